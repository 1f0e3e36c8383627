"""Speculation changes no token: whatever is guessed, requests get what they get without."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from fake_executor import FakeExecutor, make_engine
from forced_drafts import ForcedDrafting
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import END, Choice, build, contents, executor_for, requests, run, run_mixed
from test_engine import results as at_once_and_late  # noqa: F401

from ridgeline.engine import Engine
from ridgeline.sampling.drafting.tree import DraftTree
from ridgeline.types import Request, RequestOutput, SamplingParams, SlotCopy


def truth_of(engine: Engine, answers: dict[str, RequestOutput]) -> Any:
    """What sequences of an engine will say, by what their requests got elsewhere."""

    def truth(sequence: Any) -> Sequence[int]:
        state, choice = sequence.owner
        output = answers[state.id]
        return (*output.prompt_token_ids, *output.outputs[choice.index].token_ids)

    return truth


def forced(engine: Engine, seed: int, answers: dict[str, RequestOutput], right: float) -> ForcedDrafting:
    drafting = ForcedDrafting(seed, engine.model.vocabulary_size, truth_of(engine, answers), right)
    engine.scheduler.drafting = drafting  # type: ignore[assignment]
    return drafting


@settings(max_examples=60, deadline=None)
@given(
    drawn=st.lists(requests, min_size=1, max_size=7),
    window=st.sampled_from([None, 5, 24]),
    pages=st.sampled_from([6, 7, 9, 200]),
    budget=st.integers(1, 70),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
    aborted=st.sets(st.integers(0, 6), max_size=2),
    data=st.data(),
)
def test_tokens_do_not_depend_on_guesses(
    drawn: list[tuple[tuple[int, ...], dict[str, Any]]],
    window: int | None,
    pages: int,
    budget: int,
    right: float,
    seed: int,
    aborted: set[int],
    data: st.DataObject,
) -> None:
    together = build(drawn)
    ends = frozenset([END])
    answers: dict[str, RequestOutput] = {}
    for request in together:
        alone = make_engine(executor_for(window, 200), end_token_ids=ends)
        answers |= run(alone, [request])
    engine = make_engine(
        executor_for(window, pages),
        max_num_seqs=min(8, budget),
        max_num_batched_tokens=budget,
        end_token_ids=ends,
    )
    drafting = forced(engine, seed, answers, right)
    results = run_mixed(engine, together, aborted, data)
    for request_id, expected in answers.items():
        if int(request_id) not in aborted:
            assert contents(results[request_id]) == contents(expected)
    assert all(pool.used_pages == 0 for pool in engine.scheduler.cache.pools)
    records = engine.steps.recent.since(0)
    assert sum(record.drafted_tokens for record in records) >= drafting.drafted
    assert sum(record.accepted_tokens for record in records) == drafting.accepted
    assert len(set(drafting.forgotten)) == len(drafting.forgotten) == sum(r.params.n for r in together)


def test_right_guesses_save_steps_and_are_counted() -> None:
    request = Request("a", tuple(range(30)), SamplingParams(temperature=0.9, seed=1, max_tokens=60))
    plain = make_engine(FakeExecutor())
    answers = run(plain, [request])
    engine = make_engine(FakeExecutor())
    drafting = forced(engine, 3, answers, 1.0)
    assert contents(run(engine, [request])["a"]) == contents(answers["a"])
    records = engine.steps.recent.since(0)
    assert len(records) < len(plain.steps.recent.since(0)) / 2
    assert sum(record.decoded_tokens for record in records) == 60
    assert sum(record.accepted_tokens for record in records) == drafting.accepted > 30
    assert {record.kind for record in records} == {"prefill", "decode"}
    assert drafting.moved, "no side branch was ever accepted"
    stats = engine.stats
    assert (stats.prefill.steps, stats.decode.steps) == (1, len(records) - 1)


def test_what_was_accepted_is_found_by_the_next_prompt() -> None:
    """Keys and values of accepted guesses, moved to their places, are kept like any others."""
    request = Request("a", tuple(range(20)), SamplingParams(temperature=0.9, seed=1, max_tokens=60))
    answers = run(make_engine(FakeExecutor()), [request])
    engine = make_engine(FakeExecutor())
    forced(engine, 3, answers, 1.0)
    said = run(engine, [request])["a"].outputs[0].token_ids
    engine.scheduler.drafting = None
    longer = Request("b", (*range(20), *said), SamplingParams(temperature=0, max_tokens=9))
    expected = run(make_engine(FakeExecutor()), [longer])["b"]
    again = run(engine, [longer])["b"]
    assert again.cached_tokens >= 48  # 79 tokens have keys and values; the last ones may still be moved
    assert contents(again) == contents(expected)


@pytest.mark.parametrize("where", ["run", "advance", "take", "settle", "compact", "verified"])
def test_an_interrupted_step_is_run_again(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    params = SamplingParams(temperature=0.9, repetition_penalty=1.2, seed=4, max_tokens=30)
    many = [Request("a", tuple(range(40)), params), Request("b", tuple(range(9, 40)), params)]
    answers = {r.id: run(make_engine(FakeExecutor()), [r])[r.id] for r in many}
    executor = FakeExecutor()
    engine = make_engine(executor, max_num_batched_tokens=48)
    drafting = forced(engine, 5, answers, 0.9)
    scheduler = engine.scheduler
    owner: Any = {
        "run": executor,
        "advance": scheduler,
        "take": Choice,
        "settle": scheduler,
        "compact": scheduler.cache,
        "verified": drafting,
    }[where]
    method, calls = getattr(owner, where), itertools.count()
    before, after = {5, 18, 41, 60}, {1, 8, 13, 27, 50}

    def interrupted(*arguments: Any) -> Any:
        call = next(calls)
        if call in before:
            raise KeyboardInterrupt
        result = method(*arguments)
        if call in after:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, where, interrupted)
    for request in many:
        engine.add(request)
    results: dict[str, RequestOutput] = {}
    for _ in range(400):
        with contextlib.suppress(KeyboardInterrupt):
            results |= {output.request_id: output for output in engine.step()}
        if not engine.has_work:
            break
    assert {k: contents(v) for k, v in results.items()} == {k: contents(v) for k, v in answers.items()}


def test_random_operations_with_guesses_leave_nothing_behind() -> None:
    """Of a vocabulary so small that guesses at random are right now and then."""
    rng, operations = random.Random(20_000), 3_000 if FakeExecutor.asynchronous else 10_000
    executor = FakeExecutor((None, 20), (16, 12), vocabulary=5)
    engine = make_engine(executor, max_num_seqs=6, max_num_batched_tokens=40)
    drafting = ForcedDrafting(1, 5)
    engine.scheduler.drafting = drafting  # type: ignore[assignment]
    names: list[str] = []
    finished = 0
    for operation in range(operations):
        kind = rng.random()
        if kind < 0.1 and len(engine.scheduler.waiting) < 20:
            params = SamplingParams(
                max_tokens=rng.randrange(1, 40),
                temperature=rng.choice([0, 1]),
                seed=operation,
                n=rng.choice([1, 1, 2]),
                frequency_penalty=rng.choice([0, 0, 0.5]),
            )
            prompt = tuple(rng.randrange(5) for _ in range(rng.randrange(1, 100)))
            names.append(str(operation))
            engine.add(Request(names[-1], prompt, params))
        elif kind < 0.15 and names:
            engine.abort(rng.choice(names[-12:]))
        else:
            finished += sum(output.finished for output in engine.step())
            executor.steps.clear()
        if operation % 10 == 0:
            engine.scheduler.check_integrity()
    while engine.has_work:
        finished += sum(output.finished for output in engine.step())
    engine.scheduler.check_integrity()
    assert finished > operations // 50
    assert engine.scheduler.preemptions > operations // 700
    assert drafting.accepted > operations // 10
    assert drafting.moved > operations // 100
    assert [pool.free_pages for pool in engine.scheduler.cache.pools] == [16, 12]
    assert not engine._requests


def test_compaction_moves_what_is_not_in_its_place() -> None:
    cache = make_engine(FakeExecutor((None, 40), (9, 9))).scheduler.cache
    pages = cache.new_sequence()
    assert cache.grow(pages, 40)
    cache.compact(pages, 14, [0, 1])
    assert not cache.moves  # they lie where they should
    for _ in range(2):  # the second time after an interrupt
        cache.compact(pages, 14, [0, 3, 4])
    first, second, _ = pages.tables[0]
    numbers = ([16 * second + 1, 16 * second + 2], [16 * first + 15, 16 * second])
    other = [([16 * t[1] + 1, 16 * t[1] + 2], [16 * t[0] + 15, 16 * t[1]]) for t in pages.tables]
    assert cache.moves == (SlotCopy(0, *numbers), SlotCopy(1, *other[1]))


def test_a_request_can_refuse_and_a_pool_without_room_drafts_less() -> None:
    refused = Request("a", (1, 2, 3), SamplingParams(temperature=0, max_tokens=30, speculation=False))
    engine = make_engine(FakeExecutor(pages=(2,)))
    drafting = ForcedDrafting(1, 97)
    engine.scheduler.drafting = drafting  # type: ignore[assignment]
    run(engine, [refused])
    assert drafting.drafted == 0
    run(engine, [Request("b", (1, 2, 3), SamplingParams(temperature=0, max_tokens=29))])
    assert drafting.drafted > 0
    assert max(len(rows.tokens) for step in engine.executor.steps for rows in step.sequences) < 32  # type: ignore[attr-defined]


def test_a_tree_of_two_with_one_token_is_no_tree() -> None:
    with pytest.raises(AssertionError):
        DraftTree([1, 1], [-1, -1], [0.5, 0.5]).check_integrity()
