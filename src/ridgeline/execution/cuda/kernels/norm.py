"""Adding to the residual stream, norms, and gathering of rows, in one pass over each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution.cuda.arrays import A8, GROUP, Activations, NormWeights
from ridgeline.execution.cuda.kernels.quantise import (
    check_activations,
    check_float32,
    quantise_reference,
    row_arguments,
    store_row,
)

MAX_WIDTH = 16384
"""The widest row that a program holds in registers."""


@triton.jit
def inverse_rms(squares, eps, WIDTH: tl.constexpr):
    """1 / sqrt(mean + eps) of `squares`, a sum over WIDTH values."""
    return tl.rsqrt(squares / WIDTH + eps)


@triton.jit
def _normalise(y, columns, weight, bias, eps, LAYER: tl.constexpr, WIDTH: tl.constexpr):
    """The norm of a row `y`, which is zero after WIDTH and stays so."""
    mask = columns < WIDTH
    if LAYER:
        y = tl.where(mask, y - tl.sum(y, axis=0) / WIDTH, 0.0)
    y = y * inverse_rms(tl.sum(y * y, axis=0), eps, WIDTH)
    y *= tl.load(weight + columns, mask=mask, other=0.0)
    if bias is not None:
        y += tl.load(bias + columns, mask=mask, other=0.0)
    return y


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _residual_norm_kernel(
    x,
    x_stride,
    rows,
    residual,
    residual_stride,
    out,
    out_stride,
    scales,
    scales_stride,
    before_weight,
    before_bias,
    before_eps,
    weight,
    bias,
    eps,
    BEFORE_LAYER: tl.constexpr,
    LAYER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    if rows is not None:
        x += tl.load(rows + row).to(tl.int64) * x_stride
    else:
        x += row * x_stride
    y = tl.load(x + columns, mask=mask, other=0.0)
    if before_weight is not None:
        y = _normalise(y, columns, before_weight, before_bias, before_eps, BEFORE_LAYER, WIDTH)
    if residual is not None:
        residual += row * residual_stride
        y += tl.load(residual + columns, mask=mask, other=0.0)
        tl.store(residual + columns, y, mask=mask)
    if weight is not None:
        if scales is not None:
            scales += row * scales_stride
        y = _normalise(y, columns, weight, bias, eps, LAYER, WIDTH)
        store_row(out + row * out_stride, scales, 0, y, WIDTH, BLOCK)


def residual_norm(
    x: Tensor,
    out: Activations | None,
    norm: NormWeights | None,
    *,
    before: NormWeights | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """Add rows to the residual stream and normalise what comes of it; each part may be left out.

    For each row i of `out`, with y = x[rows[i]] where the int32 `rows` (count,) are given, else y = x[i]:
    y = before(y); residual[i] += y, and y = residual[i]; out[i] = norm(y) as out's kind. `x` and `residual`
    are float32 (rows, width), width up to 16384. `out` may share the memory of an ungathered `x`.

    RMS norm: arXiv:1910.07467; layer norm: arXiv:1607.06450. Raises ValueError for parts that do not go
    together.
    """
    count = _check(x, out, norm, before, residual, rows)
    if count == 0:
        return
    width = x.shape[1]
    block, num_warps = _configuration(width)
    _residual_norm_kernel[(count,)](
        x,
        x.stride(0),
        rows,
        residual,
        residual.stride(0) if residual is not None else 0,
        *(row_arguments(out) if out is not None else (None, 0, None, 0)),
        *_norm_arguments(before),
        *_norm_arguments(norm),
        BEFORE_LAYER=before is not None and before.kind == "layer",
        LAYER=norm is not None and norm.kind == "layer",
        WIDTH=width,
        BLOCK=block,
        num_warps=num_warps,
    )


def residual_norm_reference(
    x: Tensor,
    out: Activations | None,
    norm: NormWeights | None,
    *,
    before: NormWeights | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """As `residual_norm`, in float64 but for the stream itself."""
    count = _check(x, out, norm, before, residual, rows)
    y = x[rows.long()] if rows is not None else x[:count]
    if before is not None:
        y = norm_reference(y, before)
    if residual is not None:
        residual[:count] += y
        y = residual[:count]
    if out is not None and norm is not None:
        quantise_reference(norm_reference(y, norm), out)


def norm_reference(x: Tensor, norm: NormWeights) -> Tensor:
    """The norm of the last axis of float32 `x`, computed in float64 and rounded."""
    y = x.double()
    if norm.kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return (y + norm.bias if norm.bias is not None else y).float()


def _configuration(width: int) -> tuple[int, int]:
    """Columns that a program holds, and its warps.

    Sixteen values for each thread, four 16-byte loads in flight, hide the memory's latency in long steps
    and still leave the two reductions of a short one to few warps. 16 warps are the most, with 32 values.
    """
    block = max(triton.next_power_of_2(width), GROUP)
    return block, min(max(block // 512, 1), 16)


def _norm_arguments(norm: NormWeights | None) -> tuple[Tensor | None, Tensor | None, float]:
    return (norm.weight, norm.bias, norm.eps) if norm is not None else (None, None, 0.0)


def _check(
    x: Tensor,
    out: Activations | None,
    norm: NormWeights | None,
    before: NormWeights | None,
    residual: Tensor | None,
    rows: Tensor | None,
) -> int:
    """How many rows there are to do."""
    if (out is None) != (norm is None):
        raise ValueError("a norm needs an output, and an output its norm")
    if out is None and residual is None:
        raise ValueError("there is neither an output nor a residual stream to write to")
    if rows is not None and residual is not None:
        raise ValueError("gathered rows are not added to the residual stream")
    width = x.shape[1]
    assert 0 < width <= MAX_WIDTH, width
    check_float32(x)
    held = out.codes if isinstance(out, A8) else out
    count = held.shape[0] if held is not None else x.shape[0]
    if out is not None:
        check_activations(out, count, width)
    if rows is not None:
        assert rows.shape == (count,), (rows.shape, count)
        assert rows.dtype == torch.int32, rows.dtype
        assert rows.is_contiguous()
    else:
        assert x.shape[0] >= count, (x.shape, count)
    if residual is not None:
        check_float32(residual)
        assert residual.shape[0] >= count, (residual.shape, count)
        assert residual.shape[1] == width, (residual.shape, width)
    for weights in (before, norm):
        if weights is not None:
            check_norm(weights, width)
    return count


def check_norm(norm: NormWeights, *shape: int) -> None:
    """Assert that a norm's gain and bias are float32 of a shape, side by side."""
    for vector in (norm.weight, norm.bias):
        if vector is not None:
            assert vector.shape == shape, (vector.shape, shape)
            assert vector.dtype == torch.float32, vector.dtype
            assert vector.is_contiguous()
