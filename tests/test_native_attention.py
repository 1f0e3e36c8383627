"""Rope, KV pages and attention of the C++ extension against NumPy, and what a row may depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_oracles import (
    LEVELS,
    Floats,
    Part,
    Rows,
    a8_buffer,
    a8_values,
    bf16_bits,
    bf16_buffer,
    f32_buffer,
    kv8_values,
    step_inputs,
    widen,
)

from ridgeline import native

TEAM = native.Team(2)
ONE_THREAD = native.Team(1)
FIVE_THREADS = native.Team(5)
BF16, F32, INT8 = np.dtype(np.uint16), np.dtype(np.float32), np.dtype(np.uint8)
NAN = {BF16: 0x7FFF, F32: np.nan, INT8: 0xFF}  # what fills a pool with NaN: int8 codes have NaN scales
KINDS: list[dict[str, Any]] = [{"pool": pool} for pool in NAN] + [{"pool": BF16, "rounded": True}]
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=["bf16", "f32", "int8", "bf16-rounded"])


@dataclass(frozen=True)
class Shape:
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    window: int = 0
    scale: float = 0.2
    softcap: float = 0.0
    with_sinks: bool = False
    pool: np.dtype[Any] = BF16
    rounded: bool = False  # queries are bfloat16; weights are too where the level multiplies such pairs

    def queries(self, q: Floats) -> Floats:
        return widen(bf16_bits(q)) if self.rounded else q

    @property
    def tolerances(self) -> dict[str, float]:
        return {"rtol": 1e-4, "atol": 8e-3 if self.rounded else 2e-6}

    def stored(self, x: Floats) -> Floats:
        """x as the pool rounds it, (..., kv_width)."""
        if self.pool == INT8:
            return kv8_values(x.reshape(-1, self.head_dim)).reshape(x.shape)
        return x if self.pool == F32 else widen(bf16_bits(x))

    @property
    def sinks(self) -> Floats | None:
        """From ones that hardly count to ones above all scores."""
        return np.linspace(-3, 8, self.heads, dtype=np.float32) if self.with_sinks else None

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


class Harness:
    """One attention layer over a pool whose pages hold NaN until they are written."""

    def __init__(self, isa: str, shape: Shape, max_rows: int, pages: int, team: native.Team = TEAM) -> None:
        self.shape, self.max_rows = shape, max_rows
        head_values = 2 * 16 * (shape.head_dim + 4 * (shape.pool == INT8))
        self.pool = np.full((pages, shape.kv_heads, head_values), NAN[shape.pool], shape.pool)
        self.q, self.out = f32_buffer(max_rows, shape.q_width), f32_buffer(max_rows, shape.q_width)
        self.k, self.v = f32_buffer(max_rows, shape.kv_width), f32_buffer(max_rows, shape.kv_width)
        geometry = (0, shape.heads, shape.kv_heads, shape.head_dim)
        self.tape = native.Tape(team, isa, max_rows)
        rounded = bf16_buffer(max_rows, shape.q_width) if shape.rounded else None
        self.tape.rope_store(self.q, self.k, self.v, self.pool, *geometry, rounded_q=rounded)
        queries = self.q if rounded is None else rounded
        options = (shape.scale, shape.window, shape.softcap, shape.sinks)
        self.tape.attention(queries, self.out, self.pool, *geometry, *options)
        self.coded = a8_buffer(max_rows, shape.q_width)
        if shape.head_dim % 32 == 0:
            self.tape.attention(queries, self.coded, self.pool, *geometry, *options)

    def run(self, sequences: Sequence[Rows], q: Floats, k: Floats, v: Floats) -> Floats:
        rows, shape = len(q), self.shape
        self.q[:rows, : shape.q_width] = q
        self.k[:rows, : shape.kv_width] = k
        self.v[:rows, : shape.kv_width] = v
        self.tape.run(step_inputs(sequences))
        out = self.out[:rows, : shape.q_width].copy()
        if shape.head_dim % 32 == 0:
            coded = native.dequantise_a8(self.coded, shape.q_width)[:rows]
            finite = np.isfinite(out).all(axis=1)
            np.testing.assert_array_equal(coded[finite], a8_values(out[finite]))
            assert not np.isfinite(coded[~finite]).all(axis=1).any()
        return out

    def stored(self, page: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """K and V of a slot, (kv_heads, head_dim)."""
        half, pool = 16 * self.shape.head_dim, self.shape.pool
        heads, held = self.shape.kv_heads, self.pool[page]
        k = held[:, :half].reshape(heads, -1, 16, 2 if pool == BF16 else 1)[:, :, slot].reshape(heads, -1)
        v = held[:, half : 2 * half].reshape(heads, 16, -1)[:, slot]
        if pool == INT8:
            scales = held[:, 2 * half :].copy().view(np.float32).reshape(heads, 2, 16)[:, :, slot, None]
            return k.view(np.int8) * scales[:, 0], v.view(np.int8) * scales[:, 1]
        return (widen(k), widen(v)) if pool == BF16 else (k, v)


@dataclass(frozen=True)
class Context:
    """What one sequence holds in a segment: K and V as the pool rounds them, (length, kv_heads, head_dim)."""

    k: Floats
    v: Floats
    segment: Part


def attention_of(shape: Shape, q: Floats, position: int, contexts: Sequence[Context]) -> np.ndarray:
    """One row: q (heads, head_dim) over its segments, in float64."""
    scores, values, q = [], [], shape.queries(q)
    for c in contexts:
        at = c.segment.first_position + np.arange(c.segment.length)
        seen = np.ones(len(at), bool) if not c.segment.causal else at <= position
        if shape.window:
            seen &= at > position - shape.window
        ratio = shape.heads // shape.kv_heads
        k = np.repeat(c.k.astype(np.float64), ratio, axis=1)[seen]
        values.append(np.repeat(c.v.astype(np.float64), ratio, axis=1)[seen])
        products = np.einsum("hd,jhd->jh", q.astype(np.float64), k) * shape.scale
        if shape.softcap:
            products = shape.softcap * np.tanh(products / shape.softcap)
        scores.append(products + c.segment.bias)
    s, v = np.concatenate(scores), np.concatenate(values)
    if not len(s):
        return np.zeros(shape.q_width)
    p = np.exp(s - s.max(axis=0))
    total = p.sum(axis=0)
    if shape.sinks is not None:
        total = total + np.exp(shape.sinks - s.max(axis=0))
    return np.einsum("jh,jhd->hd", p / total, v).reshape(-1)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def make_tokens(rng: np.random.Generator, shape: Shape, count: int) -> tuple[Floats, Floats, Floats]:
    return (
        normal(rng, count, shape.q_width),
        normal(rng, count, shape.kv_width),
        normal(rng, count, shape.kv_width),
    )


SHAPES = [
    Shape(),
    Shape(heads=9, kv_heads=3, head_dim=64, scale=0.125),
    Shape(heads=4, kv_heads=4, head_dim=6),
    Shape(heads=5, kv_heads=1, head_dim=80, window=13),
    Shape(heads=2, kv_heads=2, head_dim=96, window=40, softcap=1.5),
    Shape(heads=8, kv_heads=1, head_dim=18),
    Shape(heads=4, kv_heads=2, head_dim=32, pool=F32),
    Shape(heads=3, kv_heads=1, head_dim=18, pool=F32, window=20),
    Shape(heads=6, kv_heads=2, head_dim=32, window=30, with_sinks=True),
    Shape(heads=9, kv_heads=3, head_dim=64, scale=0.125, pool=INT8),
    Shape(heads=4, kv_heads=4, head_dim=6, softcap=1.5, pool=INT8),
    Shape(heads=5, kv_heads=1, head_dim=18, window=20, pool=INT8),
    Shape(heads=6, kv_heads=2, head_dim=32, window=30, with_sinks=True, pool=INT8),
    Shape(heads=9, kv_heads=3, head_dim=64, scale=0.125, rounded=True),
    Shape(heads=5, kv_heads=1, head_dim=18, window=13, rounded=True),
    Shape(heads=2, kv_heads=2, head_dim=96, window=40, softcap=1.5, rounded=True),
    Shape(heads=6, kv_heads=2, head_dim=32, window=30, with_sinks=True, rounded=True),
    Shape(heads=4, kv_heads=2, head_dim=32, pool=INT8, rounded=True),
]


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", [1, 15, 40, 70])
def test_whole_prompt_is_softmax_attention(isa: str, shape: Shape, length: int) -> None:
    rng = np.random.default_rng(length)
    pages = tuple(rng.permutation(12)[: -(-length // 16)].tolist())
    harness = Harness(isa, shape, 80, 12)
    q, k, v = make_tokens(rng, shape, length)
    out = harness.run([Rows(0, length, (Part(length),), (pages,))], q, k, v)
    for slot in range(length):
        stored_k, stored_v = harness.stored(pages[slot // 16], slot % 16)
        np.testing.assert_array_equal(stored_k.reshape(-1), shape.stored(k[slot]))
        np.testing.assert_array_equal(stored_v.reshape(-1), shape.stored(v[slot]))
    k, v = (shape.stored(x).reshape(length, shape.kv_heads, -1) for x in (k, v))
    context = Context(k, v, Part(length))
    heads = q.reshape(length, shape.heads, -1)
    expected = np.stack([attention_of(shape, heads[i], i, [context]) for i in range(length)])
    np.testing.assert_allclose(out, expected, **shape.tolerances)


def run_in_chunks(
    isa: str, shape: Shape, tokens: tuple[Floats, Floats, Floats], cuts: Sequence[int], pages: Sequence[int],
    team: native.Team = TEAM, poison: bool = False,
) -> Floats:  # fmt: skip
    """The rows of one sequence, run in steps between the cuts. `poison` fills pages that no row can see."""
    harness = Harness(isa, shape, cuts[-1], max(pages) + 1, team)
    outs = []
    for a, b in pairwise(cuts):
        if poison and shape.window:
            for page in range(max(0, a - shape.window + 1) // 16):
                harness.pool[pages[page]] = NAN[shape.pool]
        rows = Rows(a, b - a, (Part(b),), (tuple(pages[: -(-b // 16)]),))
        outs.append(harness.run([rows], *(x[a:b] for x in tokens)))
    return np.concatenate(outs)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_chunks_pages_and_threads_change_no_bit(data: st.DataObject) -> None:
    isa = data.draw(st.sampled_from(LEVELS))
    shape = replace(data.draw(st.sampled_from(SHAPES)), window=data.draw(st.sampled_from([0, 7, 30, 64])))
    length = data.draw(st.integers(2, 150))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tokens = make_tokens(rng, shape, length)
    count = -(-length // 16)
    whole = run_in_chunks(isa, shape, tokens, [0, length], range(count))
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(1, length - 1), max_size=8))})
    pages = rng.permutation(count + 3)[:count].tolist()
    again = run_in_chunks(isa, shape, tokens, cuts, pages, ONE_THREAD, poison=True)
    np.testing.assert_array_equal(again.view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("window", [0, 600])
@EACH_KIND
def test_long_contexts_by_one_row_and_by_many(isa: str, window: int, kind: dict[str, Any]) -> None:
    """Several splits: one new token alone, and as the last of a chunk, on one thread and on two."""
    shape = Shape(heads=3, kv_heads=1, head_dim=16, window=window, **kind)
    length = 1400
    tokens = make_tokens(np.random.default_rng(2), shape, length)
    pages = np.random.default_rng(3).permutation(-(-length // 16)).tolist()
    whole = run_in_chunks(isa, shape, tokens, [0, length], pages)
    for team in (TEAM, ONE_THREAD):
        by_row = run_in_chunks(isa, shape, tokens, [0, 1390, *range(1391, length + 1)], pages, team)
        np.testing.assert_array_equal(by_row.view(np.uint32), whole.view(np.uint32))
    k, v = (shape.stored(x).reshape(length, 1, -1) for x in tokens[1:])
    expected = attention_of(shape, tokens[0][-1].reshape(3, -1), length - 1, [Context(k, v, Part(length))])
    np.testing.assert_allclose(whole[-1], expected, **shape.tolerances)


@pytest.mark.parametrize("isa", LEVELS)
@EACH_KIND
def test_a_row_is_not_touched_by_values_that_it_cannot_see(isa: str, kind: dict[str, Any]) -> None:
    """A later row of the same block stores infinities and NaN: earlier rows keep their bits."""
    shape = Shape(**kind)
    q, k, v = make_tokens(np.random.default_rng(4), shape, 20)
    clean = run_in_chunks(isa, shape, (q, k, v), [0, 20], [0, 1])
    bad_v, bad_k = v.copy(), k.copy()
    bad_v[7, 3], bad_v[9, 40], bad_k[11, 5] = np.inf, np.nan, np.nan
    dirty = run_in_chunks(isa, shape, (q, bad_k, bad_v), [0, 20], [0, 1])
    np.testing.assert_array_equal(dirty[:7], clean[:7])
    by_row = run_in_chunks(isa, shape, (q, bad_k, bad_v), range(21), [1, 0])
    np.testing.assert_array_equal(by_row, dirty)
    assert not np.isfinite(dirty[7:9]).all()
    assert np.isnan(dirty[9:]).any()


@pytest.mark.parametrize("isa", LEVELS)
def test_the_sign_of_a_zero_does_not_depend_on_the_block(isa: str) -> None:
    """A flushed product leaves -0, which a masked slot, computed for a neighbour, would clear."""
    shape = Shape(heads=1, kv_heads=1, head_dim=32, scale=1.0)
    q, k, v = (np.zeros((3, 32), np.float32) for _ in range(3))
    q[:, 0], k[0, 0], v[0] = 1, -60, -1e-20
    v[1], v[2] = -0.0, 1
    whole = run_in_chunks(isa, shape, (q, k, v), [0, 3], [0])
    by_row = run_in_chunks(isa, shape, (q, k, v), [0, 1, 2, 3], [0])
    np.testing.assert_array_equal(by_row.view(np.uint32), whole.view(np.uint32))
    assert (whole[1] == 0).all()


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("window", [0, 25])
@EACH_KIND
def test_several_segments_with_bias_and_without_mask(isa: str, window: int, kind: dict[str, Any]) -> None:
    """Two stored segments, one of them seen whole, and the sequence's own: alone and beside others."""
    shape = Shape(heads=4, kv_heads=2, head_dim=32, window=window, **kind)
    rng = np.random.default_rng(5)
    harness = Harness(isa, shape, 40, 20)
    first, second, own = Part(20), Part(35, 3, -0.5, causal=False), Part(13, 18, 1.25)
    places = {first: (4, 9), second: (1, 0, 7), own: (5,)}
    contexts = []
    for segment in (first, second):
        q, k, v = make_tokens(rng, shape, segment.length)
        harness.run([Rows(0, segment.length, (Part(segment.length),), (places[segment],))], q, k, v)
        kv = [shape.stored(x).reshape(segment.length, 2, -1) for x in (k, v)]
        contexts.append(Context(kv[0], kv[1], segment))
    q, k, v = make_tokens(rng, shape, 13)
    kv = [shape.stored(x).reshape(13, 2, -1) for x in (k, v)]
    contexts.append(Context(kv[0], kv[1], own))
    mine = Rows(0, 13, (first, second, own), tuple(places.values()))
    alone = harness.run([mine], q, k, v)
    expected = [attention_of(shape, q[i].reshape(4, -1), 18 + i, contexts) for i in range(13)]
    np.testing.assert_allclose(alone, np.stack(expected), **shape.tolerances)
    others = make_tokens(rng, shape, 8)
    before, after = Rows(0, 3, (Part(3),), ((10,),)), Rows(0, 5, (Part(5),), ((11,),))
    joined = [np.concatenate([o[:3], x, o[3:]]) for o, x in zip(others, (q, k, v), strict=True)]
    batch = harness.run([before, mine, after], *joined)
    np.testing.assert_array_equal(batch[3:16], alone)


