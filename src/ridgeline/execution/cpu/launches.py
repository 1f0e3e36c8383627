"""The launches that the C++ tape knows, each with the operations it covers and how it is bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ridgeline.execution.lowering import Launch
from ridgeline.model.program import (
    Activate,
    Attention,
    Combine,
    Embed,
    ExpertLinear,
    Norm,
    Quantise,
    Route,
    Softcap,
    StoreKV,
    Value,
    Weight,
)
from ridgeline.model.spec import Activation, RopeSpec
from ridgeline.native import Matrix, Part, Tape
from ridgeline.types import Float32Array


@dataclass(frozen=True, slots=True)
class Binding:
    """What launches are bound to: where a value, a weight, a layer's memory and a rope's tables live."""

    tape: Tape
    buffer: Callable[[Value], Any]  # float32, A8 or bfloat16 buffer; None for the step's logits
    matrix: Callable[[Weight], Matrix]
    vector: Callable[[Weight | None], Float32Array | None]
    pool: Callable[[int], Any]
    rope: Callable[[RopeSpec], tuple[Float32Array, Float32Array]]


@dataclass(frozen=True, slots=True)
class EmbedLaunch(Launch):
    """Rows of a table, written or added to what is there."""

    embed: Embed
    out: Value
    accumulate: bool

    def bind(self, to: Binding) -> None:
        source = self.embed.ids.kind
        to.tape.embed(
            to.matrix(self.embed.table), to.buffer(self.out), self.embed.scale, source, self.accumulate
        )


@dataclass(frozen=True, slots=True)
class NormLaunch(Launch):
    """Norm with what surrounds it: picking rows before, quantising or adding to the stream after."""

    norm: Norm
    x: Value
    out: Value
    gather: bool
    accumulate: bool

    def bind(self, to: Binding) -> None:
        to.tape.norm(
            to.buffer(self.x),
            to.buffer(self.out),
            self.norm.spec.kind,
            self.norm.spec.eps,
            self.norm.x.width,
            to.vector(self.norm.weight),
            to.vector(self.norm.bias),
            gather=self.gather,
            accumulate=self.accumulate,
        )


@dataclass(frozen=True, slots=True)
class QuantiseLaunch(Launch):
    """Quantise a value that also somebody else reads in float32."""

    quantise: Quantise

    def bind(self, to: Binding) -> None:
        x = self.quantise.x
        to.tape.quantise(to.buffer(x), to.buffer(self.quantise.out), x.width, experts=x.experts)


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One output of a linear launch: act(gate x) * (W x + b), or act(W x + b), set or added to `out`.

    With weights of experts, it is the whole of an expert launch.
    """

    weight: Weight
    bias: Weight | None
    out: Value
    gate: Weight | None = None
    gate_bias: Weight | None = None
    activation: Activation | None = None
    accumulate: bool = False

    def bind(self, to: Binding) -> Part:
        return Part(
            to.matrix(self.weight),
            to.buffer(self.out),
            bias=to.vector(self.bias),
            gate=to.matrix(self.gate) if self.gate else None,
            gate_bias=to.vector(self.gate_bias),
            activation=self.activation or "none",
            accumulate=self.accumulate,
        )


@dataclass(frozen=True, slots=True)
class LinearLaunch(Launch):
    """All linears that read one value."""

    x: Value
    parts: tuple[LinearPart, ...]

    def bind(self, to: Binding) -> None:
        parts = [part.bind(to) for part in self.parts]
        to.tape.linear(to.buffer(self.x), parts, outputs_only=self.x.selected)


@dataclass(frozen=True, slots=True)
class RouteLaunch(Launch):
    """The experts of each row, and the list of work that the products of this layer's experts share."""

    route: Route

    def bind(self, to: Binding) -> None:
        op = self.route
        gate = to.vector(op.shared_gate)
        to.tape.route(
            to.buffer(op.x),
            to.buffer(op.out),
            to.matrix(op.router),
            op.chosen,
            op.renormalise,
            to.vector(op.bias),
            None if gate is None else gate.reshape(-1),
        )


