"""Products of A8-g32 activations with weights of 4 or 8 bits on the integer tensor cores.

Along the inputs every group of 32 is multiplied in int32, which is exact, and scaled in float32:

    out += float32(codes of x . codes of w) * (scale of x * d)

and for 4-bit weights, whose values are code * d + m, also (sum of x's codes) * (scale of x * m). Groups are
added in their order at every number of rows, so a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution.cuda.arrays import A8, GROUP, Packed, padded_groups
from ridgeline.execution.cuda.kernels.codes import code_rows, load_codes, scale_rows
from ridgeline.execution.cuda.kernels.tiles import TOGETHER, Tile, block_of_program, check_packed, store_block
from ridgeline.execution.cuda.pack import dequantise


@triton.jit
def block_product(
    x_row,
    x_scale_row,
    m_inside,
    code_row,
    scale_row,
    n_inside,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """BLOCK_M rows of x times BLOCK_N rows of weights, by their addresses: float32 (BLOCK_N, BLOCK_M)."""
    # The weights are the left operand: their side of an instruction is the wide one (see weight_only).
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, GROUPS, BLOCK_GROUPS):
        for i in tl.static_range(BLOCK_GROUPS):
            group = first + i
            w = load_codes(code_row, n_inside, group, GROUPS, BITS, 1).to(tl.int8)
            k = group * 32 + tl.arange(0, 32)
            a = tl.load(x_row[:, None] + k[None, :], mask=m_inside[:, None], other=0)
            a_scale = tl.load(x_scale_row + group, mask=m_inside, other=0.0)
            product = tl.dot(w, tl.trans(a), out_dtype=tl.int32).to(tl.float32)
            if BITS == 4:
                d = tl.load(scale_row + group * 2, mask=n_inside, other=0.0).to(tl.float32)
                lift = tl.load(scale_row + group * 2 + 1, mask=n_inside, other=0.0).to(tl.float32)
                a_sum = tl.sum(a.to(tl.int32), axis=1).to(tl.float32) * a_scale
                total += lift[:, None] * a_sum[None, :]
            else:
                d = tl.load(scale_row + group, mask=n_inside, other=0.0).to(tl.float32)
            total += product * (d[:, None] * a_scale[None, :])
    return total


@triton.jit(do_not_specialize=["rows"])
def _matmul(
    x_codes,
    x_codes_stride,
    x_scales,
    x_scales_stride,
    codes,
    scales,
    bias,
    out,
    out_stride,
    rows,
    N,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    m_block, n_block = block_of_program(rows, N, BLOCK_M, BLOCK_N, TOGETHER)
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    code_row = code_rows(codes, n.to(tl.int64), GROUPS, BITS)
    scale_row = scale_rows(scales, n.to(tl.int64), GROUPS, BITS)
    x_row = x_codes + m.to(tl.int64) * x_codes_stride
    x_scale_row = x_scales + m.to(tl.int64) * x_scales_stride
    total = block_product(
        x_row, x_scale_row, m < rows, code_row, scale_row, n < N, GROUPS, BITS, BLOCK_M, BLOCK_N, BLOCK_GROUPS
    )
    store_block(total, bias, out, out_stride, m, n, rows, N, HAS_BIAS)


def matmul_tile(rows: int, groups: int) -> Tile:
    """Few rows wait for memory: they take few outputs, so that there are programs enough, and several groups
    at a time, so that their loads are under way together. Many rows take what registers hold, where a sum
    needs one for itself and one for the product of its group.
    """
    if rows <= 16:
        return Tile(16, 32, math.gcd(groups, 8), 4, 4)
    if rows <= 32:
        return Tile(32, 64, math.gcd(groups, 4), 4, 4)
    together = math.gcd(groups, 2)
    return Tile(64, 64, together, 4, 4) if rows <= 64 else Tile(64, 128, together, 8, 4)


def integer(x: A8, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> None:
    """out (rows, outputs) float32 = x (rows, inputs) A8-g32 @ W.T + bias, for W of 4 or 8 bits."""
    rows, groups = x.codes.shape[0], padded_groups(matrix.cols)
    scales = check_packed(matrix, rows, out, bias)
    assert x.codes.dtype == torch.int8
    assert x.codes.shape == (rows, groups * GROUP)
    assert x.scales.dtype == torch.float32
    assert x.scales.shape == (rows, groups)
    assert x.codes.stride(1) == 1
    assert x.scales.stride(1) == 1
    tile = matmul_tile(rows, groups)
    _matmul[tile.grid(rows, matrix.rows)](
        x.codes,
        x.codes.stride(0),
        x.scales,
        x.scales.stride(0),
        matrix.codes,
        scales,
        bias,
        out,
        out.stride(0),
        rows,
        matrix.rows,
        GROUPS=groups,
        BITS=matrix.bits,
        HAS_BIAS=bias is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_GROUPS=tile.block_groups,
        TOGETHER=TOGETHER,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def integer_reference(x: A8, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> None:
    """The same product of the values that the codes stand for, in float64."""
    codes = x.codes.to(torch.float64).view(*x.scales.shape, GROUP)
    values = (codes * x.scales.to(torch.float64)[..., None]).view(x.codes.shape)[:, : matrix.cols]
    product = values @ dequantise(matrix).to(torch.float64).T
    out.copy_(product if bias is None else product + bias)
