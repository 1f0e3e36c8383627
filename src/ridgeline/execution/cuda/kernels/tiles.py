"""What the products with quantised weights share: blocks of the result, their order, their storing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution.cuda.arrays import GROUP, Packed, padded_groups

TOGETHER = 8
"""Blocks of rows whose programs run next to each other on the same weights, so that L2 serves all but one."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The block of the result that a program computes, the groups of inputs that it takes at a time, and the
    threads and pipeline stages that it does so with."""

    block_m: int
    block_n: int
    block_groups: int
    num_warps: int
    num_stages: int

    def grid(self, rows: int, outputs: int) -> tuple[int]:
        """Programs that cover the result; `block_of_program` says which one has which block."""
        return (triton.cdiv(rows, self.block_m) * triton.cdiv(outputs, self.block_n),)


@triton.jit
def block_of_program(rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr):
    """Which block of rows and which block of outputs this program computes."""
    m_blocks, n_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (TOGETHER * n_blocks) * TOGETHER
    height = tl.minimum(m_blocks - first, TOGETHER)
    within = program % (TOGETHER * n_blocks)
    return first + within % height, within // height


@triton.jit
def store_block(total, bias, out, out_stride, m, n, rows, N, HAS_BIAS: tl.constexpr):
    """Add the bias to `total` (outputs, rows) and store it as (rows, outputs)."""
    result = tl.trans(total)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    places = out + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(places, result, mask=(m < rows)[:, None] & (n < N)[None, :])


def check_packed(matrix: Packed, rows: int, out: Tensor, bias: Tensor | None) -> Tensor:
    """Assert what the kernels rely on in a quantised matrix and in the result, and give the scales."""
    scales = check_quantised(matrix)
    assert out.dtype == torch.float32
    assert out.shape == (rows, matrix.rows)
    assert out.stride(1) == 1
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == (matrix.rows,))
    assert bias is None or bias.stride(0) == 1
    return scales


def check_quantised(matrix: Packed) -> Tensor:
    """Assert what the kernels rely on in a quantised matrix, and give its scales."""
    groups, scales = padded_groups(matrix.cols), matrix.scales
    assert matrix.bits in (4, 8)
    assert matrix.codes.dtype == (torch.uint8 if matrix.bits == 4 else torch.int8)
    assert matrix.codes.shape == (matrix.rows, groups * GROUP * matrix.bits // 8)
    assert matrix.codes.is_contiguous()
    assert scales is not None
    assert scales.dtype == torch.float16
    assert scales.shape == ((matrix.rows, groups, 2) if matrix.bits == 4 else (matrix.rows, groups))
    assert scales.is_contiguous()
    return scales
