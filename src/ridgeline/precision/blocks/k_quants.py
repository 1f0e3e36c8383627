"""Super-blocks of 256 values with integer scales for the groups in them, and one or two float16 over these.

- Q2_K: 16 bytes, scale in the low and minimum in the high half; 64 bytes of codes; float16 d, m.
  Groups of 16. value = code * (d * scale) - m * minimum
- Q3_K: 32 bytes of third bits; 64 bytes of two-bit codes; 12 bytes of scales; float16 d.
  Groups of 16. value = (code - 4) * (d * (scale - 32))
- Q4_K: float16 d, m; 12 bytes of scales and minima; 128 bytes of codes.
  Groups of 32. value = code * (d * scale) - m * minimum
- Q5_K: as Q4_K, with 32 bytes of fifth bits before the four-bit codes.
- Q6_K: 128 bytes of four-bit codes; 64 bytes of fifth and sixth bits; 16 int8 scales; float16 d.
  Groups of 16. value = (code - 32) * (d * scale)

Codes lie in planes (`layout.planes`) of 32 bytes, the four bits of Q6_K in planes of 64. The scales of six
bits of Q3_K, and the scales and minima of Q4_K and Q5_K, share 12 bytes as their functions below say.
"""

from __future__ import annotations

import numpy as np

from ridgeline.precision.blocks.layout import (
    SUPER_BLOCK,
    Int8Array,
    Storage,
    centred,
    float16_fields,
    planes,
    scaled,
    split_blocks,
)
from ridgeline.types import ByteArray, Float32Array

_Q2_FIELDS = float16_fields(84, 80, 2)
_Q3_FIELDS = float16_fields(110, 108)
_Q4_FIELDS = float16_fields(144, 0, 2)
_Q5_FIELDS = float16_fields(176, 0, 2)
_Q6_FIELDS = float16_fields(210, 208)


def _dequantise_q2_k(data: ByteArray) -> Float32Array:
    blocks = split_blocks(data, 84)
    fields = _Q2_FIELDS(data).astype(np.float32)
    pairs = blocks[..., :16]
    scales = fields[..., :1] * (pairs & np.uint8(15))
    minima = fields[..., 1:] * (pairs >> np.uint8(4))
    return scaled(planes(blocks[..., 16:80], 2, 32), scales, minima)


def _dequantise_q3_k(data: ByteArray) -> Float32Array:
    blocks = split_blocks(data, 110)
    codes = planes(blocks[..., 32:96], 2, 32)
    codes |= planes(blocks[..., :32], 1, 32) << np.uint8(2)
    scales = _Q3_FIELDS(data).astype(np.float32) * _sixteen_scales(blocks[..., 96:108])
    return scaled(centred(codes, 4), scales)


def _dequantise_q4_k(data: ByteArray) -> Float32Array:
    blocks = split_blocks(data, 144)
    scales, minima = _scales_and_minima(_Q4_FIELDS(data).astype(np.float32), blocks[..., 4:16])
    return scaled(planes(blocks[..., 16:], 4, 32), scales, minima)


def _dequantise_q5_k(data: ByteArray) -> Float32Array:
    blocks = split_blocks(data, 176)
    scales, minima = _scales_and_minima(_Q5_FIELDS(data).astype(np.float32), blocks[..., 4:16])
    codes = planes(blocks[..., 48:], 4, 32)
    codes |= planes(blocks[..., 16:48], 1, 32) << np.uint8(4)
    return scaled(codes, scales, minima)


def _dequantise_q6_k(data: ByteArray) -> Float32Array:
    blocks = split_blocks(data, 210)
    codes = planes(blocks[..., :128], 4, 64)
    codes |= planes(blocks[..., 128:192], 2, 32) << np.uint8(4)
    scales = _Q6_FIELDS(data).astype(np.float32) * blocks[..., 192:208].view(np.int8)
    return scaled(centred(codes, 32), scales)


def _sixteen_scales(packed: ByteArray) -> Int8Array:
    """Q3_K's scales - 32: low four bits in two planes of 8 bytes, high two bits in four planes of 4."""
    scales = planes(packed[..., :8], 4, 8)
    scales |= planes(packed[..., 8:], 2, 4) << np.uint8(4)
    return centred(scales, 32)


def _scales_and_minima(fields: Float32Array, packed: ByteArray) -> tuple[Float32Array, Float32Array]:
    """d * scale and m * minimum of the eight groups of Q4_K and Q5_K, of six bits each.

    Bytes 0 to 3 hold the scales of groups 0 to 3 and bytes 4 to 7 their minima, in their low six bits;
    bytes 8 to 11 the low four bits of the other scales, and of the other minima in their high half. The high
    two bits of those are the high two bits of bytes 0 to 3, and of bytes 4 to 7.
    """
    first, second, third = (packed[..., at : at + 4] for at in (0, 4, 8))
    codes = np.empty((2, *packed.shape[:2], 8), np.uint8)
    codes[0, ..., :4] = first & np.uint8(63)
    codes[0, ..., 4:] = (third & np.uint8(15)) | ((first >> np.uint8(6)) << np.uint8(4))
    codes[1, ..., :4] = second & np.uint8(63)
    codes[1, ..., 4:] = (third >> np.uint8(4)) | ((second >> np.uint8(6)) << np.uint8(4))
    return fields[..., :1] * codes[0], fields[..., 1:] * codes[1]


K_QUANTS = (
    Storage("Q2_K", SUPER_BLOCK, 84, _dequantise_q2_k, _Q2_FIELDS),
    Storage("Q3_K", SUPER_BLOCK, 110, _dequantise_q3_k, _Q3_FIELDS),
    Storage("Q4_K", SUPER_BLOCK, 144, _dequantise_q4_k, _Q4_FIELDS),
    Storage("Q5_K", SUPER_BLOCK, 176, _dequantise_q5_k, _Q5_FIELDS),
    Storage("Q6_K", SUPER_BLOCK, 210, _dequantise_q6_k, _Q6_FIELDS),
)
