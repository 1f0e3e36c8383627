"""A step as flat arrays: what every executor reads, derived once."""

from __future__ import annotations

import functools
import operator
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, repeat
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ridgeline.config import PAGE_TOKENS
from ridgeline.model.spec import RopeSpec
from ridgeline.types import Float32Array, Int32Array, Segment, Step

_NO_PARENTS: Int32Array = np.empty(0, np.int32)


class StepArrays(msgspec.Struct, frozen=True, eq=False):
    """Rows in order, grouped by sequence; segments in order, grouped by sequence.

    int32 unless noted. Per row: tokens, positions (rotary), slots (in the sequence's last segment) and
    row_sequence. output_rows: rows whose logits are wanted. Per sequence, as offsets with an end:
    sequence_row_begin, segment_begin. Per segment: segment_length, segment_first_position, table_begin
    as offsets with an end into the columns of tables (groups, pages), segment_bias (float32) and
    segment_causal (uint8).

    parents: for each row the row that it follows, -1 where that is none of the step's; empty where nothing
    is a tree.
    """

    tokens: Int32Array
    positions: Int32Array
    slots: Int32Array
    row_sequence: Int32Array
    sequence_row_begin: Int32Array
    output_rows: Int32Array
    parents: Int32Array
    segment_begin: Int32Array
    segment_length: Int32Array
    segment_first_position: Int32Array
    table_begin: Int32Array
    segment_bias: Float32Array
    segment_causal: NDArray[np.uint8]
    tables: Int32Array

    @classmethod
    def of(cls, step: Step, groups: int, drawn: Int32Array | None = None) -> StepArrays:
        """`drawn` holds the tokens of the step before, for those that this step leaves open; without it
        they stay as they are, below 0."""
        if {len(s.tokens) == len(s.outputs) == len(s.segments) == 1 for s in step.sequences} == {True}:
            return cls._of_decodes(step, groups, drawn)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        owners: list[int] = []
        outputs: list[int] = []
        segments: list[Segment] = []
        trees = False
        rows_end, segments_end = [0], [0]
        for index, rows in enumerate(step.sequences):
            begin, count = len(tokens), len(rows.tokens)
            first = rows.segments[-1].first_position + rows.start
            tokens.extend(rows.tokens)
            if rows.parents:
                trees = True
                positions.extend([first + depth for depth in rows.depths])
            else:
                positions.extend(range(first, first + count))
            slots.extend(range(rows.start, rows.start + count))
            owners.extend(repeat(index, count))
            outputs.extend([begin + row for row in rows.outputs])
            segments.extend(rows.segments)
            rows_end.append(len(tokens))
            segments_end.append(len(segments))
        lengths = [s.length for s in segments]
        firsts = [s.first_position for s in segments]
        tables_end = _tables_end(segments, groups)
        integers = _side_by_side(
            _known(tokens, drawn),
            positions,
            slots,
            owners,
            rows_end,
            outputs,
            _parents(step) if trees else [],
            segments_end,
            lengths,
            firsts,
            tables_end,
        )
        biases = np.array([s.bias for s in segments], np.float32)
        causal = np.array([s.causal for s in segments], np.uint8)
        tables = _tables([s.tables for s in segments], groups)
        return cls(*chain(integers, (biases, causal, tables)))

    @classmethod
    def _of_decodes(cls, step: Step, groups: int, drawn: Int32Array | None) -> StepArrays:
        """Where every sequence has one row, one segment and one output, most of it is as in other steps."""
        sequences = step.sequences
        segments = [rows.segments[0] for rows in sequences]
        starts = [rows.start for rows in sequences]
        firsts = [s.first_position for s in segments]
        biases = [s.bias for s in segments]
        causal = [s.causal for s in segments]
        moved = any(firsts)
        tokens, slots, lengths, positions, tables_end = _side_by_side(
            _known([rows.tokens[0] for rows in sequences], drawn),
            starts,
            [s.length for s in segments],
            list(map(operator.add, starts, firsts)) if moved else [],
            _tables_end(segments, groups),
        )
        usual = _Usual.of(len(sequences))
        numbers = usual.numbers
        return cls(
            tokens=tokens,
            positions=positions if moved else slots,
            slots=slots,
            row_sequence=numbers[:-1],
            sequence_row_begin=numbers,
            output_rows=numbers[:-1],
            parents=_NO_PARENTS,
            segment_begin=numbers,
            segment_length=lengths,
            segment_first_position=np.array(firsts, np.int32) if moved else usual.zeros,
            table_begin=tables_end,
            segment_bias=np.array(biases, np.float32) if any(biases) else usual.no_bias,
            segment_causal=usual.causal if all(causal) else np.array(causal, np.uint8),
            tables=_tables([s.tables for s in segments], groups),
        )

    def row_pages(self, group: int) -> Int32Array:
        """The page of a memory group that each row's keys and values are written to."""
        last = self.segment_begin[1:][self.row_sequence] - 1
        pages: Int32Array = self.tables[group][self.table_begin[last] + self.slots // PAGE_TOKENS]
        return pages

    def is_tree(self, sequence: int) -> bool:
        """Whether a row of a sequence stands elsewhere than its slot lies."""
        if not len(self.parents):
            return False
        begin, end = self.sequence_row_begin[sequence : sequence + 2]
        first = self.segment_first_position[self.segment_begin[sequence + 1] - 1]
        return bool((self.positions[begin:end] != first + self.slots[begin:end]).any())

    def path_slots(self, row: int) -> Int32Array:
        """Of a tree's row: the slots of the rows on its path, in order, its own last."""
        path = []
        while row >= 0:
            path.append(row)
            row = int(self.parents[row])
        slots: Int32Array = self.slots[path[::-1]]
        return slots


def _parents(step: Step) -> list[int]:
    """The row of the step that each row follows; without parents, the one before it in its sequence."""
    parents: list[int] = []
    for rows in step.sequences:
        begin = len(parents)
        given = rows.parents or range(-1, len(rows.tokens) - 1)
        parents.extend([begin + parent if parent >= 0 else -1 for parent in given])
    return parents


class _Usual(NamedTuple):
    """What steps of so many sequences share where each has one row; `numbers` are 0 to theirs.
    Nobody may write to it."""

    numbers: Int32Array
    zeros: Int32Array
    no_bias: Float32Array
    causal: NDArray[np.uint8]

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def of(size: int) -> _Usual:
        numbers = np.arange(size + 1, dtype=np.int32)
        zeros, no_bias = np.zeros(size, np.int32), np.zeros(size, np.float32)
        usual = _Usual(numbers, zeros, no_bias, np.ones(size, np.uint8))
        for array_ in usual:
            array_.setflags(write=False)
        return usual


def _side_by_side(*columns: list[int]) -> Iterator[Any]:
    """Each column as an int32 array. They lie in one: a step has many, and they are short."""
    everything = np.frombuffer(array("i", chain.from_iterable(columns)), np.int32)
    begin = 0
    for column in columns:
        yield everything[begin : begin + len(column)]
        begin += len(column)


def _known(tokens: list[int], drawn: Int32Array | None) -> list[int]:
    """Those that the step before drew in place of those that are open. One that could not be drawn ends its
    sequence: what is run in its place does not matter."""
    if drawn is None or not tokens or min(tokens) >= 0:
        return tokens
    return [token if token >= 0 else max(int(drawn[-1 - token]), 0) for token in tokens]


def _tables_end(segments: list[Segment], groups: int) -> list[int]:
    """Where each segment's pages begin in the tables of any group, and their end."""
    if not groups:
        return [0] * (len(segments) + 1)
    return [*accumulate([len(s.tables[0]) for s in segments], initial=0)]


def _tables(tables: list[tuple[Sequence[int], ...]], groups: int) -> Int32Array:
    """Tables of all segments side by side, a line for each memory group: (groups, pages)."""
    line = array("i")
    for group in range(groups):
        for of_groups in tables:
            line.extend(of_groups[group])  # a plain copy where the table is such an array too
    return np.array(line, np.int32).reshape(groups, len(line) // groups if groups else 0)


def rope_tables(spec: RopeSpec, positions: Int32Array) -> tuple[Float32Array, Float32Array]:
    """cos and sin of each row's rotary angles, float32 (rows, dim / 2).

    The angle is one float32 product, as models are trained with; its cosine is taken, and multiplied with
    the rope's scale, in float64.
    """
    angles = positions.astype(np.float32)[:, None] * _frequencies(spec)
    wide = angles.astype(np.float64)
    cos, sin = np.cos(wide) * spec.scale, np.sin(wide) * spec.scale
    return cos.astype(np.float32), sin.astype(np.float32)


@functools.cache
def _frequencies(spec: RopeSpec) -> Float32Array:
    return np.array(spec.frequencies, np.float32)
