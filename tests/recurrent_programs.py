"""Programs with recurrent layers that no family has: made by putting them behind the layers of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from ridgeline.model.build import decoder, encoder
from ridgeline.model.program import (
    Add,
    GatedRecurrence,
    Linear,
    Operation,
    Program,
    StateGroup,
    Value,
    Weight,
)
from ridgeline.model.spec import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec, NormSpec, RopeSpec
from ridgeline.types import Float32Array

VOCABULARY, HIDDEN = 61, 24
WIDTHS = (16, 40)


def hybrid_spec(windows: Sequence[int | None] = (None, 24)) -> ModelSpec:
    """A layer of attention for each window."""
    rope = RopeSpec(tuple(10000.0 ** (-index / 4) for index in range(4)))
    layers = tuple(
        LayerSpec(AttentionSpec(4, 2, 8, 8**-0.5, rope, window), FeedForwardSpec(32, "silu", gated=True))
        for window in windows
    )
    return ModelSpec("hybrid", HIDDEN, VOCABULARY, 256, NormSpec("rms", 1e-5), layers, tied_head=False)


def hybrid(spec: ModelSpec) -> tuple[Program, Program]:
    """Decoder and encoder with a recurrent layer of its own width behind each layer."""
    return with_recurrence(decoder(spec)), with_recurrence(encoder(spec))


def with_recurrence(program: Program) -> Program:
    operations: list[Operation] = []
    renamed: dict[str, Value] = {}
    states: list[StateGroup] = []
    for op in program.operations:
        read = {f.name: getattr(op, f.name) for f in fields(op) if f.name != "out"}
        new = {
            name: renamed[v.name] for name, v in read.items() if isinstance(v, Value) and v.name in renamed
        }
        operations.append(replace(op, **new))
        if op.out.name.endswith("feed_forward_sum"):
            layer = len(states)
            width = WIDTHS[layer % len(WIDTHS)]
            operations += recurrent_layer(op.out, layer, width)
            renamed[op.out.name] = operations[-1].out
            states.append(StateGroup((layer,), width))
    return replace(program, operations=tuple(operations), states=tuple(states))


def recurrent_layer(stream: Value, layer: int, width: int) -> list[Operation]:
    """stream + W h, where h remembers a linear of the stream by a gate that is another."""

    def linear(x: Value, name: str, width: int) -> Linear:
        name = f"recurrent.{layer}.{name}"
        return Linear(Value(name, "f32", width), x, Weight(name, (width, x.width)))

    x, gate = linear(stream, "x", width), linear(stream, "gate", width)
    state = GatedRecurrence(Value(f"recurrent.{layer}.state", "f32", width), x.out, gate.out, layer, layer)
    back = linear(state.out, "out", stream.width)
    return [x, gate, state, back, Add(replace(stream, name=f"recurrent.{layer}.sum"), stream, back.out)]


class RandomWeights:
    """What an executor loads of `model.weights.Weights`, for a program's own names and shapes."""

    formats: dict[str, Any] = {}  # noqa: RUF012 - all are float32

    def __init__(self, *programs: Program) -> None:
        rng = np.random.default_rng(5)
        self._values: dict[str, Float32Array] = {}
        for weight in (weight for program in programs for weight in program.weights()):
            spread, middle = (1.5 / weight.shape[-1] ** 0.5, 0) if len(weight.shape) == 2 else (0.2, 1)
            values = rng.standard_normal(weight.shape) * spread + middle
            self._values.setdefault(weight.name, values.astype(np.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def vector(self, name: str) -> Float32Array:
        return self._values[name]
