"""Trees of guessed tokens: every node is what it would be at the end of its own path, to the bit, and keeping
a path by copying its slots leaves the memory that running it would have left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from native_oracles import LEVELS, Part, Rows, ints
from running import PAGES, Loaded, load, relative_error
from test_native_attention import EACH_KIND, NAN, SHAPES, Harness, Shape, make_tokens
from test_native_rows import checking_tape, step_with
from tiny_models import VOCABULARY, TinyModel

from ridgeline import native
from ridgeline.execution.base import KV_STORAGES
from ridgeline.execution.step_arrays import StepArrays
from ridgeline.types import Segment, SequenceRows, SlotCopy, Step

Tiny = Callable[[str], TinyModel]
QUICK = settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
TEAMS = {threads: native.Team(threads) for threads in (1, 2, 5)}


@st.composite
def trees(draw: st.DrawFn, most: int = 45) -> tuple[int, ...]:
    """Parents of chains, stars, and all between: how far back a row's parent lies is at most `reach`."""
    rows, reach = draw(st.integers(1, most)), draw(st.sampled_from([1, 2, 3, 8, 100]))
    star = draw(st.sampled_from([0.0, 0.1, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    chain = draw(st.integers(0, rows))  # its leading rows
    return tuple(
        row - 1
        if row < chain or row == 0
        else -1
        if random.random() < star
        else max(-1, row - int(random.integers(1, reach + 1)))
        for row in range(rows)
    )


def path_to(parents: Sequence[int], row: int) -> list[int]:
    path = [row]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def leaves(parents: Sequence[int]) -> list[int]:
    return [row for row in range(len(parents)) if row not in parents]


# ------------------------------------------------------------------------------- attention of the kernels


def stored(harness: Harness, random: np.random.Generator, part: Part, pages: tuple[int, ...]) -> None:
    """Keys and values of `part.length` slots."""
    for start in range(0, part.length, harness.max_rows):
        count = min(harness.max_rows, part.length - start)
        rows = Rows(start, count, (Part(start + count, part.first_position),), (pages,))
        harness.run([rows], *make_tokens(random, harness.shape, count))


@QUICK
@given(data=st.data())
@pytest.mark.parametrize("isa", LEVELS)
def test_a_node_attends_as_at_the_end_of_its_path(isa: str, data: st.DataObject) -> None:
    """Over a segment of others, in company, at any number of threads, with short contexts and long."""
    shape: Shape = data.draw(st.sampled_from(SHAPES))
    parents = data.draw(trees())
    start = data.draw(st.one_of(st.integers(0, 100), st.integers(230, 280), st.integers(490, 600)))
    other = data.draw(st.integers(0, 300))
    seed, rows = data.draw(st.integers(0, 99)), len(parents)
    order = np.random.default_rng(seed).permutation(90).tolist()
    held, own, beside = tuple(order[:20]), tuple(order[20:65]), tuple(order[65:70])
    first, length = Part(other, 3, -0.5), start + rows

    def harness(threads: int) -> Harness:
        made, random = Harness(isa, shape, 64, 90, TEAMS[threads]), np.random.default_rng(seed)
        stored(made, random, first, held)
        stored(made, random, Part(start, 7 + other), own)
        return made

    def run(on: Harness, chosen: list[int], parents: tuple[int, ...], company: int) -> np.ndarray:
        last = Part(start + len(chosen), 7 + other, 0.25)
        places = (held[: -(-other // 16)], own[: -(-last.length // 16)])
        mine = Rows(start, len(chosen), (first, last), places, parents)
        others = Rows(0, company, (Part(company),), (beside[: -(-company // 16)],))
        noise = make_tokens(np.random.default_rng(company), shape, company)
        joined = [np.concatenate([n, x[chosen]]) for n, x in zip(noise, tokens, strict=True)]
        return on.run([others, mine], *joined)[company:]

    tokens = make_tokens(np.random.default_rng(seed + 1), shape, rows)
    assert length <= 16 * len(own)
    whole = run(harness(data.draw(st.sampled_from([1, 2, 5]))), [*range(rows)], parents, 19)
    alone = harness(1)
    for leaf in leaves(parents):
        path = path_to(parents, leaf)
        expected = run(alone, path, (), data.draw(st.sampled_from([0, 1])))
        np.testing.assert_array_equal(whole[path].view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("isa", LEVELS)
@EACH_KIND
def test_a_node_is_not_touched_by_its_siblings_values(isa: str, kind: dict[str, Any]) -> None:
    """Infinities and NaN in slots between those of a path."""
    shape = Shape(**kind)
    q, k, v = make_tokens(np.random.default_rng(4), shape, 9)
    parents = (-1, 0, 1, 0, 3, 4, -1, 6, 5)
    outs = []
    for bad in (False, True):
        harness = Harness(isa, shape, 9, 2)
        stored(harness, np.random.default_rng(5), Part(10), (0, 1))
        if bad:
            v[[2, 7], 3], k[2, 5], k[7, 4] = (np.inf, np.nan), np.nan, np.inf
        outs.append(harness.run([Rows(10, 9, (Part(19),), ((0, 1),), parents)], q, k, v))
    clean, dirty = outs
    fine = [0, 1, 3, 4, 5, 6, 8]
    np.testing.assert_array_equal(dirty[fine].view(np.uint32), clean[fine].view(np.uint32))
    assert not np.isfinite(dirty[[2, 7]]).all(axis=1).any()


# ------------------------------------------------------------------------------------- whole programs

FORMATS = [("llama", "W4A8-g32"), ("gemma3", "W8A8-g32"), ("gpt2", "W16A16"), ("odd", "W32A32")]


@pytest.fixture(scope="module")
def executors(tiny: Tiny) -> Callable[..., Loaded]:
    """By family, formats, executor and threads, each made once; a step must not depend on those before it."""
    return cache(lambda family, *rest: load(tiny(family).folder, *rest))


def limit(family: str) -> int:
    return 50 if family == "odd" else VOCABULARY


def tree_rows(
    loaded: Loaded, tokens: Sequence[int], start: int, parents: Sequence[int], pages: Sequence[int]
) -> SequenceRows:
    return replace(loaded.rows(tokens, start, pages), parents=parents)


def assert_same(kind: str, seen: np.ndarray, expected: np.ndarray) -> None:
    if kind == "reference":  # its matrix products may differ in the last place
        assert relative_error(seen, expected) < 1e-5
    else:
        np.testing.assert_array_equal(seen, expected)


@QUICK
@given(data=st.data())
@pytest.mark.parametrize("kv_format", KV_STORAGES)
@pytest.mark.parametrize("isa", LEVELS)
def test_a_tree_gives_the_bits_of_its_paths(
    executors: Callable[..., Loaded], isa: str, kv_format: str, data: st.DataObject
) -> None:
    check_trees(executors, isa, kv_format, data)


@settings(QUICK, max_examples=6)
@given(data=st.data())
def test_a_tree_gives_the_logits_of_its_paths(executors: Callable[..., Loaded], data: st.DataObject) -> None:
    check_trees(executors, "reference", "KV32", data)


def check_trees(executors: Callable[..., Loaded], kind: str, kv_format: str, data: st.DataObject) -> None:
    """Trees and ordinary rows in a step; then a path of each is kept, and goes on as if it had been run."""
    family, weights = data.draw(st.sampled_from(FORMATS))
    weights = "W32A32" if kind == "reference" else weights
    loaded = executors(family, kind, weights, kv_format, data.draw(st.sampled_from([1, 2])))
    alone = executors(family, kind, weights, kv_format, 1)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count = data.draw(st.integers(1, 3))
    order = random.permutation(PAGES).tolist()
    *tables, elsewhere = [order[i * 10 : (i + 1) * 10] for i in range(count + 1)]
    most = 8 if kind == "reference" else 30  # it is slow
    shapes = [data.draw(st.one_of(st.just(()), trees(most))) for _ in range(count)]
    starts = [data.draw(st.integers(0, 75)) for _ in range(count)]
    guesses = [random.integers(0, limit(family), len(shape) or 5).tolist() for shape in shapes]
    prompts = [random.integers(0, limit(family), start).tolist() for start in starts]
    for prompt, table in zip(prompts, tables, strict=True):
        if prompt:
            loaded.run(prompt, 0, table)
    places = list(zip(guesses, starts, shapes, tables, strict=True))
    logits = loaded.logits(*[tree_rows(loaded, *place) for place in places])
    ends = np.cumsum([len(guess) for guess in guesses])
    moves, kept = [], []
    for end, (guess, start, shape, table), prompt in zip(ends, places, prompts, strict=True):
        mine, parents = logits[end - len(guess) : end], shape or range(-1, len(guess) - 1)
        for leaf in leaves(parents):
            path = path_to(parents, leaf)
            expected = alone.run(prompt + [guess[row] for row in path], 0, elsewhere)[start:]
            assert_same(kind, mine[path], expected)
        path = path_to(parents, int(random.integers(len(guess))))
        sources, targets = (
            [table[(start + row) // 16] * 16 + (start + row) % 16 for row in rows]
            for rows in (path, range(len(path)))
        )
        moves += [SlotCopy(group, sources, targets) for group in range(len(loaded.program.groups))]
        kept.append((prompt + [guess[row] for row in path], table))
    loaded.executor.transfer(moves)
    following = random.integers(0, limit(family), 4).tolist()
    seen = loaded.logits(*[loaded.rows(following, len(text), table) for text, table in kept])
    for i, (text, _) in enumerate(kept):
        expected = alone.run(text + following, 0, elsewhere)[len(text) :]
        assert_same(kind, seen[4 * i : 4 * i + 4], expected)


@pytest.mark.parametrize("kv_format", KV_STORAGES)
@pytest.mark.parametrize("kind", ["reference", *LEVELS])
def test_slots_are_copied_as_if_all_were_read_first(
    executors: Callable[..., Loaded], kind: str, kv_format: str
) -> None:
    """Slots change places within a page and between two, in a table of another order; others stay."""
    loaded = executors("gemma3", kind, "W32A32", kv_format, 2)
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, 40).tolist()
    loaded.run(tokens[:32], pages=[8, 9])
    expected = loaded.run(tokens[32:], 32, pages=[8, 9, 10])
    cycle = [8 * 16 + 3, 8 * 16 + 4, 9 * 16 + 11]
    moved = [*cycle[1:], cycle[0]]
    groups = range(len(loaded.program.groups))
    loaded.executor.transfer([SlotCopy(group, cycle, moved) for group in groups])
    changed = loaded.run(tokens[32:], 32, pages=[8, 9, 10])
    assert not np.array_equal(changed, expected)
    loaded.executor.transfer([SlotCopy(group, moved, cycle) for group in groups])
    np.testing.assert_array_equal(loaded.run(tokens[32:], 32, pages=[8, 9, 10]), expected)
    loaded.executor.transfer([SlotCopy(0, [], [])])


@pytest.mark.parametrize("dtype", NAN, ids=str)
def test_slots_of_a_pool_are_checked(dtype: np.dtype) -> None:
    pool = np.zeros((2, 3, 2 * 16 * (8 + 4 * (dtype == np.uint8))), dtype)
    with pytest.raises(ValueError, match=r"^targets is 32; accepted: 0 to 31"):
        native.copy_slots(pool, 8, ints([0]), ints([32]))
    with pytest.raises(ValueError, match=r"^sources is -1; accepted: 0 to 31"):
        native.copy_slots(pool, 8, ints([-1]), ints([3]))
    with pytest.raises(ValueError, match=r"^targets.shape\[0\] is 2; accepted: 1"):
        native.copy_slots(pool, 8, ints([1]), ints([3, 4]))
    with pytest.raises(ValueError, match=r"^pool.shape\[2\] is"):
        native.copy_slots(pool, 10, ints([1]), ints([3]))
    with pytest.raises(ValueError, match=r"^head_dim is 7"):
        native.copy_slots(pool, 7, ints([1]), ints([3]))


# -------------------------------------------------------------------------------- steps and what is refused


def rows_with(parents: Sequence[int], rows: int = 4, causal: bool = True) -> Step:
    own = Segment(((0, 1),), 9 + rows, 100, causal=causal)
    return Step((SequenceRows([1, 2], 0, (Segment(((2,),), 2),), (1,)),
                 SequenceRows([5] * rows, 9, (own,), (0,), parents)))  # fmt: skip


def test_rows_stand_one_behind_their_parents() -> None:
    arrays = StepArrays.of(rows_with((-1, 0, 0, -1)), 1)
    assert arrays.positions.tolist() == [0, 1, 109, 110, 110, 109]
    assert arrays.slots.tolist() == [0, 1, 9, 10, 11, 12]
    assert arrays.parents.tolist() == [-1, 0, -1, 2, 2, -1]
    assert (arrays.is_tree(0), arrays.is_tree(1)) == (False, True)
    assert arrays.path_slots(4).tolist() == [9, 11]
    chain = StepArrays.of(rows_with((-1, 0, 1, 2)), 1)
    assert not chain.is_tree(1)
    plain = StepArrays.of(rows_with(()), 1)
    assert plain.positions.tolist() == chain.positions.tolist() == [0, 1, 109, 110, 111, 112]
    assert len(plain.parents) == 0
    assert not plain.is_tree(1)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((-1, 1, 0, 0), r"^parents\[1\] is 1; accepted: -1 to 0$"),
        ((0, 0, 0, 0), r"^parents\[0\] is 0; accepted: -1 to -1$"),
        ((-1, -2, 0, 0), r"^parents\[1\] is -2"),
        ((-1, 0, 0), r"^parents are 3; accepted: 4, one of each row$"),
    ],
)
def test_parents_that_make_no_tree_are_refused(
    executors: Callable[..., Loaded], parents: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StepArrays.of(rows_with(parents), 1)
    for kind in ("reference", LEVELS[0]):
        loaded = executors("llama", kind, "W32A32", "KV32", 1)
        with pytest.raises(ValueError, match=message):
            loaded.executor.run(loaded.handle, rows_with(parents))


def test_a_tree_wants_a_causal_segment() -> None:
    with pytest.raises(ValueError, match=r"^parents are given in a segment that is not causal"):
        StepArrays.of(rows_with((-1, 0, 0, 0), causal=False), 1)


TREE = {
    "positions": ints([2, 3, 4, 3, 4, 20]),
    "slots": ints([2, 3, 4, 5, 6, 20]),
    "segment_length": ints([7, 21]),
    "parents": ints([-1, 0, 1, 0, 3, -1]),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parents": ints([-1, 0, 2, 0, 3, -1])}, r"^parents\[2\] is 2; accepted: -1, or 0 to 1$"),
        ({"parents": ints([-1, 0, 1, 0, -2, -1])}, r"^parents\[4\] is -2"),
        ({"parents": ints([-1, 0, 1, 0, 3, 4])}, r"^parents\[5\] is 4; accepted: -1, or 5 to 4$"),
        ({"parents": ints([-1, 0, 1, 0, 3])}, r"^parents.shape\[0\] is 5; accepted: 6"),
        ({"slots": ints([2, 3, 4, 6, 5, 20])}, r"^slots\[3\] is 6; accepted: 5$"),
        ({"positions": ints([2, 3, 4, 4, 4, 20])}, r"^positions\[3\] is 4; accepted: 3$"),
        ({"positions": ints([2, 3, 4, 3, 4, 19])}, r"^positions\[5\] is 19; accepted: 20$"),
        (
            {"segment_causal": np.array([0, 1], np.uint8)},
            r"^segment_causal\[0\] is 0; accepted: 1 for a",
        ),
    ],
)
def test_the_kernels_refuse_what_is_no_tree(changed: dict[str, object], message: str) -> None:
    tape = checking_tape()
    tape.run(step_with(**TREE))
    with pytest.raises(ValueError, match=message):
        tape.run(step_with(**TREE | changed))


def test_pages_of_all_of_a_trees_slots_are_checked() -> None:
    """Rows that all stand at position 15, the last of their slots in the second page: without a launch that
    writes there, only attention tells that it reads them."""
    tape = native.Tape(TEAMS[1], LEVELS[0], 6)
    q = np.zeros((6, 32), np.float32)
    tape.attention(q, q, np.zeros((4, 1, 2 * 16 * 32), np.uint16), 0, 1, 1, 32, 1.0)
    star = {
        "positions": ints([15, 15, 15, 15, 15, 20]),
        "slots": ints([15, 16, 17, 18, 19, 20]),
        "segment_length": ints([20, 21]),
        "parents": ints([-1] * 6),
        "table_begin": ints([0, 2, 4]),
    }
    tape.run(step_with(**star, tables=ints([3, 1, 0, 2]).reshape(1, 4)))
    with pytest.raises(ValueError, match=r"^tables\[1\] is 9; accepted: 0 to 3"):
        tape.run(step_with(**star, tables=ints([3, 9, 0, 2]).reshape(1, 4)))
