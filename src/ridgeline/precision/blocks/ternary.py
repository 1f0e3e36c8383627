"""Super-blocks of 256 codes of three values, with one float16 scale behind them: value = (code - 1) * d.

- TQ2_0: 64 bytes of two-bit codes, in planes of 32 bytes; float16 d. A code of 3 is decoded too.
- TQ1_0: 48 bytes of five codes each and 4 bytes of four; float16 d. A byte holds its codes as the digits of
  a fraction b / 256 in base 3. The digits of a place form a plane; planes are of 32 bytes for the first 32,
  of 16 for the next 16, and of 4 for the last 4.
"""

from __future__ import annotations

import numpy as np

from ridgeline.precision.blocks.layout import (
    SUPER_BLOCK,
    Int8Array,
    centred,
    float16_fields,
    planes,
    split_blocks,
    symmetric,
)
from ridgeline.types import ByteArray, Float32Array

_TQ1_FIELDS = float16_fields(54, 52)
_TQ2_FIELDS = float16_fields(66, 64)


def _digits() -> Int8Array:
    """(5, 256): the digits, less 1, of each byte. What is left of the fraction keeps 8 bits at each place."""
    rest = np.arange(256)
    digits = []
    for _ in range(5):
        digits.append((rest * 3 >> 8) - 1)
        rest = rest * 3 & 255
    return np.array(digits, np.int8)


_DIGITS = _digits()
_TQ1_PLANES = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
"""The first byte and the end of each run, and how many codes its bytes hold."""


def _split_tq1_0(data: ByteArray) -> tuple[Int8Array, Float32Array]:
    blocks = split_blocks(data, 54)
    codes = np.empty((*blocks.shape[:2], SUPER_BLOCK), np.int8)
    at = 0
    for start, end, places in _TQ1_PLANES:
        packed = blocks[..., start:end]
        for place in range(places):
            codes[..., at : at + end - start] = _DIGITS[place][packed]
            at += end - start
    return codes, _TQ1_FIELDS(data).astype(np.float32)


def _split_tq2_0(data: ByteArray) -> tuple[Int8Array, Float32Array]:
    codes = planes(split_blocks(data, 66)[..., :64], 2, 32)
    return centred(codes, 1), _TQ2_FIELDS(data).astype(np.float32)


TERNARY = (
    symmetric("TQ1_0", SUPER_BLOCK, 54, _split_tq1_0, _TQ1_FIELDS),
    symmetric("TQ2_0", SUPER_BLOCK, 66, _split_tq2_0, _TQ2_FIELDS),
)
