"""A step as flat arrays: what every executor reads, derived once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

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
    def of(cls, step: Step, groups: int) -> StepArrays:
        sequences = step.sequences
        segments = [segment for s in sequences for segment in s.segments]
        counts = np.fromiter((len(s.tokens) for s in sequences), np.int32, len(sequences))
        begin = _offsets(counts)
        row_sequence = np.repeat(np.arange(len(sequences), dtype=np.int32), counts)
        within = np.arange(begin[-1], dtype=np.int32) - begin[:-1][row_sequence]
        start = np.fromiter((s.start for s in sequences), np.int32, len(sequences))
        first = np.fromiter((s.segments[-1].first_position for s in sequences), np.int32, len(sequences))
        slots = start[row_sequence] + within
        outputs = [
            row + offset for s, offset in zip(sequences, begin.tolist(), strict=False) for row in s.outputs
        ]
        return cls(
            tokens=np.fromiter(chain.from_iterable(s.tokens for s in sequences), np.int32, int(begin[-1])),
            positions=slots + first[row_sequence],
            slots=slots,
            row_sequence=row_sequence,
            sequence_row_begin=begin,
            output_rows=np.array(outputs, np.int32),
            segment_begin=_offsets(np.array([len(s.segments) for s in sequences], np.int32)),
            segment_length=np.array([s.length for s in segments], np.int32),
            segment_first_position=np.array([s.first_position for s in segments], np.int32),
            segment_bias=np.array([s.bias for s in segments], np.float32),
            segment_causal=np.array([s.causal for s in segments], np.uint8),
            table_begin=_offsets(np.array([len(s.tables[0]) for s in segments], np.int32)),
            tables=_tables([s.tables for s in segments], groups),
        )


def _offsets(counts: Int32Array) -> Int32Array:
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _tables(tables: list[tuple[object, ...]], groups: int) -> Int32Array:
    """Tables of all segments side by side, a line for each memory group."""
    lines = [np.concatenate([np.asarray(t[g], np.int32) for t in tables]) for g in range(groups)]
    return np.ascontiguousarray(np.stack(lines))


def rope_tables(spec: RopeSpec, positions: Int32Array) -> tuple[Float32Array, Float32Array]:
    """cos and sin of each row's rotary angles, float32 (rows, dim / 2).

    The angle is one float32 product, as models are trained with; its cosine is taken in float64.
    """
    angles = positions.astype(np.float32)[:, None] * np.array(spec.frequencies, np.float32)
    wide = angles.astype(np.float64)
    return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)
