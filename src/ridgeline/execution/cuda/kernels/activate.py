"""Gated activations, and the soft cap on logits."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution.cuda.arrays import Activations
from ridgeline.execution.cuda.kernels.quantise import (
    check_activations,
    check_float32,
    column_block,
    quantise_reference,
    row_arguments,
    store_row,
)
from ridgeline.model.spec import Activation

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_LEAST, _MOST, _CLAMPED_SLOPE = tl.constexpr(-7.0), tl.constexpr(7.0), tl.constexpr(-1.702)
_GELU_SLOPE = tl.constexpr(-2 * math.sqrt(2 / math.pi))


@triton.jit
def tanh(x):
    """tanh without overflow; a series where the quotient would cancel. Both are good to about 1e-6."""
    e = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - e) / (1.0 + e)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0.0, -size, size))


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "clamped_silu":
        x = tl.minimum(x, _MOST)
        y = x / (1.0 + tl.exp(x * _CLAMPED_SLOPE))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * _SQRT_HALF))
    else:  # 0.5 (1 + tanh u) = 1 / (1 + exp(-2u)), which does not cancel for a negative u
        y = x / (1.0 + tl.exp((x + 0.044715 * x * x * x) * _GELU_SLOPE))
    return y


@triton.jit
def _activate_kernel(
    x,
    x_stride,
    times,
    times_stride,
    out,
    out_stride,
    scales,
    scales_stride,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    columns = begin + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    y = _activation(tl.load(x + row * x_stride + columns, mask=mask, other=0.0), ACTIVATION)
    if times is not None:
        factor = tl.load(times + row * times_stride + columns, mask=mask, other=0.0)
        if ACTIVATION == "clamped_silu":
            factor = tl.minimum(tl.maximum(factor, _LEAST), _MOST) + 1.0
        y *= factor
    if scales is not None:
        scales += row * scales_stride
    store_row(out + row * out_stride, scales, begin, y, WIDTH, BLOCK)


def activate(x: Tensor, out: Activations, activation: Activation, times: Tensor | None = None) -> None:
    """out = activation(x), or activation(x) * times, as out's kind.

    `x` and `times` are float32 (rows, width), usually two column views of one tensor. SiLU and GELU:
    arXiv:1606.08415, whose tanh approximation is "gelu_tanh"; for "clamped_silu" see `model.spec.Activation`.
    """
    rows, width = _check(x, out, activation, times)
    if rows == 0:
        return
    block, num_warps = column_block(width)
    grid = (rows, triton.cdiv(width, block))
    _activate_kernel[grid](
        x,
        x.stride(0),
        times,
        times.stride(0) if times is not None else 0,
        *row_arguments(out),
        ACTIVATION=activation,
        WIDTH=width,
        BLOCK=block,
        num_warps=num_warps,
    )


def activate_reference(
    x: Tensor, out: Activations, activation: Activation, times: Tensor | None = None
) -> None:
    """As `activate`, by PyTorch's functions in float64."""
    _check(x, out, activation, times)
    wide = x.double()
    if activation == "clamped_silu":
        wide = wide.clamp(max=7.0)
        y = wide * torch.sigmoid(1.702 * wide)
        times = times.double().clamp(-7.0, 7.0) + 1.0 if times is not None else None
    elif activation == "silu":
        y = torch.nn.functional.silu(wide)
    else:
        y = torch.nn.functional.gelu(wide, approximate="tanh" if activation == "gelu_tanh" else "none")
    quantise_reference((y * times if times is not None else y).float(), out)


def _check(x: Tensor, out: Activations, activation: Activation, times: Tensor | None) -> tuple[int, int]:
    assert activation in ("silu", "gelu", "gelu_tanh", "clamped_silu"), activation
    rows, width = x.shape
    check_float32(x)
    check_activations(out, rows, width)
    if times is not None:
        check_float32(times)
        assert times.shape == x.shape, (times.shape, x.shape)
    return rows, width


@triton.jit
def _softcap_kernel(x, x_stride, cap, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    x += tl.program_id(0).to(tl.int64) * x_stride
    y = tl.load(x + columns, mask=mask, other=0.0)
    tl.store(x + columns, cap * tanh(y / cap), mask=mask)


def softcap(x: Tensor, cap: float) -> None:
    """Bound logits (arXiv:2408.00118, section 2): x = cap * tanh(x / cap) in place, float32 (rows, width)."""
    check_float32(x)
    assert cap > 0, cap
    rows, width = x.shape
    if rows == 0:
        return
    block, num_warps = column_block(width)
    grid = (rows, triton.cdiv(width, block))
    _softcap_kernel[grid](x, x.stride(0), cap, WIDTH=width, BLOCK=block, num_warps=num_warps)


def softcap_reference(x: Tensor, cap: float) -> None:
    """As `softcap`, in float64."""
    check_float32(x)
    x.copy_(cap * torch.tanh(x.double() / cap))
