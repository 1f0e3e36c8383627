"""Paged attention against float64: ragged rows, page permutations, windows, segments, splits, poison.

Every slot that no row of its sequence sees holds NaN, pages that no table names hold NaN, and table entries
that no visible slot needs name pages that do not exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor

from ridgeline.config import PAGE_TOKENS, pages_for
from ridgeline.execution.cuda.arrays import ITEM_FIELDS, MERGE_FIELDS, Partials, WorkList
from ridgeline.execution.cuda.kernels.attention import (
    attention,
    attention_reference,
    block_rows,
    padded_head_dim,
    tile_rows,
)
from ridgeline.execution.cuda.work_list import WorkLimits, attention_work, branch_paths, segment_records
from ridgeline.execution.step_arrays import StepArrays
from ridgeline.precision.quantise import quantise_groups
from ridgeline.types import Segment, SequenceRows, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPLIT = 64
BF16, F32, INT8 = torch.bfloat16, torch.float32, torch.int8
NO_PAGE = 2**30
CUT, WHOLE = WorkLimits(items=64, partials=64, programs=10**6), WorkLimits(items=64, partials=0, programs=1)

Lengths = Sequence[tuple[int, int, float, bool]]
"""Segments before the last one: length, first position, bias, causal."""


@dataclass(frozen=True)
class Model:
    """Heads, formats and window of a layer."""

    group: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    query: torch.dtype = F32
    pool: torch.dtype = BF16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def width(self) -> int:
        return self.group * self.kv_heads * self.head_dim

    @property
    def sink_scores(self) -> Tensor:
        """As large as the largest scores, and one of no weight at all."""
        scores = torch.linspace(-2, 3, self.group * self.kv_heads)
        scores[0] = -torch.inf
        return scores.to(DEVICE)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "scale": self.head_dim**-0.5,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sink_scores if self.sinks else None,
            "split_tokens": SPLIT,
        }


@dataclass(frozen=True)
class Case:
    """A step's tensors on the device."""

    model: Model
    arrays: StepArrays
    query: Tensor
    pool: Tensor
    tables: Tensor
    pool_scales: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {**self.model.options, "pool_scales": self.pool_scales}

    @property
    def rows(self) -> int:
        return len(self.arrays.tokens)


def sequence(start: int, rows: int, others: Lengths = (), first_position: int | None = None) -> SequenceRows:
    """Rows after `start` slots of the last segment, which follows the other ones' positions by default."""
    if first_position is None:
        first_position = max((first + length for length, first, _, _ in others), default=0)
    lengths = [*others, (start + rows, first_position, 0.0, True)]
    return SequenceRows(
        [0] * rows, start, tuple(Segment(([0] * pages_for(n),), n, f, b, c) for n, f, b, c in lengths), ()
    )


def seen_slots(arrays: StepArrays, index: int, segment: int, window: int | None) -> np.ndarray:
    """Slots of a segment that any row of the sequence sees."""
    rows = arrays.positions[arrays.row_sequence == index][:, None]
    at = arrays.segment_first_position[segment] + np.arange(arrays.segment_length[segment])
    seen = (at <= rows) | (arrays.segment_causal[segment] == 0)
    if window is not None:
        seen &= at > rows - window
    if segment == arrays.segment_begin[index + 1] - 1:  # rows of a tree see their slots wherever those lie
        own = arrays.slots[arrays.row_sequence == index]
        seen[:, own[own < len(at)]] = True
    return np.flatnonzero(seen.any(axis=0))


def make(model: Model, *sequences: SequenceRows, seed: int = 0) -> Case:
    """Tables name shuffled pages of a pool; what nobody sees is poisoned, in the pool and in the tables."""
    random = np.random.default_rng(seed)
    arrays = StepArrays.of(Step(sequences), 1)
    count = arrays.tables.shape[1]
    ids = random.permutation(count + 3)[:count].astype(np.int32)
    pool = np.full((count + 3, model.kv_heads, 2, PAGE_TOKENS, model.head_dim), np.nan, np.float32)
    tables = np.full(count, NO_PAGE, np.int32)
    for index in range(len(sequences)):
        for segment in range(*arrays.segment_begin[index : index + 2]):
            slots = seen_slots(arrays, index, segment, model.window)
            places = arrays.table_begin[segment] + slots // PAGE_TOKENS
            tables[places] = ids[places]
            held = random.standard_normal((len(slots), model.kv_heads, 2, model.head_dim))
            pool[ids[places], :, :, slots % PAGE_TOKENS] = held
    query = random.standard_normal((len(arrays.tokens), model.width)) * 2
    scales = None
    if model.pool == INT8:
        pool, scales = quantise_groups(pool)  # what is poisoned has a scale of NaN
    return Case(
        model,
        arrays,
        torch.tensor(query, dtype=model.query, device=DEVICE),
        torch.tensor(pool, dtype=model.pool, device=DEVICE),
        torch.tensor(tables, device=DEVICE),
        None if scales is None else torch.tensor(scales, device=DEVICE),
    )


