"""A linear layer: which product serves which activations and weights, and the dense ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ridgeline.execution.cuda.arrays import A8, Activations, Packed
from ridgeline.execution.cuda.kernels.integer import integer, integer_reference
from ridgeline.execution.cuda.kernels.weight_only import weight_only, weight_only_reference

Product = Callable[[Any, Packed, Tensor, Tensor | None], None]


def linear(x: Activations, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> None:
    """out = x @ W.T + bias: x (rows, inputs), W (outputs, inputs), out float32 (rows, outputs).

    `out` may be some columns of a wider tensor, and so may a tensor x; bias is float32 (outputs,). Sums are
    float32. Raises ValueError, with the reason of each candidate, when none takes these types.
    """
    if out.shape[0]:
        _candidate(x, matrix).run(x, matrix, out, bias)


def linear_reference(x: Activations, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> None:
    """The same in plain PyTorch, summed in float64."""
    if out.shape[0]:
        _candidate(x, matrix).reference(x, matrix, out, bias)


def dense(x: Tensor, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> None:
    """The product of unquantised values of one type, float32 or bfloat16, by PyTorch.

    For float32 the caller has switched TF32 off, which is a setting of the whole process.
    """
    weights = matrix.codes
    assert x.dtype == weights.dtype
    assert out.dtype == torch.float32
    assert out.shape == (x.shape[0], matrix.rows)
    if x.dtype == torch.float32:
        torch.mm(x, weights.t(), out=out)
    elif x.is_cuda:
        torch.mm(x, weights.t(), out_dtype=torch.float32, out=out)
    else:  # only CUDA multiplies bfloat16 into float32
        torch.mm(x.to(torch.float32), weights.to(torch.float32).t(), out=out)
    if bias is not None:
        out += bias


def dense_reference(x: Tensor, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> None:
    """The same product, summed in float64."""
    product = x.to(torch.float64) @ matrix.codes.to(torch.float64).t()
    out.copy_(product if bias is None else product + bias)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A product, and the kind of activations and bits of weights that it takes."""

    name: str
    kind: str
    bits: tuple[int, ...]
    run: Product
    reference: Product

    def refusal(self, kind: str, bits: int) -> str | None:
        """Why this product does not take these, or None when it does."""
        if kind != self.kind:
            return f"{self.name} takes {self.kind} activations"
        if bits not in self.bits:
            return f"{self.name} takes weights of {' or '.join(map(str, self.bits))} bits"
        return None


_CANDIDATES = (
    _Candidate("dense float32", "f32", (32,), dense, dense_reference),
    _Candidate("dense bfloat16", "bf16", (16,), dense, dense_reference),
    _Candidate("weight-only", "bf16", (4, 8), weight_only, weight_only_reference),
    _Candidate("integer", "A8-g32", (4, 8), integer, integer_reference),
)

_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _candidate(x: Activations, matrix: Packed) -> _Candidate:
    kind = "A8-g32" if isinstance(x, A8) else _KINDS.get(x.dtype, str(x.dtype))
    refusals = []
    for candidate in _CANDIDATES:
        refusal = candidate.refusal(kind, matrix.bits)
        if refusal is None:
            return candidate
        refusals.append(refusal)
    raise ValueError(
        f"no product takes {kind} activations with weights of {matrix.bits} bits: {'; '.join(refusals)}"
    )
