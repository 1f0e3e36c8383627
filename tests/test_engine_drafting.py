"""What an engine's drafting keeps of sequences, and what is left of it when something fails in its midst."""

from __future__ import annotations

import gc

from fake_executor import FakeExecutor, make_engine
from test_scheduler_classes import pace_of

from ridgeline.engine import Engine
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
    engine = drafted_engine()
    answer(engine, REPEATED)
    drafting = engine.scheduler.drafting
    assert drafting is not None
    assert sum(each.accepted for each in drafting.totals.values()) > 20
    engine.steps._last = None
    gc.collect()
    assert not any(type(each) is Sequence for each in gc.get_objects())
