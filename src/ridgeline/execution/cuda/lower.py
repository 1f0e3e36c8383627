"""Fusion for a GPU: from a canonical program to launches of kernels.

The rules, each local and guarded by "nobody else reads it":
- all linears of one value are one product with their weights stacked, its outputs side by side; so are those
  of one expert;
- an addition to the residual stream joins the norm that reads the sum, and the norm before it, if any;
- a `Quantise` joins the norm, activation or store that produces its input; attention's, where it only rounds;
- picking output rows joins the final norm;
- head norms and ropes of Q and K join the store of K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ridgeline.execution.cuda.launches import (
    ActivateLaunch,
    AttentionLaunch,
    CombineLaunch,
    CudaLaunch,
    EmbedLaunch,
    ExpertLaunch,
    LinearLaunch,
    NormLaunch,
    QuantiseLaunch,
    RopeStoreLaunch,
    RouteLaunch,
    SampleLaunch,
    SoftcapLaunch,
)
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


def lower(program: Program) -> tuple[CudaLaunch, ...]:
    """The program's launches in order; checked to cover it exactly."""
    return _Lowering(program).lower()


class _Lowering(Fusion[CudaLaunch]):
    executor = "CUDA"

    def embed(self, op: Embed) -> CudaLaunch:
        add = self.only_user(op.out)
        if isinstance(add, Add) and self.may_overwrite(add.x, add):
            return EmbedLaunch((op, add), ((add.out, add.x),), op, add.out, accumulate=True)
        return EmbedLaunch((op,), (), op, op.out, accumulate=False)

    # -- the residual stream and its norms

    def norm(self, op: Norm) -> CudaLaunch:
        add = self.only_user(op.out)
        if isinstance(add, Add) and (stream := self._stream(add, op.out)):
            return self._onto(stream, add, op.x, before=op)
        quantise, out = self.then_quantise(op.out)
        return NormLaunch((op, *quantise), (), x=op.x, norm=op, out=out)

    def add(self, op: Add) -> CudaLaunch:
        for value in (op.y, op.x):
            if stream := self._stream(op, value):
                return self._onto(stream, op, value)
        raise ValueError(f"{op.out.name}: the CUDA executor adds only onto a value that nobody reads later")

    def select(self, op: Select) -> CudaLaunch:
        norm = self.only_user(op.out)
        if not isinstance(norm, Norm):
            raise ValueError(f"{op.out.name}: the CUDA executor picks output rows only before a norm")
        quantise, out = self.then_quantise(norm.out)
        return NormLaunch((op, norm, *quantise), (), x=op.x, norm=norm, out=out, gather=True)

    def _stream(self, add: Add, value: Value) -> Value | None:
        """The other side of an addition, if `value` may be added onto it in place."""
        stream = add.y if add.x.name == value.name else add.x
        return stream if stream.name != value.name and self.may_overwrite(stream, add) else None

    def _onto(self, stream: Value, add: Add, x: Value, before: Norm | None = None) -> CudaLaunch:
        """Add x, or a norm of it, to the stream, and take along a norm that reads the sum."""
        covers = (before, add) if before else (add,)
        overwrites = ((add.out, stream),)
        users = self.users.get(add.out.name, [])
        norm = next((u for u in users if isinstance(u, Norm) and u.head_dim is None), None)
        if norm is None:
            return NormLaunch(covers, overwrites, x=x, before=before, residual=add.out)
        quantise, out = self.then_quantise(norm.out)
        return NormLaunch(
            (*covers, norm, *quantise), overwrites, x=x, before=before, residual=add.out, norm=norm, out=out
        )

    # -- products, memory, attention

    def linear(self, op: Linear) -> CudaLaunch:
        siblings = tuple(
            u for u in self.users[op.x.name] if isinstance(u, Linear) and u.out.kind == op.out.kind
        )
        return LinearLaunch(siblings, (), op.x, siblings)

    def route(self, op: Route) -> CudaLaunch:
        return RouteLaunch((op,), (), op)

    def expert_linear(self, op: ExpertLinear) -> CudaLaunch:
        siblings = tuple(
            u
            for u in self.users[op.x.name]
            if isinstance(u, ExpertLinear) and u.routes == op.routes and u.count == op.count
        )
        return ExpertLaunch(siblings, (), op.x, siblings)

    def combine(self, op: Combine) -> CudaLaunch:
        return CombineLaunch((op,), (), op)

    def store(self, op: StoreKV) -> CudaLaunch:
        attention = self.attention_of(op)
        rounding = self.producer[attention.query.name]
        quantise = rounding if isinstance(rounding, Quantise) else None
        turned = quantise.x if quantise else attention.query
        query, query_norm, query_rope = self.head_chain(turned)
        key, key_norm, key_rope = self.head_chain(op.key)
        chain = [c for c in (query_norm, query_rope, quantise, key_norm, key_rope) if c is not None]
        in_place = quantise is None and turned.name != query.name
        return RopeStoreLaunch(
            (*chain, op),
            ((turned, query),) if in_place else (),
            store=op,
            attention=attention,
            query=query,
            key=key,
            rope=self.shared_rope(query_rope, key_rope, op),
            query_norm=query_norm,
            key_norm=key_norm,
        )

    def attention(self, op: Attention) -> CudaLaunch:
        quantise, out = self.then_quantise(op.out, "bf16")
        return AttentionLaunch((op, *quantise), (), op, out)

    # -- what stands alone

    def quantise(self, op: Quantise) -> CudaLaunch:
        return QuantiseLaunch((op,), (), op)

    def activate(self, op: Activate) -> CudaLaunch:
        quantise, out = self.then_quantise(op.out)
        return ActivateLaunch((op, *quantise), (), op, out)

    def softcap(self, op: Softcap) -> CudaLaunch:
        return SoftcapLaunch((op,), ((op.out, op.x),), op)

    def sample(self, op: Sample) -> CudaLaunch:
        return SampleLaunch((op,), (), op)

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
