"""Preemption with lower tiers: what was computed comes back, unless computing it again is faster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from cache_machine import contents
from fake_executor import FakeExecutor, make_engine
from tier_engines import LadderInTurns, tiered_engine
from tiny_models import TinyModel, pool_bytes

from ridgeline import LLM
from ridgeline.config import PAGE_TOKENS, EngineConfig
from ridgeline.engine import Engine
from ridgeline.loading import load_engine
from ridgeline.resources.transfers import FetchChoice
from ridgeline.types import PageFill, PageSpill, Request, SamplingParams

PROMPT, ANSWER = 12, 88
SHAPES = {"full": ((None,), (14,)), "windows": ((None, 24), (14, 8)), "window alone": ((33,), (9,))}


class Watched(FakeExecutor):
    """Counts its moves by their kind."""

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self.moved = {PageSpill: 0, PageFill: 0}

    def transfer(self, moves: Any) -> None:
        for move in moves:
            if type(move) in self.moved:
                self.moved[type(move)] += 1
        super().transfer(moves)


def request(name: int, prompt: int = PROMPT, answer: int = ANSWER, temperature: float = 0) -> Request:
    tokens = tuple((7 * name + 3 * index) % 97 for index in range(prompt))
    params = SamplingParams(temperature=temperature, seed=name, max_tokens=answer, ignore_eos=True)
    return Request(str(name), tokens, params, str(name))  # nobody finds what another has computed


def run(engine: Engine, requests: list[Request]) -> dict[str, list[Any]]:
    for each in requests:
        engine.add(each, stream=False)
    told = {}
    for _ in range(5000):
        if not engine.has_work:
            break
        told |= {output.request_id: contents(output) for output in engine.step()}
        engine.scheduler.check_integrity()
        tiers = engine.scheduler.cache.tiers
        if tiers is not None and isinstance(tiers.ladder, LadderInTurns):
            tiers.ladder.turn()
    assert len(told) == len(requests), "somebody never ended"
    return told


def rows_run(engine: Engine) -> int:
    return engine.stats.prefill.rows + engine.stats.decode.rows


def swapping(kind: str, compute_s: float | None, read_s: float = 1.0) -> Engine:
    """An engine that fetches a byte from memory in `read_s`, and computes any rows in `compute_s`."""
    choice = FetchChoice()
    choice.link("memory").observe(1, read_s)
    choice.link("memory").observe = lambda amount, elapsed_s: None  # type: ignore[method-assign]
    predict = None if compute_s is None else lambda begin, end: compute_s
    return tiered_engine(
        None,
        Watched(*SHAPES[kind]),
        memory_bytes=1 << 20,
        in_turns=True,
        compute_s=predict,
        choice=choice,
        max_num_batched_tokens=40,
    )


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "one step late"])
def test_preempted_sequences_are_swapped_where_that_is_faster(
    kind: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    windows, _ = SHAPES[kind]
    requests = [request(name, temperature=name % 2) for name in range(6)]
    expected = run(make_engine(FakeExecutor(windows, (99,) * len(windows))), requests)
    least = len(requests) * (PROMPT + ANSWER - 1 + late)  # a row may run past an end
    swapped, recomputed = swapping(kind, 1e9), swapping(kind, 1e-9)
    for engine in (swapped, recomputed):
        assert run(engine, requests) == expected
        assert engine.scheduler.preemptions >= 3
    assert swapped.executor.moved[PageFill] > 2
    # All but the rows of the last page, which were full in part.
    lost = rows_run(swapped) - least
    assert lost < PAGE_TOKENS * swapped.scheduler.preemptions
    assert rows_run(recomputed) - least > lost + PAGE_TOKENS
    assert recomputed.executor.moved[PageFill] <= 6, "tried again now and then"
    swapped.close()
    recomputed.close()


def test_without_tiers_what_is_evicted_is_computed_again() -> None:
    requests = [request(name) for name in range(6)]
    engine = make_engine(Watched(*SHAPES["full"]), max_num_batched_tokens=40)
    expected = run(make_engine(FakeExecutor(pages=(99,))), requests)
    assert run(engine, requests) == expected
    assert engine.scheduler.preemptions >= 3
    assert engine.executor.moved == {PageSpill: 0, PageFill: 0}


def test_newcomers_wait_for_who_is_being_fetched() -> None:
    engine = swapping("full", 1e9)
    ladder, scheduler = engine.scheduler.cache.tiers.ladder, engine.scheduler
    for name in (0, 1):
        engine.add(request(name, prompt=70, answer=80), stream=False)
    while not scheduler.preemptions:
        engine.step()
    (swapped,) = scheduler.waiting
    engine.add(request(2, prompt=110, answer=20), stream=False)
    _, newcomer = scheduler.waiting
    wait, ladder.wait = ladder.wait, lambda fetches, timeout_s: None  # type: ignore[method-assign]
    while not swapped.running:  # until 0 has ended
        ladder.turn()
        engine.step()
    for _ in range(20):
        assert engine.step() == []
        assert swapped.pages.fetch is not None
        assert not newcomer.running, "its room was given away"
        scheduler.check_integrity()
    ladder.wait = wait  # type: ignore[method-assign]
    ended = []
    while engine.has_work:
        assert not (swapped.running and newcomer.running)
        ended += [output.request_id for output in engine.step()]
    assert ended == ["1", "2"]
    assert engine.executor.moved[PageFill] > 0
    assert swapped.preemptions == scheduler.preemptions == 1
    engine.close()


def test_others_go_on_while_pages_come_back() -> None:
    """Nothing depends on when, or whether, a fetch ends."""
    requests = [request(name) for name in range(6)]
    expected = run(make_engine(FakeExecutor(pages=(99,))), requests)
    engine = swapping("full", 1e9)
    ladder, told, steps = engine.scheduler.cache.tiers.ladder, {}, 0
    for each in requests:
        engine.add(each, stream=False)
    while engine.has_work:
        steps += 1
        told |= {output.request_id: contents(output) for output in engine.step()}
        engine.scheduler.check_integrity()
        if steps % 7 == 0:
            ladder.turn()
    assert told == expected
    assert engine.executor.moved[PageFill] > 0
    engine.close()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_in_a_tenth_of_the_memory_says_the_same(
    tiny: Callable[[str], TinyModel], family: str
) -> None:
    model = tiny(family)
    prompts = [[(7 * index + 11 * name) % 50 + 3 for index in range(20)] for name in range(10)]
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    options = {"threads": 1, "device": "cpu", "max_model_len": 128}
    with LLM(str(model.folder), **options) as roomy:
        expected = [output.outputs[0].token_ids for output in roomy.generate(prompts, params)]
    tight = {"kv_cache_memory_bytes": pool_bytes(model, 128), "cache_memory_bytes": 1 << 24}
    loaded = load_engine(EngineConfig(model=str(model.folder), **options, **tight))
    filled = []
    with closing(loaded.engine) as engine:
        transfer = engine.executor.transfer

        def watched(moves: Any) -> None:
            filled.extend(move for move in moves if isinstance(move, PageFill))
            transfer(moves)

        engine.executor.transfer = watched  # type: ignore[method-assign]
        for index, prompt in enumerate(prompts):
            engine.add(Request(str(index), tuple(prompt), params, str(index)), stream=False)
        told = {}
        while engine.has_work:
            told |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        assert [told[str(index)] for index in range(len(prompts))] == expected
        assert engine.scheduler.preemptions > 0
        ladder = engine.scheduler.cache.tiers.ladder
        assert ladder.dropped == 0
        ladder.check_integrity()
    assert filled
