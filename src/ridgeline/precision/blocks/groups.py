"""Blocks of 32 values with one scale, and a minimum where the name ends in 1.

- Q4_0: float16 d; codes.                        value = (code - 8) * d
- Q4_1: float16 d, float16 m; codes.             value = code * d + m
- Q5_0: float16 d; fifth bits; codes.            value = (code - 16) * d
- Q5_1: float16 d, float16 m; fifth bits; codes. value = code * d + m
- Q8_0: float16 d; 32 int8 codes.                value = code * d

Codes of 4 bits are 16 bytes in two planes: byte i holds value i in its low half and value i + 16 in its high
half. The fifth bits are 4 bytes, bit i of which, counted from the lowest of the first, belongs to value i.
"""

from __future__ import annotations

import numpy as np

from ridgeline.precision.blocks.layout import (
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


def _five_bits(fifth: ByteArray, packed: ByteArray) -> ByteArray:
    codes = planes(packed, 4, 16)
    codes |= np.unpackbits(fifth, axis=-1, bitorder="little") << np.uint8(4)
    return codes


def _with_minimum(data: ByteArray, block_bytes: int, codes: ByteArray) -> Float32Array:
    fields = float16_fields(block_bytes, count=2)(data).astype(np.float32)
    return scaled(codes, fields[..., :1], -fields[..., 1:])


def _split_q4_0(data: ByteArray) -> tuple[Int8Array, Float32Array]:
    codes = planes(split_blocks(data, 18)[..., 2:], 4, 16)
    return centred(codes, 8), float16_fields(18)(data).astype(np.float32)


def _dequantise_q4_1(data: ByteArray) -> Float32Array:
    return _with_minimum(data, 20, planes(split_blocks(data, 20)[..., 4:], 4, 16))


def _split_q5_0(data: ByteArray) -> tuple[Int8Array, Float32Array]:
    blocks = split_blocks(data, 22)
    codes = _five_bits(blocks[..., 2:6], blocks[..., 6:])
    return centred(codes, 16), float16_fields(22)(data).astype(np.float32)


def _dequantise_q5_1(data: ByteArray) -> Float32Array:
    blocks = split_blocks(data, 24)
    return _with_minimum(data, 24, _five_bits(blocks[..., 4:8], blocks[..., 8:]))


def _split_q8_0(data: ByteArray) -> tuple[Int8Array, Float32Array]:
    codes = split_blocks(data, 34)[..., 2:].view(np.int8)
    return codes, float16_fields(34)(data).astype(np.float32)


GROUPS = (
    symmetric("Q4_0", 32, 18, _split_q4_0, float16_fields(18)),
    Storage("Q4_1", 32, 20, _dequantise_q4_1, float16_fields(20, count=2)),
    symmetric("Q5_0", 32, 22, _split_q5_0, float16_fields(22)),
    Storage("Q5_1", 32, 24, _dequantise_q5_1, float16_fields(24, count=2)),
    symmetric("Q8_0", 32, 34, _split_q8_0, float16_fields(34)),
)
