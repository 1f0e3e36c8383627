"""Products of bfloat16 activations with weights of 4 or 8 bits, which are unpacked in registers.

A weight is multiplied as bfloat16(float32(code * d + m)); sums are float32. One row is bound by reading the
weights and takes a matrix-vector kernel; more rows take a matrix product on the tensor cores. Each adds along
the inputs in one order that only the matrix decides; the two orders differ, so a row alone may differ in its
last bits from the same row among others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution.cuda.arrays import Packed, padded_groups
from ridgeline.execution.cuda.kernels.codes import code_rows, load_values, scale_rows
from ridgeline.execution.cuda.kernels.tiles import TOGETHER, Tile, block_of_program, check_packed, store_block
from ridgeline.execution.cuda.pack import dequantise


@triton.jit
def row_product(
    x,
    code_row,
    scale_row,
    inside,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """The row `x` times BLOCK_N rows of weights, whose addresses are given: float32 (BLOCK_N,)."""
    offsets = tl.arange(0, BLOCK_GROUPS * 32)
    total = tl.zeros((BLOCK_N, BLOCK_GROUPS * 32), tl.float32)
    for group in range(0, GROUPS, BLOCK_GROUPS):
        w = load_values(code_row, scale_row, inside, group, GROUPS, BITS, BLOCK_GROUPS)
        k = group * 32 + offsets
        a = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        total += w.to(tl.bfloat16).to(tl.float32) * a[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def block_product(
    x_row,
    m,
    rows,
    code_row,
    scale_row,
    n,
    N,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """BLOCK_M rows of x, if m < rows, times BLOCK_N rows of weights, if n < N, by their addresses: float32
    (BLOCK_N, BLOCK_M)."""
    # The weights are the left operand, which the tensor cores take from registers, where they are unpacked;
    # and their side of an instruction is the wide one, so that few rows waste little of it.
    offsets = tl.arange(0, BLOCK_GROUPS * 32)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in range(0, GROUPS, BLOCK_GROUPS):
        w = load_values(code_row, scale_row, n < N, group, GROUPS, BITS, BLOCK_GROUPS).to(tl.bfloat16)
        k = group * 32 + offsets
        a = tl.load(x_row[:, None] + k[None, :], mask=(m < rows)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(w, tl.trans(a), total)
    return total


@triton.jit
def _matvec(
    x,
    codes,
    scales,
    bias,
    out,
    N,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    code_row = code_rows(codes, n.to(tl.int64), GROUPS, BITS)
    scale_row = scale_rows(scales, n.to(tl.int64), GROUPS, BITS)
    result = row_product(x, code_row, scale_row, inside, K, GROUPS, BITS, BLOCK_N, BLOCK_GROUPS)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=inside, other=0.0)
    tl.store(out + n, result, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _matmul(
    x,
    x_stride,
    codes,
    scales,
    bias,
    out,
    out_stride,
    rows,
    N,
    K: tl.constexpr,
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
    x_row = x + m.to(tl.int64) * x_stride
    total = block_product(
        x_row, m, rows, code_row, scale_row, n, N, K, GROUPS, BITS, BLOCK_M, BLOCK_N, BLOCK_GROUPS
    )
    store_block(total, bias, out, out_stride, m, n, rows, N, HAS_BIAS)


def matvec_tile(outputs: int, groups: int, bits: int) -> Tile:
    """16 bytes of codes for each of 128 threads at a time.

    Long rows of few outputs give many programs, whose loads together keep the memory busy; where there are
    many outputs anyhow, a program takes several, so that what it reads of x serves more of them.
    """
    row_groups = min(triton.next_power_of_2(groups), 32 if outputs < 8192 else 16)
    return Tile(1, max(1, 128 * 4 // (bits * row_groups)), row_groups, 4, 1)


def matmul_tile(rows: int) -> Tile:
    """64 inputs at a time at every number of rows, so that all add in one order.

    Few rows wait for memory and take many stages; more inputs at a time would spill where rows are many.
    """
    if rows <= 16:
        return Tile(16, 64, 2, 4, 8)
    if rows <= 32:
        return Tile(32, 64, 2, 4, 6)
    if rows <= 64:
        return Tile(64, 64, 2, 4, 5)
    return Tile(128, 128, 2, 8, 4)


def matvec(x: Tensor, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> None:
    """out (1, outputs) float32 = x (1, inputs) bfloat16 @ W.T + bias, for W of 4 or 8 bits."""
    scales = _check(x, matrix, out, bias)
    assert x.shape[0] == 1
    groups = padded_groups(matrix.cols)
    tile = matvec_tile(matrix.rows, groups, matrix.bits)
    _matvec[tile.grid(1, matrix.rows)](
        x,
        matrix.codes,
        scales,
        bias,
        out,
        matrix.rows,
        K=matrix.cols,
        GROUPS=groups,
        BITS=matrix.bits,
        HAS_BIAS=bias is not None,
        BLOCK_N=tile.block_n,
        BLOCK_GROUPS=tile.block_groups,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def matmul(x: Tensor, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> None:
    """out (rows, outputs) float32 = x (rows, inputs) bfloat16 @ W.T + bias, for W of 4 or 8 bits."""
    scales = _check(x, matrix, out, bias)
    rows = x.shape[0]
    tile = matmul_tile(rows)
    _matmul[tile.grid(rows, matrix.rows)](
        x,
        x.stride(0),
        matrix.codes,
        scales,
        bias,
        out,
        out.stride(0),
        rows,
        matrix.rows,
        K=matrix.cols,
        GROUPS=padded_groups(matrix.cols),
        BITS=matrix.bits,
        HAS_BIAS=bias is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_GROUPS=tile.block_groups,
        TOGETHER=TOGETHER,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def weight_only(x: Tensor, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> None:
    """`matvec` for one row, `matmul` for more."""
    (matvec if x.shape[0] == 1 else matmul)(x, matrix, out, bias)


def weight_only_reference(x: Tensor, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> None:
    """The same product, summed in float64."""
    weights = dequantise(matrix).to(torch.bfloat16)
    product = x.to(torch.float64) @ weights.to(torch.float64).T
    out.copy_(product if bias is None else product + bias)


def _check(x: Tensor, matrix: Packed, out: Tensor, bias: Tensor | None) -> Tensor:
    assert x.dtype == torch.bfloat16
    assert x.shape[1] == matrix.cols
    assert x.stride(1) == 1
    return check_packed(matrix, x.shape[0], out, bias)
