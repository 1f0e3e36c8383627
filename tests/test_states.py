"""Recurrent state under the engine: what is found, what is computed again, and that no token changes."""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cache_machine import CacheMachine, contents, finish
from fake_executor import FakeExecutor, make_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from tier_engines import settle, tiered_engine

from ridgeline.cache.kv import KVCache
from ridgeline.cache.prefix import PrefixCache
from ridgeline.cache.radix import HOLE
from ridgeline.config import PAGE_TOKENS
from ridgeline.engine import Engine
from ridgeline.types import PoolingParams, Request, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
ONE = SamplingParams(temperature=0, max_tokens=1)
LATE = pytest.mark.parametrize("late", [False, True], ids=["at once", "one step late"])
GROUPS: dict[str, tuple[tuple[int | None, ...], tuple[int, ...]]] = {
    "alone": ((), ()),
    "beside full": ((None,), (11,)),
    "beside windows": ((None, 24), (11, 8)),
    "beside a window": ((20,), (7,)),
}
KINDS = pytest.mark.parametrize("kind", list(GROUPS))


def text(length: int, first: int = 0) -> tuple[int, ...]:
    return tuple((first + 3 * index) % 97 for index in range(length))


def engine_of(kind: str = "beside full", slots: int = 24, pages: int = 60, **options: Any) -> Engine:
    windows, _ = GROUPS[kind]
    executor = FakeExecutor(windows, (pages,) * len(windows), states=slots)
    return make_engine(executor, **{"max_num_batched_tokens": 256, **options})


def run_all(engine: Engine) -> dict[str, Any]:
    told: dict[str, Any] = {}
    while engine.has_work:
        told |= {output.request_id: output for output in engine.step() if output.finished}
        engine.scheduler.check_integrity()
    return told


def alone(kind: str, request: Request) -> list[Any]:
    return contents(finish(engine_of(kind, prefix_caching=False), request))


# ----------------------------------------------------------------------------------- what is found


