"""Beam searches inside an engine: among other requests, with few seats, little memory, and faults."""

from __future__ import annotations

import queue
from typing import Any

import pytest
from fake_executor import FakeExecutor, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.beams import BeamRequests, Searched
from ridgeline.engine import Engine
from ridgeline.sampling.beam_search import Beam, BeamSearchParams
from ridgeline.server.engine_process import EngineWorker
from ridgeline.server.messages import Abort, Add, Message, Pieces, Refused, Search
from ridgeline.types import SERVICE_CLASSES, Request, RequestError, RequestOutput, SamplingParams

PROMPT = tuple(range(5, 45))
WIDE = BeamSearchParams(3, 12, stop_token_ids=range(20))


def drive(engine: Engine, requests: BeamRequests, limit: int = 5000) -> tuple[dict[str, Searched], list[Any]]:
    """Step to the end; what the searches found, and the last outputs of the others."""
    found: dict[str, Searched] = {}
    others: list[RequestOutput] = []
    for _ in range(limit):
        if not engine.has_work:
            return found, others
        outputs, ended = requests.take(engine.step())
        others += [output for output in outputs if output.finished]
        found.update({each.id: each for each in ended})
        engine.scheduler.check_integrity()
    raise AssertionError("it has no end")


def alone(params: BeamSearchParams, prompt: tuple[int, ...] = PROMPT) -> list[Beam]:
    """With all the room there is."""
    engine = make_engine(FakeExecutor(), end_token_ids=frozenset({1, 2}), max_num_seqs=64)
    requests = BeamRequests(engine)
    requests.begin("s", prompt, params)
    return list(drive(engine, requests)[0]["s"].beams)


@settings(max_examples=40, deadline=None)
@given(
    seats=st.integers(1, 5),
    pages=st.integers(5, 12),
    waiting=st.booleans(),
    caching=st.booleans(),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    others=st.integers(0, 3),
)
def test_beams_do_not_depend_on_what_else_runs(
    seats: int, pages: int, waiting: bool, caching: bool, widths: list[int], others: int
) -> None:
    executor = FakeExecutor(pages=(pages,))
    executor.asynchronous = waiting
    engine = make_engine(
        executor, max_num_seqs=seats, prefix_caching=caching, end_token_ids=frozenset({1, 2})
    )
    requests = BeamRequests(engine)
    greedy = SamplingParams(temperature=0, max_tokens=9)
    for number, width in enumerate(widths):
        requests.begin(f"s{number}", PROMPT, BeamSearchParams(width, 10, length_penalty=0.5))
        if number < others:
            engine.add(Request(f"r{number}", PROMPT[: 20 + number], greedy), stream=False)
    found, rest = drive(engine, requests)
    assert sorted(found) == [f"s{number}" for number in range(len(widths))]
    assert len(rest) == min(others, len(widths))
    for number, width in enumerate(widths):
        ended = found[f"s{number}"]
        assert ended.error is None
        assert list(ended.beams) == alone(BeamSearchParams(width, 10, length_penalty=0.5))
    assert all(pool.free_pages == pool.pages for pool in engine.scheduler.cache.pools)


def test_what_the_prompt_shares_is_found() -> None:
    engine = make_engine(FakeExecutor())
    requests = BeamRequests(engine)
    requests.begin("first", PROMPT, WIDE)
    requests.begin("other", PROMPT, WIDE, cache_salt="another")
    found, _ = drive(engine, requests)
    assert [found[each].cached_tokens for each in ("first", "other")] == [0, 0]
    requests.begin("second", PROMPT, WIDE)
    assert drive(engine, requests)[0]["second"].cached_tokens == 32


def test_every_round_is_its_sender_s() -> None:
    engine = make_engine(FakeExecutor())
    requests = BeamRequests(engine)
    requests.begin("s", PROMPT, WIDE, "salt", "batch", "somebody")
    rounds = 0
    while engine.has_work:
        sequences = [*engine.scheduler.running, *engine.scheduler.waiting]
        assert {each.account.tenant for each in sequences} == {"somebody"}
        assert {SERVICE_CLASSES[each.level] for each in sequences} == {"batch"}
        requests.take(engine.step())
        rounds += 1
    assert rounds > 2


def test_what_cannot_be_served_is_refused_whole() -> None:
    engine = make_engine(FakeExecutor(pages=(5,)), max_model_len=300)
    requests = BeamRequests(engine)
    for prompt, params, said in (
        ((), WIDE, "0 tokens"),
        ((1000,), WIDE, "prompt token"),
        (PROMPT, BeamSearchParams(2, 2, stop_token_ids=[1000]), "stop_token_ids"),
        (PROMPT, BeamSearchParams(2, 60), "KV cache holds"),
    ):
        with pytest.raises(RequestError, match=said):
            requests.begin("s", prompt, params)
        assert not engine.has_work
        assert not requests.abort("s")


