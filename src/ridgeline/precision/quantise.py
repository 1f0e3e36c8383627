"""The one definition of how we quantise: activations in every step, weights when a model is loaded.

**Activations, A8-g32.** Along a row, in groups of `GROUP` = 32 values, the last group filled up with zeros.
With every operation in float32, rounded to nearest even after each:

    amax  = max |x| of the group
    scale = amax * float32(1/127)
    inv   = 127 / amax      if amax >= TINY = 2**-100, else 0
    code  = rint(x * inv)   half to even, then clipped to -127..127

A group below `TINY` becomes zeros, because 127/amax would leave the range of float32 further down. Kernels
reproduce codes and scales bit for bit; a denormal scale may be flushed to zero, since its codes are zero.
The rule says nothing about groups that hold an infinity or NaN.

**Activations, A16.** The nearest bfloat16, ties to even.

**Keys and values, KV8.** The rule of A8-g32 with what one token's KV head holds as the group: a scale for its
key, after norm and rope, and one for its value. KV16 is the nearest bfloat16.

**Weights of 8 bits**, stored as Q8_0: d = float16(amax / 127), code = rint(w / d), clipped to -127..127.

**Weights of 4 bits**, stored as Q4_1: m = float16(min), rounded down, d = float16((max - m) / 15),
code = rint((w - m) / d), clipped to 0..15.

In both, d is the next larger float16 where rounding it down would clip a code, codes are computed with the
rounded m and d, and all codes are 0 where d is 0. So no weight is off by more than d/2. Weights of 16 bits
are the nearest bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ridgeline.precision.formats import Format, encoded_storage
from ridgeline.precision.storage import (
    STORAGES,
    Storage,
    Tensor,
    check_finite,
    float32_tensor,
    row_blocks,
)
from ridgeline.types import ByteArray, CheckpointError, Float32Array

Int8Array = NDArray[np.int8]

GROUP = 32
TINY = np.float32(2.0**-100)
_RECIPROCAL_127 = np.float32(1 / 127)

# ------------------------------------------------------------------------------------- activations


def quantise_activations(x: Float32Array) -> tuple[Int8Array, Float32Array]:
    """A8-g32 of float32 (rows, width): int8 codes (rows, groups * 32) and float32 scales (rows, groups)."""
    codes, scales = quantise_groups(_grouped(x))
    return codes.reshape(len(x), scales.shape[1] * GROUP), scales


def quantise_groups(groups: Float32Array) -> tuple[Int8Array, Float32Array]:
    """The rule of activations: int8 codes of float32 (..., group), and the groups' scales, float32 (...)."""
    amax = np.abs(groups).max(axis=-1)
    scales: Float32Array = amax * _RECIPROCAL_127
    inverse = np.zeros_like(amax)
    np.divide(np.float32(127), amax, out=inverse, where=amax >= TINY)
    with np.errstate(invalid="ignore", over="ignore"):
        codes = np.clip(np.rint(groups * inverse[..., None]), -127, 127).astype(np.int8)
    return codes, scales


def round_kv8(heads: Float32Array) -> Float32Array:
    """What KV8 keeps of keys or values, float32 (..., head_dim)."""
    codes, scales = quantise_groups(heads)
    rounded: Float32Array = codes * scales[..., None]
    return rounded


def dequantise_activations(codes: Int8Array, scales: Float32Array, width: int) -> Float32Array:
    """The float32 (rows, width) values that codes and scales of `quantise_activations` stand for."""
    values = codes.reshape(*scales.shape, GROUP) * scales[..., None]
    return values.reshape(codes.shape)[:, :width]


