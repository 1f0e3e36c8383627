"""Reading quantised weights inside a kernel: codes of 4 or 8 bits, and the values that they stand for.

Groups of 32 values lie as `arrays.Packed` describes. The functions take the addresses of rows, so that the
same code reads neighbouring rows of a matrix and rows of a table picked one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def code_rows(codes, rows, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Addresses of the codes of `rows`, int64 (R,)."""
    return codes + rows * (GROUPS * BITS * 4)


@triton.jit
def scale_rows(scales, rows, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Addresses of the scales of `rows`, int64 (R,)."""
    return scales + rows * (GROUPS * (8 // BITS))


@triton.jit
def load_codes(rows, inside, group, GROUPS: tl.constexpr, BITS: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """Codes of BLOCK_GROUPS groups from `group` on, (R, BLOCK_GROUPS * 32) int8 or uint8; 0 outside."""
    GROUP_BYTES: tl.constexpr = BITS * 4
    at = group * GROUP_BYTES + tl.arange(0, BLOCK_GROUPS * GROUP_BYTES)
    mask = inside[:, None] & (at < GROUPS * GROUP_BYTES)[None, :]
    result = tl.load(rows[:, None] + at[None, :], mask=mask, other=0)
    if BITS == 4:
        pairs = tl.join(result & 15, result >> 4)
        result = tl.reshape(pairs, (rows.shape[0], BLOCK_GROUPS * 32))
    return result


@triton.jit
def float_of_code(codes, BITS: tl.constexpr):
    """Codes as float32, without the conversion instruction, which GPUs run at an eighth of their usual rate.

    An integer below 2**23 is put into the mantissa of 2**23, which is then taken away again.
    """
    if BITS == 4:
        result = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    else:
        # A signed byte with its sign bit turned over is the byte plus 128.
        shifted = codes.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
        result = shifted.to(tl.float32, bitcast=True) - 8388736.0
    return result


@triton.jit
def load_values(
    codes, scales, inside, group, GROUPS: tl.constexpr, BITS: tl.constexpr, BLOCK_GROUPS: tl.constexpr
):
    """The float32 values of those codes, (R, BLOCK_GROUPS * 32); 0 outside.

    `codes` and `scales` are addresses of rows, (R,). A code times d is exact, so that each value rounds once.
    """
    R: tl.constexpr = codes.shape[0]
    loaded = load_codes(codes, inside, group, GROUPS, BITS, BLOCK_GROUPS)
    wide = tl.reshape(float_of_code(loaded, BITS), (R, BLOCK_GROUPS, 32))
    groups = group + tl.arange(0, BLOCK_GROUPS)
    mask = inside[:, None] & (groups < GROUPS)[None, :]
    if BITS == 4:
        places = scales[:, None] + groups[None, :] * 2
        d = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(places + 1, mask=mask, other=0.0).to(tl.float32)
        values = wide * d[:, :, None] + m[:, :, None]
    else:
        d = tl.load(scales[:, None] + groups[None, :], mask=mask, other=0.0).to(tl.float32)
        values = wide * d[:, :, None]
    return tl.reshape(values, (R, BLOCK_GROUPS * 32))
