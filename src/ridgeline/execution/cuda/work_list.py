"""Attention's work list: from a step to items and merges that fit into buffers of fixed size.

Host arithmetic in NumPy only, done in every step. How the work is cut changes no result: `attention` merges
splits in one order, whether inside an item or afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ridgeline.execution.cuda.arrays import (
    ITEM_FIELDS,
    ITEM_PARTIAL,
    ITEM_PATH,
    ITEM_ROW,
    ITEM_ROWS,
    ITEM_SEGMENT_BEGIN,
    ITEM_SEGMENT_END,
    ITEM_SPLIT_BEGIN,
    ITEM_SPLIT_END,
    MERGE_COUNT,
    MERGE_FIELDS,
    MERGE_FIRST,
    MERGE_ROW,
    MERGE_ROWS,
    SEGMENT_BIAS,
    SEGMENT_CAUSAL,
    SEGMENT_FIELDS,
    SEGMENT_FIRST_POSITION,
    SEGMENT_LENGTH,
    SEGMENT_TABLE,
)
from ridgeline.execution.cuda.kernels.attention import SPLIT_TOKENS
from ridgeline.execution.step_arrays import StepArrays
from ridgeline.types import Int32Array

_EVEN_SHARES = 1.25
"""A block is cut from this many even shares of a program on: partial results cost traffic and a merge."""


@dataclass(frozen=True, slots=True)
class WorkLimits:
    """How many items and partial results the device's buffers hold, and how many programs share the items of
    a KV head. A merge has two partials or more, so there are at most `partials` // 2 of them."""

    items: int
    partials: int
    programs: int


@dataclass(frozen=True, slots=True)
class HostWork:
    """The used part of a work list, int32: `items` (·, ITEM_FIELDS), `merges` (·, MERGE_FIELDS), and how many
    partial results the items leave behind."""

    items: Int32Array
    merges: Int32Array
    partials: int


@dataclass(frozen=True, slots=True)
class Paths:
    """Paths of a step with trees, int32: the `records` one behind the other, as `arrays.PATH_*` lays them
    out, and where each row's begins, (rows,): at 0 for all rows but those on side branches."""

    records: Int32Array
    of_row: Int32Array


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Rows of one sequence each: the first one, how many, the sequence, positions of the first and last."""

    row: Int32Array
    rows: Int32Array
    sequence: Int32Array
    first_position: Int32Array
    last_position: Int32Array


@dataclass(frozen=True, slots=True)
class _Views:
    """What a block sees of each segment of its sequence: splits `begin` … `end` − 1. Views lie in the order
    of blocks and then of segments; `offsets` (blocks + 1,) says where each block's begin."""

    block: Int32Array
    segment: Int32Array
    begin: Int32Array
    end: Int32Array
    offsets: Int32Array


def segment_records(arrays: StepArrays) -> Int32Array:
    """The step's segments as the kernels read them, (segments, SEGMENT_FIELDS), for all memory groups."""
    records = np.zeros((len(arrays.segment_length), SEGMENT_FIELDS), np.int32)
    records[:, SEGMENT_LENGTH] = arrays.segment_length
    records[:, SEGMENT_FIRST_POSITION] = arrays.segment_first_position
    records[:, SEGMENT_BIAS] = arrays.segment_bias.view(np.int32)
    records[:, SEGMENT_CAUSAL] = arrays.segment_causal
    records[:, SEGMENT_TABLE] = arrays.table_begin[:-1]
    return records


def attention_work(
    arrays: StepArrays,
    window: int | None,
    block_rows: int,
    limits: WorkLimits,
    split_tokens: int = SPLIT_TOKENS,
    paths: Paths | None = None,
) -> HostWork:
    """Items and merges of a step for a memory group with this window.

    Rows form blocks of at most `block_rows` rows of a sequence, those with a path of their own each a block.
    A block is one item that gives the final
    result, unless it sees clearly more splits than a program's even share of the step: then each split that
    it sees becomes an item with a partial result, and a merge follows. Blocks that see most are cut first,
    as far as the limits go. Raises ValueError where there are more blocks than `limits.items`; there never
    are where the limit is at least the number of rows.
    """
    blocks = _row_blocks(arrays, block_rows, paths)
    if len(blocks.row) > limits.items:
        raise ValueError(f"{len(blocks.row)} blocks of rows do not fit into {limits.items} items")
    if not len(blocks.row):
        return HostWork(np.zeros((0, ITEM_FIELDS), np.int32), np.zeros((0, MERGE_FIELDS), np.int32), 0)
    views = _views(arrays, blocks, window, split_tokens)
    splits = np.add.reduceat(views.end - views.begin, views.offsets[:-1])
    cut = _cut(splits, limits)
    pieces, merges = _pieces(blocks, views, splits, cut)
    whole = _whole_items(arrays, blocks, views)
    if len(pieces):
        whole = np.concatenate((whole[~cut], pieces))
    if paths is not None:
        whole[:, ITEM_PATH] = paths.of_row[whole[:, ITEM_ROW]]
    return HostWork(whole, merges, len(pieces))


def branch_paths(arrays: StepArrays) -> Paths | None:
    """The paths of a step's rows that lie elsewhere than they stand; None where there are none."""
    of_row = np.zeros(len(arrays.slots), np.int32)
    records = [-1, 0]
    for sequence in range(len(arrays.segment_begin) - 1):
        if not arrays.is_tree(sequence):
            continue
        segment = int(arrays.segment_begin[sequence + 1]) - 1
        start = int(arrays.slots[arrays.sequence_row_begin[sequence]])
        for row in range(*arrays.sequence_row_begin[sequence : sequence + 2].tolist()):
            if arrays.positions[row] - arrays.segment_first_position[segment] != arrays.slots[row]:
                of_row[row] = len(records)
                records += [segment, start, *arrays.path_slots(row).tolist()]
    return Paths(np.array(records, np.int32), of_row) if len(records) > 2 else None


