"""The host side of paged attention: each visible slot of each row in exactly one item, within limits."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.config import pages_for
from ridgeline.execution.cuda.arrays import (
    ITEM_PARTIAL,
    ITEM_ROW,
    ITEM_ROWS,
    ITEM_SEGMENT_BEGIN,
    ITEM_SEGMENT_END,
    ITEM_SPLIT_BEGIN,
    ITEM_SPLIT_END,
    MERGE_COUNT,
    MERGE_FIRST,
    MERGE_ROW,
    MERGE_ROWS,
    SEGMENT_BIAS,
    SEGMENT_CAUSAL,
    SEGMENT_FIRST_POSITION,
    SEGMENT_LENGTH,
    SEGMENT_TABLE,
)
from ridgeline.execution.cuda.work_list import HostWork, WorkLimits, attention_work, segment_records
from ridgeline.execution.step_arrays import StepArrays
from ridgeline.types import Segment, SequenceRows, Step

SPLIT = 32


def pages(length: int) -> tuple[list[int]]:
    return (list(range(pages_for(length))),)


@st.composite
def sequences(draw: Any) -> SequenceRows:
    """Rows at the end of a context that may have other segments before it, of any visibility."""
    start, rows = draw(st.integers(0, 150)), draw(st.integers(1, 12))
    others = []
    for _ in range(draw(st.integers(0, 2))):
        length = draw(st.integers(0, 100))
        first = draw(st.integers(0, 200))
        others.append(Segment(pages(length), length, first, draw(st.floats(-2, 2)), draw(st.booleans())))
    own = Segment(pages(start + rows), start + rows, first_position=draw(st.integers(0, 120)))
    return SequenceRows([0] * rows, start, (*others, own), ())


steps = st.lists(sequences(), min_size=1, max_size=5).map(lambda some: Step(tuple(some)))
windows = st.none() | st.integers(1, 90)


def visible(arrays: StepArrays, row: int, window: int | None) -> set[tuple[int, int]]:
    """(segment, slot) pairs that a row sees."""
    sequence, position = arrays.row_sequence[row], arrays.positions[row]
    return {
        (segment, slot)
        for segment in range(*arrays.segment_begin[sequence : sequence + 2])
        for slot in range(arrays.segment_length[segment])
        for at in [arrays.segment_first_position[segment] + slot]
        if (not arrays.segment_causal[segment] or at <= position)
        and (window is None or at > position - window)
    }


def covered(arrays: StepArrays, work: HostWork, window: int | None) -> dict[int, Counter[tuple[int, int]]]:
    """How often the items cover each (segment, slot) that their rows see."""
    counts: dict[int, Counter[tuple[int, int]]] = {}
    for item in work.items:
        for row in range(item[ITEM_ROW], item[ITEM_ROW] + item[ITEM_ROWS]):
            counts.setdefault(row, Counter()).update(
                (segment, slot)
                for segment, slot in visible(arrays, row, window)
                if item[ITEM_SEGMENT_BEGIN] <= segment < item[ITEM_SEGMENT_END]
                and item[ITEM_SPLIT_BEGIN] <= slot // SPLIT < item[ITEM_SPLIT_END]
            )
    return counts


def limits_for(rows: int) -> st.SearchStrategy[WorkLimits]:
    return st.builds(WorkLimits, st.integers(rows, rows + 60), st.integers(0, 60), st.integers(1, 64))


@given(st.data(), steps, windows, st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_every_visible_slot_is_covered_once_within_the_limits(
    data: st.DataObject, step: Step, window: int | None, block_rows: int
) -> None:
    arrays = StepArrays.of(step, 1)
    limits = data.draw(limits_for(step.rows))
    work = attention_work(arrays, window, block_rows, limits, SPLIT)

    counts = covered(arrays, work, window)
    assert sorted(counts) == list(range(step.rows))
    for row, seen in counts.items():
        assert seen == Counter(visible(arrays, row, window))

    assert len(work.items) <= limits.items
    assert work.partials <= limits.partials
    assert 2 * len(work.merges) <= limits.partials
    assert work.items.dtype == work.merges.dtype == np.int32


@given(st.data(), steps, windows, st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_a_block_is_final_or_merged_from_its_partials_in_order(
    data: st.DataObject, step: Step, window: int | None, block_rows: int
) -> None:
    arrays = StepArrays.of(step, 1)
    work = attention_work(arrays, window, block_rows, data.draw(limits_for(step.rows)), SPLIT)
    final = [item for item in work.items if item[ITEM_PARTIAL] < 0]
    pieces = {int(item[ITEM_PARTIAL]): item for item in work.items if item[ITEM_PARTIAL] >= 0}
    assert sorted(pieces) == list(range(work.partials))
    assert len(final) + len(pieces) == len(work.items)

    merged: list[int] = []
    for merge in work.merges:
        mine = range(merge[MERGE_FIRST], merge[MERGE_FIRST] + merge[MERGE_COUNT])
        merged.extend(mine)
        assert len(mine) >= 2
        where = [(pieces[p][ITEM_SEGMENT_BEGIN], pieces[p][ITEM_SPLIT_BEGIN]) for p in mine]
        assert where == sorted(set(where))
        for p in mine:
            assert tuple(pieces[p][[ITEM_ROW, ITEM_ROWS]]) == (merge[MERGE_ROW], merge[MERGE_ROWS])
            assert pieces[p][ITEM_SPLIT_END] == pieces[p][ITEM_SPLIT_BEGIN] + 1
            assert pieces[p][ITEM_SEGMENT_END] == pieces[p][ITEM_SEGMENT_BEGIN] + 1
    assert merged == list(range(work.partials))

    blocks = [*((i[ITEM_ROW], i[ITEM_ROWS]) for i in final)]
    blocks += [(m[MERGE_ROW], m[MERGE_ROWS]) for m in work.merges]
    assert sum(rows for _, rows in blocks) == step.rows
    for row, rows in blocks:
        assert 1 <= rows <= block_rows
        assert len(set(arrays.row_sequence[row : row + rows])) == 1


def decodes(contexts: list[int]) -> StepArrays:
    """A step of one row for each context length."""
    rows = [SequenceRows([0], n - 1, (Segment(pages(n), n),), ()) for n in contexts]
    return StepArrays.of(Step(tuple(rows)), 1)


def test_a_lone_long_context_is_cut_into_all_of_its_splits() -> None:
    work = attention_work(decodes([10 * SPLIT]), None, 4, WorkLimits(64, 64, 33), SPLIT)
    assert work.partials == len(work.items) == 10
    assert work.merges[:, MERGE_COUNT].tolist() == [10]


def test_equal_contexts_that_fill_the_machine_stay_whole() -> None:
    work = attention_work(decodes([10 * SPLIT] * 64), None, 4, WorkLimits(4096, 4096, 33), SPLIT)
    assert (len(work.items), work.partials, len(work.merges)) == (64, 0, 0)


def test_a_long_context_among_short_ones_is_cut_alone() -> None:
    work = attention_work(decodes([SPLIT] * 64 + [100 * SPLIT]), None, 4, WorkLimits(4096, 4096, 33), SPLIT)
    assert (len(work.items), work.partials, len(work.merges)) == (64 + 100, 100, 1)


def test_the_longest_are_cut_first_where_room_is_short() -> None:
    arrays = decodes([4 * SPLIT, 8 * SPLIT, 2 * SPLIT])
    work = attention_work(arrays, None, 4, WorkLimits(64, 10, 1000), SPLIT)
    assert work.merges[:, [MERGE_ROW, MERGE_COUNT]].tolist() == [[1, 8]]
    assert attention_work(arrays, None, 4, WorkLimits(3, 64, 1000), SPLIT).partials == 0


def test_more_blocks_than_items_are_refused() -> None:
    with pytest.raises(ValueError, match="3 blocks of rows do not fit into 2 items"):
        attention_work(decodes([5, 5, 5]), None, 1, WorkLimits(2, 9, 9), SPLIT)


def test_a_step_without_rows_has_no_work() -> None:
    work = attention_work(StepArrays.of(Step(()), 1), 8, 4, WorkLimits(0, 0, 4), SPLIT)
    assert (len(work.items), len(work.merges), work.partials) == (0, 0, 0)


def test_segment_records_hold_what_the_step_says() -> None:
    segments = (Segment(([4, 9],), 20, 7, -0.5, causal=False), Segment(([1],), 3, 27))
    records = segment_records(StepArrays.of(Step((SequenceRows([1], 2, segments, ()),)), 1))
    assert records[:, SEGMENT_LENGTH].tolist() == [20, 3]
    assert records[:, SEGMENT_FIRST_POSITION].tolist() == [7, 27]
    assert records[:, SEGMENT_CAUSAL].tolist() == [0, 1]
    assert records[:, SEGMENT_TABLE].tolist() == [0, 2]
    assert np.ascontiguousarray(records[:, SEGMENT_BIAS]).view(np.float32).tolist() == [-0.5, 0.0]


def test_the_work_of_256_decodes_takes_well_under_a_millisecond() -> None:
    arrays = decodes([500 + 7 * i for i in range(256)])
    took = []
    for _ in range(20):
        begin = time.perf_counter()
        attention_work(arrays, None, 4, WorkLimits(4096, 1024, 33))
        took.append(time.perf_counter() - begin)
    assert min(took) < 1e-3, f"{min(took) * 1e3:.2f} ms"
