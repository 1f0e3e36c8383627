"""Whole codes on an even grid, with a scale and a zero for each group: which storage holds them, and how.

    value = (code - zero) * scale

Codes, scales and zeros decide which storage of blocks of 32 values is handed over, the first that can be:

- Q4_0, where code - zero lies within -8..7 throughout, and Q8_0, where it lies within -128..127: the codes
  are kept. Scales that the file holds in float16 are kept too, others are rounded to float16.
- Q4_1, for other codes of up to 4 bits: the codes are kept, and m = -zero * d is rounded to float16, d being
  the scale in float16. A group moves by at most 2**-11 of m, which is 0.008 of the step between its codes.
- F32 for the rest: 8 bits off centre, columns whose groups are not whole blocks of 32 (act-order), and scales
  that float16 cannot hold, or of a tensor that is so small that float16 holds it badly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ridgeline.model.checkpoint.quantised.logical import Decoder, Logical
from ridgeline.types import ByteArray, Float32Array

BLOCK = 32
_LAST_PLACE, _UNSEEN = np.float32(2.0**-11), np.float32(2.0**-16)
Int16Array = NDArray[np.int16]
Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Grid:
    """A matrix of shape (outputs, inputs) with codes of `bits` bits, from 0.

    `codes` gives uint8 (rows, inputs) of some rows. `scales` gives float32, and `zeros` int16, (outputs,
    groups); without `zeros` they are the middle, 2**(bits - 1). `group_of` says to which group each input
    belongs. The functions read the file anew at each call.
    """

    shape: tuple[int, int]
    bits: int
    codes: Callable[[slice], ByteArray]
    scales: Callable[[], Float32Array]
    group_of: Int32Array
    zeros: Callable[[], Int16Array] | None = None

    @property
    def block_groups(self) -> Int32Array | None:
        """The group of each block of 32 inputs; None where a block has several, or is not whole."""
        if self.shape[1] % BLOCK:
            return None
        blocks = self.group_of.reshape(-1, BLOCK)
        return blocks[:, 0] if (blocks == blocks[:, :1]).all() else None

    def all_zeros(self) -> Int16Array:
        """(outputs, groups), or (1, 1) where all are alike."""
        if self.zeros is None:
            return np.full((1, 1), 1 << (self.bits - 1), np.int16)
        zeros = self.zeros()
        return zeros[:1, :1] if zeros.size and (zeros == zeros[0, 0]).all() else zeros


def in_order(inputs: int, group: int) -> Int32Array:
    """The groups of inputs that lie one after another, `group` inputs to each."""
    return np.arange(inputs, dtype=np.int32) // np.int32(group)


def on_grid(grid: Grid, parts: tuple[str, ...]) -> Logical:
    """The logical tensor of a grid that `parts` hold. Reads scales and zeros, which choose its storage."""
    storage = _storage(grid)
    return Logical(grid.shape, storage, parts, lambda: _STARTS[storage](grid))


def _storage(grid: Grid) -> str:
    if grid.block_groups is None:
        return "F32"
    scales, zeros = grid.scales(), grid.all_zeros()
    if not _fits_float16(scales):
        return "F32"
    low, high = -int(zeros.max()), (1 << grid.bits) - 1 - int(zeros.min())
    if low >= -8 and high <= 7:
        return "Q4_0"
    if grid.bits <= 4:
        return "Q4_1" if _fits_float16(_minima(scales, zeros)) else "F32"
    return "Q8_0" if low >= -128 and high <= 127 else "F32"


def _fits_float16(values: Float32Array) -> bool:
    """Whether rounding moves no value by more than its own last place, or by what nobody sees in the tensor.

    Scales of dead outputs are often so small that float16 makes them subnormal or zero. Values that are not
    finite are for others to refuse.
    """
    finite = np.isfinite(values)
    largest = np.abs(values).max(initial=0, where=finite)
    allowed = np.maximum(np.abs(values) * _LAST_PLACE, largest * _UNSEEN)
    with np.errstate(invalid="ignore"):
        near = np.abs(_halves(values).astype(np.float32) - values) <= allowed
    return bool((near | ~finite).all())


def _halves(values: Float32Array) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return values.astype("<f2")


def _minima(scales: Float32Array, zeros: Int16Array) -> Float32Array:
    with np.errstate(invalid="ignore", over="ignore"):
        return _halves(scales).astype(np.float32) * -zeros.astype(np.float32)


def _of_blocks(fields: Float32Array, groups: Int32Array) -> ByteArray:
    """Float16 of each block of 32, (rows, groups) to uint8 (rows, blocks, 2)."""
    halves = np.ascontiguousarray(_halves(fields)[:, groups])
    return halves.view(np.uint8).reshape(*halves.shape, 2)


def _start_4_bits(grid: Grid, with_minimum: bool) -> Decoder:
    groups = grid.block_groups
    assert groups is not None
    scales, zeros = grid.scales(), grid.all_zeros()
    fields = [_of_blocks(scales, groups)]
    shifts = None
    if with_minimum:
        fields.append(_of_blocks(np.broadcast_to(_minima(scales, zeros), scales.shape), groups))
    elif zeros.size > 1:
        shifts = (8 - zeros).astype(np.uint8)[:, groups, None]
    else:
        shifts = np.full((1, 1, 1), 8 - int(zeros[0, 0]), np.uint8)
    header = np.concatenate(fields, axis=2)

    def decode(rows: slice) -> ByteArray:
        codes = grid.codes(rows)
        codes = codes.reshape(len(codes), -1, BLOCK)
        if shifts is not None and shifts.any():
            codes = codes + (shifts if len(shifts) == 1 else shifts[rows])
        packed = codes[..., 16:] << np.uint8(4)
        packed |= codes[..., :16]
        return np.concatenate((header[rows], packed), axis=2).reshape(len(codes), -1)

    return decode


def _start_8_bits(grid: Grid) -> Decoder:
    groups = grid.block_groups
    assert groups is not None
    header = _of_blocks(grid.scales(), groups)
    zeros = grid.all_zeros().astype(np.uint8)

    def decode(rows: slice) -> ByteArray:
        codes = grid.codes(rows)
        codes = codes.reshape(len(codes), -1, BLOCK)
        # Modulo 256, which is two's complement.
        codes = codes - (zeros[:, :, None] if zeros.size == 1 else zeros[rows][:, groups, None])
        return np.concatenate((header[rows], codes), axis=2).reshape(len(codes), -1)

    return decode


def _start_floats(grid: Grid) -> Decoder:
    scales, zeros = grid.scales(), grid.all_zeros()

    def decode(rows: slice) -> ByteArray:
        values = grid.codes(rows).astype(np.float32)
        values -= zeros if zeros.size == 1 else np.take(zeros[rows], grid.group_of, axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= np.take(scales[rows], grid.group_of, axis=1)
        return np.ascontiguousarray(values, "<f4").view(np.uint8)

    return decode


_STARTS: dict[str, Callable[[Grid], Decoder]] = {
    "Q4_0": lambda grid: _start_4_bits(grid, with_minimum=False),
    "Q4_1": lambda grid: _start_4_bits(grid, with_minimum=True),
    "Q8_0": _start_8_bits,
    "F32": _start_floats,
}
