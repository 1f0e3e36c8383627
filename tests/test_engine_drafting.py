"""What an engine's drafting keeps of sequences, and what is left of it when something fails in its midst."""

from __future__ import annotations

import copy
import gc

import pytest
from fake_executor import FakeExecutor, make_engine
from test_scheduler_classes import pace_of

from ridgeline.engine import Engine
from ridgeline.sampling.drafting.index import TokenIndex
from ridgeline.sampling.drafting.speculator import Speculator
from ridgeline.scheduling.drafting import Drafting
from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import Request, RequestOutput, SamplingParams, SpeculationParams

REPEATED = Request("a", (1, 2, 3, 4) * 8, SamplingParams(temperature=0, max_tokens=40))


def drafted_engine() -> Engine:
    """An engine that guesses by looking up; its model says the token before last again, and its steps take
    hardly longer for a guess."""

    def repeat(logits: object, tokens: list[int]) -> None:
        logits[tokens[-4]] += 1e3  # type: ignore[index]

    drafting = Drafting(Speculator.of_lookups, pace_of(0.01, 1e-5), SpeculationParams())
    return make_engine(FakeExecutor(edit=repeat), drafting=drafting)


def answer(engine: Engine, request: Request) -> RequestOutput:
    engine.add(request)
    while engine.has_work:
        for output in engine.step():
            found = output
    return found


def test_nothing_is_kept_of_a_sequence_that_has_ended() -> None:
    """But by the record of the last step, until there is another."""
    others = {id(each) for each in gc.get_objects() if type(each) is Sequence}
    engine = drafted_engine()
    answer(engine, REPEATED)
    drafting = engine.scheduler.drafting
    assert drafting is not None
    assert sum(each.accepted for each in drafting.totals.values()) > 20
    engine.steps._last = None
    gc.collect()
    assert not any(type(each) is Sequence and id(each) not in others for each in gc.get_objects())


def test_counts_outlive_the_texts() -> None:
    engine = drafted_engine()
    answer(engine, REPEATED)
    drafting = engine.scheduler.drafting
    assert drafting is not None
    before = copy.deepcopy(drafting.totals)
    drafting.restart()
    assert drafting.totals == before
    answer(engine, REPEATED)
    assert drafting.totals["suffix"].accepted > before["suffix"].accepted > 0


def test_an_end_that_cannot_be_noted_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory runs out as a past output is kept, the request still ends, and the texts that are half
    changed are forgotten."""
    engine = drafted_engine()
    drafting = engine.scheduler.drafting
    assert drafting is not None
    expected = answer(engine, REPEATED).outputs
    speculator = drafting._speculator

    def full(index: TokenIndex, tokens: object) -> None:
        raise MemoryError

    engine.add(REPEATED)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):  # noqa: PT012
        patch.setattr("ridgeline.sampling.drafting.outputs._Shelf.add", full)
        while engine.has_work:
            engine.step()
    (told,) = engine.step()
    assert told.outputs == expected
    assert not engine.has_work
    assert not engine.scheduler.running
    assert drafting._speculator is not speculator
    engine.scheduler.check_integrity()
    assert all(pool.used_pages == 0 for pool in engine.scheduler.cache.pools)
    assert answer(engine, REPEATED).outputs == expected
