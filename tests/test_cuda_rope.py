"""Rotary tables, and rotating and storing of queries, keys and values, against their references."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from cuda_tensors import DEVICE, SPARE, assert_written, normal, poisoned, views
from torch import Tensor

from ridgeline.execution.cuda.arrays import NormWeights
from ridgeline.execution.cuda.kernels.rope import (
    Heads,
    Rope,
    rope_store,
    rope_store_reference,
    rope_table,
    rope_table_reference,
)
from ridgeline.execution.step_arrays import rope_tables
from ridgeline.model.spec import RopeSpec

SHAPES = [
    Heads(4, 2, 64),
    Heads(9, 3, 64),
    Heads(5, 1, 6),
    Heads(3, 3, 50),
    Heads(2, 2, 80),
    Heads(16, 8, 128),
    Heads(1, 1, 16),
]


def frequencies(half: int, theta: float = 10000.0) -> Tensor:
    return (theta ** (-torch.arange(half, dtype=torch.float64) / half)).float().to(DEVICE)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def rope_of(positions: Tensor, half: int) -> Rope:
    rope = Rope(*torch.empty((2, len(positions), half), device=DEVICE))
    rope_table_reference(positions, frequencies(half), rope.cos, rope.sin)
    return rope


# -------------------------------------------------------------------------------------------- table


@pytest.mark.parametrize(("half", "scale"), [(3, 1.0), (25, 1.19), (40, 1.0), (64, 0.7)])
def test_rope_table(half: int, scale: float) -> None:
    positions = ints(0, 1, 2, 3, 17, 511, 4096, 32767, 65535, 99999, 131071, 131070)
    count = len(positions)
    cos, sin = views(half, half, rows=count + SPARE)
    cos.fill_(torch.nan)
    sin.fill_(torch.nan)
    rope_table(positions, frequencies(half), cos[:count], sin[:count], scale)
    spec = RopeSpec(tuple(frequencies(half).tolist()), scale)
    for table, expected in zip((cos, sin), rope_tables(spec, positions.cpu().numpy()), strict=True):
        unit = torch.from_numpy(np.spacing(np.abs(expected))).to(DEVICE)
        difference = (table[:count] - torch.from_numpy(expected).to(DEVICE)).abs()
        assert (difference <= unit).all()
        assert (difference == 0).float().mean() > 0.99  # two ways to float64 that round alike almost always
        assert table[count:].isnan().all()


def test_rope_table_of_no_rows() -> None:
    rope_table(ints(), frequencies(8), *torch.empty((2, 0, 8), device=DEVICE))


# -------------------------------------------------------------------------------------------- store


class Case:
    """A step's queries, keys and values as views of one tensor, and a pool of six pages full of NaN."""

    def __init__(
        self, heads: Heads, rows: int, pool_dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> None:
        kv_width = heads.kv_heads * heads.head_dim
        self.heads = heads
        widths = (heads.heads * heads.head_dim, kv_width, kv_width)
        self.query, self.key, self.value = views(*widths, rows=rows, seed=seed)
        shape = (6, heads.kv_heads, 2, 16, heads.head_dim)
        coded = pool_dtype == torch.int8
        self.pool = torch.full(shape, 99 if coded else torch.nan, dtype=pool_dtype, device=DEVICE)
        self.scales = torch.full(shape[:-1], torch.nan, device=DEVICE) if coded else None

    def check(self, slots: Tensor, query_kind: str, **parts: Rope | NormWeights | Tensor | None) -> None:
        """Launcher and reference give the same queries and pool."""
        rows, width = self.query.shape
        expected, expected_pool = torch.empty((rows, width), device=DEVICE), self.pool.clone()
        expected_scales = None if self.scales is None else self.scales.clone()
        inputs, parts = (self.query, self.key, self.value), parts | {"pool_scales": expected_scales}
        rope_store_reference(*inputs, expected, expected_pool, slots, self.heads, **parts)  # type: ignore[arg-type]
        out = poisoned(query_kind, rows, width)
        assert isinstance(out, Tensor)
        parts["pool_scales"] = self.scales
        rope_store(*inputs, out[:rows], self.pool, slots, self.heads, **parts)  # type: ignore[arg-type]
        assert_written(out, expected)
        if expected_scales is None:
            self.check_pool(expected_pool)
        else:
            self.check_codes(expected_pool, expected_scales)

    def check_codes(self, expected: Tensor, scales: Tensor) -> None:
        """Values bit for bit; keys as near as their rotation is, which may take one to the code beside it."""
        assert self.scales is not None
        torch.testing.assert_close(self.scales, scales, rtol=2e-6, atol=0, equal_nan=True)
        stored = ~scales[:, :, 1].isnan()
        assert torch.equal(self.scales[:, :, 1][stored], scales[:, :, 1][stored])
        assert torch.equal(self.pool[:, :, 1], expected[:, :, 1])
        apart = (self.pool[:, :, 0].int() - expected[:, :, 0].int()).abs()
        assert apart.max() <= 1
        assert apart[stored].float().mean() < 0.02

    def check_pool(self, expected: Tensor) -> None:
        tolerance = 2**-7 if self.pool.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(self.pool, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        stored = ~expected[:, :, 1].isnan()
        assert torch.equal(self.pool[:, :, 1][stored], expected[:, :, 1][stored])  # values are only rounded


@pytest.mark.parametrize("query_kind", ["f32", "bf16"])
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_rotates_and_stores(heads: Heads, pool_dtype: torch.dtype, query_kind: str) -> None:
    rope = rope_of(ints(0, 5, 131071), heads.head_dim // 2)
    Case(heads, 3, pool_dtype).check(ints(95, 0, 33), query_kind, rope=rope)


@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("rotated", [0, 1, 2])
@pytest.mark.parametrize(("kind", "by_head"), [("rms", False), ("layer", True), ("layer", False)])
def test_norms_of_heads(heads: Heads, rotated: int, kind: Literal["rms", "layer"], by_head: bool) -> None:
    """Nothing, some or all of a head is rotated after its norm."""
    rope = rope_of(ints(7, 1000), max(rotated * heads.head_dim // 4, 1)) if rotated else None
    query_norm, key_norm = (
        NormWeights(kind, eps, normal(*((count,) if by_head else ()), heads.head_dim, seed=count))
        for count, eps in ((heads.heads, 1e-6), (heads.kv_heads, 1e-2))
    )
    Case(heads, 2).check(ints(16, 40), "f32", rope=rope, query_norm=query_norm, key_norm=key_norm)


@pytest.mark.parametrize("rotated", [0, 1, 2])
@pytest.mark.parametrize("heads", SHAPES[2:5], ids=str)
def test_what_becomes_codes_is_normed_and_rotated(heads: Heads, rotated: int) -> None:
    """A layer norm takes the mean of a head's own values, and codes the largest of them."""
    rope = rope_of(ints(7, 1000), max(rotated * heads.head_dim // 4, 1)) if rotated else None
    norm = NormWeights("layer", 1e-6, normal(heads.head_dim, seed=3))
    case = Case(heads, 2, torch.int8)
    case.key[1] += 5
    case.value[0] = 0  # no largest magnitude to divide by
    case.check(ints(16, 40), "f32", rope=rope, key_norm=norm)


def test_norm_of_queries_alone() -> None:
    norm = NormWeights("rms", 1e-6, normal(64, seed=3))
    Case(Heads(4, 2, 64), 2).check(ints(16, 40), "f32", query_norm=norm)


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_stores_without_rotation(heads: Heads) -> None:
    """An odd head, too: learned positions know no pairs."""
    Case(heads, 2).check(ints(1, 18), "bf16")
    Case(Heads(3, 1, 7), 2).check(ints(1, 18), "f32")


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_rotates_queries_in_place(heads: Heads) -> None:
    case, rope, slots = Case(heads, 4), rope_of(ints(3, 4, 5, 6), heads.head_dim // 2), ints(3, 4, 5, 6)
    norm = NormWeights("rms", 1e-6, normal(heads.head_dim, seed=3))
    expected, expected_pool = torch.empty_like(case.query), case.pool.clone()
    inputs = (case.key, case.value)
    rope_store_reference(
        case.query, *inputs, expected, expected_pool, slots, heads, rope=rope, query_norm=norm
    )
    rope_store(case.query, *inputs, case.query, case.pool, slots, heads, rope=rope, query_norm=norm)
    torch.testing.assert_close(case.query, expected, rtol=2e-6, atol=2e-6)
    case.check_pool(expected_pool)


def test_queries_may_stay_as_they_are() -> None:
    case, slots = Case(Heads(4, 2, 64), 2), ints(1, 18)
    expected_pool = case.pool.clone()
    rope_store_reference(None, case.key, case.value, None, expected_pool, slots, case.heads)
    rope_store(None, case.key, case.value, None, case.pool, slots, case.heads)
    case.check_pool(expected_pool)


def test_padding_stores_nothing() -> None:
    """Rows with negative slots leave the pool alone, whatever they hold; their neighbours do not notice."""
    case, rope = Case(Heads(4, 2, 64), 4, torch.float32), rope_of(ints(3, 0, 4, 0), 32)
    padding = torch.tensor([False, True, False, True], device=DEVICE)
    for x in (case.query, case.key, case.value):
        x[padding] = torch.nan
    out = torch.empty_like(case.query)
    rope_store(case.query, case.key, case.value, out, case.pool, ints(20, -1, 50, -16), case.heads, rope=rope)
    assert not out[~padding].isnan().any()
    written = ~case.pool.isnan().all(dim=-1)
    expected = torch.zeros_like(written)
    expected[1, :, :, 4] = expected[3, :, :, 2] = True
    assert torch.equal(written, expected)


def test_a_row_does_not_depend_on_the_others() -> None:
    heads = Heads(9, 3, 64)
    rope, slots = rope_of(ints(5, 6, 7), 32), ints(5, 6, 7)
    norm = NormWeights("rms", 1e-6, normal(64, seed=3))
    together, alone = Case(heads, 3), Case(heads, 3)
    outs = [torch.empty_like(case.query) for case in (together, alone)]
    one = slice(1, 2)
    rope_store(
        together.query, together.key, together.value, outs[0], together.pool, slots, heads,
        rope=rope, query_norm=norm, key_norm=norm,
    )  # fmt: skip
    rope_store(
        alone.query[one], alone.key[one], alone.value[one], outs[1][one], alone.pool, slots[one], heads,
        rope=Rope(rope.cos[one], rope.sin[one]), query_norm=norm, key_norm=norm,
    )  # fmt: skip
    assert torch.equal(outs[0][1], outs[1][1])
    assert torch.equal(together.pool[0, :, :, 6], alone.pool[0, :, :, 6])


def test_no_rows() -> None:
    case = Case(Heads(4, 2, 64), 0)
    rope_store(case.query, case.key, case.value, case.query.clone(), case.pool, ints(), case.heads)
    assert case.pool.isnan().all()