@KINDS
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 64, 100])
def test_the_same_prompt_goes_on_from_the_state_behind_its_last_page(kind: str, length: int) -> None:
    engine = engine_of(kind)
    first, again = (finish(engine, Request(name, text(length), GREEDY)) for name in "ab")
    assert contents(first) == contents(again) == alone(kind, Request("x", text(length), GREEDY))
    assert (first.cached_tokens, again.cached_tokens) == (0, (length - 1) // PAGE_TOKENS * PAGE_TOKENS)


@KINDS
@LATE
def test_an_answer_is_found_in_the_next_turn(kind: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    engine = engine_of(kind)
    first = finish(engine, Request("a", text(20), SamplingParams(temperature=0, max_tokens=75)))
    said = text(20) + first.outputs[0].token_ids
    turn = Request("b", (*said, 5, 6, 7), GREEDY)
    second = finish(engine, turn)
    assert second.cached_tokens == (len(said) - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert contents(second) == alone(kind, turn)
    slots = engine.scheduler.cache.states
    assert slots is not None
    # The ends of both prompts and of both answers: none for each page of an answer.
    assert slots.pool.evictable_pages <= 4


@KINDS
def test_where_prompts_part_the_second_leaves_a_state_for_the_third(kind: str) -> None:
    engine = engine_of(kind)
    prompts = [text(100) + text(30, first) for first in (50, 60, 70)]
    outputs = [finish(engine, Request(str(index), prompt, GREEDY)) for index, prompt in enumerate(prompts)]
    assert [output.cached_tokens for output in outputs] == [0, 0, 96]
    for output, prompt in zip(outputs, prompts, strict=True):
        assert contents(output) == alone(kind, Request("x", prompt, GREEDY))


@LATE
def test_requests_that_come_together_compute_their_common_prompt_once(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    engine = engine_of(pages=200)
    for index in range(8):
        engine.add(Request(str(index), (*text(192), index, index), ONE), stream=False)
    told = run_all(engine)
    assert [told[str(index)].cached_tokens for index in range(8)] == [0, *[192] * 7]
    assert engine.stats.prefill.rows + engine.stats.decode.rows == 194 + 7 * 2


@LATE
@KINDS
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [1, 5, 16, 17, 32, 45])
def test_samples_go_on_from_one_state_each_on_its_own(
    kind: str, late: bool, caching: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    engine = engine_of(kind, prefix_caching=caching)
    several = finish(engine, Request("a", text(length), SamplingParams(n=4, seed=2, max_tokens=20)))
    for index, choice in enumerate(several.outputs):
        params = SamplingParams(n=index + 1, seed=2, max_tokens=20)
        fresh = engine_of(kind, prefix_caching=False)
        assert finish(fresh, Request("a", text(length), params)).outputs[index] == choice
    assert len({choice.token_ids for choice in several.outputs}) == 4
    if caching:
        rest = length - (length - 1) // PAGE_TOKENS * PAGE_TOKENS
        beside = 12  # decodes of those that came first
        assert engine.stats.prefill.rows <= length + 3 * rest + beside


def test_what_is_scored_or_pooled_is_computed() -> None:
    engine = engine_of()
    finish(engine, Request("a", text(64), GREEDY))
    scored = Request("b", text(64), SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1))
    mean, last = (Request(pooling, text(64), PoolingParams(pooling)) for pooling in ("mean", "last"))
    for request, found in ((scored, 0), (mean, 0), (last, 48)):
        output = finish(engine, request)
        assert output.cached_tokens == found
        assert contents(output) == alone("beside full", request)


# --------------------------------------------------------------------------------- what is lost


@KINDS
def test_checkpoints_are_as_many_as_there_is_room_for_the_latest_used_kept(kind: str) -> None:
    engine = engine_of(kind, slots=6, max_num_seqs=3)
    for first in (1, 2, 3):
        finish(engine, Request(f"new {first}", text(40, first), ONE))
    finish(engine, Request("1 again", text(40, 1), ONE))
    for first in (4, 5, 6):
        finish(engine, Request(f"new {first}", text(40, first), ONE))
        engine.scheduler.check_integrity()
    found = {
        first: finish(engine, Request(str(first), text(40, first), ONE)).cached_tokens for first in (1, 2)
    }
    assert found == {1: 32, 2: 0}


def test_no_more_sequences_run_than_there_is_state_for() -> None:
    engine = engine_of(slots=7)
    for index in range(10):
        engine.add(Request(str(index), text(20, index), GREEDY), stream=False)
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, len(engine.scheduler.running))
        engine.scheduler.check_integrity()
    assert most == 3


@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_sequence_comes_back_from_a_checkpoint_or_from_nothing(caching: bool) -> None:
    engine = engine_of(pages=9, max_num_batched_tokens=64, prefix_caching=caching)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for index in range(3):
        engine.add(Request(str(index), text(20, index), params), stream=False)
    told = run_all(engine)
    assert engine.scheduler.preemptions > 0
    for index in range(3):
        assert contents(told[str(index)]) == alone("beside full", Request("x", text(20, index), params))


@LATE
@KINDS
@pytest.mark.parametrize("where", ["before it runs", "after it ran", "after it was noted"])
def test_a_step_that_an_interrupt_hides_moves_no_state_twice(
    kind: str, late: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    requests = [
        Request(str(n), text(30 + n, n), SamplingParams(temperature=0, max_tokens=40)) for n in range(3)
    ]
    engine = engine_of(kind, max_num_batched_tokens=40)
    owner: Any = engine.scheduler if "noted" in where else engine.executor
    name, calls = ("advance" if "noted" in where else "run"), Counter[str]()
    method = getattr(owner, name)

    def interrupted(*arguments: Any) -> Any:
        calls[name] += 1
        strikes = calls[name] % 7 == 3
        if strikes and "before" in where:
            raise KeyboardInterrupt
        result = method(*arguments)
        if strikes:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)
    for request in requests:
        engine.add(request, stream=False)
    told: dict[str, Any] = {}
    for _ in range(1000):
        with contextlib.suppress(KeyboardInterrupt):
            told |= {output.request_id: output for output in engine.step() if output.finished}
        engine.scheduler.check_integrity()
        if not engine.has_work:
            break
    assert calls[name] > 20
    for request in requests:
        assert contents(told[request.id]) == alone(kind, request)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="state slots are 1; accepted: at least 2"):
        KVCache((None,), (4,), True, state_slots=1)
    assert KVCache((None,), (4,)).states is None


def sequence_of(cache: KVCache, tokens: tuple[int, ...], ends: list[int]) -> Any:
    """A sequence that ran its tokens in chunks up to these ends."""
    pages = cache.new_sequence()
    computed = cache.restore(pages, tokens, 0, len(tokens) - 1)
    for end in ends:
        if end > computed:
            assert cache.states is not None
            assert cache.grow(pages, end)
            cache.states.plan(pages, computed, end)
            cache.launched(pages, tokens, computed, end)
            computed = end
            cache.check_integrity([pages])
    return pages


def test_a_state_stays_in_its_slot_unless_somebody_needs_it() -> None:
    cache = KVCache((None,), (20,), True, state_slots=6)
    assert cache.states is not None
    pages = sequence_of(cache, text(60), [5, 9, 15])
    (slot,) = pages.states.values()
    cache.states.plan(pages, 15, 16)
    assert pages.planned == (slot, slot)
    cache.launched(pages, text(60), 15, 16)
    cache.states.plan(pages, 16, 17)
    assert pages.planned is not None
    assert pages.planned[0] == slot != pages.planned[1]
    cache.states.plan(pages, 16, 20)  # again, as the plan was dropped
    assert sorted(pages.states) == [16, 20]
    cache.launched(pages, text(60), 16, 20)
    assert cache.states.pool.is_kept(slot)
    assert cache.states.pool.users(slot) == 0
    others = [cache.new_sequence() for _ in range(2)]
    assert [cache.restore(other, text(60), 0, 59) for other in others] == [16, 16]
    assert cache.states.pool.users(slot) == 2
    cache.check_integrity([pages, *others])


def test_of_the_states_of_an_answer_the_last_stays_and_those_that_others_need() -> None:
    cache = KVCache((None,), (40,), True, state_slots=30)
    assert cache.states is not None
    tokens = text(200)
    pages = sequence_of(cache, tokens, [32, 40, *range(41, 100)])

    def kept() -> list[int]:
        """The tokens behind which there is a state, of those that a sequence may begin with."""
        found = set()
        for limit in range(16, 200, 16):
            other = cache.new_sequence()
            found.add(cache.restore(other, tokens, 0, limit))
            cache.release(other)
        return sorted(found - {0})

    assert kept() == [32, 96]
    other = cache.new_sequence()
    assert cache.restore(other, tokens, 0, 110) == 96
    for end in range(100, 131):
        assert cache.grow(pages, end)
        cache.states.plan(pages, end - 1, end)
        cache.launched(pages, tokens, end - 1, end)
    assert kept() == [32, 96, 128], "somebody goes on from the one behind 96"
    cache.check_integrity([pages, other])


def test_check_integrity_sees_what_is_wrong() -> None:
    def corrupted(change: Any) -> None:
        cache = KVCache((None,), (20,), True, state_slots=6)
        pages = sequence_of(cache, text(60), [32, 40])
        change(cache, pages)
        cache.check_integrity([pages])

    corrupted(lambda cache, pages: None)
    for change in (
        lambda cache, pages: pages.states.clear(),
        lambda cache, pages: pages.states.update({7: 5}),
        lambda cache, pages: cache.states.pool.share(list(pages.states.values())),
        lambda cache, pages: cache.states.pool.keep(next(iter(pages.states.values()))),
        lambda cache, pages: cache.states.pool.allocate(1),
    ):
        with pytest.raises(AssertionError):
            corrupted(change)


# ------------------------------------------------------------------------------------- lower tiers


@LATE
@KINDS
def test_the_next_engine_starts_warm(
    tmp_path: Path, kind: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    request = Request("a", text(200), GREEDY)
    windows, _ = GROUPS[kind]
    for found in (0, 192):
        engine = tiered_engine(tmp_path, FakeExecutor(windows, (64,) * len(windows), states=24))
        output = finish(engine, request)
        assert output.cached_tokens == found
        assert contents(output) == alone(kind, request)
        settle(engine)
        engine.close()


@KINDS
def test_evicted_states_come_back(tmp_path: Path, kind: str) -> None:
    windows, _ = GROUPS[kind]
    engine = tiered_engine(tmp_path, FakeExecutor(windows, (64,) * len(windows), states=4))
    for turn in range(3):
        for first in range(6):
            request = Request("a", text(100, first), GREEDY)
            output = finish(engine, request)
            assert output.cached_tokens == (96 if turn else 0)
            assert contents(output) == alone(kind, request)
            settle(engine)
    engine.close()


# ------------------------------------------------------------------- the longest start that all have


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_hit_is_the_longest_start_that_every_group_restores(data: st.DataObject) -> None:
    """Beside a rule that looks at every start and every row's view of it."""
    windows = tuple(data.draw(st.lists(st.sampled_from([None, 1, 7, 16, 20, 40]), max_size=3)))
    recurrent = data.draw(st.booleans()) or not windows
    begin, count = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 6))
    held = [
        data.draw(st.lists(st.booleans() if window else st.just(True), min_size=count, max_size=count))
        for window in (*windows, *([1] if recurrent else []))
    ]
    cache = KVCache(windows, (40,) * len(windows), True, state_slots=8 if recurrent else 0)
    prefixes: PrefixCache | None = cache.prefixes
    assert prefixes is not None
    columns = [column_of(each) for each in held]
    limit = data.draw(st.integers(begin * PAGE_TOKENS, (begin + count) * PAGE_TOKENS))

    def has(group: int, slot: int) -> bool:
        page = slot // PAGE_TOKENS - begin
        return page < 0 or held[group][page]

    def restores(tokens: int) -> bool:
        seen = [range(max(tokens - (window or tokens), 0), tokens) for window in windows]
        if not all(has(group, slot) for group, slots in enumerate(seen) for slot in slots):
            return False
        if not recurrent or tokens <= begin * PAGE_TOKENS:
            return True
        return tokens % PAGE_TOKENS == 0 and has(len(windows), tokens - 1)

    longest = max(tokens for tokens in range(begin * PAGE_TOKENS, limit + 1) if restores(tokens))
    assert prefixes.restorable(columns, begin, limit) == longest


