"""Is it right on this GPU? Products, and what works on rows, against float64 on samples.

Errors are the largest difference of any value, as a share of that value's size plus the root mean square of
all: one wrong value is found, and a value near 0 asks no more than the others. Where results are rounded to
bfloat16 a neighbour is allowed for. Of A8-g32 the error is the share of codes that differ, by one at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from gpu_kernels import launch_label
from gpu_models import Model, random_matrix
from torch import Tensor

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.cuda.arrays import (
    A8,
    Activations,
    NormWeights,
    Packed,
    empty_activations,
)
from ridgeline.execution.cuda.device import Device
from ridgeline.execution.cuda.kernels.activate import activate, activate_reference
from ridgeline.execution.cuda.kernels.embed import embed, embed_reference
from ridgeline.execution.cuda.kernels.linear import linear, linear_reference
from ridgeline.execution.cuda.kernels.norm import residual_norm, residual_norm_reference
from ridgeline.execution.cuda.kernels.quantise import quantise, quantise_reference
from ridgeline.execution.cuda.kernels.rope import (
    Heads,
    Rope,
    rope_store,
    rope_store_reference,
    rope_table,
    rope_table_reference,
)
from ridgeline.execution.cuda.launches import LinearLaunch
from ridgeline.execution.cuda.lower import lower

SAMPLED_ROWS, SAMPLED_OUTPUTS = 16, 64

FLOAT32 = 2e-5
"""Norms, activations, rotations: a few roundings of float32."""
BFLOAT16 = 2.0**-7
"""A neighbouring bfloat16."""
CODES = 2e-3
"""float32 results that stand near a tie may become the one code or the other."""
PRODUCTS = {"f32": 1e-4, "bf16": 5e-4, "A8-g32": 1e-4}
"""float32 sums of up to 14336 products; tensor cores cut off what they add instead of rounding it."""


@dataclass(frozen=True)
class Check:
    """An error beside its limit; what is no number is beyond every limit."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


# ------------------------------------------------------------------------------------------- errors


