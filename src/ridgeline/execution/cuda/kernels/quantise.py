"""How kernels write a row of activations: float32, bfloat16 or A8-g32.

The rule of A8-g32 stands in `precision/quantise.py`; its codes and scales are reproduced bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution.cuda.arrays import A8, GROUP, Activations, padded_groups
from ridgeline.precision.quantise import TINY, quantise_activations

_GROUP = tl.constexpr(GROUP)
_TINY = tl.constexpr(float(TINY))
_RECIPROCAL_127 = tl.constexpr(float(np.float32(1 / 127)))
_MAGIC = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def codes_of(values, largest):
    """int8 codes of float32 `values`; `largest`, of a shape that fits, are the magnitudes of their groups."""
    inverse = tl.math.div_rn(127.0, tl.where(largest >= _TINY, largest, 1.0))
    inverse = tl.where(largest >= _TINY, inverse, 0.0)
    # Clipping before rounding gives the same codes, and keeps the compiler from fusing the product and
    # the sum below into one operation that would round only once.
    scaled = tl.minimum(tl.maximum(values * inverse, -127.0), 127.0)
    # At this size a float32's unit is 1, so the sum is rounded half to even; its low byte is the code.
    return (scaled + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def scale_of(largest):
    """What the codes of a group with this largest magnitude are multiplied with."""
    return largest * _RECIPROCAL_127


@triton.jit
def store_row(out, scales, begin, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write float32 `y` (BLOCK,), the values from column `begin` of a row of WIDTH values, to the row `out`.

    `scales` is the row of A8-g32's scales, and `out` that of its codes, zeros after WIDTH; or `scales` is
    None, and `y` is rounded to the type of `out`. `begin` and BLOCK are multiples of 32.
    """
    columns = begin + tl.arange(0, BLOCK)
    if scales is None:
        tl.store(out + columns, y.to(out.dtype.element_ty), mask=columns < WIDTH)
    else:
        GROUPS: tl.constexpr = (WIDTH + _GROUP - 1) // _GROUP
        grouped = tl.reshape(tl.where(columns < WIDTH, y, 0.0), (BLOCK // _GROUP, _GROUP))
        largest = tl.max(tl.abs(grouped), axis=1)
        codes = codes_of(grouped, largest[:, None])
        tl.store(out + columns, tl.reshape(codes, (BLOCK,)), mask=columns < GROUPS * _GROUP)
        groups = begin // _GROUP + tl.arange(0, BLOCK // _GROUP)
        tl.store(scales + groups, scale_of(largest), mask=groups < GROUPS)


@triton.jit
def _quantise_kernel(
    x, x_stride, out, out_stride, scales, scales_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    columns = begin + tl.arange(0, BLOCK)
    y = tl.load(x + row * x_stride + columns, mask=columns < WIDTH, other=0.0)
    if scales is not None:
        scales += row * scales_stride
    store_row(out + row * out_stride, scales, begin, y, WIDTH, BLOCK)


def quantise(x: Tensor, out: Activations) -> None:
    """Round float32 `x` (rows, width) to the kind of `out`. Columns of a row lie side by side."""
    rows, width = x.shape
    check_float32(x)
    check_activations(out, rows, width)
    if rows == 0:
        return
    block, num_warps = column_block(width)
    grid = (rows, triton.cdiv(width, block))
    _quantise_kernel[grid](x, x.stride(0), *row_arguments(out), WIDTH=width, BLOCK=block, num_warps=num_warps)


def quantise_reference(x: Tensor, out: Activations) -> None:
    """As `quantise`, by `precision.quantise` and PyTorch."""
    if not isinstance(out, A8):
        out.copy_(x)
        return
    codes, scales = quantise_activations(x.detach().cpu().numpy())
    out.codes.copy_(torch.from_numpy(codes))
    out.scales.copy_(torch.from_numpy(scales))


def column_block(width: int) -> tuple[int, int]:
    """Columns of a program that need not see its whole row, and its warps.

    Eight values for each thread are two 16-byte loads in flight; blocks of at most 1024 columns keep even a
    single row of a feed-forward layer spread over several multiprocessors.
    """
    block = min(max(triton.next_power_of_2(width), GROUP), 1024)
    return block, max(block // 256, 1)


def row_arguments(out: Activations) -> tuple[Tensor, int, Tensor | None, int]:
    """What a kernel with `store_row` is given: values or codes, their row stride, scales and theirs."""
    if isinstance(out, A8):
        return out.codes, out.codes.stride(0), out.scales, out.scales.stride(0)
    return out, out.stride(0), None, 0


def check_float32(*tensors: Tensor) -> None:
    """Assert that each is float32 (rows, width) with the values of a row side by side."""
    for tensor in tensors:
        assert tensor.dtype == torch.float32, tensor.dtype
        _check_rows(tensor, *tensor.shape)


def check_activations(out: Activations, rows: int, width: int) -> None:
    """Assert that `out` has room for exactly (rows, width) values of its kind."""
    if isinstance(out, A8):
        groups = padded_groups(width)
        assert out.codes.dtype == torch.int8, out.codes.dtype
        assert out.scales.dtype == torch.float32, out.scales.dtype
        _check_rows(out.codes, rows, groups * GROUP)
        _check_rows(out.scales, rows, groups)
    else:
        assert out.dtype in (torch.float32, torch.bfloat16), out.dtype
        _check_rows(out, rows, width)


def _check_rows(tensor: Tensor, rows: int, width: int) -> None:
    assert tensor.shape == (rows, width), (tensor.shape, rows, width)
    assert tensor.stride(1) == 1 or width == 1, tensor.stride()
