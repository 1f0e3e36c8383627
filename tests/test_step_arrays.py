"""Steps as arrays: the short ways that most steps take give what the long ones give."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.config import PAGE_TOKENS, pages_for
from ridgeline.execution.rope_cache import KEPT_POSITIONS, RopeCache
from ridgeline.execution.step_arrays import StepArrays, rope_tables
from ridgeline.model.spec import RopeSpec
from ridgeline.types import Segment, SequenceRows, Step

GROUPS = 2
DRAWN = np.array([11, 12, -1], np.int32)

token = st.integers(-len(DRAWN), 99)
usual = st.tuples(st.just(0), st.just(0.0), st.just(True))
other = st.tuples(st.integers(0, 50), st.sampled_from([0.0, -1.5]), st.booleans())


@st.composite
def decodes(draw: st.DrawFn) -> SequenceRows:
    start = draw(st.integers(0, 5 * PAGE_TOKENS))
    first, bias, causal = draw(usual | other)
    tables = tuple(array("i", range(group, group + pages_for(start + 1))) for group in range(GROUPS))
    return SequenceRows([draw(token)], start, (Segment(tables, start + 1, first, bias, causal),), (0,))


@given(st.lists(decodes(), min_size=1, max_size=9))
@settings(deadline=None)
def test_decodes_are_laid_out_as_beside_a_prefill(sequences: list[SequenceRows]) -> None:
    count = len(sequences)
    prefill = SequenceRows([1, 2], 0, (Segment((array("i", [5]),) * GROUPS, 2),), (1,))
    alone = StepArrays.of(Step(tuple(sequences)), GROUPS, DRAWN)
    beside = StepArrays.of(Step((*sequences, prefill)), GROUPS, DRAWN)
    for name in ("tokens", "positions", "slots", "row_sequence", "output_rows"):
        assert getattr(alone, name).tolist() == getattr(beside, name)[:count].tolist()
    for name in ("segment_length", "segment_first_position", "segment_bias", "segment_causal"):
        assert getattr(alone, name).tolist() == getattr(beside, name)[:count].tolist()
        assert getattr(alone, name).dtype == getattr(beside, name).dtype
    for name in ("sequence_row_begin", "segment_begin", "table_begin"):
        assert getattr(alone, name).tolist() == getattr(beside, name)[: count + 1].tolist()
    assert alone.tables.tolist() == beside.tables[:, :-1].tolist()
    assert [alone.row_pages(g).tolist() for g in range(GROUPS)] == [
        beside.row_pages(g)[:count].tolist() for g in range(GROUPS)
    ]


def test_a_step_of_nothing() -> None:
    arrays = StepArrays.of(Step(()), GROUPS)
    assert arrays.sequence_row_begin.tolist() == [0]
    assert arrays.tables.shape == (GROUPS, 0)


positions = st.integers(0, 2 * 256) | st.integers(KEPT_POSITIONS - 2, KEPT_POSITIONS + 2) | st.just(-1)


@given(st.lists(st.lists(positions, max_size=5), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_rows_that_are_looked_up_are_those_that_are_made(steps: list[list[int]]) -> None:
    spec = RopeSpec((1.0, 0.25, 0.01), 1.5)
    cache = RopeCache(spec)
    for step in steps:
        asked = np.array(step, np.int32)
        buffers = np.full((6, 3), 7, np.float32), np.full((6, 3), 7, np.float32)
        cache.write(asked, buffers)
        for buffer, expected in zip(buffers, rope_tables(spec, asked), strict=True):
            np.testing.assert_array_equal(buffer[: len(step)], expected)
            assert (buffer[len(step) :] == 7).all()