@dataclass(frozen=True, slots=True)
class ExpertLaunch(Launch):
    """A linear of each row's experts, or the two of a gated activation."""

    linear: ExpertLinear
    part: LinearPart

    def bind(self, to: Binding) -> None:
        op = self.linear
        to.tape.experts(
            to.buffer(op.x), to.buffer(op.routes), self.part.bind(to), x_by_expert=op.x.experts > 1
        )


@dataclass(frozen=True, slots=True)
class CombineLaunch(Launch):
    """The weighted sum of what experts gave, set, added to the stream or quantised."""

    combine: Combine
    out: Value
    accumulate: bool

    def bind(self, to: Binding) -> None:
        op = self.combine
        shared = to.buffer(op.shared) if op.shared else None
        to.tape.combine(
            to.buffer(op.x), to.buffer(op.routes), to.buffer(self.out), op.x.width, shared, self.accumulate
        )


@dataclass(frozen=True, slots=True)
class RopeStoreLaunch(Launch):
    """Head norms and rope of Q and K, then K and V into their slots.

    Q is rewritten in place, or rounded to the bfloat16 value that attention reads.
    """

    store: StoreKV
    attention: Attention
    query: Value
    key: Value
    rope: RopeSpec | None
    query_norm: Norm | None
    key_norm: Norm | None

    def bind(self, to: Binding) -> None:
        cos, sin = to.rope(self.rope) if self.rope else (None, None)
        norm = self.query_norm or self.key_norm
        rounded = self.attention.query if self.attention.query.kind == "bf16" else None
        to.tape.rope_store(
            to.buffer(self.query),
            to.buffer(self.key),
            to.buffer(self.store.value),
            to.pool(self.store.layer),
            self.store.group,
            self.attention.heads,
            self.attention.kv_heads,
            self.attention.head_dim,
            cos,
            sin,
            self.rope.dim if self.rope else 0,
            _gains(self.query_norm, to),
            _gains(self.key_norm, to),
            norm.spec.eps if norm else 0.0,
            norm.spec.kind if norm else "rms",
            norm is not None and norm.by_head,
            rounded_q=to.buffer(rounded) if rounded else None,
        )


def _gains(norm: Norm | None, to: Binding) -> Float32Array | None:
    """One head's gains after the other's."""
    gains = to.vector(norm.weight) if norm else None
    return None if gains is None else gains.reshape(-1)


@dataclass(frozen=True, slots=True)
class AttentionLaunch(Launch):
    """Attention over a layer's pages, its result quantised where only a `Quantise` reads it."""

    attention: Attention
    out: Value

    def bind(self, to: Binding) -> None:
        op = self.attention
        to.tape.attention(
            to.buffer(op.query),
            to.buffer(self.out),
            to.pool(op.layer),
            op.group,
            op.heads,
            op.kv_heads,
            op.head_dim,
            op.scale,
            op.window or 0,
            op.softcap or 0.0,
            to.vector(op.sinks),
        )


@dataclass(frozen=True, slots=True)
class ActivateLaunch(Launch):
    """An activation that could not join the linear before it."""

    activate: Activate
    out: Value

    def bind(self, to: Binding) -> None:
        op = self.activate
        times = to.buffer(op.times) if op.times else None
        to.tape.activate(to.buffer(op.x), to.buffer(self.out), op.x.width, op.activation, times, op.x.experts)


@dataclass(frozen=True, slots=True)
class AddLaunch(Launch):
    """An addition to the stream that could not join the launch before it."""

    x: Value
    out: Value

    def bind(self, to: Binding) -> None:
        to.tape.add(to.buffer(self.x), to.buffer(self.out), self.x.width)


@dataclass(frozen=True, slots=True)
class SoftcapLaunch(Launch):
    """The cap on the step's logits."""

    softcap: Softcap

    def bind(self, to: Binding) -> None:
        to.tape.softcap(self.softcap.x.width, self.softcap.cap)


@dataclass(frozen=True, slots=True)
class SampleLaunch(Launch):
    """Drawing tokens, which is NumPy's work: the executor does it when the tape has run."""

    def bind(self, to: Binding) -> None:
        """Nothing of it is on the tape."""


CpuLaunch = (
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
    | AddLaunch
    | SoftcapLaunch
    | SampleLaunch
)
