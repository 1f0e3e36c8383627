"""Rotary embedding of queries and keys, with the norms of their heads, and storing of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.cuda.arrays import NormWeights
from ridgeline.execution.cuda.kernels.norm import check_norm, inverse_rms, norm_reference
from ridgeline.execution.cuda.kernels.pages import check_pool
from ridgeline.execution.cuda.kernels.quantise import check_activations, check_float32, codes_of, scale_of
from ridgeline.execution.step_arrays import rope_tables
from ridgeline.model.spec import RopeSpec
from ridgeline.precision.quantise import quantise_groups

_PAGE_TOKENS = tl.constexpr(PAGE_TOKENS)


@dataclass(frozen=True, slots=True)
class Heads:
    """How attention's queries, keys and values divide into heads."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosine and sine of each row's rotary angles, float32 (rows, half)."""

    cos: Tensor
    sin: Tensor


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _rope_table_kernel(
    positions, frequencies, cos, cos_stride, sin, sin_stride,
    SCALE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < HALF
    position = tl.load(positions + row).to(tl.float32)
    angle = (position * tl.load(frequencies + i, mask=mask, other=0.0)).to(tl.float64)
    tl.store(cos + row * cos_stride + i, (tl.cos(angle) * SCALE).to(tl.float32), mask=mask)
    tl.store(sin + row * sin_stride + i, (tl.sin(angle) * SCALE).to(tl.float32), mask=mask)


def rope_table(positions: Tensor, frequencies: Tensor, cos: Tensor, sin: Tensor, scale: float = 1.0) -> None:
    """Cosine and sine of a step's rotary angles, by the rule of `step_arrays.rope_tables`.

    `positions` int32 (rows,), `frequencies` float32 (half,); writes `cos` and `sin`, float32 (rows, half),
    times `scale`.
    """
    rows, half = _check_table(positions, frequencies, cos, sin)
    if rows == 0:
        return
    block = triton.next_power_of_2(half)
    # Two warps hide some of float64's latency; a row has few angles, and there is one launch in a step.
    _rope_table_kernel[(rows,)](
        positions, frequencies, cos, cos.stride(0), sin, sin.stride(0),
        SCALE=scale, HALF=half, BLOCK=block, num_warps=2,
    )  # fmt: skip


def rope_table_reference(
    positions: Tensor, frequencies: Tensor, cos: Tensor, sin: Tensor, scale: float = 1.0
) -> None:
    """As `rope_table`, by NumPy."""
    _check_table(positions, frequencies, cos, sin)
    tables = rope_tables(RopeSpec(tuple(frequencies.tolist()), scale), positions.cpu().numpy())
    for out, table in zip((cos, sin), tables, strict=True):
        out.copy_(torch.from_numpy(table))


def _check_table(positions: Tensor, frequencies: Tensor, cos: Tensor, sin: Tensor) -> tuple[int, int]:
    rows, half = cos.shape
    check_float32(cos, sin)
    assert sin.shape == cos.shape, (sin.shape, cos.shape)
    assert positions.shape == (rows,), (positions.shape, rows)
    assert positions.dtype == torch.int32, positions.dtype
    assert frequencies.shape == (half,), (frequencies.shape, half)
    assert frequencies.dtype == torch.float32, frequencies.dtype
    assert positions.is_contiguous()
    assert frequencies.is_contiguous()
    return rows, half


@triton.jit
def _gains(gain, columns, inside, mask, BY_HEAD: tl.constexpr):
    if BY_HEAD:
        inside = inside & mask
    return tl.load(gain + columns, mask=inside, other=0.0)


@triton.jit
def _turn_heads(
    source,
    target,
    scales,
    head,
    mask,
    row,
    cos,
    sin,
    cos_stride,
    sin_stride,
    gain,
    eps,
    LAYER: tl.constexpr,
    BY_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Normalise and rotate a row's heads; `source`, `target`, `scales`, `head` and `mask` are (heads, 1).

    A thread holds both values of a pair, so `target` may be where `source` is. The pairs come first, then
    the REST of the head that is not rotated. Where there are `scales`, `target` is given codes.
    """
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    i = tl.arange(0, BLOCK_HALF)[None, :]
    j = tl.arange(0, BLOCK_REST)[None, :]
    low = tl.load(source + i, mask=mask & (i < HALF), other=0.0)
    high = tl.load(source + HALF + i, mask=mask & (i < HALF), other=0.0)
    if REST > 0:
        rest = tl.load(source + 2 * HALF + j, mask=mask & (j < REST), other=0.0)
    if gain is not None:
        if LAYER:
            sums = tl.sum(low + high, axis=1)
            if REST > 0:
                sums += tl.sum(rest, axis=1)
            mean = (sums / HEAD_DIM)[:, None]
            low = tl.where(i < HALF, low - mean, 0.0)
            high = tl.where(i < HALF, high - mean, 0.0)
            if REST > 0:
                rest = tl.where(j < REST, rest - mean, 0.0)
        if BY_HEAD:
            gain += head * HEAD_DIM
        squares = tl.sum(low * low + high * high, axis=1)
        if REST > 0:
            squares += tl.sum(rest * rest, axis=1)
        scale = inverse_rms(squares, eps, HEAD_DIM)[:, None]
        low *= scale * _gains(gain, i, i < HALF, mask, BY_HEAD)
        high *= scale * _gains(gain, HALF + i, i < HALF, mask, BY_HEAD)
        if REST > 0:
            rest *= scale * _gains(gain, 2 * HALF + j, j < REST, mask, BY_HEAD)
    if cos is not None:
        c = tl.load(cos + row * cos_stride + i, mask=i < HALF, other=0.0)
        s = tl.load(sin + row * sin_stride + i, mask=i < HALF, other=0.0)
        first = low
        low = first * c - high * s
        high = high * c + first * s
    if scales is not None:
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1)[:, None]
        if REST > 0:
            largest = tl.maximum(largest, tl.max(tl.abs(rest), axis=1)[:, None])
            rest = codes_of(rest, largest)
        low, high = codes_of(low, largest), codes_of(high, largest)
        tl.store(scales, scale_of(largest), mask=mask)
    tl.store(target + i, low.to(target.dtype.element_ty), mask=mask & (i < HALF))
    tl.store(target + HALF + i, high.to(target.dtype.element_ty), mask=mask & (i < HALF))
    if REST > 0:
        tl.store(target + 2 * HALF + j, rest.to(target.dtype.element_ty), mask=mask & (j < REST))


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rope_store_kernel(
    query,
    query_stride,
    key,
    key_stride,
    value,
    value_stride,
    query_out,
    query_out_stride,
    pool,
    pool_scales,
    slots,
    cos,
    cos_stride,
    sin,
    sin_stride,
    query_gain,
    query_eps,
    key_gain,
    key_eps,
    LAYER: tl.constexpr,
    BY_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    QUERY_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    if block < QUERY_BLOCKS:
        head = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
        source = query + row * query_stride + head * HEAD_DIM
        target = query_out + row * query_out_stride + head * HEAD_DIM
        _turn_heads(
            source, target, None, head, head < HEADS, row, cos, sin, cos_stride, sin_stride, query_gain,
            query_eps, LAYER, BY_HEAD, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        slot = tl.load(slots + row).to(tl.int64)
        if slot >= 0:
            head = ((block - QUERY_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
            mask = head < KV_HEADS
            # Of each head's 2 * PAGE_TOKENS lines in a page, the first half are keys.
            line = (slot // _PAGE_TOKENS * KV_HEADS + head) * (2 * _PAGE_TOKENS) + slot % _PAGE_TOKENS
            keys = pool + line * HEAD_DIM
            scales = None
            if pool_scales is not None:
                scales = pool_scales + line
            _turn_heads(
                key + row * key_stride + head * HEAD_DIM, keys, scales, head, mask, row, cos, sin, cos_stride,
                sin_stride, key_gain, key_eps, LAYER, BY_HEAD, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
            d = tl.arange(0, BLOCK_DIM)[None, :]
            inside = mask & (d < HEAD_DIM)
            v = tl.load(value + row * value_stride + head * HEAD_DIM + d, mask=inside, other=0.0)
            if pool_scales is not None:
                largest = tl.max(tl.abs(v), axis=1)[:, None]
                v = codes_of(v, largest)
                tl.store(pool_scales + line + _PAGE_TOKENS, scale_of(largest), mask=mask)
            values = keys + _PAGE_TOKENS * HEAD_DIM
            tl.store(values + d, v.to(pool.dtype.element_ty), mask=inside)


def rope_store(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    query_out: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    heads: Heads,
    *,
    rope: Rope | None = None,
    query_norm: NormWeights | None = None,
    key_norm: NormWeights | None = None,
    pool_scales: Tensor | None = None,
) -> None:
    """Normalise and rotate queries and keys, and store keys and values in their slots; one launch.

    `query` (rows, heads * head_dim), `key` and `value` (rows, kv_heads * head_dim) are float32, usually
    column views of one tensor. The norms are over each head, of one kind and without bias; their gains are
    (head_dim,) for all heads, or (heads, head_dim) in both. `rope` turns the pairs (i, i + half) of each head
    (arXiv:2104.09864) and leaves what follows them. `query_out` has query's shape, float32 or bfloat16, and
    may be the same memory; both are None where queries stay as they are. `pool` is (pages, kv_heads, 2, 16,
    head_dim), bfloat16 or float32, or KV8's codes with `pool_scales` (pages, kv_heads, 2, 16); row r goes to
    its physical slot `slots[r]` = page * 16 + offset, int32, or nowhere where that is negative.
    """
    rows = _check_store(query, key, value, query_out, pool, slots, heads, rope, query_norm, key_norm)
    check_pool(pool, pool_scales)
    if rows == 0:
        return
    half = rope.cos.shape[1] if rope is not None else heads.head_dim // 2
    norm = query_norm or key_norm
    block_heads, num_warps = _configuration(heads)
    query_heads = heads.heads if query is not None else 0
    blocks = triton.cdiv(query_heads, block_heads) + triton.cdiv(heads.kv_heads, block_heads)
    source, target = (key, key) if query is None or query_out is None else (query, query_out)
    _rope_store_kernel[(rows, blocks)](
        source,
        source.stride(0),
        key,
        key.stride(0),
        value,
        value.stride(0),
        target,
        target.stride(0),
        pool,
        pool_scales,
        slots,
        *((rope.cos, rope.cos.stride(0), rope.sin, rope.sin.stride(0)) if rope else (None, 0, None, 0)),
        *((query_norm.weight, query_norm.eps) if query_norm else (None, 0.0)),
        *((key_norm.weight, key_norm.eps) if key_norm else (None, 0.0)),
        LAYER=norm is not None and norm.kind == "layer",
        BY_HEAD=norm is not None and norm.weight.ndim == 2,
        HEADS=query_heads,
        KV_HEADS=heads.kv_heads,
        HEAD_DIM=heads.head_dim,
        HALF=half,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(max(heads.head_dim - 2 * half, 1)),
        BLOCK_DIM=triton.next_power_of_2(heads.head_dim),
        num_warps=num_warps,
    )


def rope_store_reference(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    query_out: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    heads: Heads,
    *,
    rope: Rope | None = None,
    query_norm: NormWeights | None = None,
    key_norm: NormWeights | None = None,
    pool_scales: Tensor | None = None,
) -> None:
    """As `rope_store`, a head at a time in PyTorch."""
    rows = _check_store(query, key, value, query_out, pool, slots, heads, rope, query_norm, key_norm)
    check_pool(pool, pool_scales)
    if query is not None and query_out is not None:
        query_out.copy_(_turned_reference(query, query_norm, rope, heads).reshape(query.shape))
    keys = _turned_reference(key, key_norm, rope, heads)
    stored = slots >= 0
    page, offset = slots[stored].long() // PAGE_TOKENS, slots[stored].long() % PAGE_TOKENS
    values = value.reshape(rows, -1, heads.head_dim)
    for side, given in enumerate((keys[stored].float(), values[stored])):
        if pool_scales is None:
            pool[page, :, side, offset] = given.to(pool.dtype)
            continue
        codes, scales = quantise_groups(given.cpu().numpy())
        pool[page, :, side, offset] = torch.from_numpy(codes).to(pool.device)
        pool_scales[page, :, side, offset] = torch.from_numpy(scales).to(pool.device)


def _turned_reference(x: Tensor, norm: NormWeights | None, rope: Rope | None, heads: Heads) -> Tensor:
    """Heads of x, (rows, heads, head_dim)."""
    x = x.reshape(len(x), -1, heads.head_dim)
    x = norm_reference(x, norm) if norm is not None else x
    if rope is None:
        return x
    x, half = x.double(), rope.cos.shape[1]
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _configuration(heads: Heads) -> tuple[int, int]:
    """Heads of a program, and its warps.

    512 values over two warps are one 16-byte load of each half of the heads for every thread; smaller
    programs would leave a multiprocessor, which takes 32 of them, half empty.
    """
    block = max(512 // triton.next_power_of_2(heads.head_dim), 1)
    return min(block, triton.next_power_of_2(heads.heads)), 2


def _check_store(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    query_out: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    heads: Heads,
    rope: Rope | None,
    query_norm: NormWeights | None,
    key_norm: NormWeights | None,
) -> int:
    rows, dim = key.shape[0], heads.head_dim
    check_float32(key, value)
    assert key.shape == value.shape == (rows, heads.kv_heads * dim), (key.shape, value.shape)
    assert (query is None) == (query_out is None)
    if query is not None and query_out is not None:
        check_float32(query)
        assert query.shape == (rows, heads.heads * dim), query.shape
        check_activations(query_out, rows, heads.heads * dim)
    assert pool.shape[1:] == (heads.kv_heads, 2, PAGE_TOKENS, dim), pool.shape
    assert pool.is_contiguous()
    assert slots.shape == (rows,), (slots.shape, rows)
    assert slots.dtype == torch.int32, slots.dtype
    assert slots.is_contiguous()
    if rope is not None:
        check_float32(rope.cos, rope.sin)
        assert rope.cos.shape == rope.sin.shape, (rope.cos.shape, rope.sin.shape)
        assert rope.cos.shape[0] == rows, (rope.cos.shape, rows)
        assert 0 < 2 * rope.cos.shape[1] <= dim, (rope.cos.shape, dim)
    norms = [(norm, n) for norm, n in ((query_norm, heads.heads), (key_norm, heads.kv_heads)) if norm]
    for norm, count in norms:
        assert norm.kind == norms[0][0].kind, "one kind of norm for queries and keys"
        assert norm.bias is None
        check_norm(norm, *((count, dim) if norms[0][0].weight.ndim == 2 else (dim,)))
    return rows