def round_bfloat16(x: Float32Array) -> Float32Array:
    """Nearest bfloat16 of each value, ties to even, still in float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


def _grouped(x: Float32Array) -> Float32Array:
    """(rows, width) to (rows, groups, 32), filled up with zeros."""
    rows, width = x.shape
    groups = -(-width // GROUP)
    if width % GROUP:
        padded = np.zeros((rows, groups * GROUP), np.float32)
        padded[:, :width] = x
        x = padded
    return x.reshape(rows, groups, GROUP)


# ----------------------------------------------------------------------------------------- weights


def quantise_weight(weight: Float32Array, fmt: Format, name: str = "weight") -> Tensor:
    """`weight`, float32 (rows, cols), in the storage of `fmt`; F32 shares the memory of `weight`.

    Raises CheckpointError that names the weight when a value is not finite, or beyond the range of the
    float16 scales.
    """
    return quantise_tensor(float32_tensor(weight), fmt, name)


def quantise_tensor(tensor: Tensor, fmt: Format, name: str = "weight") -> Tensor:
    """`tensor` in the storage of `fmt`, a block of rows at a time, so that it is never whole in float32.

    A tensor that already has that storage is checked and returned as it is. Errors as `quantise_weight`'s.
    """
    storage, encode = storage_of(fmt), _ENCODERS[fmt.weight_bits]
    if tensor.storage is storage:
        check_finite(tensor, name)
        return tensor
    data = np.empty((tensor.row_count, storage.row_bytes(tensor.cols)), np.uint8)
    for rows, values in _decoded_blocks(tensor):
        try:
            data[rows] = encode(values)
        except _RangeError as error:
            raise CheckpointError(
                f"tensor {name!r} holds {error.value:g}, which {fmt.name} cannot hold; "
                "accepted: finite values whose group scales fit float16, or format W32A32"
            ) from None
    return Tensor(storage, tensor.shape, data)


def storage_of(fmt: Format) -> Storage:
    """The storage that `quantise_tensor` gives a weight of this format, one of `FORMATS`."""
    return STORAGES[encoded_storage(fmt)]


def _decoded_blocks(tensor: Tensor) -> Iterator[tuple[slice, Float32Array]]:
    for rows in row_blocks(tensor.row_count, tensor.cols):
        yield rows, tensor.storage.dequantise(tensor.data[rows])[:, : tensor.cols]


class _RangeError(Exception):
    def __init__(self, value: float) -> None:
        self.value = value


def _float16_step(span: Float32Array, steps: int, groups: Float32Array) -> NDArray[np.float16]:
    """float16(span / steps), one unit larger where the largest code would otherwise be clipped."""
    with np.errstate(over="ignore", invalid="ignore"):
        step = (span / np.float32(steps)).astype(np.float16)
        short = span > np.float32(steps + 0.5) * step.astype(np.float32)
    if not np.isfinite(step).all():
        bad = groups[~np.isfinite(step)][0]
        raise _RangeError(float(bad[np.argmax(np.abs(bad))]))
    return np.where(short, np.nextafter(step, np.float16(np.inf)), step)


def _codes(offsets: Float32Array, step: NDArray[np.float16], low: int, high: int) -> Float32Array:
    divisor = step.astype(np.float32)[..., None]
    codes = np.zeros_like(offsets)
    np.divide(offsets, divisor, out=codes, where=divisor > 0)
    np.rint(codes, out=codes)
    return np.clip(codes, low, high, out=codes)


def _encode_q8_0(weight: Float32Array) -> ByteArray:
    groups = _grouped(weight)
    step = _float16_step(np.abs(groups).max(axis=2), 127, groups)
    blocks = np.empty((*step.shape, 34), np.uint8)
    blocks[..., :2] = step[..., None].astype("<f2").view(np.uint8)
    blocks[..., 2:] = _codes(groups, step, -127, 127).astype(np.int8).view(np.uint8)
    return blocks.reshape(len(weight), -1)


def _encode_q4_1(weight: Float32Array) -> ByteArray:
    groups = _grouped(weight)
    low, high = groups.min(axis=2), groups.max(axis=2)
    with np.errstate(over="ignore", invalid="ignore"):
        minimum = low.astype(np.float16)
        minimum = np.where(minimum > low, np.nextafter(minimum, np.float16(-np.inf)), minimum)
    if not np.isfinite(minimum).all():
        raise _RangeError(float(low[~np.isfinite(minimum)][0]))
    offset = minimum.astype(np.float32)
    step = _float16_step(high - offset, 15, groups)
    codes = _codes(groups - offset[..., None], step, 0, 15).astype(np.uint8)
    blocks = np.empty((*step.shape, 20), np.uint8)
    blocks[..., :4] = np.stack((step, minimum), axis=-1).astype("<f2").view(np.uint8)
    blocks[..., 4:] = codes[..., :16] | codes[..., 16:] << 4
    return blocks.reshape(len(weight), -1)


def _encode_f32(weight: Float32Array) -> ByteArray:
    if not np.isfinite(weight).all():
        raise _RangeError(float(weight[~np.isfinite(weight)][0]))
    return np.ascontiguousarray(weight, "<f4").view(np.uint8)


def _encode_bf16(weight: Float32Array) -> ByteArray:
    rounded = round_bfloat16(weight)
    if not np.isfinite(rounded).all():  # the largest float32 values round to infinity
        raise _RangeError(float(weight[~np.isfinite(rounded)][0]))
    return (rounded.view(np.uint32) >> 16).astype("<u2").view(np.uint8)


_ENCODERS: dict[int, Callable[[Float32Array], ByteArray]] = {
    8: _encode_q8_0,
    4: _encode_q4_1,
    16: _encode_bf16,
    32: _encode_f32,
}
