"""Page pools and page tables: who owns which page, at every moment."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.cache.kv import KVCache, SequencePages
from ridgeline.cache.pages import PagePool
from ridgeline.config import PAGE_TOKENS, pages_for
from ridgeline.types import CapacityError


def test_pool_hands_out_each_page_once_and_the_last_freed_first() -> None:
    pool = PagePool(5)
    first = pool.allocate(3)
    assert first == [0, 1, 2]
    pool.free([1])
    assert pool.allocate(2) == [1, 3]
    assert (pool.free_pages, pool.used_pages) == (1, 4)
    pool.check_integrity()


def test_pool_allocates_all_or_nothing() -> None:
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(CapacityError, match="2 pages wanted; 1 of 4 are free"):
        pool.allocate(2)
    assert pool.free_pages == 1


@pytest.mark.parametrize("pages", [[0, 0], [0, 2], [3], [-1], [4]])
def test_pool_refuses_to_free_what_is_not_in_use(pages: list[int]) -> None:
    pool = PagePool(4)
    pool.allocate(2)
    with pytest.raises(ValueError, match=r"not in use|twice"):
        pool.free(pages)
    assert pool.used_pages == 2
    pool.check_integrity()


def test_a_shared_page_is_free_when_its_last_user_frees_it() -> None:
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.share([page])
    pool.free([page])
    assert (pool.used_pages, pool.users(page)) == (1, 1)
    pool.free([page])
    assert (pool.used_pages, pool.free_pages) == (0, 3)
    with pytest.raises(ValueError, match="is free"):
        pool.share([page])
    pool.check_integrity()


def test_kept_pages_count_as_free_and_are_evicted_in_the_order_in_which_they_were_left() -> None:
    pool = PagePool(4)
    evicted: list[int] = []
    pool.evict = evicted.append
    pages = pool.allocate(3)
    for page in pages:
        pool.keep(page)
    pool.free([pages[2], pages[0]])
    assert (pool.free_pages, pool.evictable_pages, pool.used_pages) == (3, 2, 1)
    pool.share([pages[2]])  # found again, and left again
    pool.free([pages[2]])
    pool.check_integrity()
    taken = pool.allocate(2)
    assert evicted == [pages[0]], "a free page is taken first"
    assert pages[0] in taken
    assert pool.allocate(1) == [pages[2]] == evicted[1:]
    with pytest.raises(CapacityError):
        pool.allocate(1)
    pool.forget(pages[1])
    pool.free([pages[1]])
    assert pool.evictable_pages == 0
    for wrong in (pool.keep, pool.forget):
        with pytest.raises(ValueError, match="kept"):
            wrong(pages[1])
    pool.check_integrity()


def test_integrity_check_finds_a_page_on_the_free_list_twice() -> None:
    pool = PagePool(3)
    pool._free.append(0)
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity()


def test_integrity_check_finds_a_page_with_two_owners_and_a_lost_page() -> None:
    cache = KVCache((None,), (4,))
    one, two = cache.new_sequence(), cache.new_sequence()
    assert cache.grow(one, 1)
    assert cache.grow(two, 1)
    two.tables[0][0] = one.tables[0][0]
    with pytest.raises(AssertionError, match="has 2 users and counts 1"):
        cache.check_integrity([one, two])
    with pytest.raises(AssertionError, match="nobody owns"):
        cache.check_integrity([one])


def test_grow_takes_pages_in_every_group_or_in_none() -> None:
    cache = KVCache((None, 64), (8, 2))
    pages = cache.new_sequence()
    assert cache.grow(pages, 2 * PAGE_TOKENS)
    assert not cache.grow(pages, 2 * PAGE_TOKENS + 1)
    assert [pool.used_pages for pool in cache.pools] == [2, 2]
    assert [len(table) for table in pages.tables] == [2, 2]
    assert cache.grow(pages, 1), "covered already"


@given(window=st.integers(1, 70), position=st.integers(0, 200))
def test_trim_gives_back_only_pages_that_no_later_row_sees(window: int, position: int) -> None:
    cache = KVCache((None, window), (20, 20))
    pages = cache.new_sequence()
    assert cache.grow(pages, 201)
    before = [list(table) for table in pages.tables]
    cache.trim(pages, position)
    first_visible = max(0, position - window + 1)
    assert pages.first_live[0] == 0
    assert pages.first_live[1] * PAGE_TOKENS <= first_visible
    # Nothing is kept for long either: less than two pages lie behind the window.
    assert first_visible - pages.first_live[1] * PAGE_TOKENS < 2 * PAGE_TOKENS
    assert [list(table) for table in pages.tables] == before, "slots keep their place in the table"
    cache.check_integrity([pages])
    cache.trim(pages, position)
    cache.release(pages)
    cache.release(pages)
    assert all(pool.used_pages == 0 for pool in cache.pools)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 31, 32, 33])
def test_longest_sequence_is_what_can_really_be_decoded(window: int) -> None:
    for count in range(1, 6):
        cache = KVCache((window,), (count,))
        pages = cache.new_sequence()
        reached = 0
        while reached < 200:
            cache.trim(pages, reached)
            if not cache.grow(pages, reached + 1):
                break
            reached += 1
        limit = cache.max_sequence_tokens
        assert reached == (200 if limit is None else limit)
    assert KVCache((None, window), (3, 50)).max_sequence_tokens == 3 * PAGE_TOKENS
    assert KVCache((), ()).max_sequence_tokens is None


@pytest.mark.parametrize("windows", [(None,), (None, 1000)])
def test_pages_in_use_are_full_but_for_their_ends(windows: tuple[int | None, ...]) -> None:
    cache = KVCache(windows, (40,) * len(windows), prefix_caching=True)
    assert cache.filled([]) == 1.0
    first, second = cache.new_sequence(), cache.new_sequence()
    tokens = list(range(3 * PAGE_TOKENS))
    assert cache.grow(first, 3 * PAGE_TOKENS)
    assert cache.filled([(first, 3 * PAGE_TOKENS)]) == 1.0
    cache.store(first, tokens, 3 * PAGE_TOKENS)
    assert cache.restore(second, [*tokens, 7], 0, 3 * PAGE_TOKENS) == 3 * PAGE_TOKENS
    assert cache.grow(second, 3 * PAGE_TOKENS + 4)
    # Of four pages in all, three of them shared, one has four tokens.
    held = [(first, 3 * PAGE_TOKENS), (second, 3 * PAGE_TOKENS + 4)]
    assert cache.filled(held) == pytest.approx((3 * PAGE_TOKENS + 4) / (4 * PAGE_TOKENS))
    for pages, _ in held:
        cache.release(pages)


def test_pages_wanted_forecasts_what_growing_takes() -> None:
    cache = KVCache((None, 32), (50, 50))
    pages = cache.new_sequence()
    assert cache.pages_wanted(pages, 100) == (pages_for(100), 3)
    assert cache.grow(pages, 20)
    assert cache.pages_wanted(pages, 100) == (pages_for(100) - 2, 1)
    assert cache.pages_wanted(pages, 3) == (0, 0)


def _random_operation(rng: random.Random, cache: KVCache, live: dict[SequencePages, int]) -> None:
    kind = rng.random()
    if kind < 0.1 or not live:
        live[cache.new_sequence()] = 0
        return
    pages = rng.choice(list(live))
    if kind < 0.75:
        slots = live[pages] + rng.randrange(1, 40)
        cache.trim(pages, live[pages])
        length = pages.length
        free = min(pool.free_pages for pool in cache.pools)
        could = cache.grow(pages, slots)
        assert could == (pages_for(slots) - length <= free)
        if could:
            live[pages] = slots
    elif kind < 0.9:
        cache.trim(pages, live[pages])
    else:
        cache.release(pages)
        del live[pages]


def test_ten_thousand_random_operations_keep_every_page_accounted_for() -> None:
    rng = random.Random(46)
    cache = KVCache((None, 40, 17), (60, 25, 13))
    live: dict[SequencePages, int] = {}
    for step in range(10_000):
        _random_operation(rng, cache, live)
        if step % 10 == 0:
            cache.check_integrity(live)
    for pages in live:
        cache.release(pages)
    assert [pool.free_pages for pool in cache.pools] == [60, 25, 13]
    cache.check_integrity([])


@settings(max_examples=50)
@given(st.data())
def test_slots_reachable_are_exactly_those_that_can_be_grown_to(data: st.DataObject) -> None:
    cache = KVCache((None, 20), data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9))))
    other, pages = cache.new_sequence(), cache.new_sequence()
    cache.grow(other, data.draw(st.integers(0, 60)))
    cache.grow(pages, data.draw(st.integers(0, 60)))
    reachable = cache.reachable_slots(pages)
    assert reachable is not None
    assert not cache.grow(pages, reachable + 1)
    assert cache.grow(pages, reachable)
