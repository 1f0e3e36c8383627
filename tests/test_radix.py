"""The prefix tree on its own: what it finds is the longest beginning that it was given and still has."""

from __future__ import annotations

import random

import pytest
from cache_machine import common
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.cache.kv import KVCache
from ridgeline.cache.radix import PAGE_BYTES, Scope, common_pages, key_of
from ridgeline.cache.table import SequencePages
from ridgeline.config import PAGE_TOKENS, pages_for

Tokens = tuple[int, ...]


def tokens_of(pages: list[int]) -> Tokens:
    """A page of tokens for each number."""
    return tuple(number * 100 + index for number in pages for index in range(PAGE_TOKENS))


def enter(cache: KVCache, tokens: Tokens, scope: Scope | None = None) -> tuple[SequencePages, int]:
    """A sequence that has run all of its tokens, and how many of them it found."""
    pages = cache.new_sequence(scope)
    found = cache.restore(pages, tokens, 0, len(tokens))
    assert cache.grow(pages, len(tokens))
    cache.moved()
    cache.store(pages, tokens, len(tokens))
    return pages, found


@given(
    one=st.lists(st.integers(0, 2), max_size=40),
    two=st.lists(st.integers(0, 2), max_size=40),
    begin=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_common_pages_are_counted_exactly(one: list[int], two: list[int], begin: tuple[int, int]) -> None:
    keys = [bytearray(key_of(tokens_of(pages))) for pages in (one, two)]
    rest = [pages[at:] for pages, at in zip((one, two), begin, strict=True)]
    most = min(map(len, rest))
    same = 0
    while same < most and rest[0][same] == rest[1][same]:
        same += 1
    assert common_pages(keys[0], begin[0], keys[1], begin[1], most) == same
    assert len(keys[0]) == len(one) * PAGE_BYTES


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=7), st.integers(0, 1))))
def test_the_longest_beginning_is_found(given_: list[tuple[list[int], int]]) -> None:
    """Beside a list of all that was stored; nothing is evicted."""
    cache = KVCache((None,), (400,), prefix_caching=True)
    stored: list[tuple[list[int], int]] = []
    entered = []
    for numbers, salt in given_:
        pages, found = enter(cache, tokens_of(numbers), Scope(str(salt)))
        entered.append(pages)
        longest = max((common(numbers, other) for other, of in stored if of == salt), default=0)
        assert found == longest * PAGE_TOKENS
        stored.append((numbers, salt))
        cache.check_integrity(entered)
    for pages in entered:
        cache.release(pages)
    cache.check_integrity([])
    assert cache.usage == 0


def test_a_duplicate_page_is_given_back_and_the_table_led_to_the_first() -> None:
    cache = KVCache((None,), (8,), prefix_caching=True)
    tokens = tokens_of([1, 2])
    both = [cache.new_sequence() for _ in range(2)]
    for pages in both:
        assert cache.restore(pages, tokens, 0, 32) == 0
        assert cache.grow(pages, 33)
    assert cache.pools[0].used_pages == 6
    for pages in both:
        cache.store(pages, tokens, 32)
    assert cache.pools[0].used_pages == 4
    assert both[0].tables[0][:2] == both[1].tables[0][:2]
    assert both[0].tables[0][2] != both[1].tables[0][2]
    cache.check_integrity(both)


def test_what_is_in_use_is_never_evicted() -> None:
    cache = KVCache((None,), (6,), prefix_caching=True)
    used, _ = enter(cache, tokens_of([1, 2, 3]))
    left, _ = enter(cache, tokens_of([1, 9, 9]))
    cache.release(left)
    other = cache.new_sequence()
    assert cache.reachable_slots(other) == 3 * PAGE_TOKENS
    assert cache.grow(other, 3 * PAGE_TOKENS)
    assert not cache.grow(other, 4 * PAGE_TOKENS)
    cache.check_integrity([used, other])
    cache.release(other)
    assert enter(cache, tokens_of([1, 2, 3]))[1] == 3 * PAGE_TOKENS