def work_list(case: Case, block_m: int, limits: WorkLimits) -> WorkList:
    """Buffers longer than what is used, the rest of them left over from other steps."""
    model, arrays = case.model, case.arrays
    paths = branch_paths(arrays)
    work = attention_work(arrays, model.window, block_rows(model.group, block_m), limits, SPLIT, paths)
    items = np.full((len(work.items) + 3, ITEM_FIELDS), NO_PAGE, np.int32)
    items[: len(work.items)] = work.items
    merges = np.full((len(work.merges) + 3, MERGE_FIELDS), NO_PAGE, np.int32)
    merges[: len(work.merges)] = work.merges
    numbers = (np.array([len(work.items), len(work.merges)], np.int32), items, merges)
    held = [torch.tensor(n, device=DEVICE) for n in (*numbers, segment_records(arrays))]
    listed = None if paths is None else torch.tensor(paths.records, device=DEVICE)
    return WorkList(*held, case.tables, listed)


def room(model: Model, block_m: int, count: int = 64) -> Partials:
    shape = (count, model.kv_heads, block_m)
    mixed = torch.full((*shape, padded_head_dim(model.head_dim)), torch.nan, device=DEVICE)
    return Partials(
        mixed, torch.full(shape, torch.nan, device=DEVICE), torch.full(shape, torch.nan, device=DEVICE)
    )


def block_m_of(case: Case) -> int:
    return tile_rows(case.model.group, int(np.bincount(case.arrays.row_sequence).max()))


def run(
    case: Case, limits: WorkLimits = CUT, programs: int = 2, block_m: int | None = None, dtype: Any = F32
) -> Tensor:
    block_m = block_m or block_m_of(case)
    out = torch.full((case.rows, case.model.width), torch.nan, dtype=dtype, device=DEVICE)
    positions = torch.tensor(case.arrays.positions, device=DEVICE)
    work, partials = work_list(case, block_m, limits), room(case.model, block_m)
    options = {**case.options, "block_m": block_m, "programs": programs}
    attention(case.query, out, case.pool, positions, work, partials, **options)
    return out


def expected(case: Case, limits: WorkLimits = CUT) -> Tensor:
    block_m = block_m_of(case)
    out = torch.full((case.rows, case.model.width), torch.nan, dtype=torch.float64, device=DEVICE)
    positions = torch.tensor(case.arrays.positions, device=DEVICE)
    work, partials = work_list(case, block_m, limits), room(case.model, block_m)
    options = {**case.options, "block_m": block_m, "programs": 1}
    attention_reference(case.query, out, case.pool, positions, work, partials, **options)
    return out


def assert_close(got: Tensor, want: Tensor, relative: float) -> None:
    assert torch.isfinite(got).all()
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= relative, f"relative error {error:.2e}"


def tolerance(model: Model) -> float:
    return 1e-2 if model.query == BF16 and model.pool != F32 else 1e-5


RAGGED = (sequence(150, 1), sequence(30, 7), sequence(0, 1), sequence(64, 3))
SEGMENTS = (
    sequence(20, 4, [(70, 0, 0.7, True), (33, 70, -1.5, False)]),
    sequence(0, 1, [(40, 40, 2.0, True), (90, 0, 0.0, True)], first_position=90),
    sequence(3, 1, [(0, 0, 0.0, True), (17, 500, 0.3, True), (17, 500, 0.3, False)]),
)


