"""Where rows go among experts: the router's choice, and the list of work that comes of it.

The list is made on the device, in buffers of fixed size, so that a CUDA graph can hold it: each expert counts
the pairs that go to lower ones, which says where its own begin. Nothing depends on the order in which
programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution.cuda.arrays import (
    BLOCK_EXPERT,
    BLOCK_FIELDS,
    BLOCK_FIRST,
    BLOCK_PAIRS,
    MIN_BLOCK_PAIRS,
    Packed,
    Routes,
    most_blocks,
)
from ridgeline.execution.cuda.kernels.linear import dense
from ridgeline.execution.cuda.kernels.quantise import check_float32

_BLOCK_FIELDS, _BLOCK_EXPERT = tl.constexpr(BLOCK_FIELDS), tl.constexpr(BLOCK_EXPERT)
_BLOCK_FIRST, _BLOCK_PAIRS = tl.constexpr(BLOCK_FIRST), tl.constexpr(BLOCK_PAIRS)
_NO_EXPERT = tl.constexpr(2**30)


@triton.jit
def _choose_kernel(
    logits,
    logits_stride,
    bias,
    row_count,
    table,
    table_stride,
    order,
    blocks,
    COUNT: tl.constexpr,
    CHOSEN: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SHARED: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
):
    """One row: its experts and their scores. A row that is ALONE also writes the list of its work."""
    row = tl.program_id(0).to(tl.int64)
    live = row < tl.load(row_count)
    logits += row * logits_stride
    expert, place = tl.arange(0, BLOCK), tl.arange(0, BLOCK_CHOSEN)
    left = expert < COUNT
    score = tl.load(logits + expert, mask=left, other=float("-inf"))
    if bias is not None:
        score += tl.load(bias + expert, mask=left, other=0.0)
    # NaN is less than every number, so that whatever a row holds, its experts are different ones that exist.
    score = tl.where(score == score, score, float("-inf"))
    top = tl.max(score, axis=0)
    total = tl.sum(tl.exp(score - top), axis=0)
    chosen = tl.zeros((BLOCK_CHOSEN,), tl.int32)
    kept = tl.full((BLOCK_CHOSEN,), float("-inf"), tl.float32)
    for k in tl.static_range(CHOSEN):
        best = tl.max(tl.where(left, score, float("-inf")), axis=0)
        first = tl.min(tl.where(left & (score == best), expert, BLOCK), axis=0)
        left = left & (expert != first)
        chosen = tl.where(place == k, first, chosen)
        kept = tl.where(place == k, best, kept)
    share = tl.exp(kept - top)
    if RENORMALISE:
        total = tl.sum(share, axis=0)
    share = tl.math.div_rn(share, total)

    mask = place < CHOSEN
    table += row * table_stride
    tl.store(table + place, tl.where(live, chosen, COUNT), mask=mask)
    tl.store(table + CHOSEN + place, share.to(tl.int32, bitcast=True), mask=mask)
    if SHARED:
        shared = 1.0 / (1.0 + tl.exp(-tl.load(logits + COUNT)))
        tl.store(table + 2 * CHOSEN, shared.to(tl.int32, bitcast=True))
    if ALONE:
        tl.store(order + place, place, mask=mask)
        block = blocks + place * _BLOCK_FIELDS
        tl.store(block + _BLOCK_EXPERT, chosen, mask=mask)
        tl.store(block + _BLOCK_FIRST, place, mask=mask)
        tl.store(block + _BLOCK_PAIRS, tl.full((BLOCK_CHOSEN,), 1, tl.int32), mask=mask)


@triton.jit
def _experts_of(table, table_stride, pair, pairs, CHOSEN: tl.constexpr):
    """The experts of some pairs, and one that is none after the last pair."""
    places = table + (pair // CHOSEN).to(tl.int64) * table_stride + pair % CHOSEN
    return tl.load(places, mask=pair < pairs, other=_NO_EXPERT)


@triton.jit(do_not_specialize=["pairs", "block_pairs"])
def _group_kernel(
    table, table_stride, order, blocks, pairs, block_pairs, CHOSEN: tl.constexpr, CHUNK: tl.constexpr
):
    """Expert `program_id(0)`: its pairs in ascending order, and its blocks.

    They begin in place first / block_pairs + expert, which is behind those of all lower experts: each of them
    has at most one block that is not full. What is left free up to the next expert's place has no pairs.
    """
    expert, experts = tl.program_id(0), tl.num_programs(0)
    offsets = tl.arange(0, CHUNK)
    lower, mine = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.int32)
    for begin in range(0, pairs, CHUNK):
        chosen = _experts_of(table, table_stride, begin + offsets, pairs, CHOSEN)
        lower += (chosen < expert).to(tl.int32)
        mine += (chosen == expert).to(tl.int32)
    first, count = tl.sum(lower, axis=0), tl.sum(mine, axis=0)

    place = first
    for begin in range(0, pairs, CHUNK):
        pair = begin + offsets
        match = (_experts_of(table, table_stride, pair, pairs, CHOSEN) == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(match, axis=0) - match, pair, mask=match != 0)
        place += tl.sum(match, axis=0)

    block_begin = first // block_pairs + expert
    block_end = (first + count) // block_pairs + expert + 1
    if expert == experts - 1:  # rows that nobody reads leave places free at the end
        block_end = pairs // block_pairs + experts
    for begin in range(block_begin, block_end, 32):
        index = begin + tl.arange(0, 32)
        before = (index - block_begin) * block_pairs
        block, mask = blocks + index * _BLOCK_FIELDS, index < block_end
        tl.store(block + _BLOCK_EXPERT, tl.zeros((32,), tl.int32) + expert, mask=mask)
        tl.store(block + _BLOCK_FIRST, first + before, mask=mask)
        of_block = tl.minimum(tl.maximum(count - before, 0), block_pairs)
        tl.store(block + _BLOCK_PAIRS, of_block, mask=mask)


def block_pairs(pairs: int, count: int) -> int:
    """Pairs in a block of a step's work: about as many as an expert has if rows choose evenly, so that most
    experts read their weights once and few places are empty."""
    each = pairs // count
    return MIN_BLOCK_PAIRS if each <= 16 else 64 if each <= 64 else 128


def work_blocks(routes: Routes, count: int) -> int:
    """Blocks of the list that `route` made, with those of no pairs."""
    rows = routes.table.shape[0]
    if rows == 1:
        return routes.chosen
    return most_blocks(routes.pairs, count, block_pairs(routes.pairs, count))


def route(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    row_count: Tensor,
    routes: Routes,
    *,
    renormalise: bool,
) -> None:
    """Send each row to the experts with the largest softmax scores of router x + bias, ties to lower experts.

    x float32 (rows, width); `router` float32 (count, width), below it the gate of the shared neighbour where
    `routes.shared`; bias float32 (count,). The scores of a row's experts are divided by their sum where
    `renormalise`; the shared neighbour's share is the sigmoid of its product. Rows from `row_count`, an int32
    (1,), on are read by nobody and add no work: their experts are `count`.

    The work list has a block of one pair for each expert of a single row, in the row's order; else blocks of
    `block_pairs`, in ascending order of experts and pairs. Top-k of a softmax: arXiv:1701.06538, section 2.1.
    """
    count = _check(x, router, bias, row_count, routes)
    rows, chosen = routes.table.shape[0], routes.chosen
    if rows == 0:
        return
    logits = routes.logits[:, : router.shape[0]]
    dense(x, Packed(32, router.shape[1], router), logits)
    _choose_kernel[(rows,)](
        logits,
        logits.stride(0),
        bias,
        row_count,
        routes.table,
        routes.table.stride(0),
        routes.order,
        routes.blocks,
        COUNT=count,
        CHOSEN=chosen,
        RENORMALISE=renormalise,
        SHARED=routes.shared,
        ALONE=rows == 1,
        BLOCK=triton.next_power_of_2(count),
        BLOCK_CHOSEN=triton.next_power_of_2(chosen),
        num_warps=1,
    )
    if rows > 1:
        group(routes, count)


def group(routes: Routes, count: int) -> None:
    """The work list of more rows than one, whose experts stand in `routes.table`."""
    chunk, num_warps = _chunk(routes.pairs)
    _group_kernel[(count,)](
        routes.table,
        routes.table.stride(0),
        routes.order,
        routes.blocks,
        routes.pairs,
        block_pairs(routes.pairs, count),
        CHOSEN=routes.chosen,
        CHUNK=chunk,
        num_warps=num_warps,
    )


def _chunk(pairs: int) -> tuple[int, int]:
    """Pairs that a program looks at together, and its warps: all of a decode step's, and many of a prompt's,
    whose chunks wait for each other."""
    return (512, 4) if pairs <= 512 else (2048, 8)


def route_reference(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    row_count: Tensor,
    routes: Routes,
    *,
    renormalise: bool,
) -> None:
    """As `route`, in float64; the list by sorting, its blocks packed as closely as they can be."""
    count, chosen = _check(x, router, bias, row_count, routes), routes.chosen
    products = x.double() @ router.double().T
    scores = products[:, :count] if bias is None else products[:, :count] + bias
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :chosen]
    shares = torch.softmax(scores, dim=1).gather(1, order)
    if renormalise:
        shares /= shares.sum(dim=1, keepdim=True)
    parts = [shares, torch.sigmoid(products[:, count:])] if routes.shared else [shares]
    live = torch.arange(len(x), device=x.device)[:, None] < row_count
    routes.table[:, :chosen] = torch.where(live, order, count)
    routes.table[:, chosen:] = torch.cat(parts, dim=1).float().view(torch.int32)

    experts = routes.table[:, :chosen].reshape(-1)
    routes.order[: routes.pairs] = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=count + 1)[:count].tolist()
    most, first, records = block_pairs(routes.pairs, count), 0, []
    for expert, of_expert in enumerate(counts):
        cuts = range(0, of_expert, most)
        records += [(expert, first + cut, min(most, of_expert - cut), 0) for cut in cuts]
        first += of_expert
    routes.blocks.zero_()
    if records:
        routes.blocks[: len(records)] = torch.tensor(records, dtype=torch.int32)


def _check(x: Tensor, router: Tensor, bias: Tensor | None, row_count: Tensor, routes: Routes) -> int:
    """How many experts there are."""
    check_float32(x, router, routes.logits)
    count = router.shape[0] - routes.shared
    assert 0 < routes.chosen <= count, (routes.chosen, count)
    assert x.shape == (routes.table.shape[0], router.shape[1]), (x.shape, routes.table.shape, router.shape)
    assert routes.logits.shape[0] == x.shape[0]
    assert routes.logits.shape[1] >= router.shape[0]
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == (count,))
    for numbers in (routes.order, routes.blocks, row_count):
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
    assert routes.table.dtype == torch.int32
    assert routes.table.stride(1) == 1
    assert len(routes.order) >= routes.pairs
    assert len(routes.blocks) >= most_blocks(routes.pairs, count)
    return count