@pytest.mark.parametrize("isa", LEVELS)
@EACH_KIND
def test_long_segments_are_split_alike_by_one_thread_and_by_many(isa: str, kind: dict[str, Any]) -> None:
    """A row over two stored segments and its own, each of several splits, alone and in company."""
    shape = Shape(heads=4, kv_heads=2, head_dim=16, **kind)
    first, second, own = Part(300), Part(530, 300, -1.0, causal=False), Part(261, 830, 0.5)
    outs = []
    for team in (ONE_THREAD, TEAM, FIVE_THREADS):
        rng = np.random.default_rng(10)
        pages = iter(rng.permutation(90).tolist())
        harness = Harness(isa, shape, 530, 90, team)
        places = [tuple(next(pages) for _ in range(-(-s.length // 16))) for s in (first, second, own)]
        contexts = []
        for segment, place in zip((first, second, own), places, strict=True):
            q, k, v = make_tokens(rng, shape, segment.length)
            harness.run([Rows(0, segment.length, (Part(segment.length),), (place,))], q, k, v)
            kv = [shape.stored(x).reshape(segment.length, 2, -1) for x in (k, v)]
            contexts.append(Context(kv[0], kv[1], segment))
        last = tuple(x[-1:] for x in (q, k, v))
        mine = Rows(260, 1, (first, second, own), tuple(places))
        alone = harness.run([mine], *last)
        other = Rows(0, 40, (Part(40),), (tuple(next(pages) for _ in range(3)),))
        company = [np.concatenate([x, o]) for x, o in zip(last, make_tokens(rng, shape, 40), strict=True)]
        outs += [alone, harness.run([mine, other], *company)[:1]]
    expected = attention_of(shape, q[-1].reshape(4, -1), 830 + 260, contexts)
    np.testing.assert_allclose(outs[0][0], expected, **shape.tolerances)
    for out in outs[1:]:
        np.testing.assert_array_equal(out.view(np.uint32), outs[0].view(np.uint32))


@pytest.mark.parametrize("isa", LEVELS)
def test_a_row_that_sees_nothing_gives_zeros(isa: str) -> None:
    """Its own segment begins after it."""
    shape = Shape()
    harness = Harness(isa, shape, 4, 4)
    q, k, v = make_tokens(np.random.default_rng(6), shape, 1)
    harness.q[:1, : shape.q_width], harness.k[:1, : shape.kv_width], harness.v[:1, : shape.kv_width] = q, k, v
    own = Part(1, 5)
    step = step_inputs([Rows(0, 1, (own,), ((2,),))])
    harness.tape.run(step)
    assert np.isfinite(harness.out[0, : shape.q_width]).all()
    shifted = native.StepInputs(
        *(np.asarray(x, np.int32) for x in ([0], [4], [0], [0], [0, 1], [], [0, 1], [1], [5])),
        np.zeros(1, np.float32),
        np.ones(1, np.uint8),
        np.asarray([0, 1], np.int32),
        np.asarray([[2]], np.int32),
        np.zeros((1, 1), np.float32),
    )
    harness.tape.run(shifted)
    np.testing.assert_array_equal(harness.out[0, : shape.q_width], 0)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (34, 34), (6, 2)])
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("by_head", [False, True])
def test_rope_and_head_norms(
    isa: str, head_dim: int, rotary_dim: int, norm: str | None, by_head: bool
) -> None:
    rng = np.random.default_rng(7)
    q, k, v = normal(rng, 5, 3 * head_dim), normal(rng, 5, head_dim), normal(rng, 5, head_dim)
    angles = rng.uniform(-3, 3, (8, rotary_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    q_norm = normal(rng, 3 * head_dim if by_head else head_dim) if norm else None
    k_norm = normal(rng, head_dim) if norm else None
    tape = native.Tape(TEAM, isa, 8)
    buffers = [f32_buffer(8, x.shape[1], x) for x in (q, k, v)]
    pool = np.full((3, 1, 32 * head_dim), NAN[BF16], np.uint16)
    norms = (q_norm, k_norm, 1e-5, norm or "rms", by_head)
    tape.rope_store(*buffers, pool, 0, 3, 1, head_dim, cos, sin, rotary_dim, *norms)
    tape.run(step_inputs([Rows(13, 5, (Part(18),), ((2, 0),))]))

    def turned(x: Floats, weight: Floats | None) -> np.ndarray:
        heads = x.reshape(5, -1, head_dim).astype(np.float64)
        if norm == "layer":
            heads = heads - heads.mean(axis=2, keepdims=True)
        if weight is not None:
            heads = heads / np.sqrt((heads**2).mean(axis=2, keepdims=True) + 1e-5)
            heads = heads * weight.reshape(-1, head_dim)
        half = rotary_dim // 2
        a, b, rest = heads[..., :half], heads[..., half:rotary_dim], heads[..., rotary_dim:]
        c, s = cos[:5, None], sin[:5, None]
        return np.concatenate([a * c - b * s, b * c + a * s, rest], axis=2).reshape(5, -1)

    np.testing.assert_allclose(buffers[0][:5, : 3 * head_dim], turned(q, q_norm), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(buffers[1][:5, :head_dim], k)
    expected_k = turned(k, k_norm)
    for row in range(5):
        page, slot = (2, 0)[(13 + row) // 16], (13 + row) % 16
        bits = pool[page, 0, : 16 * head_dim].reshape(-1, 16, 2)[:, slot].reshape(-1)
        np.testing.assert_allclose(widen(bits), expected_k[row], rtol=2**-8, atol=1e-5)
        value = pool[page, 0, 16 * head_dim :].reshape(16, -1)[slot]
        np.testing.assert_array_equal(value, bf16_bits(v[row]))
    assert (pool[1] == NAN[BF16]).all()


@pytest.mark.parametrize("dtype", NAN, ids=str)
def test_pages_are_copied_whole(dtype: np.dtype[Any]) -> None:
    pool = np.arange(4 * 2 * 64).astype(dtype).reshape(4, 2, 64)
    expected = pool.copy()
    expected[3] = expected[1]
    native.copy_page(pool, 1, 3)
    np.testing.assert_array_equal(pool, expected)
    with pytest.raises(ValueError, match=r"^target is 4; accepted: 0 to 3"):
        native.copy_page(pool, 0, 4)


def test_geometry_is_checked() -> None:
    tape = native.Tape(TEAM, "portable", 2)
    q, k, pool = f32_buffer(2, 96), f32_buffer(2, 48), np.zeros((2, 2, 32 * 24), np.uint16)
    with pytest.raises(ValueError, match=r"^head_dim is 24; accepted: a multiple of 32 where out is an A8"):
        tape.attention(q, a8_buffer(2, 96), pool, 0, 4, 2, 24, 1.0)
    with pytest.raises(ValueError, match=r"^heads is 5; accepted: a multiple of kv_heads"):
        tape.attention(q, q, pool, 0, 5, 2, 24, 1.0)
    with pytest.raises(ValueError, match=r"^pool.shape\[2\] is 768; accepted: 512"):
        tape.attention(q, q, pool, 0, 4, 2, 16, 1.0)
    with pytest.raises(ValueError, match=r"^pool.shape\[2\] is 768; accepted: 896"):
        tape.attention(q, q, pool.astype(np.uint8), 0, 4, 2, 24, 1.0)
    with pytest.raises(ValueError, match=r"^head_dim is 25"):
        tape.rope_store(q, k, k, pool, 0, 4, 2, 25)
    with pytest.raises(ValueError, match=r"^sin is not given with cos"):
        tape.rope_store(q, k, k, pool, 0, 4, 2, 24, cos=np.zeros((2, 12), np.float32))
    angles = np.zeros((2, 12), np.float32)
    with pytest.raises(ValueError, match=r"^rotary_dim is 26; accepted: an even number, 2 to 24"):
        tape.rope_store(q, k, k, pool, 0, 4, 2, 24, angles, angles, 26)
    with pytest.raises(ValueError, match=r"^norm_kind is 'batch'; accepted: rms or layer"):
        tape.rope_store(q, k, k, pool, 0, 4, 2, 24, norm_kind="batch")
    with pytest.raises(ValueError, match=r"^q_norm.shape\[0\] is 24; accepted: 96"):
        tape.rope_store(q, k, k, pool, 0, 4, 2, 24, q_norm=np.zeros(24, np.float32), norm_by_head=True)
