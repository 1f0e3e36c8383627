"""The launches of a lowered program, each with the operations it covers and the kernel that it starts.

`bind` gives a function of a step's size: it slices the buffers to the rows of the step and starts the
kernel. It is called in every step, or once for a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from torch import Tensor

from ridgeline.execution.cuda.arrays import NormWeights
from ridgeline.execution.cuda.binding import DeviceBinding
from ridgeline.execution.cuda.inputs import StepSize
from ridgeline.execution.cuda.kernels.activate import activate, softcap
from ridgeline.execution.cuda.kernels.attention import attention
from ridgeline.execution.cuda.kernels.combine import combine
from ridgeline.execution.cuda.kernels.draw import draw
from ridgeline.execution.cuda.kernels.embed import embed
from ridgeline.execution.cuda.kernels.experts import expert_linear
from ridgeline.execution.cuda.kernels.linear import linear
from ridgeline.execution.cuda.kernels.norm import residual_norm
from ridgeline.execution.cuda.kernels.quantise import quantise
from ridgeline.execution.cuda.kernels.rope import Heads, Rope, rope_store
from ridgeline.execution.cuda.kernels.route import route
from ridgeline.execution.lowering import Launch
from ridgeline.model.program import (
    Activate,
    Attention,
    Combine,
    Embed,
    ExpertLinear,
    Linear,
    Norm,
    Quantise,
    Route,
    Sample,
    Softcap,
    StoreKV,
    Value,
)
from ridgeline.model.spec import RopeSpec

Run = Callable[[StepSize], None]


@dataclass(frozen=True, slots=True)
class EmbedLaunch(Launch):
    """Rows of a table, written or added to what is there."""

    embed: Embed
    out: Value
    accumulate: bool

    def bind(self, to: DeviceBinding) -> Run:
        inputs = to.inputs
        ids = inputs.tokens if self.embed.ids.kind == "tokens" else inputs.positions
        table, sixteen = to.weights.table(self.embed.table)

        def run(size: StepSize) -> None:
            embed(
                ids[: size.rows],
                inputs.drawn,
                table,
                to.tensor(self.out, size),
                scale=self.embed.scale,
                sixteen=sixteen,
                accumulate=self.accumulate,
            )

        return run


@dataclass(frozen=True, slots=True)
class NormLaunch(Launch):
    """A norm with what surrounds it: picking rows, a norm before and an addition to the stream in front,
    rounding behind. Without `norm`, only the addition."""

    x: Value
    before: Norm | None = None
    residual: Value | None = None
    norm: Norm | None = None
    out: Value | None = None
    gather: bool = False

    def bind(self, to: DeviceBinding) -> Run:
        norm, before = (_norm_weights(op, to) for op in (self.norm, self.before))
        output_rows = to.inputs.output_rows

        def run(size: StepSize) -> None:
            residual_norm(
                to.tensor(self.x, size),
                to.value(self.out, size) if self.out else None,
                norm,
                before=before,
                residual=to.tensor(self.residual, size) if self.residual else None,
                rows=output_rows[: size.outputs] if self.gather else None,
            )

        return run


def _norm_weights(op: Norm | None, to: DeviceBinding) -> NormWeights | None:
    if op is None:
        return None
    bias = to.weights.vector(op.bias) if op.bias else None
    return NormWeights(op.spec.kind, op.spec.eps, to.weights.vector(op.weight), bias)


@dataclass(frozen=True, slots=True)
class QuantiseLaunch(Launch):
    """Round a value that also somebody else reads in float32."""

    quantise: Quantise

    def bind(self, to: DeviceBinding) -> Run:
        op = self.quantise
        return lambda size: quantise(to.tensor(op.x, size), to.value(op.out, size))


@dataclass(frozen=True, slots=True)
class LinearLaunch(Launch):
    """All linears that read one value: one product for each run of weights of one storage."""

    side_by_side: ClassVar[bool] = True

    x: Value
    linears: tuple[Linear, ...]

    def bind(self, to: DeviceBinding) -> Run:
        products = []
        for _, run_of in groupby(self.linears, key=lambda op: to.weights.bits(op.weight)):
            stacked = tuple(run_of)
            matrix = to.weights.stacked([op.weight for op in stacked])
            products.append((stacked[0].out, matrix, to.weights.stacked_biases(stacked)))

        def run(size: StepSize) -> None:
            x = to.value(self.x, size)
            for first, matrix, bias in products:
                linear(x, matrix, _widened(to.tensor(first, size), matrix.rows), bias)

        return run


@dataclass(frozen=True, slots=True)
class RouteLaunch(Launch):
    """Which experts each row goes to, and the list of their work."""

    route: Route

    def bind(self, to: DeviceBinding) -> Run:
        op, router, row_count = self.route, to.weights.router(self.route), to.inputs.row_count
        bias = to.weights.vector(op.bias) if op.bias else None

        def run(size: StepSize) -> None:
            x, routes = to.tensor(op.x, size), to.routes(op.out, size)
            route(x, router, bias, row_count, routes, renormalise=op.renormalise)

        return run


@dataclass(frozen=True, slots=True)
class ExpertLaunch(Launch):
    """All linears that the experts apply to one value: one product for each run of weights of one storage and
    width."""

    side_by_side: ClassVar[bool] = True

    x: Value
    linears: tuple[ExpertLinear, ...]

    def bind(self, to: DeviceBinding) -> Run:
        products = []
        alike = groupby(self.linears, key=lambda op: (to.weights.bits(op.weight), op.weight.shape))
        for _, run_of in alike:
            stacked = tuple(run_of)
            products.append((stacked[0].out, to.weights.experts(stacked), to.weights.stacked_biases(stacked)))

        def run(size: StepSize) -> None:
            x, routes = to.value(self.x, size), to.routes(self.linears[0].routes, size)
            for first, experts, bias in products:
                expert_linear(x, routes, experts, _widened(to.tensor(first, size), experts.outputs), bias)

        return run


@dataclass(frozen=True, slots=True)
class CombineLaunch(Launch):
    """The weighed sum of what a row's experts gave."""

    combine: Combine

    def bind(self, to: DeviceBinding) -> Run:
        op = self.combine

        def run(size: StepSize) -> None:
            shared = to.tensor(op.shared, size) if op.shared else None
            combine(to.tensor(op.x, size), to.routes(op.routes, size), to.tensor(op.out, size), shared)

        return run


