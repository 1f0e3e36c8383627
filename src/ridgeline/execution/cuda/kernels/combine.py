"""The weighed sum of what a row's experts gave."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution.cuda.arrays import Routes
from ridgeline.execution.cuda.kernels.quantise import check_float32, column_block


@triton.jit
def _combine_kernel(
    x,
    x_stride,
    table,
    table_stride,
    shared,
    shared_stride,
    out,
    out_stride,
    CHOSEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    scores = table + row * table_stride + CHOSEN
    x += row * CHOSEN * x_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(CHOSEN):
        score = tl.load(scores + k).to(tl.float32, bitcast=True)
        total += score * tl.load(x + k * x_stride + columns, mask=mask, other=0.0)
    if shared is not None:
        share = tl.load(scores + CHOSEN).to(tl.float32, bitcast=True)
        total += share * tl.load(shared + row * shared_stride + columns, mask=mask, other=0.0)
    tl.store(out + row * out_stride + columns, total, mask=mask)


def combine(x: Tensor, routes: Routes, out: Tensor, shared: Tensor | None = None) -> None:
    """out = the sum over a row's pairs of score * x, in the order of the scores, plus the shared neighbour's
    share of `shared`. x float32 (pairs, width); out and shared float32 (rows, width)."""
    _check(x, routes, out, shared)
    rows, width = out.shape
    if rows == 0:
        return
    block, num_warps = column_block(width)
    _combine_kernel[(rows, triton.cdiv(width, block))](
        x,
        x.stride(0),
        routes.table,
        routes.table.stride(0),
        shared,
        shared.stride(0) if shared is not None else 0,
        out,
        out.stride(0),
        CHOSEN=routes.chosen,
        WIDTH=width,
        BLOCK=block,
        num_warps=num_warps,
    )


def combine_reference(x: Tensor, routes: Routes, out: Tensor, shared: Tensor | None = None) -> None:
    """As `combine`, in float64."""
    _check(x, routes, out, shared)
    scores = routes.table[:, routes.chosen :].contiguous().view(torch.float32).double()
    each = x.double().view(len(out), routes.chosen, -1)
    total = (scores[:, : routes.chosen, None] * each).sum(dim=1)
    if shared is not None:
        total += scores[:, routes.chosen :] * shared
    out.copy_(total)


def _check(x: Tensor, routes: Routes, out: Tensor, shared: Tensor | None) -> None:
    check_float32(x, out)
    assert out.shape[0] == routes.table.shape[0], (out.shape, routes.table.shape)
    assert x.shape == (routes.pairs, out.shape[1]), (x.shape, routes.pairs, out.shape)
    assert (shared is not None) == routes.shared
    if shared is not None:
        check_float32(shared)
        assert shared.shape == out.shape, (shared.shape, out.shape)