def worst(out: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the expected value's size and of the root mean square."""
    wide = expected.double()
    difference = (out.double() - wide).abs()
    return float((difference / (wide.abs() + wide.square().mean().sqrt())).max())


def code_error(out: A8, expected: A8) -> float:
    """The share of codes that differ; infinite where one differs by more than 1, or a scale clearly."""
    if not worst(out.scales, expected.scales) <= FLOAT32:
        return math.inf
    difference = (out.codes.int() - expected.codes.int()).abs()
    return float((difference > 0).double().mean()) if int(difference.max()) <= 1 else math.inf


def compared(name: str, out: Activations, expected: Activations, limit: float = FLOAT32) -> Check:
    """`limit` is that of float32 values; rounded ones have theirs."""
    if isinstance(out, A8):
        assert isinstance(expected, A8)
        return Check(name, code_error(out, expected), CODES)
    assert isinstance(expected, Tensor)
    return Check(name, worst(out, expected), BFLOAT16 if out.dtype == torch.bfloat16 else limit)


def poisoned(kind: str, rows: int, width: int, where: torch.device) -> Activations:
    """An output that shows what was not written to it."""
    out = empty_activations(kind, rows, width, where)
    if isinstance(out, A8):
        out.codes.fill_(77)
        out.scales.fill_(torch.nan)
    else:
        out.fill_(torch.nan)
    return out


class Checker:
    """Checks a model's kernels in its own shapes, on random values."""

    def __init__(self, model: Model, device: Device) -> None:
        self._model = model
        self._device = device
        self._where = device.where
        self._random = torch.Generator(device.where).manual_seed(7)

    # -- products

    def linears(self, rows: tuple[int, ...]) -> Iterator[Check]:
        """All products of a layer and the head, each with so many rows."""
        one_layer = replace(self._model.spec, layers=self._model.spec.layers[:1])
        program = Model.of("", one_layer, self._model.format).program
        for launch in lower(program):
            if not isinstance(launch, LinearLaunch):
                continue
            inputs = launch.x.width
            outputs = sum(op.out.width for op in launch.linears)
            matrix = random_matrix(outputs, inputs, self._model.bits, inputs**-0.5, self._random)
            for count in rows:
                name = f"linear {launch_label(launch)} {outputs}x{inputs}, {count} rows"
                yield self._linear(name, matrix, count)

    def _linear(self, name: str, matrix: Packed, rows: int) -> Check:
        x = self._activations(rows, matrix.cols)
        out = poisoned("f32", rows, matrix.rows, self._where)
        assert isinstance(out, Tensor)
        linear(x, matrix, out)
        some_rows, columns = self._sample(rows, SAMPLED_ROWS), self._sample(matrix.rows, SAMPLED_OUTPUTS)
        scales = matrix.scales[columns] if matrix.scales is not None else None
        expected = torch.empty((len(some_rows), len(columns)), device=self._where)
        part = Packed(matrix.bits, matrix.cols, matrix.codes[columns], scales)
        linear_reference(_picked(x, some_rows), part, expected)
        error = worst(out[some_rows][:, columns], expected)
        whole = bool(torch.isfinite(out).all())
        return Check(name, error if whole else math.inf, PRODUCTS[self._model.kind])

    # -- rows

    def row_kernels(self, rows: int) -> Iterator[Check]:
        """Everything that works on one row at a time."""
        spec, kind = self._model.spec, self._model.kind
        hidden, width = spec.hidden, spec.layers[0].feed_forward.width
        gain = NormWeights("rms", spec.norm.eps, 1 + 0.1 * self._normal(hidden))
        x, stream = self._normal(rows, hidden), self._normal(rows, hidden)
        yield self._against(
            f"residual norm to {kind}, {rows} x {hidden}",
            (kind, rows, hidden),
            lambda out: residual_norm(x, out, gain, residual=stream.clone()),
            lambda out: residual_norm_reference(x, out, gain, residual=stream.clone()),
        )
        some = torch.arange(rows - 1, -1, -2, dtype=torch.int32, device=self._where)
        yield self._against(
            f"norm of picked rows to {kind}",
            (kind, len(some), hidden),
            lambda out: residual_norm(x, out, gain, rows=some),
            lambda out: residual_norm_reference(x, out, gain, rows=some),
        )
        gate, up = self._columns(rows, width, width)
        yield self._against(
            f"activate to {kind}, {rows} x {width}",
            (kind, rows, width),
            lambda out: activate(gate, out, "silu", up),
            lambda out: activate_reference(gate, out, "silu", up),
        )
        rounded = self._against(
            f"quantise to {kind}",
            (kind, rows, hidden),
            lambda o: quantise(x, o),
            lambda o: quantise_reference(x, o),
        )
        yield replace(rounded, limit=0.0)  # the same float32 has only one rounding
        yield self._embed(rows)
        yield from self._rope(rows)

    def _against(
        self,
        name: str,
        shape: tuple[str, int, int],
        run: Callable[[Any], None],
        reference: Callable[[Any], None],
    ) -> Check:
        out, expected = poisoned(*shape, self._where), empty_activations(*shape, self._where)
        run(out)
        reference(expected)
        return compared(name, out, expected)

    def _embed(self, rows: int) -> Check:
        spec = self._model.spec
        table = random_matrix(spec.vocabulary, spec.hidden, self._model.bits, 1.0, self._random)
        ids = torch.randint(0, spec.vocabulary, (rows,), generator=self._random, device=self._where).int()
        ids[::3] = -1 - ids[::3] % 4  # tokens that the step before has drawn
        drawn = torch.tensor([-1, spec.vocabulary - 1, 0, 5], dtype=torch.int32).to(self._where)
        sixteen = self._model.kind == "bf16"
        return self._against(
            f"embed {self._model.bits} bits",
            ("f32", rows, spec.hidden),
            lambda out: embed(ids, drawn, table, out, scale=1.0, sixteen=sixteen, accumulate=False),
            lambda out: embed_reference(ids, drawn, table, out, scale=1.0, sixteen=sixteen, accumulate=False),
        )

    def _rope(self, rows: int) -> Iterator[Check]:
        attention = self._model.spec.layers[0].attention
        assert attention.rope is not None
        frequencies = torch.tensor(attention.rope.frequencies).to(self._where)
        positions = torch.randint(
            0, self._model.spec.context, (rows,), generator=self._random, device=self._where
        ).int()
        tables = torch.full((4, rows, len(frequencies)), torch.nan, device=self._where)
        rope_table(positions, frequencies, tables[0], tables[1])
        rope_table_reference(positions, frequencies, tables[2], tables[3])
        yield compared("rope table", tables[:2], tables[2:])
        yield self._rope_store(rows, Rope(tables[2], tables[3]))

    def _rope_store(self, rows: int, rope: Rope) -> Check:
        attention = self._model.spec.layers[0].attention
        heads = Heads(attention.heads, attention.kv_heads, attention.head_dim)
        widths = [count * heads.head_dim for count in (heads.heads, heads.kv_heads, heads.kv_heads)]
        query, key, value = self._columns(rows, *widths)
        norm = NormWeights("rms", 1e-6, 1 + 0.1 * self._normal(heads.head_dim)) if attention.qk_norm else None
        order = torch.randperm(rows, generator=self._random, device=self._where)
        slots = order.int()
        shape = (rows // PAGE_TOKENS + 1, heads.kv_heads, 2, PAGE_TOKENS, heads.head_dim)
        kind = "bf16" if self._model.kind == "bf16" else "f32"
        found = []
        for store in (rope_store, rope_store_reference):
            pool = torch.zeros(shape, dtype=torch.bfloat16, device=self._where)
            out = poisoned(kind, rows, widths[0], self._where)
            assert isinstance(out, Tensor)
            store(query, key, value, out, pool, slots, heads, rope=rope, query_norm=norm, key_norm=norm)
            found.append((out, pool))
        (out, pool), (expected, expected_pool) = found
        queries = compared(f"rope and store, {kind} queries", out, expected)
        # Keys and values are rounded, so their error is let pass up to a neighbour.
        stored = worst(pool, expected_pool)
        return queries if stored <= BFLOAT16 else replace(queries, error=stored)

    # -- helpers

    def _activations(self, rows: int, width: int) -> Activations:
        if self._model.kind != "A8-g32":
            return self._normal(rows, width).to(
                torch.bfloat16 if self._model.kind == "bf16" else torch.float32
            )
        out = empty_activations("A8-g32", rows, width, self._where)
        quantise(self._normal(rows, width), out)
        return out

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, device=self._where)

    def _columns(self, rows: int, *widths: int) -> list[Tensor]:
        """Neighbouring columns of one tensor, as products leave their results."""
        whole = self._normal(rows, sum(widths))
        return [whole[:, end - width : end] for width, end in zip(widths, accumulate(widths), strict=True)]

    def _sample(self, count: int, most: int) -> Tensor:
        """Some of 0 … count − 1, the first and the last among them."""
        order = torch.randperm(count, generator=self._random, device=self._where)[:most]
        return torch.tensor(sorted({0, count - 1, *order.tolist()})).to(self._where)


def _picked(x: Activations, rows: Tensor) -> Activations:
    return A8(x.codes[rows], x.scales[rows]) if isinstance(x, A8) else x[rows]
