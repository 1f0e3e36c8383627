"""Codes of 4 bits that are indices into a table of unevenly spaced values.

- IQ4_NL: float16 d; 16 bytes of codes, of 32 values. value = LEVELS[code] * d
- IQ4_XS: float16 d; 2 bytes with the high two bits of eight scales; 4 bytes with their low four bits, the
  lower half first; 128 bytes of codes, of 256 values. Groups of 32. value = LEVELS[code] * (d * (scale - 32))
- MXFP4: a byte e; 16 bytes of codes, of 32 values. value = DOUBLED_E2M1[code] * 2**(e - 128)

Codes lie in two planes of 16 bytes. MXFP4 is that of the OCP Microscaling Formats specification 1.0 (E2M1
with an E8M0 scale for each group): the table holds doubled values so that it is of integers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ridgeline.precision.blocks.layout import (
    SUPER_BLOCK,
    Int8Array,
    Storage,
    centred,
    float16_fields,
    planes,
    scaled,
    split_blocks,
    symmetric,
)
from ridgeline.types import ByteArray, Float32Array

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

_NL_FIELDS = float16_fields(18)
_XS_FIELDS = float16_fields(136)


def _pairs(table: tuple[int, ...]) -> NDArray[np.uint16]:
    """For each byte of two codes, the two values of the table as the bytes of one number."""
    byte = np.arange(256)
    return np.stack((np.array(table, np.int8)[byte & 15], np.array(table, np.int8)[byte >> 4]), axis=1).view(
        np.uint16
    )[:, 0]


_LEVEL_PAIRS, _E2M1_PAIRS = _pairs(LEVELS), _pairs(DOUBLED_E2M1)


def _looked_up(pairs: NDArray[np.uint16], packed: ByteArray) -> Int8Array:
    """(rows, blocks, bytes) to int8 (rows, blocks, bytes * 2), in planes of 16 bytes."""
    runs = packed.reshape(*packed.shape[:2], -1, 16)
    values = pairs[runs].view(np.int8).reshape(*runs.shape, 2)
    return values.swapaxes(-1, -2).reshape(*packed.shape[:2], -1)


def _split_iq4_nl(data: ByteArray) -> tuple[Int8Array, Float32Array]:
    values = _looked_up(_LEVEL_PAIRS, split_blocks(data, 18)[..., 2:])
    return values, _NL_FIELDS(data).astype(np.float32)


def _dequantise_iq4_xs(data: ByteArray) -> Float32Array:
    blocks = split_blocks(data, 136)
    scales = planes(blocks[..., 4:8], 4, 1)
    scales |= planes(blocks[..., 2:4], 2, 1) << np.uint8(4)
    values = _looked_up(_LEVEL_PAIRS, blocks[..., 8:])
    return scaled(values, _XS_FIELDS(data).astype(np.float32) * centred(scales, 32))


def _split_mxfp4(data: ByteArray) -> tuple[Int8Array, Float32Array]:
    blocks = split_blocks(data, 17)
    return _looked_up(_E2M1_PAIRS, blocks[..., 1:]), _powers(blocks[..., :1])


def _powers(exponents: ByteArray) -> Float32Array:
    """2**(e - 128), subnormal for e of 0 and 1."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)


def _mxfp4_scales(data: ByteArray) -> Float32Array:
    """What the largest code stands for in each block; NaN where e is 255, as the specification has it."""
    exponents = split_blocks(data, 17)[..., 0]
    with np.errstate(over="ignore"):
        largest = _powers(exponents) * np.float32(max(DOUBLED_E2M1))
    return np.where(exponents == 255, np.float32(np.nan), largest)


TABLES = (
    symmetric("IQ4_NL", 32, 18, _split_iq4_nl, _NL_FIELDS),
    Storage("IQ4_XS", SUPER_BLOCK, 136, _dequantise_iq4_xs, _XS_FIELDS),
    symmetric("MXFP4", 32, 17, _split_mxfp4, _mxfp4_scales),
)
