"""Copying of pages of sequence memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_BYTES = 8192


@triton.jit(do_not_specialize_on_alignment=["pairs"])
def _copy_pages_kernel(pool, layer_stride, pairs, VALUES: tl.constexpr, BLOCK: tl.constexpr):
    pair, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(pairs + 2 * pair).to(tl.int64)
    target = tl.load(pairs + 2 * pair + 1).to(tl.int64)
    pool += layer * layer_stride
    held = tl.load(pool + source * VALUES + i, mask=i < VALUES, other=0.0)
    tl.store(pool + target * VALUES + i, held, mask=i < VALUES)


def copy_pages(pool: Tensor, pairs: Tensor) -> None:
    """Copy pages of every layer of a memory group in one launch, in any order.

    `pool` (layers, pages, ...) holds the values of a page side by side; `pairs` int32 (n, 2) are source and
    target. No page may be written twice, nor written and read: see `independent_runs`.
    """
    count, values = _check(pool, pairs)
    if count == 0:
        return
    block, num_warps = _configuration(values, pool.element_size())
    grid = (count, pool.shape[0], triton.cdiv(values, block))
    _copy_pages_kernel[grid](pool, pool.stride(0), pairs, VALUES=values, BLOCK=block, num_warps=num_warps)


def copy_pages_reference(pool: Tensor, pairs: Tensor) -> None:
    """As `copy_pages`, one pair after the other."""
    _check(pool, pairs)
    for source, target in pairs.tolist():
        pool[:, target] = pool[:, source]


def independent_runs(moves: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut copies (source, target) into runs, each of which may be done in any order.

    The runs, one after the other, do what the copies do one after the other: within a run no page is written
    twice, nor written and read. A copy of a page onto itself is left out.
    """
    runs: list[list[tuple[int, int]]] = []
    read: set[int] = set()
    written: set[int] = set()
    for source, target in moves:
        if source == target:
            continue
        if not runs or source in written or target in written or target in read:
            runs.append([])
            read, written = set(), set()
        runs[-1].append((source, target))
        read.add(source)
        written.add(target)
    return runs


def check_pool(pool: Tensor, scales: Tensor | None) -> None:
    """Assert that a layer's pool (pages, kv_heads, 2, PAGE_TOKENS, head_dim) holds what kernels read:
    bfloat16 or float32, or int8 codes with float32 `scales` (pages, kv_heads, 2, PAGE_TOKENS)."""
    if scales is None:
        assert pool.dtype in (torch.float32, torch.bfloat16), pool.dtype
        return
    assert pool.dtype == torch.int8, pool.dtype
    assert scales.dtype == torch.float32, scales.dtype
    assert scales.shape == pool.shape[:-1], (scales.shape, pool.shape)
    assert scales.is_contiguous()


def _configuration(values: int, value_bytes: int) -> tuple[int, int]:
    """Values of a program, and its warps: four 16-byte loads in flight for each of 128 threads."""
    return min(triton.next_power_of_2(values), _BLOCK_BYTES // value_bytes), 4


def _check(pool: Tensor, pairs: Tensor) -> tuple[int, int]:
    """How many pairs there are, and values in a page of a layer."""
    assert pool.dim() >= 3, pool.shape
    assert pool.dtype in (torch.float32, torch.bfloat16, torch.int8), pool.dtype
    assert pool[0].is_contiguous()
    assert pairs.dim() == 2, pairs.shape
    assert pairs.shape[1] == 2, pairs.shape
    assert pairs.dtype == torch.int32, pairs.dtype
    assert pairs.is_contiguous()
    return pairs.shape[0], math.prod(pool.shape[2:])
