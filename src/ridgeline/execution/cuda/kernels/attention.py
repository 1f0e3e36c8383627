"""Paged attention: ragged rows, grouped queries packed together, context segments, windows and splits.

The query heads that share a KV head lie side by side on the tall side of a tile, row after row, so that a
page is read once for all of them. A context is cut into splits of fixed size, counted from slot 0 of each
segment. A split is worked off with an online softmax that starts afresh (FlashAttention-2,
arXiv:2307.08691), and its result is merged into that of the splits before it (Flash-Decoding). Whether one
program takes all splits of a block of rows, or each goes to a program of its own and the merge comes
afterwards, the sums are the same to the last bit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.config import PAGE_TOKENS
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
    PATH_FORK,
    PATH_SEGMENT,
    PATH_SLOTS,
    SEGMENT_BIAS,
    SEGMENT_CAUSAL,
    SEGMENT_FIELDS,
    SEGMENT_FIRST_POSITION,
    SEGMENT_LENGTH,
    SEGMENT_TABLE,
    Partials,
    WorkList,
)
from ridgeline.execution.cuda.kernels.activate import tanh
from ridgeline.execution.cuda.kernels.codes import float_of_code
from ridgeline.execution.cuda.kernels.pages import check_pool

SPLIT_TOKENS = 512
"""Slots of a split. Results depend on it in the last bits, so it never follows the load."""

_PAGE_TOKENS = tl.constexpr(PAGE_TOKENS)
_LOG2_E = math.log2(math.e)
_LOG2_E_DEVICE = tl.constexpr(_LOG2_E)

_ITEM_FIELDS, _ITEM_PARTIAL = tl.constexpr(ITEM_FIELDS), tl.constexpr(ITEM_PARTIAL)
_ITEM_ROW, _ITEM_ROWS = tl.constexpr(ITEM_ROW), tl.constexpr(ITEM_ROWS)
_ITEM_SEGMENT_BEGIN, _ITEM_SEGMENT_END = tl.constexpr(ITEM_SEGMENT_BEGIN), tl.constexpr(ITEM_SEGMENT_END)
_ITEM_SPLIT_BEGIN, _ITEM_SPLIT_END = tl.constexpr(ITEM_SPLIT_BEGIN), tl.constexpr(ITEM_SPLIT_END)
_ITEM_PATH, _PATH_SEGMENT = tl.constexpr(ITEM_PATH), tl.constexpr(PATH_SEGMENT)
_PATH_FORK, _PATH_SLOTS = tl.constexpr(PATH_FORK), tl.constexpr(PATH_SLOTS)
_SEGMENT_FIELDS, _SEGMENT_LENGTH = tl.constexpr(SEGMENT_FIELDS), tl.constexpr(SEGMENT_LENGTH)
_SEGMENT_FIRST_POSITION = tl.constexpr(SEGMENT_FIRST_POSITION)
_SEGMENT_BIAS, _SEGMENT_CAUSAL = tl.constexpr(SEGMENT_BIAS), tl.constexpr(SEGMENT_CAUSAL)
_SEGMENT_TABLE = tl.constexpr(SEGMENT_TABLE)
_MERGE_FIELDS, _MERGE_ROW = tl.constexpr(MERGE_FIELDS), tl.constexpr(MERGE_ROW)
_MERGE_ROWS, _MERGE_FIRST = tl.constexpr(MERGE_ROWS), tl.constexpr(MERGE_FIRST)
_MERGE_COUNT = tl.constexpr(MERGE_COUNT)

# How queries and probabilities meet the pool. BF16: both are bfloat16. TWO_TERMS: a float32 value is the sum
# of two bfloat16 ones, which keeps 16 of its 24 bits on the tensor cores. FLOAT32: a float32 pool, no
# tensor cores. In the first two, the pool holds bfloat16 or codes that are widened to it.
_BF16, _TWO_TERMS, _FLOAT32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def tile_rows(heads_per_kv_head: int, most_rows_per_sequence: int, head_dim: int = 128) -> int:
    """Height of the tile, BLOCK_M: a low one where every sequence's rows fit into it, else a high one.

    Both hold at least one row with all of its heads; both are powers of two from 16, as `tl.dot` asks. Heads
    wider than 128 halve the high one, so that its sums still fit into registers.
    """
    high = 64 if head_dim <= 128 else 32
    least: int = triton.next_power_of_2(heads_per_kv_head)
    low = max(16, least)
    return low if most_rows_per_sequence <= block_rows(heads_per_kv_head, low) else max(high, least)


def block_rows(heads_per_kv_head: int, block_m: int) -> int:
    """Rows that a tile of height `block_m` holds, each with all of its query heads."""
    return block_m // heads_per_kv_head


def padded_head_dim(head_dim: int) -> int:
    """BLOCK_D: width of the tile that holds a head; the last axis of `Partials.mixed`."""
    width: int = triton.next_power_of_2(head_dim)
    return max(16, width)


@triton.jit
def _merge(mixed, top, total, mixed_next, top_next, total_next):
    """Take one more split into (mixed, top, total). Which products are fused with their sums is spelled out,
    so that both kernels give the same bits; a split that saw nothing changes none."""
    highest = tl.maximum(top, top_next)
    finite = tl.where(highest == float("-inf"), 0.0, highest)  # −inf − −inf is NaN
    keep = tl.math.exp2(top - finite)
    take = tl.math.exp2(top_next - finite)
    mixed = tl.math.fma(mixed, tl.broadcast_to(keep[:, None], mixed.shape), mixed_next * take[:, None])
    return mixed, highest, tl.math.fma(total, keep, total_next * take)


@triton.jit
def _store_rows(
    out, out_stride, sinks, mixed, top, total, block, kv_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the result of the block whose first row and number of rows lie at `block`; a row that saw
    nothing becomes zeros. They are read again, and volatile, so that no address of a row lives in registers
    through the loops. A head's sink is one more score behind all splits, with a value of zero."""
    row, rows = tl.load(block, volatile=True), tl.load(block + 1, volatile=True)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    packed = row * GROUP + m
    if sinks is not None:
        sink = tl.load(sinks + kv_head * GROUP + packed % GROUP) * _LOG2_E_DEVICE
        highest = tl.maximum(top, sink)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        keep = tl.math.exp2(top - finite)
        mixed *= keep[:, None]
        total = tl.math.fma(total, keep, tl.math.exp2(sink - finite))
    share = tl.math.div_rn(1.0, tl.where(total > 0.0, total, 1.0))
    at = (packed // GROUP).to(tl.int64) * out_stride + (kv_head * GROUP + packed % GROUP) * HEAD_DIM
    inside = (packed < (row + rows) * GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out + at[:, None] + d[None, :], (mixed * share[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _attend_split(
    high, low, keys, pool_scales, table, path, fork, begin, end, first_seen, end_seen, seen_from, seen_to,
    scale, bias,
    KV_HEADS: tl.constexpr, PAGE_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAP: tl.constexpr, MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles from slot `begin` to `end`: (mixed, top, total) of the split.

    A row sees the slots `seen_from` … `seen_to` − 1, the whole block `first_seen` … `end_seen` − 1. Other
    slots are not read, nor is the table for them: they may belong to nobody, or hold NaN. What stands in slot
    `fork` and behind it lies in the slots that `path` lists. What `pool_scales` hold belongs to a whole key
    or value, so scores and probabilities are multiplied with it instead.
    """
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(begin, end, BLOCK_N):
        slots = tile + n
        used = (slots >= first_seen) & (slots < end_seen)
        held = slots
        if path is not None:
            held = tl.where(
                slots < fork, slots, tl.load(path + slots - fork, mask=used & (slots >= fork), other=0)
            )
        page = tl.load(table + held // _PAGE_TOKENS, mask=used, other=0).to(tl.int64)
        at = page * PAGE_STRIDE + (held % _PAGE_TOKENS) * HEAD_DIM
        inside = used[:, None] & (d < HEAD_DIM)[None, :]
        key = tl.load(keys + at[:, None] + d[None, :], mask=inside, other=0.0)
        value = tl.load(keys + _PAGE_TOKENS * HEAD_DIM + at[:, None] + d[None, :], mask=inside, other=0.0)
        if pool_scales is not None:  # int8 codes, each of which is a bfloat16
            key = float_of_code(key, 8).to(tl.bfloat16)
            value = float_of_code(value, 8).to(tl.bfloat16)
            place = pool_scales + page * (KV_HEADS * 2 * _PAGE_TOKENS) + held % _PAGE_TOKENS
        if MODE == _FLOAT32:
            scores = tl.dot(high, tl.trans(key), input_precision="ieee")
        else:
            scores = tl.dot(high, tl.trans(key))
            if MODE == _TWO_TERMS:
                scores = tl.dot(low, tl.trans(key), scores)
        if pool_scales is not None:
            scores *= tl.load(place, mask=used, other=0.0)[None, :]
        seen = (slots[None, :] >= seen_from[:, None]) & (slots[None, :] < seen_to[:, None])
        if CAP > 0:
            scores = tl.math.fma(tanh(scores * scale), CAP * _LOG2_E_DEVICE, bias)
        else:
            scores = tl.math.fma(scores, scale, bias)
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=1))
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        keep = tl.math.exp2(top - finite)
        chances = tl.math.exp2(scores - finite[:, None])
        total = tl.math.fma(total, keep, tl.sum(chances, axis=1))
        mixed *= keep[:, None]
        top = highest
        if pool_scales is not None:
            chances *= tl.load(place + _PAGE_TOKENS, mask=used, other=0.0)[None, :]
        if MODE == _FLOAT32:
            mixed = tl.dot(chances, value, mixed, input_precision="ieee")
        else:
            upper = chances.to(tl.bfloat16)
            mixed = tl.dot(upper, value, mixed)
            if MODE == _TWO_TERMS:
                mixed = tl.dot((chances - upper.to(tl.float32)).to(tl.bfloat16), value, mixed)
    return mixed, top, total


@triton.jit
def _attention_kernel(
    query, out, pool, pool_scales, positions, sinks, counts, items, segments, tables, paths,
    partial_mixed, partial_top, partial_total, query_stride, out_stride, scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SPLIT: tl.constexpr, MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Items `program_id(0)`, + `num_programs(0)`, … for KV head `program_id(1)`. WINDOW 0: no window.
    `scale` makes base-2 scores, or where they are bounded by CAP, shares of it."""
    kv_head = tl.program_id(1)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    keys = pool + kv_head * (2 * _PAGE_TOKENS * HEAD_DIM)
    if pool_scales is not None:
        pool_scales += kv_head * (2 * _PAGE_TOKENS)
    for index in range(tl.program_id(0), tl.load(counts), tl.num_programs(0)):
        item = items + index * _ITEM_FIELDS
        row, rows = tl.load(item + _ITEM_ROW), tl.load(item + _ITEM_ROWS)
        partial = tl.load(item + _ITEM_PARTIAL)
        split_begin, split_end = tl.load(item + _ITEM_SPLIT_BEGIN), tl.load(item + _ITEM_SPLIT_END)
        packed = row * GROUP + m  # depends on the item, or its parts would live in registers throughout
        live = packed < (row + rows) * GROUP
        at = (packed // GROUP).to(tl.int64) * query_stride
        at += (kv_head * GROUP + packed % GROUP) * HEAD_DIM
        inside = live[:, None] & (d < HEAD_DIM)[None, :]
        given = tl.load(query + at[:, None] + d[None, :], mask=inside, other=0.0)
        if MODE == _FLOAT32:
            high = given.to(tl.float32)
            low = high
        else:
            high = given.to(tl.bfloat16)
            low = high
            if MODE == _TWO_TERMS:
                low = (given - high.to(tl.float32)).to(tl.bfloat16)
        position = tl.load(positions + packed // GROUP, mask=live, other=0)
        first_row, last_row = tl.load(positions + row), tl.load(positions + row + rows - 1)

        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for number in range(tl.load(item + _ITEM_SEGMENT_BEGIN), tl.load(item + _ITEM_SEGMENT_END)):
            segment = segments + number * _SEGMENT_FIELDS
            length, first = tl.load(segment + _SEGMENT_LENGTH), tl.load(segment + _SEGMENT_FIRST_POSITION)
            bias = tl.load(segment + _SEGMENT_BIAS).to(tl.float32, bitcast=True) * _LOG2_E_DEVICE
            table = tables + tl.load(segment + _SEGMENT_TABLE)
            # A row sees the slots up to its own position, and of those the last WINDOW. The block sees from
            # its first row's first slot to its last row's last one: its positions follow each other.
            seen_to, end_seen = tl.where(live, length, 0), length
            if tl.load(segment + _SEGMENT_CAUSAL) != 0:
                seen_to = tl.minimum(seen_to, position - first + 1)
                end_seen = tl.minimum(end_seen, last_row - first + 1)
            seen_from, first_seen = tl.zeros([BLOCK_M], tl.int32), 0
            if WINDOW > 0:
                seen_from = tl.maximum(seen_from, position - first + 1 - WINDOW)
                first_seen = tl.maximum(first_seen, first_row - first + 1 - WINDOW)
            path, fork = paths, end_seen
            if paths is not None:
                path = paths + tl.load(item + _ITEM_PATH)
                fork = tl.where(tl.load(path + _PATH_SEGMENT) == number, tl.load(path + _PATH_FORK), length)
                path += _PATH_SLOTS
            split_from = tl.maximum(split_begin, first_seen // SPLIT)
            split_to = tl.minimum(split_end, tl.cdiv(tl.maximum(end_seen, 0), SPLIT))
            for split in range(split_from, split_to):
                begin = tl.maximum(first_seen, split * SPLIT) // BLOCK_N * BLOCK_N
                end = tl.minimum(end_seen, split * SPLIT + SPLIT)
                mixed_next, top_next, total_next = _attend_split(
                    high, low, keys, pool_scales, table, path, fork,
                    begin, end, first_seen, end_seen, seen_from, seen_to, scale, bias,
                    KV_HEADS, PAGE_STRIDE, HEAD_DIM, CAP, MODE, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                mixed, top, total = _merge(mixed, top, total, mixed_next, top_next, total_next)

        if partial < 0:
            _store_rows(
                out, out_stride, sinks, mixed, top, total, item + _ITEM_ROW, kv_head,
                GROUP, HEAD_DIM, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        else:
            place = (partial.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_M + m
            tl.store(partial_mixed + place[:, None] * BLOCK_D + d[None, :], mixed)
            tl.store(partial_top + place, top)
            tl.store(partial_total + place, total)


@triton.jit
def _merge_kernel(
    out, sinks, counts, merges, partial_mixed, partial_top, partial_total, out_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merges `program_id(0)`, + `num_programs(0)`, … for KV head `program_id(1)`."""
    kv_head = tl.program_id(1)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    for index in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        merge = merges + index * _MERGE_FIELDS
        begin = tl.load(merge + _MERGE_FIRST)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for partial in range(begin, begin + tl.load(merge + _MERGE_COUNT)):
            place = (tl.cast(partial, tl.int64) * KV_HEADS + kv_head) * BLOCK_M + m
            mixed_next = tl.load(partial_mixed + place[:, None] * BLOCK_D + d[None, :])
            top_next, total_next = tl.load(partial_top + place), tl.load(partial_total + place)
            mixed, top, total = _merge(mixed, top, total, mixed_next, top_next, total_next)
        _store_rows(
            out, out_stride, sinks, mixed, top, total, merge + _MERGE_ROW, kv_head,
            GROUP, HEAD_DIM, BLOCK_M, BLOCK_D,
        )  # fmt: skip


def _mode(query: Tensor, pool: Tensor) -> int:
    if pool.dtype == torch.float32:
        return int(_FLOAT32.value)
    return int((_BF16 if query.dtype == torch.bfloat16 else _TWO_TERMS).value)


def _configuration(mode: int, block_m: int, block_d: int, coded: bool) -> tuple[int, dict[str, int]]:
    """(BLOCK_N, launch options) of the attention kernel.

    A high or wide tile has its sums, and those of the split at hand, spread over eight warps. Its slots are
    as many as fit beside them, and beside the codes of a pool that is `coded`. The bound on registers is no
    limit that is ever reached: without one, ptxas spills to reach an occupancy that it has picked itself.
    """
    warps = 8 if block_m > 32 or block_d > 128 else 4
    two_terms = mode == int(_TWO_TERMS.value)
    if mode == int(_FLOAT32.value) or (coded and two_terms and block_m > 32 and block_d > 64):
        block_n = 16
    else:
        block_n = 32 if block_d > 128 or (block_m > 16 and block_d > 64) else 64
    return block_n, {"num_warps": warps, "num_stages": 3, "maxnreg": 255}


def attention(
    query: Tensor,
    out: Tensor,
    pool: Tensor,
    positions: Tensor,
    work: WorkList,
    partials: Partials,
    *,
    scale: float,
    window: int | None,
    block_m: int,
    programs: int,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    pool_scales: Tensor | None = None,
    split_tokens: int = SPLIT_TOKENS,
) -> None:
    """Attention of the work list's rows over the pages that its segments name.

    query, out (rows, heads * head_dim) float32 or bfloat16; pool (pages, kv_heads, 2, PAGE_TOKENS,
    head_dim) bfloat16, float32, or int8 codes with `pool_scales` float32 (pages, kv_heads, 2, PAGE_TOKENS),
    keys at 0 and values at 1 of their third axis; positions int32 (rows,) rotary. `softcap` bounds scaled
    scores s: softcap * tanh(s / softcap). `sinks` float32 (heads,) are scores that take part in each head's
    softmax and have no value. Rows that no item names are left as they are. A row's result depends on
    `block_m`, on `split_tokens` and on what the row sees, but not on how the list cuts the work, nor on
    `programs`, the width of the grid. float32 queries give about five digits over a bfloat16 or int8 pool;
    bfloat16 ones have their probabilities rounded to bfloat16 as well.
    """
    kv_heads, head_dim = pool.shape[1], pool.shape[4]
    block_d = padded_head_dim(head_dim)
    heads = query.shape[1] // head_dim
    mode = _mode(query, pool)
    block_n, options = _configuration(mode, block_m, block_d, pool_scales is not None)
    _check(query, out, pool, pool_scales, positions, work, partials, block_m)
    assert split_tokens % block_n == 0, "splits are whole tiles"
    assert window is None or window > 0, "a row sees itself"
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == (heads,)), "a sink for each head"
    shape = {"GROUP": heads // kv_heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
    results = (partials.mixed, partials.top, partials.total)
    grid = (programs, kv_heads)
    _attention_kernel[grid](
        query, out, pool, pool_scales, positions, sinks,
        work.counts, work.items, work.segments, work.tables, work.paths, *results,
        query.stride(0), out.stride(0), scale / softcap if softcap else scale * _LOG2_E,
        **shape, PAGE_STRIDE=pool.stride(0), WINDOW=window or 0, CAP=softcap or 0.0, SPLIT=split_tokens,
        MODE=mode,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, **options,
    )  # fmt: skip
    _merge_kernel[grid](
        out, sinks, work.counts, work.merges, *results, out.stride(0),
        **shape, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=options["num_warps"], num_stages=2, maxnreg=255,
    )  # fmt: skip


def _check(
    query: Tensor,
    out: Tensor,
    pool: Tensor,
    scales: Tensor | None,
    positions: Tensor,
    work: WorkList,
    partials: Partials,
    block_m: int,
) -> None:
    _, kv_heads, sides, page, head_dim = pool.shape
    assert (sides, page) == (2, PAGE_TOKENS), "a page holds keys and values of PAGE_TOKENS slots"
    assert pool.stride()[1:] == (2 * page * head_dim, page * head_dim, head_dim, 1), "pages are contiguous"
    check_pool(pool, scales)
    assert query.shape == out.shape, "a result for each query"
    assert query.shape[1] % (kv_heads * head_dim) == 0, "each KV head serves as many query heads"
    assert query.shape[1] <= block_m * kv_heads * head_dim, "a tile holds a row with all its query heads"
    for rows in (query, out):
        assert rows.stride(1) == 1, "a row's values lie side by side"
        assert rows.dtype in (torch.bfloat16, torch.float32)
    paths = () if work.paths is None else (work.paths,)
    for numbers in (positions, work.counts, work.items, work.merges, work.segments, work.tables, *paths):
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
    count = partials.top.shape[0]
    assert partials.top.shape == partials.total.shape == (count, kv_heads, block_m)
    assert partials.mixed.shape == (count, kv_heads, block_m, padded_head_dim(head_dim))
    for result in (partials.mixed, partials.top, partials.total):
        assert result.dtype == torch.float32
        assert result.is_contiguous()


def attention_reference(
    query: Tensor,
    out: Tensor,
    pool: Tensor,
    positions: Tensor,
    work: WorkList,
    partials: Partials,
    *,
    scale: float,
    window: int | None,
    block_m: int,
    programs: int,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    pool_scales: Tensor | None = None,
    split_tokens: int = SPLIT_TOKENS,
) -> None:
    """What `attention` writes to `out`, in float64: each row over all that its items cover, at once.

    Final results only: `partials` stay as they are.
    """
    kv_heads, head_dim = pool.shape[1], pool.shape[4]
    heads = query.shape[1] // head_dim
    scores: dict[int, list[Tensor]] = {}
    values: dict[int, list[Tensor]] = {}
    for item in work.items[: int(work.counts[0])].tolist():
        for row in range(item[ITEM_ROW], item[ITEM_ROW] + item[ITEM_ROWS]):
            q = query[row].double().view(kv_heads, -1, head_dim)
            for number in range(item[ITEM_SEGMENT_BEGIN], item[ITEM_SEGMENT_END]):
                segment = work.segments[number]
                slots = _visible_slots(segment, int(positions[row]), window)
                split = slots // split_tokens
                slots = slots[(split >= item[ITEM_SPLIT_BEGIN]) & (split < item[ITEM_SPLIT_END])]
                if work.paths is not None and work.paths[item[ITEM_PATH] + PATH_SEGMENT] == number:
                    slots = _on_path(slots, work.paths[item[ITEM_PATH] :])
                pages = work.tables[int(segment[SEGMENT_TABLE]) + slots // PAGE_TOKENS].long()
                held = pool[pages, :, :, slots % PAGE_TOKENS].double()  # (slots, kv_heads, 2, head_dim)
                if pool_scales is not None:
                    held *= pool_scales[pages, :, :, slots % PAGE_TOKENS].double()[..., None]
                bias = segment[SEGMENT_BIAS].view(torch.float32).double()
                products = torch.einsum("khd,skd->khs", q, held[:, :, 0]) * scale
                if softcap is not None:
                    products = softcap * torch.tanh(products / softcap)
                scores.setdefault(row, []).append(products + bias)
                values.setdefault(row, []).append(held[:, :, 1])
    for row in scores:
        seen = torch.cat(scores[row], dim=2)
        ends = [seen] if sinks is None else [seen, sinks.double().view(*seen.shape[:2], 1)]
        chances = torch.softmax(torch.cat(ends, dim=2), dim=2)[:, :, : seen.shape[2]]
        mixed = torch.einsum("khs,skd->khd", chances, torch.cat(values[row]))
        out[row] = mixed.reshape(heads * head_dim).to(out.dtype)


def _on_path(slots: Tensor, path: Tensor) -> Tensor:
    """Where what stands in `slots` lies."""
    fork = int(path[PATH_FORK])
    listed: Tensor = path[PATH_SLOTS + (slots - fork).clamp(min=0)]
    return torch.where(slots < fork, slots, listed)


def _visible_slots(segment: Tensor, position: int, window: int | None) -> Tensor:
    slots = torch.arange(int(segment[SEGMENT_LENGTH]), device=segment.device)
    at = slots + int(segment[SEGMENT_FIRST_POSITION])
    seen = torch.ones_like(slots, dtype=torch.bool)
    if segment[SEGMENT_CAUSAL]:
        seen &= at <= position
    if window is not None:
        seen &= at > position - window
    return slots[seen]