@pytest.mark.parametrize(("group", "head_dim"), [(1, 6), (2, 16), (3, 64), (4, 32), (5, 80)])
@pytest.mark.parametrize(
    ("query", "pool"), [(F32, BF16), (BF16, BF16), (F32, F32), (BF16, F32), (F32, INT8), (BF16, INT8)]
)
def test_ragged_rows_match_float64(group: int, head_dim: int, query: torch.dtype, pool: torch.dtype) -> None:
    model = Model(group, 2 if head_dim < 64 else 1, head_dim, query, pool)
    case = make(model, *RAGGED)
    assert_close(run(case), expected(case), tolerance(model))


@pytest.mark.parametrize("window", [None, 1, 20, 100])
@pytest.mark.parametrize("sequences", [RAGGED, SEGMENTS], ids=["ragged", "segments"])
def test_windows_and_segments_match_float64(sequences: Sequence[SequenceRows], window: int | None) -> None:
    case = make(Model(group=3, kv_heads=1, window=window), *sequences)
    want = expected(case)
    torch.testing.assert_close(want, expected(case, WHOLE), rtol=1e-12, atol=1e-12)
    assert_close(run(case), want, 1e-5)
    assert_close(run(case, WHOLE), want, 1e-5)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("query", "pool"), [(F32, BF16), (BF16, BF16), (F32, INT8)])
def test_sinks_take_their_share_once(query: torch.dtype, pool: torch.dtype, window: int | None) -> None:
    """However many splits and segments a row sees, and whether they are merged by one program or later."""
    model = Model(group=3, kv_heads=2, query=query, pool=pool, window=window, sinks=True)
    case = make(model, sequence(150, 2), SEGMENTS[1])
    cut = run(case)
    assert_close(cut, expected(case), 2 * tolerance(model))
    assert torch.equal(cut, run(case, WHOLE))
    without = run(dataclasses.replace(case, model=dataclasses.replace(model, sinks=False)))
    assert torch.equal(cut[:, : model.head_dim], without[:, : model.head_dim])
    assert not torch.equal(cut, without)


def test_with_sinks_a_row_that_sees_nothing_becomes_zeros() -> None:
    case = make(Model(sinks=True), SequenceRows([0], 0, (Segment(([],), 0),), ()), sequence(5, 1))
    assert (run(case)[0] == 0).all()
    assert_close(run(case)[1:], expected(case)[1:], 1e-5)


@pytest.mark.parametrize(("query", "pool"), [(F32, BF16), (BF16, BF16), (F32, F32), (BF16, INT8)])
def test_how_the_work_is_cut_changes_no_bit(query: torch.dtype, pool: torch.dtype) -> None:
    sequences = (sequence(150, 1), sequence(60, 6), SEGMENTS[0])
    case = make(Model(kv_heads=1, query=query, pool=pool), *sequences)
    assert len(work_list(case, block_m_of(case), CUT).merges) > 2
    cut = run(case, CUT, programs=1)
    assert torch.equal(cut, run(case, WHOLE, programs=1))
    assert torch.equal(cut, run(case, CUT, programs=3))
    assert torch.equal(cut, run(case, WorkLimits(items=64, partials=5, programs=10**6), programs=9))


@pytest.mark.parametrize(("window", "pool"), [(None, BF16), (30, BF16), (30, INT8)])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(window: int | None, pool: torch.dtype) -> None:
    """A row's place in its block and the block's other rows do not matter."""
    sequences = (sequence(62, 4), sequence(150, 1), sequence(20, 2, [(70, 0, 0.7, True)]))
    model = Model(group=3, kv_heads=1, pool=pool, window=window, softcap=1.5)
    case = make(model, *sequences)
    together = run(case, block_m=64)
    row = 0
    for index, rows in enumerate(sequences):
        for own in range(len(rows.tokens)):
            last = rows.segments[-1]
            alone = structs.replace(
                rows,
                tokens=[0],
                start=rows.start + own,
                segments=(*rows.segments[:-1], structs.replace(last, length=rows.start + own + 1)),
            )
            arrays = StepArrays.of(Step((alone,)), 1)
            begin = int(case.arrays.table_begin[case.arrays.segment_begin[index]])
            tables = case.tables[begin : begin + arrays.tables.shape[1]]
            query = case.query[row : row + 1]
            single = Case(model, arrays, query, case.pool, tables, case.pool_scales)
            assert torch.equal(run(single, WHOLE, block_m=64)[0], together[row])
            row += 1