def column_of(held: list[bool]) -> Any:
    return array("i", [0 if each else HOLE for each in held])


# ------------------------------------------------------------------------------ anything, in any order

OPERATIONS = settings(
    max_examples=110,
    stateful_step_count=130,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_ten_thousand_operations_of_recurrent_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of a tenth of what is asked for at once, few slots, and executors of both kinds."""
    done: Counter[str] = Counter()
    known: dict[str, list[Any]] = {}

    def remembered(kind: str, request: Request) -> list[Any]:
        name = repr((kind, request.prompt_token_ids, request.params))
        if name not in known:
            known[name] = alone(kind, request)
        return known[name]

    class OnFake(CacheMachine):
        @initialize(
            kind=st.sampled_from(list(GROUPS)),
            late=st.booleans(),
            slots=st.sampled_from([2, 7, 12, 40]),
            caching=st.sampled_from([True, True, True, False]),
        )
        def begin(self, kind: str, late: bool, slots: int, caching: bool) -> None:
            monkeypatch.setattr(FakeExecutor, "asynchronous", late)
            executor = FakeExecutor(*GROUPS[kind], states=slots)
            options = {"max_num_seqs": 6, "max_num_batched_tokens": 40, "prefix_caching": caching}
            self.engine = make_engine(executor, **options)
            self.alone, self.done = partial(remembered, kind), done

    run_state_machine_as_test(OnFake, settings=OPERATIONS)
    assert done["operations"] >= 10_000, done
    assert done["finished"] > 500, done
    assert done["preemptions"] > 40, done
    assert done["aborts"] > 100, done
    assert done["cached tokens"] > 1000, done
