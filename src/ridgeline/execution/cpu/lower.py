"""Fusion for the CPU: from a canonical program to the tape's launches.

The rules, each local and guarded by "nobody else reads it":
- all linears of one value are one launch; gate, up and activation are one of its parts;
- a `Quantise`, or an `Add` to the residual stream, joins the operation that produces its input;
- picking output rows joins the final norm;
- head norms and ropes of Q and K join the store of K and V.
"""

from __future__ import annotations

from collections.abc import Callable

from ridgeline.execution.cpu.launches import (
    ActivateLaunch,
    AddLaunch,
    AttentionLaunch,
    CpuLaunch,
    EmbedLaunch,
    LinearLaunch,
    LinearPart,
    NormLaunch,
    QuantiseLaunch,
    RopeStoreLaunch,
    SampleLaunch,
    SoftcapLaunch,
)
from ridgeline.execution.lowering import check_lowering
from ridgeline.model.program import (
    Activate,
    Add,
    Attention,
    Embed,
    Linear,
    Norm,
    Operation,
    Program,
    Quantise,
    Rope,
    Sample,
    Select,
    Softcap,
    StoreKV,
    Value,
)
from ridgeline.model.spec import RopeSpec

A8_HEAD_MULTIPLE = 32  # attention quantises its heads one by one, so a group must not span two


def lower(program: Program) -> tuple[CpuLaunch, ...]:
    """The program's launches in order; checked to cover it exactly."""
    launches = tuple(_Lowering(program).launches())
    check_lowering(program, launches)
    return launches


class _Lowering:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.producer = {op.out.name: op for op in program.operations}
        self.users: dict[str, list[Operation]] = {}
        for op in program.operations:
            for value in op.inputs:
                self.users.setdefault(value.name, []).append(op)
        self.done: set[int] = set()

    def launches(self) -> list[CpuLaunch]:
        made: list[CpuLaunch] = []
        for op in self.program.operations:
            if id(op) in self.done or self._joins_store(op):
                continue
            launch = _RULES[type(op)](self, op)
            self.done.update(id(covered) for covered in launch.covers)
            made.append(launch)
        return made

    # -- who reads a value

    def only_user(self, value: Value) -> Operation | None:
        users = self.users.get(value.name, [])
        return users[0] if len(users) == 1 and not self.program.leaves(value) else None

    def then_quantise(self, value: Value) -> tuple[tuple[Operation, ...], Value]:
        """The `Quantise` that alone reads `value`, if there is one, and the value that then leaves."""
        user = self.only_user(value)
        return ((user,), user.out) if isinstance(user, Quantise) else ((), value)

    def then_add(self, value: Value) -> tuple[Add, Value] | None:
        """The `Add` that alone reads `value`, with its other side, if that is a stream it may overwrite."""
        user = self.only_user(value)
        if not isinstance(user, Add):
            return None
        stream = user.y if user.x is value or user.x.name == value.name else user.x
        made = self.producer.get(stream.name)
        ready = made is not None and id(made) in self.done
        rest = [u for u in self.users[stream.name] if u is not user and id(u) not in self.done]
        return (user, stream) if ready and not rest and stream.name != value.name else None

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
        self, op: Linear, siblings: list[Linear]
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

    def _gate_and_up(self, op: Activate, siblings: list[Linear]) -> tuple[Linear, Linear] | None:
        """The two linears of a gated activation, if both are siblings that nobody else reads."""
        if op.times is None:
            return None
        pair = [self.producer[value.name] for value in (op.x, op.times)]
        if any(not any(p is s for s in siblings) or self.only_user(p.out) is not op for p in pair):
            return None
        gate, up = pair
        assert isinstance(gate, Linear)
        assert isinstance(up, Linear)
        return gate, up

    def store(self, op: StoreKV) -> CpuLaunch:
        attention = self.only_user(op.out)
        if not isinstance(attention, Attention):
            raise ValueError(f"{op.out.name}: the CPU executor stores keys and values for one attention")
        query, query_norm, query_rope = self._head_chain(attention.query)
        key, key_norm, key_rope = self._head_chain(op.key)
        chain = [c for c in (query_norm, query_rope, key_norm, key_rope) if c is not None]
        rope = self._shared(query_rope, key_rope, op)
        overwrites = () if attention.query.name == query.name else ((attention.query, query),)
        covers = (*chain, op)
        return RopeStoreLaunch(covers, overwrites, op, attention, query, key, rope, query_norm, key_norm)

    def _shared(self, query: Rope | None, key: Rope | None, op: StoreKV) -> RopeSpec | None:
        specs = {r.spec if r else None for r in (query, key)}
        if len(specs) > 1:
            raise ValueError(f"{op.out.name}: the CPU executor turns queries and keys by one rope")
        return specs.pop()

    def _head_chain(self, value: Value) -> tuple[Value, Norm | None, Rope | None]:
        """What lies between a projection and its use: an optional head norm, then an optional rope."""
        rope = norm = None
        op = self.producer[value.name]
        if isinstance(op, Rope):
            rope, value = op, op.x
            op = self.producer[value.name]
        if isinstance(op, Norm) and op.head_dim is not None:
            norm, value = op, op.x
        return value, norm, rope

    def _joins_store(self, op: Operation) -> bool:
        return isinstance(op, Rope) or (isinstance(op, Norm) and op.head_dim is not None)

    def attention(self, op: Attention) -> CpuLaunch:
        quantise, out = self.then_quantise(op.out) if op.head_dim % A8_HEAD_MULTIPLE == 0 else ((), op.out)
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


_RULES: dict[type[Operation], Callable[..., CpuLaunch]] = {
    Embed: _Lowering.embed,
    Select: _Lowering.select,
    Norm: _Lowering.norm,
    Quantise: _Lowering.quantise,
    Linear: _Lowering.linear,
    StoreKV: _Lowering.store,
    Attention: _Lowering.attention,
    Activate: _Lowering.activate,
    Add: _Lowering.add,
    Softcap: _Lowering.softcap,
    Sample: _Lowering.sample,
}
