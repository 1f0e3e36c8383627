"""Trees of guessed tokens on the CUDA executor, against the reference and against separate runs. Without a
GPU its kernels run in Triton's interpreter, so trees are small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from running import Loaded, load, relative_error
from test_cuda_attention import CUT, SPLIT, WHOLE, Model, assert_close, expected, make, run, sequence
from tiny_models import TinyModel

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.cuda.arrays import (
    ITEM_PATH,
    ITEM_ROW,
    ITEM_ROWS,
    PATH_FORK,
    PATH_SEGMENT,
    PATH_SLOTS,
)
from ridgeline.execution.cuda.graphs import GraphBook
from ridgeline.execution.cuda.inputs import StepSize
from ridgeline.execution.cuda.work_list import attention_work, branch_paths
from ridgeline.execution.step_arrays import StepArrays
from ridgeline.types import SequenceRows, SlotCopy, Step

Tiny = Callable[[str], TinyModel]
TOKENS = np.random.default_rng(9).integers(0, 50, 60).tolist()
BUSHY = (-1, 0, 1, 0, 3, 3, -1, 6)
PATH = [0, 3, 5]


def grown(loaded: Loaded, start: int, pages: list[int]) -> SequenceRows:
    return replace(loaded.rows(TOKENS[40:48], start, pages), parents=BUSHY)


def after_a_tree(loaded: Loaded, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a tree beside rows of two other sequences, and of what follows when one path is kept."""
    pages = [7, 3, 12]
    loaded.run(TOKENS[:start], pages=pages)
    tree = loaded.logits(
        loaded.rows(TOKENS[5:7], pages=[1]), grown(loaded, start, pages), loaded.rows(TOKENS[9:10], pages=[2])
    )
    sources, targets = (
        [pages[slot // PAGE_TOKENS] * PAGE_TOKENS + slot % PAGE_TOKENS for slot in slots]
        for slots in ([start + row for row in PATH], range(start, start + len(PATH)))
    )
    groups = range(len(loaded.program.groups))
    loaded.executor.transfer([SlotCopy(group, sources, targets) for group in groups])
    return tree, loaded.run(TOKENS[50:52], start + len(PATH), pages)


@pytest.mark.parametrize(("family", "kv_format"), [("llama", "KV32"), ("gemma3", "KV32"), ("llama", "KV8")])
def test_a_tree_follows_the_reference_and_a_path_is_kept(tiny: Tiny, family: str, kv_format: str) -> None:
    """The tree's slots begin in the middle of a page, and reach over its end."""
    reference, cuda = (load(tiny(family).folder, kind, "W32A32", kv_format) for kind in ("reference", "cuda"))
    start = 27 if family == "gemma3" else 12  # beyond its window
    tolerance = 1e-4 if kv_format == "KV32" else 0.02
    seen, following = after_a_tree(cuda, start)
    assert relative_error(seen, after_a_tree(reference, start)[0]) < tolerance
    whole = TOKENS[:start] + [TOKENS[40 + row] for row in PATH] + TOKENS[50:52]
    fresh = reference.run(whole, pages=[20, 21, 22])[-2:]
    assert relative_error(following, fresh) < tolerance
    cuda.executor.close()


def test_slots_are_copied_as_if_all_were_read_first(tiny: Tiny) -> None:
    loaded = load(tiny("gemma3").folder, "cuda", "W32A32", "KV8")
    loaded.run(TOKENS[:20], pages=[4, 5])
    before = loaded.run(TOKENS[20:21], 20, [4, 5])
    cycle = [4 * 16 + 3, 4 * 16 + 9, 5 * 16 + 1]
    moved = [*cycle[1:], cycle[0]]
    groups = range(len(loaded.program.groups))
    loaded.executor.transfer([SlotCopy(group, cycle, moved) for group in groups])
    assert not np.array_equal(loaded.run(TOKENS[20:21], 20, [4, 5]), before)
    loaded.executor.transfer([*[SlotCopy(g, moved, cycle) for g in groups], SlotCopy(0, [], [])])
    np.testing.assert_array_equal(loaded.run(TOKENS[20:21], 20, [4, 5]), before)
    loaded.executor.close()


def tree(start: int, parents: tuple[int, ...], **options: object) -> SequenceRows:
    return replace(sequence(start, len(parents), **options), parents=parents)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model",
    [
        Model(),
        Model(window=20, pool=torch.int8),
        Model(group=3, kv_heads=1, head_dim=18, pool=torch.float32, softcap=2.0, sinks=True),
    ],
    ids=str,
)
def test_paths_across_splits_cut_or_whole(model: Model) -> None:
    """Nodes on both sides of a split's end, over another segment and beside a plain sequence."""
    deep = (-1, 0, 1, 2, 0, 4, 5, 6, -1, 8)
    case = make(
        model,
        tree(SPLIT - 3, deep, others=[(9, 0, 0.5, True)]),
        sequence(SPLIT + 5, 2),
        tree(0, (-1, -1, 1)),
    )
    whole, cut = run(case, WHOLE, 1), run(case, CUT)
    assert torch.equal(whole, cut)
    tolerance = 1e-5 if model.pool == torch.float32 else 1e-4
    assert_close(cut, expected(case), tolerance)
    for first in (0, len(deep) + 2):  # the reference agrees with a chain that lies in order
        parents = deep if first == 0 else (-1, -1, 1)
        for row in range(len(parents)):
            assert_close(cut[first + row], alone(case, first, row), tolerance)


def alone(case, first: int, row: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """A node's result, in float64: its path's keys and values are put into slots in order."""
    arrays = case.arrays
    index = int(arrays.row_sequence[first])
    path = arrays.path_slots(first + row)
    segment = int(arrays.segment_begin[index + 1]) - 1
    begin, start = int(arrays.table_begin[segment]), int(arrays.slots[first])
    pool = case.pool.clone()
    scales = None if case.pool_scales is None else case.pool_scales.clone()
    for depth, slot in enumerate(path):
        (to, at), (source, place) = (divmod(s, PAGE_TOKENS) for s in (start + depth, int(slot)))
        to, source = int(case.tables[begin + to]), int(case.tables[begin + source])
        pool[to, :, :, at] = case.pool[source, :, :, place]
        if scales is not None:
            scales[to, :, :, at] = case.pool_scales[source, :, :, place]
    lengths, firsts = arrays.segment_length.tolist(), arrays.segment_first_position.tolist()
    biases, before = arrays.segment_bias.tolist(), range(arrays.segment_begin[index], segment)
    others = [(lengths[s], firsts[s], biases[s], True) for s in before]
    chain = StepArrays.of(Step((sequence(start + len(path) - 1, 1, others, firsts[segment]),)), 1)
    tables = case.tables[int(arrays.table_begin[arrays.segment_begin[index]]) :].contiguous()
    query = case.query[first + row : first + row + 1]
    lone = dataclasses.replace(
        case, arrays=chain, query=query, pool=pool, pool_scales=scales, tables=tables.contiguous()
    )
    return expected(lone, WHOLE)[0]


def test_rows_on_side_branches_have_paths_and_blocks_of_their_own() -> None:
    plain, grown = sequence(3, 5), tree(20, (-1, 0, 1, 1, 3, 0), first_position=2)
    arrays = StepArrays.of(Step((plain, grown)), 1)
    paths = branch_paths(arrays)
    assert paths is not None
    assert paths.of_row.tolist()[:8] == [0] * 8  # the leading chain lies in order
    assert paths.records[PATH_SEGMENT] == -1
    listed = {}
    for row in (8, 9, 10):
        record = paths.records[paths.of_row[row] :]
        assert record[PATH_SEGMENT] == 1
        depth = int(arrays.positions[row]) - 22
        listed[row] = record[PATH_SLOTS : PATH_SLOTS + depth + 1].tolist()
        assert record[PATH_FORK] == 20
    assert listed == {8: [20, 21, 23], 9: [20, 21, 23, 24], 10: [20, 25]}
    for limits in (CUT, WHOLE):
        items = attention_work(arrays, None, 4, limits, SPLIT, paths).items
        blocks = sorted({tuple(item) for item in items[:, [ITEM_ROW, ITEM_ROWS]].tolist()})
        assert blocks == [(0, 4), (4, 1), (5, 3), (8, 1), (9, 1), (10, 1)]
        np.testing.assert_array_equal(items[:, ITEM_PATH], paths.of_row[items[:, ITEM_ROW]])
    chain = StepArrays.of(Step((tree(4, (-1, 0, 1)),)), 1)
    assert branch_paths(chain) is None


def test_steps_with_paths_have_no_graph() -> None:
    book = GraphBook(64, 8, lambda launch: launch)
    assert book.bucket(StepSize(8, 8, False)) is not None
    assert book.bucket(StepSize(8, 8, False, paths=True)) is None