def test_a_partial_page_is_copied_and_its_source_held_until_then() -> None:
    cache = KVCache((None, 40), (6, 6), prefix_caching=True)
    tokens = tokens_of([1, 2])
    first, _ = enter(cache, tokens)
    source = [table[1] for table in first.tables]
    second = cache.new_sequence()
    assert cache.restore(second, tokens, 0, 31) == 31
    cache.release(first)
    assert [(copy.source, copy.target) for copy in cache.moves] == [
        (page, table[1]) for page, table in zip(source, second.tables, strict=True)
    ]
    assert all(pool.users(page) == 1 for pool, page in zip(cache.pools, source, strict=True))
    cache.check_integrity([second])
    cache.moved()
    assert all(pool.users(page) == 0 for pool, page in zip(cache.pools, source, strict=True))
    cache.store(second, tokens, 32)
    assert [table[1] for table in second.tables] == source, "its own copy is given back"
    cache.check_integrity([second])


def test_without_room_for_a_copy_the_last_page_is_computed() -> None:
    cache = KVCache((None,), (2,), prefix_caching=True)
    tokens = tokens_of([1, 2])
    first, _ = enter(cache, tokens)
    cache.release(first)
    second = cache.new_sequence()
    assert cache.restore(second, tokens, 0, 31) == 16
    assert cache.moves == ()
    assert cache.grow(second, 32)
    cache.check_integrity([second])


def test_windows_leave_holes_that_are_filled_again() -> None:
    window = 20
    cache = KVCache((None, window), (40, 6), prefix_caching=True)
    tokens = tokens_of([1, 2, 3, 4, 5, 6])

    def run() -> SequencePages:
        """Page by page, as chunks of a page run it."""
        pages = cache.new_sequence()
        for end in range(16, 97, 16):
            cache.trim(pages, end - 16)
            assert cache.grow(pages, end)
            cache.store(pages, tokens, end)
            cache.check_integrity([pages])
        return pages

    first = run()
    cache.release(first)
    other = cache.new_sequence()  # takes four of the window's pages: the oldest are lost
    assert cache.grow(other, 64)
    cache.check_integrity([other])
    cache.release(other)
    again = cache.new_sequence()
    found = cache.restore(again, tokens, 0, 48)
    assert found < 48
    cache.release(again)
    cache.release(run())
    again = cache.new_sequence()
    assert cache.restore(again, tokens, 0, 95) == 95
    cache.moved()
    assert again.first_live == [0, (95 - window) // PAGE_TOKENS]
    cache.check_integrity([again])


def test_a_tree_of_windows_alone_forgets_what_holds_no_page() -> None:
    cache = KVCache((8,), (3,), prefix_caching=True)
    rng = random.Random(8)
    for number in range(200):
        tokens = tuple(rng.randrange(3) for _ in range(60))
        pages = cache.new_sequence(Scope(str(number % 7)))
        reached = cache.restore(pages, tokens, 0, 59)
        while reached < 60:
            cache.trim(pages, reached)
            assert cache.grow(pages, reached + 1)
            reached += 1
            cache.moved()
            cache.store(pages, tokens, reached)
        cache.check_integrity([pages])
        cache.release(pages)
        cache.check_integrity([])
    assert cache.prefixes is not None
    assert sum(1 for _ in cache.prefixes._tree.nodes()) <= 2 * 3


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17])
def test_only_full_pages_are_kept(length: int) -> None:
    cache = KVCache((None,), (8,), prefix_caching=True)
    pages = cache.new_sequence()
    assert cache.grow(pages, length)
    cache.store(pages, tuple(range(length)), length)
    cache.release(pages)
    assert cache.pools[0].evictable_pages == length // PAGE_TOKENS
    assert pages_for(length) >= length // PAGE_TOKENS