def _widened(first: Tensor, width: int) -> Tensor:
    """The columns of a buffer from its first value on."""
    if first.shape[1] == width:
        return first
    return first.as_strided((first.shape[0], width), first.stride(), first.storage_offset())


@dataclass(frozen=True, slots=True)
class RopeStoreLaunch(Launch):
    """Head norms and rope of Q and K, K and V into their slots, and Q as attention wants it."""

    store: StoreKV
    attention: Attention
    query: Value
    key: Value
    rope: RopeSpec | None
    query_norm: Norm | None
    key_norm: Norm | None

    def bind(self, to: DeviceBinding) -> Run:
        op = self.attention
        heads = Heads(op.heads, op.kv_heads, op.head_dim)
        query_norm, key_norm = (_norm_weights(norm, to) for norm in (self.query_norm, self.key_norm))
        tables = to.rope(self.rope) if self.rope else None
        slots = to.inputs.slots[self.store.group]
        pool, scales = to.pool(self.store.layer)
        turned = op.query.name != self.query.name

        def run(size: StepSize) -> None:
            rope_store(
                to.tensor(self.query, size) if turned else None,
                to.tensor(self.key, size),
                to.tensor(self.store.value, size),
                to.tensor(op.query, size) if turned else None,
                pool,
                slots[: size.rows],
                heads,
                rope=Rope(tables.cos[: size.rows], tables.sin[: size.rows]) if tables else None,
                query_norm=query_norm,
                key_norm=key_norm,
                pool_scales=scales,
            )

        return run


@dataclass(frozen=True, slots=True)
class AttentionLaunch(Launch):
    """Attention over a layer's pages, its result rounded where only a rounding reads it."""

    attention: Attention
    out: Value

    def bind(self, to: DeviceBinding) -> Run:
        op = self.attention
        pool, scales = to.pool(op.layer)
        sinks = to.weights.vector(op.sinks) if op.sinks else None

        def run(size: StepSize) -> None:
            block_m, programs, partials = to.attention_grid(op, size)
            attention(
                to.tensor(op.query, size),
                to.tensor(self.out, size),
                pool,
                to.inputs.positions[: size.rows],
                to.inputs.work(op.group, size.paths),
                partials,
                scale=op.scale,
                window=op.window,
                block_m=block_m,
                programs=programs,
                softcap=op.softcap,
                sinks=sinks,
                pool_scales=scales,
            )

        return run


@dataclass(frozen=True, slots=True)
class ActivateLaunch(Launch):
    """An activation, times the gated half where there is one."""

    activate: Activate
    out: Value

    def bind(self, to: DeviceBinding) -> Run:
        op = self.activate

        def run(size: StepSize) -> None:
            times = to.tensor(op.times, size) if op.times else None
            activate(to.tensor(op.x, size), to.value(self.out, size), op.activation, times)

        return run


@dataclass(frozen=True, slots=True)
class SoftcapLaunch(Launch):
    """The cap on the step's logits, in place."""

    softcap: Softcap

    def bind(self, to: DeviceBinding) -> Run:
        op = self.softcap
        return lambda size: softcap(to.tensor(op.x, size), op.cap)


@dataclass(frozen=True, slots=True)
class SampleLaunch(Launch):
    """A token for each output for which the step says how."""

    sample: Sample

    def bind(self, to: DeviceBinding) -> Run:
        op, inputs = self.sample, to.inputs

        def run(size: StepSize) -> None:
            outputs = size.outputs
            draw(to.tensor(op.logits, size), inputs.draws[:outputs], inputs.drawn[:outputs])

        return run


CudaLaunch = (
    EmbedLaunch
    | NormLaunch
    | QuantiseLaunch
    | LinearLaunch
    | RouteLaunch
    | ExpertLaunch
    | CombineLaunch
    | RopeStoreLaunch
    | AttentionLaunch
    | ActivateLaunch
    | SoftcapLaunch
    | SampleLaunch
)
