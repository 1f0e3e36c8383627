"""Products of rows with the matrices of their experts, for all kinds of activations and weights.

A program takes a block of the work list that `route` made, which is some rows that go to one expert, and some
of its outputs. The sums are those of the linears' kernels: a pair's result does not depend on which others
are in its block. A single row takes a block for each of its experts, and for weights of 4 or 8 bits beside
bfloat16 the matrix-vector product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution.cuda.arrays import (
    A8,
    BLOCK_EXPERT,
    BLOCK_FIELDS,
    BLOCK_FIRST,
    BLOCK_PAIRS,
    Activations,
    Experts,
    Routes,
    padded_groups,
)
from ridgeline.execution.cuda.kernels import integer, weight_only
from ridgeline.execution.cuda.kernels.codes import code_rows, scale_rows
from ridgeline.execution.cuda.kernels.linear import linear_reference
from ridgeline.execution.cuda.kernels.quantise import check_activations
from ridgeline.execution.cuda.kernels.route import block_pairs, work_blocks
from ridgeline.execution.cuda.kernels.tiles import TOGETHER, Tile, block_of_program, check_quantised

_BLOCK_FIELDS, _BLOCK_EXPERT = tl.constexpr(BLOCK_FIELDS), tl.constexpr(BLOCK_EXPERT)
_BLOCK_FIRST, _BLOCK_PAIRS = tl.constexpr(BLOCK_FIRST), tl.constexpr(BLOCK_PAIRS)

_integer_product = integer.block_product
_row_product, _weight_only_product = weight_only.row_product, weight_only.block_product


@triton.jit
def _weight_rows(expert, n, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Which rows of the stacked matrices hold the outputs `n` of an expert, int64."""
    return ((n // WIDTH * COUNT + expert) * WIDTH + n % WIDTH).to(tl.int64)


@triton.jit
def _pairs_of(order, record, m):
    """The pairs of a block, and which of `m` there are."""
    inside = m < tl.load(record + _BLOCK_PAIRS)
    return tl.load(order + tl.load(record + _BLOCK_FIRST) + m, mask=inside, other=0), inside


@triton.jit
def _store_pairs(total, bias, out, out_stride, pair, inside, row, n, N: tl.constexpr):
    """Add the bias to `total` (outputs, pairs) and store it as rows of the pairs."""
    result = tl.trans(total)
    if bias is not None:
        result += tl.load(bias + row, mask=n < N, other=0.0)[None, :]
    places = out + pair.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(places, result, mask=inside[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["block_count"])
def _weight_only_kernel(
    x, x_stride, codes, scales, bias, out, out_stride, order, blocks, block_count,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr,
    K: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_GROUPS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    block, n_block = block_of_program(block_count, N, 1, BLOCK_N, TOGETHER)
    record = blocks + block * _BLOCK_FIELDS
    if tl.load(record + _BLOCK_PAIRS) == 0:
        return
    m = tl.arange(0, BLOCK_M)
    pair, inside = _pairs_of(order, record, m)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = _weight_rows(tl.load(record + _BLOCK_EXPERT), n, COUNT, WIDTH)
    x_row = x + (pair // SHARE).to(tl.int64) * x_stride
    code_row, scale_row = code_rows(codes, row, GROUPS, BITS), scale_rows(scales, row, GROUPS, BITS)
    total = _weight_only_product(
        x_row, m, tl.load(record + _BLOCK_PAIRS), code_row, scale_row, n, N,
        K, GROUPS, BITS, BLOCK_M, BLOCK_N, BLOCK_GROUPS,
    )  # fmt: skip
    _store_pairs(total, bias, out, out_stride, pair, inside, row, n, N)


@triton.jit
def _matvec_kernel(
    x, x_stride, codes, scales, bias, out, out_stride, blocks,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr,
    K: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """A single row: pair `program_id(1)` has the block of that number to itself."""
    pair = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    row = _weight_rows(tl.load(blocks + pair * _BLOCK_FIELDS + _BLOCK_EXPERT), n, COUNT, WIDTH)
    code_row, scale_row = code_rows(codes, row, GROUPS, BITS), scale_rows(scales, row, GROUPS, BITS)
    x += pair // SHARE * x_stride
    result = _row_product(x, code_row, scale_row, inside, K, GROUPS, BITS, BLOCK_N, BLOCK_GROUPS)
    if bias is not None:
        result += tl.load(bias + row, mask=inside, other=0.0)
    tl.store(out + pair * out_stride + n, result, mask=inside)


@triton.jit(do_not_specialize=["block_count"])
def _integer_kernel(
    x_codes, x_codes_stride, x_scales, x_scales_stride,
    codes, scales, bias, out, out_stride, order, blocks, block_count,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr,
    GROUPS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_GROUPS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    block, n_block = block_of_program(block_count, N, 1, BLOCK_N, TOGETHER)
    record = blocks + block * _BLOCK_FIELDS
    if tl.load(record + _BLOCK_PAIRS) == 0:
        return
    pair, inside = _pairs_of(order, record, tl.arange(0, BLOCK_M))
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = _weight_rows(tl.load(record + _BLOCK_EXPERT), n, COUNT, WIDTH)
    x_row = (pair // SHARE).to(tl.int64)
    code_row, scale_row = code_rows(codes, row, GROUPS, BITS), scale_rows(scales, row, GROUPS, BITS)
    total = _integer_product(
        x_codes + x_row * x_codes_stride, x_scales + x_row * x_scales_stride, inside,
        code_row, scale_row, n < N, GROUPS, BITS, BLOCK_M, BLOCK_N, BLOCK_GROUPS,
    )  # fmt: skip
    _store_pairs(total, bias, out, out_stride, pair, inside, row, n, N)


@triton.jit(do_not_specialize=["block_count"])
def _dense_kernel(
    x, x_stride, weights, bias, out, out_stride, order, blocks, block_count,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Weights and activations of one type, float32 or bfloat16."""
    block, n_block = block_of_program(block_count, N, 1, BLOCK_N, TOGETHER)
    record = blocks + block * _BLOCK_FIELDS
    if tl.load(record + _BLOCK_PAIRS) == 0:
        return
    pair, inside = _pairs_of(order, record, tl.arange(0, BLOCK_M))
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = _weight_rows(tl.load(record + _BLOCK_EXPERT), n, COUNT, WIDTH)
    x_row = x + (pair // SHARE).to(tl.int64) * x_stride
    weight_row = weights + row * K
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        w = tl.load(weight_row[:, None] + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        a = tl.load(x_row[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(w, tl.trans(a), total, input_precision="ieee")
    _store_pairs(total, bias, out, out_stride, pair, inside, row, n, N)


def _integer_tile(block_m: int, groups: int) -> Tile:
    """As for linears; a high tile is as wide as registers hold its sums beside those of the group at hand."""
    return integer.matmul_tile(block_m, groups) if block_m <= 64 else Tile(128, 64, math.gcd(groups, 2), 8, 4)


def _dense_tile(block_m: int, sixteen: bool) -> Tile:
    """As many inputs at a time at every height, so that all add in one order. Few rows wait for memory and
    take many stages; float32 has no tensor cores and keeps to what registers hold."""
    if not sixteen:
        return Tile(block_m, 64, 1, 4 if block_m <= 16 else 8, 3)
    if block_m <= 16:
        return Tile(16, 64, 2, 4, 6)
    return Tile(64, 64, 2, 4, 4) if block_m <= 64 else Tile(128, 128, 2, 8, 4)


def expert_linear(
    x: Activations, routes: Routes, experts: Experts, out: Tensor, bias: Tensor | None = None
) -> None:
    """Each pair's row times the matrix of its expert, plus that expert's bias.

    x (rows, inputs), or (pairs, inputs) where each pair has its own; `experts` of matrices (outputs, inputs);
    out float32 (pairs, outputs); bias float32, a number for each row of the matrices. Weights and activations
    go together as `kernels.linear` has it; sums are float32. `out` may be some columns of a wider tensor, and
    so may x. Pairs that are in no block of `routes`, which has been through `route`, are left as they are.
    """
    kind, sixteen = _check(x, routes, experts, out, bias)
    if routes.pairs == 0:
        return
    matrix = experts.matrix
    if kind == "A8-g32":
        _run_integer(x, routes, experts, out, bias)
    elif matrix.scales is None:
        tile = _dense_tile(block_pairs(routes.pairs, experts.count), sixteen)
        assert isinstance(x, Tensor)
        _dense_kernel[_grid(tile, routes, experts)](
            x, x.stride(0), matrix.codes, *_results(bias, out, routes, experts),
            **_constants(x, routes, experts), K=matrix.cols,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_groups * 32, TOGETHER=TOGETHER,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    else:
        _run_weight_only(x, routes, experts, out, bias)


def _run_integer(x: Any, routes: Routes, experts: Experts, out: Tensor, bias: Tensor | None) -> None:
    matrix, groups = experts.matrix, padded_groups(experts.matrix.cols)
    tile = _integer_tile(block_pairs(routes.pairs, experts.count), groups)
    _integer_kernel[_grid(tile, routes, experts)](
        x.codes, x.codes.stride(0), x.scales, x.scales.stride(0),
        matrix.codes, matrix.scales, *_results(bias, out, routes, experts), **_constants(x, routes, experts),
        GROUPS=groups, BITS=matrix.bits,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_GROUPS=tile.block_groups, TOGETHER=TOGETHER,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _run_weight_only(x: Any, routes: Routes, experts: Experts, out: Tensor, bias: Tensor | None) -> None:
    matrix, groups = experts.matrix, padded_groups(experts.matrix.cols)
    if routes.table.shape[0] == 1:
        tile = weight_only.matvec_tile(experts.outputs * routes.chosen, groups, matrix.bits)
        _matvec_kernel[(triton.cdiv(experts.outputs, tile.block_n), routes.chosen)](
            x, x.stride(0), matrix.codes, matrix.scales, bias, out, out.stride(0), routes.blocks,
            **_constants(x, routes, experts), K=matrix.cols, GROUPS=groups, BITS=matrix.bits,
            BLOCK_N=tile.block_n, BLOCK_GROUPS=tile.block_groups,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return
    tile = weight_only.matmul_tile(block_pairs(routes.pairs, experts.count))
    _weight_only_kernel[_grid(tile, routes, experts)](
        x, x.stride(0), matrix.codes, matrix.scales, *_results(bias, out, routes, experts),
        **_constants(x, routes, experts), K=matrix.cols, GROUPS=groups, BITS=matrix.bits,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_GROUPS=tile.block_groups, TOGETHER=TOGETHER,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _grid(tile: Tile, routes: Routes, experts: Experts) -> tuple[int]:
    return (work_blocks(routes, experts.count) * triton.cdiv(experts.outputs, tile.block_n),)


def _results(bias: Tensor | None, out: Tensor, routes: Routes, experts: Experts) -> tuple[Any, ...]:
    return bias, out, out.stride(0), routes.order, routes.blocks, work_blocks(routes, experts.count)


def _constants(x: Activations, routes: Routes, experts: Experts) -> dict[str, int]:
    """SHARE pairs read one row of x."""
    share = routes.pairs // _rows(x)
    return {"COUNT": experts.count, "WIDTH": experts.width, "N": experts.outputs, "SHARE": share}


def _rows(x: Activations) -> int:
    return len(x.codes if isinstance(x, A8) else x)


def expert_linear_reference(
    x: Activations, routes: Routes, experts: Experts, out: Tensor, bias: Tensor | None = None
) -> None:
    """As `expert_linear`, pair by pair, by the linears' references."""
    _check(x, routes, experts, out, bias)
    chosen, matrix = routes.chosen, experts.matrix
    share = routes.pairs // max(1, _rows(x))
    for pair, expert in enumerate(routes.table[:, :chosen].reshape(-1).tolist()):
        if expert == experts.count:
            continue
        for first in range(0, experts.outputs, experts.width):
            begin = first * experts.count + expert * experts.width
            rows = slice(begin, begin + experts.width)
            linear_reference(
                x[pair // share : pair // share + 1],
                matrix.slice(rows.start, rows.stop),
                out[pair : pair + 1, first : first + experts.width],
                bias[rows] if bias is not None else None,
            )


def _check(
    x: Activations, routes: Routes, experts: Experts, out: Tensor, bias: Tensor | None
) -> tuple[str, bool]:
    """The kind of x, and whether it is bfloat16. Raises ValueError where it does not go with the weights."""
    matrix, kind = experts.matrix, "A8-g32" if isinstance(x, A8) else "f32"
    sixteen = isinstance(x, Tensor) and x.dtype == torch.bfloat16
    kind = "bf16" if sixteen else kind
    if (kind, matrix.bits) not in _TAKEN:
        raise ValueError(f"no experts' product takes {kind} activations with weights of {matrix.bits} bits")
    check_activations(x, _rows(x), matrix.cols)
    assert _rows(x) in (routes.table.shape[0], routes.pairs), (_rows(x), routes.table.shape)
    assert out.dtype == torch.float32
    assert out.shape == (routes.pairs, experts.outputs), (out.shape, routes.pairs, experts.outputs)
    assert matrix.rows == experts.outputs * experts.count
    assert experts.outputs % experts.width == 0
    assert bias is None or (bias.shape == (matrix.rows,) and bias.dtype == torch.float32)
    if matrix.scales is None:
        assert matrix.codes.is_contiguous()
        assert matrix.codes.shape == (matrix.rows, matrix.cols)
    else:
        check_quantised(matrix)
    return kind, sixteen


_TAKEN = {("f32", 32), ("bf16", 16), ("bf16", 4), ("bf16", 8), ("A8-g32", 4), ("A8-g32", 8)}
