"""NumPy meanings of what the C++ kernels do, in float64 where rounding is not at stake."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ridgeline import native

Floats = NDArray[np.float32]
LEVELS = native.isa_levels()
QUANTISED = ("Q4_0", "Q4_1", "Q8_0")
STORAGES = (*QUANTISED, "F32", "F16", "BF16")


def blocks(weights: Floats, storage: str) -> NDArray[np.uint8]:
    """GGUF blocks of a float matrix, (rows, row_bytes)."""
    from gguf import GGMLQuantizationType as Type
    from gguf import quants

    if storage in ("F32", "F16"):
        return weights.astype({"F32": np.float32, "F16": np.float16}[storage]).view(np.uint8)
    return quants.quantize(weights, Type[storage]).view(np.uint8)


def dequantised(data: NDArray[np.uint8], storage: str) -> Floats:
    from gguf import GGMLQuantizationType as Type
    from gguf import quants

    return np.asarray(quants.dequantize(data, Type[storage]), dtype=np.float32)


def quantise_a8(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Codes (rows, groups, 32) and scales (rows, groups) by the rule, in float32."""
    rows, width = x.shape
    groups = -(-width // 32)
    padded = np.zeros((rows, groups * 32), np.float32)
    padded[:, :width] = x
    return quantise_groups(padded.reshape(rows, groups, 32))


def quantise_groups(grouped: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Codes (..., group) and scales (...) by the rule, in float32."""
    amax = np.abs(grouped).max(axis=-1)
    large = amax >= np.float32(2.0**-100)
    inverse = np.where(large, np.float32(127) / np.where(large, amax, np.float32(1)), np.float32(0))
    codes = np.clip(np.rint(grouped * inverse[..., None].astype(np.float32)), -127, 127)
    return codes.astype(np.int8), amax * np.float32(1 / 127)


def kv8_values(heads: Floats) -> Floats:
    """What KV8 keeps of heads, (..., head_dim)."""
    codes, scales = quantise_groups(heads)
    return codes.astype(np.float32) * scales[..., None]


def a8_values(x: Floats) -> Floats:
    """What an A8 buffer holds for x."""
    codes, scales = quantise_a8(x)
    values = codes.astype(np.float32) * scales[:, :, None]
    return values.reshape(len(x), codes.shape[1] * 32)[:, : x.shape[1]]


def bf16_bits(x: Floats) -> NDArray[np.uint16]:
    """The nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def widen(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_values(x: Floats) -> Floats:
    return widen(bf16_bits(x))


def _erf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


ACTIVATIONS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "clamped_silu": lambda x: np.minimum(x, 7) / (1 + np.exp(-1.702 * np.minimum(x, 7))),
}


def gate_factor(activation: str, up: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the activation of a gate is multiplied with."""
    return np.clip(up, -7, 7) + 1 if activation == "clamped_silu" else up


def f32_buffer(rows: int, width: int, values: Floats | None = None) -> Floats:
    """A float32 buffer whose padding columns and unused rows hold NaN, as nothing may rely on them."""
    buffer = np.full((rows, -(-width // 16) * 16), np.nan, np.float32)
    if values is not None:
        buffer[: len(values), :width] = values
    return buffer


def a8_buffer(rows: int, width: int) -> NDArray[np.uint8]:
    return native.allocate(rows * native.a8_row_bytes(width)).reshape(rows, -1)


def bf16_buffer(rows: int, width: int) -> NDArray[np.uint16]:
    """A bfloat16 buffer of NaN."""
    return np.full((rows, -(-width // 32) * 32), 0x7FFF, np.uint16)


def packed(weights: Floats, storage: str, team: native.Team) -> native.Matrix:
    data = native.pack(blocks(weights, storage), storage, weights.shape[1], team)
    return native.Matrix(data, storage, *weights.shape)


@dataclass(frozen=True)
class Part:
    """A segment of a test sequence: pages per group are chosen by `step_inputs`."""

    length: int
    first_position: int = 0
    bias: float = 0.0
    causal: bool = True


@dataclass(frozen=True)
class Rows:
    """Rows of one sequence in a test step: `count` rows from slot `start` of the last segment; of a tree, the
    row before each, counted from 0."""

    start: int
    count: int
    segments: tuple[Part, ...]
    pages: tuple[tuple[int, ...], ...]  # per segment
    parents: tuple[int, ...] = ()

    @property
    def positions(self) -> list[int]:
        positions: list[int] = []
        for parent in self.parents or range(-1, self.count - 1):
            before = self.segments[-1].first_position + self.start - 1
            positions.append(1 + (positions[parent] if parent >= 0 else before))
        return positions


def ints(values: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(values, dtype=np.int32)


def step_inputs(
    sequences: Sequence[Rows],
    tokens: Sequence[int] | None = None,
    output_rows: Sequence[int] = (),
    logits: Floats | None = None,
) -> native.StepInputs:
    rows = [s.count for s in sequences]
    segments = [p for s in sequences for p in s.segments]
    tables = [list(p) for s in sequences for p in s.pages]
    slots = [slot for s in sequences for slot in range(s.start, s.start + s.count)]
    ends = np.cumsum(rows)
    parents = [
        begin + parent if parent >= 0 else -1
        for begin, s in zip(ends - rows, sequences, strict=True)
        for parent in s.parents or range(-1, s.count - 1)
    ]
    return native.StepInputs(
        ints(tokens if tokens is not None else [0] * sum(rows)),
        ints([position for s in sequences for position in s.positions]),
        ints(slots),
        ints([i for i, n in enumerate(rows) for _ in range(n)]),
        ints([0, *ends]),
        ints(output_rows),
        ints([0, *np.cumsum([len(s.segments) for s in sequences])]),
        ints([p.length for p in segments]),
        ints([p.first_position for p in segments]),
        np.asarray([p.bias for p in segments], np.float32),
        np.asarray([p.causal for p in segments], np.uint8),
        ints([0, *np.cumsum([len(t) for t in tables])]),
        ints([p for t in tables for p in t]).reshape(1, -1),
        np.zeros((max(1, len(output_rows)), 1), np.float32) if logits is None else logits,
        ints(parents) if any(s.parents for s in sequences) else None,
    )


def plain_step(rows: int, **keywords: object) -> native.StepInputs:
    """A step whose rows only count: one sequence of that many rows."""
    pages = tuple(range(-(-rows // 16)))
    return step_inputs([Rows(0, rows, (Part(rows),), (pages,))], **keywords)  # type: ignore[arg-type]
