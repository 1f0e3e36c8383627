"""Rows of a table by token id or position, for tables of every width; ids may still be on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution.cuda.arrays import GROUP, Packed, padded_groups
from ridgeline.execution.cuda.kernels.codes import code_rows, load_values, scale_rows
from ridgeline.execution.cuda.pack import dequantise


@triton.jit
def _embed(
    ids,
    drawn,
    codes,
    scales,
    out,
    out_stride,
    scale,
    COLS: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    SIXTEEN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    row = tl.program_id(0)
    group = tl.program_id(1) * BLOCK_GROUPS
    token = tl.load(ids + row)
    draw = tl.load(drawn + tl.maximum(-1 - token, 0), mask=token < 0, other=0)
    token = tl.where(token < 0, tl.maximum(draw, 0), token).to(tl.int64)
    one = tl.zeros((1,), tl.int64) + token
    column = group * 32 + tl.arange(0, BLOCK_GROUPS * 32)
    if BITS >= 16:
        values = tl.load(codes + token * COLS + column, mask=column < COLS, other=0.0).to(tl.float32)
    else:
        rows = code_rows(codes, one, GROUPS, BITS)
        tile = load_values(
            rows, scale_rows(scales, one, GROUPS, BITS), one >= 0, group, GROUPS, BITS, BLOCK_GROUPS
        )
        values = tl.reshape(tile, (BLOCK_GROUPS * 32,))
    if SIXTEEN:
        values = values.to(tl.bfloat16).to(tl.float32)
    values *= scale
    places = out + row.to(tl.int64) * out_stride + column
    if ACCUMULATE:
        values += tl.load(places, mask=column < COLS, other=0.0)
    tl.store(places, values, mask=column < COLS)


def embed(
    ids: Tensor, drawn: Tensor, table: Packed, out: Tensor, *, scale: float, sixteen: bool, accumulate: bool
) -> None:
    """out float32 (rows, cols) = row `id` of the table times `scale`, or += where `accumulate`.

    ids int32 (rows,). An id below 0 stands for a token that is still on the device: drawn[-1 - id], where
    drawn is int32 and its -1 (nothing was drawn) counts as token 0. `sixteen` rounds values to bfloat16
    before the scale, as products with activations of 16 bits do with their weights.
    """
    rows, groups = ids.shape[0], padded_groups(table.cols)
    assert ids.dtype == torch.int32
    assert drawn.dtype == torch.int32
    assert ids.stride(0) == 1
    assert drawn.stride(0) == 1
    assert table.codes.is_contiguous()
    assert table.scales is None or table.scales.is_contiguous()
    assert table.codes.shape[1] == (table.cols if table.bits >= 16 else groups * GROUP * table.bits // 8)
    assert out.dtype == torch.float32
    assert out.shape == (rows, table.cols)
    assert out.stride(1) == 1
    if rows == 0:
        return
    # A row has a few kilobytes: programs of 1024 values keep more than one of them in flight for a lone row.
    block_groups = min(triton.next_power_of_2(groups), 1024 // GROUP)
    _embed[(rows, triton.cdiv(groups, block_groups))](
        ids,
        drawn,
        table.codes,
        table.scales,
        out,
        out.stride(0),
        scale,
        COLS=table.cols,
        GROUPS=groups,
        BITS=table.bits,
        SIXTEEN=sixteen,
        ACCUMULATE=accumulate,
        BLOCK_GROUPS=block_groups,
        num_warps=4,
        num_stages=1,
    )


def embed_reference(
    ids: Tensor, drawn: Tensor, table: Packed, out: Tensor, *, scale: float, sixteen: bool, accumulate: bool
) -> None:
    """The same in plain PyTorch."""
    tokens = ids.to(torch.int64)
    for row in (tokens < 0).nonzero().flatten().tolist():
        tokens[row] = max(int(drawn[-1 - tokens[row]]), 0)
    scales = table.scales[tokens] if table.scales is not None else None
    values = dequantise(Packed(table.bits, table.cols, table.codes[tokens], scales))
    if sixteen:
        values = values.to(torch.bfloat16).to(torch.float32)
    values = values * torch.tensor(scale, dtype=torch.float32)
    out.copy_(out + values if accumulate else values)