def test_a_row_that_sees_nothing_becomes_zeros() -> None:
    """One without a slot, one whose window ends before its segment, one beside a row that sees something."""
    empty = SequenceRows([0], 0, (Segment(([],), 0),), ())
    late = sequence(0, 1, first_position=50)
    late = structs.replace(late, segments=(Segment(([0] * 2,), 20, 200), Segment(([],), 0, 50)))
    case = make(Model(window=40), empty, late, sequence(5, 1))
    for limits in (CUT, WHOLE):
        out = run(case, limits)
        assert (out[:2] == 0).all()
        assert_close(out[2:], expected(case)[2:], 1e-5)
    half = structs.replace(
        sequence(0, 2, first_position=50), segments=(Segment(([0] * 2,), 20, 51), Segment(([],), 0, 50))
    )
    case = make(Model(), half)
    out = run(case)
    assert (out[0] == 0).all()
    assert_close(out[1:], expected(case)[1:], 1e-5)


def test_column_views_bfloat16_results_and_foreign_rows() -> None:
    """Queries are columns of a wider tensor, results go into columns of another; more rows than items."""
    case = make(Model(group=3, query=BF16), *RAGGED)
    width, block_m = case.model.width, 16
    wide_query = torch.full((case.rows + 2, width + 24), torch.nan, dtype=BF16, device=DEVICE)
    wide_query[: case.rows, 8 : 8 + width] = case.query
    wide_out = torch.full((case.rows + 2, width + 40), 7.0, dtype=BF16, device=DEVICE)
    positions = torch.zeros(case.rows + 2, dtype=torch.int32, device=DEVICE)
    positions[: case.rows] = torch.tensor(case.arrays.positions)
    work, partials = work_list(case, block_m, CUT), room(case.model, block_m)
    attention(
        wide_query[:, 8 : 8 + width],
        wide_out[:, 16 : 16 + width],
        case.pool,
        positions,
        work,
        partials,
        **case.options,
        block_m=block_m,
        programs=2,
    )
    got = wide_out[: case.rows, 16 : 16 + width]
    assert torch.equal(got, run(case, block_m=block_m).to(BF16))
    untouched = wide_out.clone()
    untouched[: case.rows, 16 : 16 + width] = 7.0
    assert (untouched == 7.0).all()


def test_a_pool_may_be_a_layer_of_a_larger_tensor() -> None:
    """Its pages then lie apart, as when all layers of a page lie side by side."""
    case = make(Model(), *RAGGED)
    layers = torch.full((len(case.pool), 3, *case.pool.shape[1:]), torch.nan, dtype=BF16, device=DEVICE)
    layers[:, 1] = case.pool
    assert torch.equal(run(dataclasses.replace(case, pool=layers[:, 1])), run(case))


def test_an_empty_work_list_writes_nothing() -> None:
    case = make(Model(), sequence(0, 1))
    work = dataclasses.replace(work_list(case, 16, CUT), counts=torch.zeros(2, dtype=torch.int32).to(DEVICE))
    out = torch.full((1, case.model.width), 7.0, device=DEVICE)
    positions = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    partials = room(case.model, 16)
    attention(case.query, out, case.pool, positions, work, partials, **case.options, block_m=16, programs=3)
    assert (out == 7.0).all()


def test_a_score_far_below_the_others_and_large_scores_stay_finite() -> None:
    case = make(Model(), sequence(100, 2, [(40, 0, -1e4, True), (40, 40, 1e4, True)]))
    case = dataclasses.replace(case, query=case.query * 100)
    assert_close(run(case), expected(case), 1e-4)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 12, 16, 24, 71])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_tiles_hold_whole_rows(group: int, head_dim: int) -> None:
    low = tile_rows(group, 1, head_dim)
    assert low >= 16
    assert low & (low - 1) == 0
    fit = block_rows(group, low)
    assert fit >= 1
    assert tile_rows(group, fit, head_dim) == low
    high = tile_rows(group, fit + 1, head_dim)
    assert high == max(64 if head_dim == 64 else 32, low)
    assert high & (high - 1) == 0


def test_contradicting_tensors_are_refused() -> None:
    case = make(Model(), sequence(0, 1))
    with pytest.raises(AssertionError, match="pages are contiguous"):
        run(dataclasses.replace(case, pool=case.pool.transpose(3, 4).contiguous().transpose(3, 4)))
    with pytest.raises(AssertionError, match="each KV head serves as many"):
        run(dataclasses.replace(case, query=case.query[:, :48], model=Model(group=2, head_dim=12)))
