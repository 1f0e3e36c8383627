"""Fusion for the CPU: from a canonical program to the tape's launches.

The rules, each local and guarded by "nobody else reads it":
- all linears of one value are one launch; gate, up and activation are one of its parts;
- gate, up and activation of experts are one launch, and their sum takes along the `Add` to the stream;
- a `Quantise`, or an `Add` to the residual stream, joins the operation that produces its input;
- picking output rows joins the final norm;
- head norms, ropes and the rounding of Q, and those of K, join the store of K and V.

Then launches whose results are only wanted of rows with outputs are told so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from ridgeline.execution.cpu.launches import (
    ActivateLaunch,
    AddLaunch,
    AttentionLaunch,
    CombineLaunch,
    CpuLaunch,
    EmbedLaunch,
    ExpertLaunch,
    LinearLaunch,
    LinearPart,
    NormLaunch,
    QuantiseLaunch,
    RopeStoreLaunch,
    RouteLaunch,
    SampleLaunch,
    SoftcapLaunch,
)
from ridgeline.execution.cpu.outputs import for_outputs
from ridgeline.execution.fusion import Fusion
from ridgeline.execution.lowering import Launch
from ridgeline.model.program import (
    Activate,
    Add,
    Attention,
    Combine,
    Embed,
    ExpertLinear,
    Linear,
    Norm,
    Operation,
    Program,
    Quantise,
    Route,
    Sample,
    Select,
    Softcap,
    StoreKV,
    Value,
)

A8_HEAD_MULTIPLE = 32  # attention writes its heads one by one, so a group of A8 must not span two


def lower(program: Program, every_row: bool = False) -> tuple[CpuLaunch, ...]:
    """The program's launches in order; checked to cover it exactly. With `every_row`, none is only for rows
    with outputs but those that the program itself has behind its selection."""
    launches = _Lowering(program).lower()
    return launches if every_row else for_outputs(program, launches)


class _Lowering(Fusion[CpuLaunch]):
    executor = "CPU"

    def then_add(self, value: Value) -> tuple[Add, Value] | None:
        """The `Add` that alone reads `value`, with its other side, if that is a stream it may overwrite."""
        user = self.only_user(value)
        if not isinstance(user, Add):
            return None
        stream = user.y if user.x is value or user.x.name == value.name else user.x
        return (user, stream) if stream.name != value.name and self.may_overwrite(stream, user) else None

    # -- rules, one for each operation that may come first in a launch

    def embed(self, op: Embed) -> CpuLaunch:
        if added := self.then_add(op.out):
            add, stream = added
            return EmbedLaunch((op, add), ((add.out, stream),), op, add.out, accumulate=True)
        return EmbedLaunch((op,), (), op, op.out, accumulate=False)

    def select(self, op: Select) -> CpuLaunch:
        norm = self.only_user(op.out)
        if not isinstance(norm, Norm):
            raise ValueError(f"{op.out.name}: the CPU executor picks output rows only before a norm")
        quantise, out = self.then_quantise(norm.out)
        return NormLaunch((op, norm, *quantise), (), norm, op.x, out, gather=True, accumulate=False)

    def norm(self, op: Norm) -> CpuLaunch:
        if added := self.then_add(op.out):
            add, stream = added
            return NormLaunch(
                (op, add), ((add.out, stream),), op, op.x, add.out, gather=False, accumulate=True
            )
        quantise, out = self.then_quantise(op.out)
        return NormLaunch((op, *quantise), (), op, op.x, out, gather=False, accumulate=False)

    def quantise(self, op: Quantise) -> CpuLaunch:
        return QuantiseLaunch((op,), (), op)

    def linear(self, op: Linear) -> CpuLaunch:
        covers: list[Operation] = []
        parts: list[LinearPart] = []
        overwrites: list[tuple[Value, Value]] = []
        siblings = [u for u in self.users[op.x.name] if isinstance(u, Linear)]
        for sibling in siblings:
            if any(sibling is c for c in covers):
                continue
            part, operations, overwritten = self._part(sibling, siblings)
            parts.append(part)
            covers += operations
            overwrites += overwritten
        return LinearLaunch(tuple(covers), tuple(overwrites), op.x, tuple(parts))

    def _part(
        self, op: Linear | ExpertLinear, siblings: Sequence[Linear | ExpertLinear]
    ) -> tuple[LinearPart, list[Operation], list[tuple[Value, Value]]]:
        user = self.only_user(op.out)
        if isinstance(user, Activate):
            pair = self._gate_and_up(user, siblings)
            quantise, out = self.then_quantise(user.out)
            if pair is not None:
                gate, up = pair
                part = LinearPart(up.weight, up.bias, out, gate.weight, gate.bias, user.activation)
                return part, [gate, up, user, *quantise], []
            if user.times is None:
                part = LinearPart(op.weight, op.bias, out, activation=user.activation)
                return part, [op, user, *quantise], []
        if added := self.then_add(op.out):
            add, stream = added
            return LinearPart(op.weight, op.bias, add.out, accumulate=True), [op, add], [(add.out, stream)]
        return LinearPart(op.weight, op.bias, op.out), [op], []

    def _gate_and_up(
        self, op: Activate, siblings: Sequence[Linear | ExpertLinear]
    ) -> tuple[Linear | ExpertLinear, Linear | ExpertLinear] | None:
        """The two linears of a gated activation, if both are siblings that nobody else reads."""
        if op.times is None:
            return None
        pair = [self.producer[value.name] for value in (op.x, op.times)]
        if any(not any(p is s for s in siblings) or self.only_user(p.out) is not op for p in pair):
            return None
        gate, up = pair
        assert isinstance(gate, Linear | ExpertLinear)
        assert isinstance(up, Linear | ExpertLinear)
        return gate, up

    def route(self, op: Route) -> CpuLaunch:
        return RouteLaunch((op,), (), op)

    def expert_linear(self, op: ExpertLinear) -> CpuLaunch:
        siblings = [
            u
            for u in self.users[op.x.name]
            if isinstance(u, ExpertLinear) and u.x.name == op.x.name and u.routes.name == op.routes.name
        ]
        part, covers, overwrites = self._part(op, siblings)
        return ExpertLaunch(tuple(covers), tuple(overwrites), op, part)

    def combine(self, op: Combine) -> CpuLaunch:
        if added := self.then_add(op.out):
            add, stream = added
            return CombineLaunch((op, add), ((add.out, stream),), op, add.out, accumulate=True)
        quantise, out = self.then_quantise(op.out)
        return CombineLaunch((op, *quantise), (), op, out, accumulate=False)

    def store(self, op: StoreKV) -> CpuLaunch:
        attention = self.attention_of(op)
        rounding = self.producer[attention.query.name]
        quantise = rounding if isinstance(rounding, Quantise) else None
        turned = quantise.x if quantise else attention.query
        query, query_norm, query_rope = self.head_chain(turned)
        key, key_norm, key_rope = self.head_chain(op.key)
        chain = [c for c in (query_norm, query_rope, quantise, key_norm, key_rope) if c is not None]
        rope = self.shared_rope(query_rope, key_rope, op)
        in_place = quantise is None and turned.name != query.name
        overwrites = ((turned, query),) if in_place else ()
        covers = (*chain, op)
        return RopeStoreLaunch(covers, overwrites, op, attention, query, key, rope, query_norm, key_norm)

    def attention(self, op: Attention) -> CpuLaunch:
        kinds = ("bf16",) if op.head_dim % A8_HEAD_MULTIPLE else ()
        quantise, out = self.then_quantise(op.out, *kinds)
        return AttentionLaunch((op, *quantise), (), op, out)

    def activate(self, op: Activate) -> CpuLaunch:
        quantise, out = self.then_quantise(op.out)
        return ActivateLaunch((op, *quantise), (), op, out)

    def add(self, op: Add) -> CpuLaunch:
        for value, stream in ((op.y, op.x), (op.x, op.y)):
            if all(u is op or id(u) in self.done for u in self.users[stream.name]):
                return AddLaunch((op,), ((op.out, stream),), value, op.out)
        raise ValueError(f"{op.out.name}: the CPU executor adds only onto a value that nobody reads later")

    def softcap(self, op: Softcap) -> CpuLaunch:
        return SoftcapLaunch((op,), ((op.out, op.x),), op)

    def sample(self, op: Sample) -> CpuLaunch:
        return SampleLaunch((op,), ())

    rules: ClassVar[Mapping[type[Operation], Callable[[Any, Any], Launch]]] = {
        Embed: embed,
        Select: select,
        Norm: norm,
        Quantise: quantise,
        Linear: linear,
        Route: route,
        ExpertLinear: expert_linear,
        Combine: combine,
        StoreKV: store,
        Attention: attention,
        Activate: activate,
        Add: add,
        Softcap: softcap,
        Sample: sample,
    }