def _row_blocks(arrays: StepArrays, block_rows: int, paths: Paths | None) -> _Blocks:
    row_begin = arrays.sequence_row_begin
    if len(row_begin) - 1 == len(arrays.positions) == row_begin[-1] and (np.diff(row_begin) == 1).all():
        ones = np.ones(len(arrays.positions), np.int32)  # a decode step: every sequence has one row
        return _Blocks(row_begin[:-1], ones, arrays.row_sequence, arrays.positions, arrays.positions)
    begin = row_begin
    if paths is not None:
        begin = np.unique(np.concatenate((row_begin, np.flatnonzero(paths.of_row)))).astype(np.int32)
    run, place = _numbered(-(-np.diff(begin) // block_rows))
    row = begin[run] + place * block_rows
    rows = np.minimum(block_rows, begin[run + 1] - row)
    return _Blocks(
        row, rows, arrays.row_sequence[row], arrays.positions[row], arrays.positions[row + rows - 1]
    )


def _views(arrays: StepArrays, blocks: _Blocks, window: int | None, split_tokens: int) -> _Views:
    """A block's positions follow each other, so that it sees one run of a segment's slots: from what its
    first row's window begins with, to what its last row sees last."""
    segment_begin = arrays.segment_begin
    counts = (segment_begin[1:] - segment_begin[:-1])[blocks.sequence]
    block, place = _numbered(counts)
    segment = segment_begin[blocks.sequence[block]] + place
    first = arrays.segment_first_position[segment]
    end = arrays.segment_length[segment]
    last_seen = np.minimum(end, blocks.last_position[block] - first + 1)
    end = np.maximum(np.where(arrays.segment_causal[segment], last_seen, end), 0)
    begin = np.zeros_like(end)
    if window is not None:
        begin = np.clip(blocks.first_position[block] - first + 1 - window, 0, end)
    last = np.where(begin < end, -(-end // split_tokens), begin // split_tokens)
    return _Views(block, segment, begin // split_tokens, last, _offsets(counts))


def _cut(splits: Int32Array, limits: WorkLimits) -> NDArray[np.bool_]:
    """Which blocks to cut, by the number of splits that each sees."""
    cut: NDArray[np.bool_] = splits > np.maximum(1, _EVEN_SHARES * splits.sum() / limits.programs)
    if not cut.any():
        return cut
    order = np.flatnonzero(cut)
    order = order[np.argsort(-splits[order], kind="stable")]
    partials = np.cumsum(splits[order])
    items = len(splits) + partials - np.arange(1, len(order) + 1)
    room = (partials <= limits.partials) & (items <= limits.items)
    cut[order[~room]] = False
    return cut


def _whole_items(arrays: StepArrays, blocks: _Blocks, views: _Views) -> Int32Array:
    items = np.zeros((len(blocks.row), ITEM_FIELDS), np.int32)
    items[:, ITEM_ROW], items[:, ITEM_ROWS] = blocks.row, blocks.rows
    items[:, ITEM_SEGMENT_BEGIN] = arrays.segment_begin[blocks.sequence]
    items[:, ITEM_SEGMENT_END] = arrays.segment_begin[blocks.sequence + 1]
    items[:, ITEM_SPLIT_END] = np.maximum.reduceat(views.end, views.offsets[:-1])
    items[:, ITEM_PARTIAL] = -1
    return items


def _pieces(
    blocks: _Blocks, views: _Views, splits: Int32Array, cut: NDArray[np.bool_]
) -> tuple[Int32Array, Int32Array]:
    """An item for each split that the cut blocks see, in order, and a merge for each cut block."""
    chosen = np.flatnonzero(cut)
    merges = np.zeros((len(chosen), MERGE_FIELDS), np.int32)
    if not len(chosen):
        return np.zeros((0, ITEM_FIELDS), np.int32), merges
    merges[:, MERGE_ROW], merges[:, MERGE_ROWS] = blocks.row[chosen], blocks.rows[chosen]
    merges[:, MERGE_FIRST] = _offsets(splits[chosen])[:-1]
    merges[:, MERGE_COUNT] = splits[chosen]

    seen = np.flatnonzero(cut[views.block])
    number, place = _numbered(views.end[seen] - views.begin[seen])
    view = seen[number]
    items = np.zeros((len(view), ITEM_FIELDS), np.int32)
    items[:, ITEM_ROW], items[:, ITEM_ROWS] = blocks.row[views.block[view]], blocks.rows[views.block[view]]
    items[:, ITEM_SEGMENT_BEGIN] = views.segment[view]
    items[:, ITEM_SEGMENT_END] = views.segment[view] + 1
    items[:, ITEM_SPLIT_BEGIN] = views.begin[view] + place
    items[:, ITEM_SPLIT_END] = views.begin[view] + place + 1
    items[:, ITEM_PARTIAL] = np.arange(len(view))
    return items, merges


def _offsets(counts: Int32Array) -> Int32Array:
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _numbered(counts: Int32Array) -> tuple[Int32Array, Int32Array]:
    """For every one of `counts[i]` things of each i: its i, and its place among the things of that i."""
    owner = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return owner, np.arange(len(owner), dtype=np.int32) - _offsets(counts)[owner]
