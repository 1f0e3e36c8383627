"""What a storage is, and the pieces that block layouts are made of.

Blocks are handled as uint8 (rows, blocks, bytes) and their codes as (rows, blocks, values).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.types import ByteArray, Float32Array

Int8Array = NDArray[np.int8]

SUPER_BLOCK = 256
"""Values of the blocks whose scales are themselves quantised."""


@dataclass(frozen=True, slots=True)
class Storage:
    """One way to lay numbers into bytes.

    `dequantise` takes uint8 (rows, row_bytes) and gives float32 (rows, blocks * block_values), which may be
    a view. `scales` takes the same bytes and gives every floating-point field among them, in any shape: a
    tensor whose scales are finite decodes to finite values.

    `split` is there where a value is an int8 code times a scale that its whole block shares, the product
    rounded to float32: it gives the codes (rows, blocks, block_values) and the scales (rows, blocks, 1).
    """

    name: str
    block_values: int
    block_bytes: int
    dequantise: Callable[[ByteArray], Float32Array]
    scales: Callable[[ByteArray], NDArray[np.floating[Any]]]
    split: Callable[[ByteArray], tuple[Int8Array, Float32Array]] | None = None

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` values; the last block may be partly used."""
        return -(-cols // self.block_values) * self.block_bytes


def symmetric(
    name: str,
    block_values: int,
    block_bytes: int,
    split: Callable[[ByteArray], tuple[Int8Array, Float32Array]],
    scales: Callable[[ByteArray], NDArray[np.floating[Any]]],
) -> Storage:
    """The storage that `split` describes."""
    return Storage(name, block_values, block_bytes, lambda data: scaled(*split(data)), scales, split)


def split_blocks(data: ByteArray, block_bytes: int) -> ByteArray:
    """uint8 (rows, row_bytes) as (rows, blocks, block_bytes), a view."""
    return data.reshape(len(data), -1, block_bytes)


def float16_fields(
    block_bytes: int, offset: int = 0, count: int = 1
) -> Callable[[ByteArray], NDArray[np.float16]]:
    """The function that finds `count` float16 from byte `offset` of every block: (rows, blocks, count)."""

    def fields(data: ByteArray) -> NDArray[np.float16]:
        raw = split_blocks(data, block_bytes)[..., offset : offset + 2 * count]
        return raw.view("<f2").astype(np.float16, copy=False)

    return fields


def planes(packed: ByteArray, bits: int, width: int) -> ByteArray:
    """Codes of `bits` bits that lie in planes: in each run of `width` bytes, byte j holds the codes j,
    j + width, j + 2 * width ... of the run, the first of them in its lowest bits.

    (rows, blocks, bytes) to a new array (rows, blocks, bytes * 8 / bits).
    """
    runs = packed.reshape(*packed.shape[:2], -1, 1, width)
    codes = runs >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    if bits < 8:
        codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:2], -1)


def centred(codes: ByteArray, middle: int) -> Int8Array:
    """codes - middle, in place."""
    codes -= np.uint8(middle)  # wraps around to two's complement
    return codes.view(np.int8)


def scaled(
    codes: ByteArray | Int8Array, scales: Float32Array, minima: Float32Array | None = None
) -> Float32Array:
    """codes * scales - minima, each rounded to float32: (rows, blocks, values) to (rows, blocks * values).

    Scales and minima are (rows, blocks, groups): each belongs to values / groups neighbouring codes.
    """
    values = codes.astype(np.float32).reshape(*scales.shape, -1)
    values *= scales[..., None]
    if minima is not None:
        values -= minima[..., None]
    return values.reshape(len(codes), -1)
