"""Tensors for tests of kernels: on the GPU where there is one, else for Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from ridgeline.execution.cuda.arrays import A8, Activations, empty_activations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = ("f32", "bf16", "A8-g32")
SPARE = 2  # rows of an output after those that a kernel is given
STALE_CODE = 77


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def views(*widths: int, rows: int, seed: int = 0) -> list[Tensor]:
    """Column views of one tensor, whose rows hold NaN after them."""
    whole = torch.full((rows, sum(widths) + 5), torch.nan, device=DEVICE)
    whole[:, : sum(widths)] = normal(rows, sum(widths), seed=seed)
    return list(whole[:, : sum(widths)].split(widths, dim=1))


def poisoned(kind: str, rows: int, width: int) -> Activations:
    """An output with SPARE rows more, all of it stale."""
    out = empty_activations(kind, rows + SPARE, width, DEVICE)
    if isinstance(out, A8):
        out.codes.fill_(STALE_CODE)
        out.scales.fill_(torch.nan)
    else:
        out.fill_(torch.nan)
    return out


def assert_written(out: Activations, expected: Tensor, tolerance: float = 2e-6) -> None:
    """The rows of `out` hold the float32 `expected` in its kind, and what follows them is stale."""
    rows, width = expected.shape
    if not isinstance(out, A8):
        if out.dtype == torch.bfloat16:
            tolerance = max(tolerance, 2**-8)  # a neighbour, where float32 stands near a tie
        torch.testing.assert_close(out[:rows].float(), expected, rtol=tolerance, atol=tolerance)
        assert out[rows:].isnan().all()
        return
    groups = out.scales.shape[1]
    padded = torch.zeros(rows, groups * 32, device=DEVICE)
    padded[:, :width] = expected
    scales = padded.reshape(rows, groups, 32).abs().amax(2) / 127
    torch.testing.assert_close(out.scales[:rows], scales, rtol=1e-5, atol=tolerance / 127)
    step = scales.repeat_interleave(32, dim=1)
    assert ((out.codes[:rows] * step - padded).abs() <= 0.501 * step + tolerance).all()
    assert not out.codes[:rows, width:].any()
    assert (out.codes[rows:] == STALE_CODE).all()
    assert out.scales[rows:].isnan().all()
