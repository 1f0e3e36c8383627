"""A step as flat arrays: what every executor reads, derived once."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
from numpy.typing import NDArray

from ridgeline.config import PAGE_TOKENS
from ridgeline.model.spec import RopeSpec
from ridgeline.types import Float32Array, Int32Array, Step


@dataclass(frozen=True, slots=True)
class StepArrays:
    """Rows in order, grouped by sequence; segments in order, grouped by sequence.

    int32 unless noted. Per row: tokens, positions (rotary), slots (in the sequence's last segment) and
    row_sequence. output_rows: rows whose logits are wanted. Per sequence, as offsets with an end:
    sequence_row_begin, segment_begin. Per segment: segment_length, segment_first_position, segment_bias
    (float32), segment_causal (uint8), and table_begin as offsets with an end into the columns of
    tables (groups, pages).
    """

    tokens: Int32Array
    positions: Int32Array
    slots: Int32Array
    row_sequence: Int32Array
    sequence_row_begin: Int32Array
    output_rows: Int32Array
    segment_begin: Int32Array
    segment_length: Int32Array
    segment_first_position: Int32Array
    segment_bias: Float32Array
    segment_causal: NDArray[np.uint8]
    table_begin: Int32Array
    tables: Int32Array

    @classmethod
    def of(cls, step: Step, groups: int, drawn: Int32Array | None = None) -> StepArrays:
        """`drawn` holds the tokens of the step before, for those that this step leaves open; without it
        they stay as they are, below 0."""
        sequences = step.sequences
        segments = [segment for s in sequences for segment in s.segments]
        counts = [len(s.tokens) for s in sequences]
        begin = _offsets(counts)
        own = [range(s.start, s.start + count) for s, count in zip(sequences, counts, strict=True)]
        slots = np.array([*chain.from_iterable(own)], np.int32)
        row_sequence = np.repeat(np.arange(len(sequences), dtype=np.int32), counts)
        first = np.array([s.segments[-1].first_position for s in sequences], np.int32)
        outputs = [row + offset for s, offset in zip(sequences, begin, strict=False) for row in s.outputs]
        tokens = np.array([*chain.from_iterable(s.tokens for s in sequences)], np.int32)
        if drawn is not None and tokens.size and tokens.min() < 0:
            # A token that could not be drawn ends its sequence; what is run in its place does not matter.
            known = np.maximum(drawn[np.where(tokens < 0, -1 - tokens, 0)], 0)
            tokens = np.where(tokens < 0, known, tokens)
        return cls(
            tokens=tokens,
            positions=slots + first[row_sequence],
            slots=slots,
            row_sequence=row_sequence,
            sequence_row_begin=np.array(begin, np.int32),
            output_rows=np.array(outputs, np.int32),
            segment_begin=np.array(_offsets(len(s.segments) for s in sequences), np.int32),
            segment_length=np.array([s.length for s in segments], np.int32),
            segment_first_position=np.array([s.first_position for s in segments], np.int32),
            segment_bias=np.array([s.bias for s in segments], np.float32),
            segment_causal=np.array([s.causal for s in segments], np.uint8),
            table_begin=np.array(_offsets(len(s.tables[0]) for s in segments), np.int32),
            tables=_tables([s.tables for s in segments], groups),
        )

    def row_pages(self, group: int) -> Int32Array:
        """The page of a memory group that each row's keys and values are written to."""
        last = self.segment_begin[1:][self.row_sequence] - 1
        pages: Int32Array = self.tables[group][self.table_begin[last] + self.slots // PAGE_TOKENS]
        return pages


def _offsets(counts: Iterable[int]) -> list[int]:
    return [*accumulate(counts, initial=0)]


def _tables(tables: list[tuple[Sequence[int], ...]], groups: int) -> Int32Array:
    """Tables of all segments side by side, a line for each memory group: (groups, pages)."""
    line = array("i")
    for group in range(groups):
        for of_groups in tables:
            line.extend(of_groups[group])  # a plain copy where the table is such an array too
    return np.array(line, np.int32).reshape(groups, -1)


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