def test_the_begin_token_stands_for_no_prompt_in_every_round() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor, begin_token_id=3)
    requests = BeamRequests(engine)
    requests.begin("s", (), BeamSearchParams(2, 6))
    found, _ = drive(engine, requests)
    assert list(found["s"].beams) == alone(BeamSearchParams(2, 6), (3,))


def test_a_model_that_cannot_go_on_ends_that_search_alone() -> None:
    def edit(logits: Any, seen: list[int]) -> None:
        if seen[0] == 66 and len(seen) == 6:
            logits[40] = float("nan")

    engine = make_engine(FakeExecutor(edit=edit))
    requests = BeamRequests(engine)
    requests.begin("bad", (66, 7, 8), BeamSearchParams(3, 9))
    requests.begin("good", PROMPT, WIDE)
    found, _ = drive(engine, requests)
    assert "beam could not go on" in str(found["bad"].error)
    assert found["bad"].beams == ()
    assert list(found["good"].beams) == alone(WIDE)


# ------------------------------------------------------------------------------------ in its process


class Told:
    """A worker, and what it says."""

    def __init__(self, **settings: Any) -> None:
        self.executor = FakeExecutor()
        self.engine = make_engine(self.executor, **settings)
        self.said: list[Message] = []
        self.worker = EngineWorker(self.engine, queue.SimpleQueue(), self.said.append)

    def step_to_the_end(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work:
                return
            self.worker.step()
        raise AssertionError("it has no end")


def test_beams_are_told_at_the_end_with_their_scores() -> None:
    told = Told()
    told.worker._obey(Search(7, PROMPT, WIDE))
    told.worker._obey(Add(8, PROMPT, SamplingParams(temperature=0, max_tokens=3), stream=False))
    told.step_to_the_end()
    messages = [each for each in told.said if isinstance(each, Pieces)]
    pieces = [piece for each in messages for piece in each.pieces if piece.id == 7]
    assert [number for each in messages for number in each.ended].count(7) == 1
    assert messages[-1].ended == (7,)
    for piece, beam in zip(pieces, alone(WIDE), strict=True):
        assert (piece.text, piece.tokens) == (beam.text, beam.token_ids)
        assert piece.cumulative_logprob == beam.cumulative_logprob
        assert piece.logprobs is None


def test_a_step_names_a_search_once_and_by_its_number() -> None:
    told = Told()
    run, in_step = told.executor.run, set()

    def watched(handle: Any, step: Any) -> Any:
        in_step.add((len(told.engine.running), told.worker.pulse().in_step))
        return run(handle, step)

    told.executor.run = watched  # type: ignore[method-assign]
    told.worker._obey(Search(7, PROMPT, BeamSearchParams(4, 30)))
    told.worker._obey(Add(8, PROMPT, SamplingParams(temperature=0, max_tokens=30)))
    told.step_to_the_end()
    assert (5, (7, 8)) in in_step
    assert all(len(set(numbers)) == len(numbers) for _, numbers in in_step)


@pytest.mark.parametrize("steps", range(5))
def test_an_abort_leaves_nothing(steps: int) -> None:
    told = Told()
    told.worker._obey(Search(7, PROMPT, BeamSearchParams(4, 30)))
    for _ in range(steps):
        told.worker.step()
    told.worker._obey(Abort(7))
    told.worker._obey(Abort(7))
    assert not told.engine.has_work
    assert not told.said
    assert all(pool.free_pages == pool.pages for pool in told.engine.scheduler.cache.pools)


def test_too_little_memory_ends_the_search_that_came_last() -> None:
    told = Told()
    told.worker._obey(Search(6, PROMPT, BeamSearchParams(2, 5)))
    for _ in range(2):
        told.worker.step()
    told.worker._obey(Search(7, PROMPT, BeamSearchParams(4, 30)))
    for _ in range(2):
        told.worker.step()
    told.executor.fail = MemoryError()
    told.worker.step()
    told.executor.fail = None
    told.step_to_the_end()
    (refused,) = [each for each in told.said if isinstance(each, Refused)]
    assert refused.cause == "capacity"
    ended = [number for each in told.said if isinstance(each, Pieces) for number in each.ended]
    assert sorted([*ended, refused.id]) == [6, 7]


def test_an_error_of_the_model_is_a_fault() -> None:
    told = Told()
    told.executor.edit = lambda logits, seen: logits.fill(float("nan"))
    told.worker._obey(Search(7, PROMPT, WIDE))
    told.step_to_the_end()
    (refused,) = told.said
    assert isinstance(refused, Refused)
    assert (refused.id, refused.cause) == (7, "fault")
