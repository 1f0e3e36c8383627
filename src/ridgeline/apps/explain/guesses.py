"""What guessed tokens bring: in steps that had some, and predicted for texts that were answered without.

Both are sums over passes, and what a pass takes with guesses and without is the step-time model's to say, as
it is when the engine decides how much to guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ridgeline.apps.explain.gains import Gains
from ridgeline.apps.explain.run import Case
from ridgeline.apps.explain.texts import Answered
from ridgeline.apps.plan.steps import times_of
from ridgeline.config import MAX_OUTPUT_ROWS
from ridgeline.records import StepRecord
from ridgeline.sampling.drafting.replay import Guesses, Pass, replay
from ridgeline.scheduling.drafting import seconds_by_rows
from ridgeline.scheduling.pace import Pace
from ridgeline.types import SpeculationParams


@dataclass(frozen=True, slots=True)
class Guessing:
    """What guesses would bring to texts that were answered without, and the setting that brings it."""

    guesses: Guesses
    gains: Gains
    setting: str


def guesses_in(steps: Sequence[StepRecord]) -> Guesses | None:
    """What guesses brought in steps that only decoded; None where there were none."""
    return Guesses.of([_pass_of(step) for step in steps if step.kind == "decode" and step.sequences])


def _pass_of(step: StepRecord) -> Pass:
    """Without guesses, what the step was measured to take; with some, what was predicted of it without."""
    alone_s = step.elapsed_s if step.unguessed_s is None else step.unguessed_s
    return Pass(step.sequences, step.drafted_tokens, step.accepted_tokens, step.elapsed_s, alone_s)


def guessing_of(answered: Answered, case: Case) -> Guessing | None:
    """What guesses would have brought to what was answered without, by replaying them; None where they are
    on, cannot be, or have nothing to guess."""
    if answered.setting is None:
        return None
    model = case.model
    pace = Pace(model.work, times_of(model, case.host), model.program.groups, ())
    passes = replay(
        answered.texts,
        answered.batch,
        min(case.step_tokens, MAX_OUTPUT_ROWS) - answered.batch,
        lambda contexts: seconds_by_rows(pace, contexts),
        SpeculationParams(answered.setting),
    )
    guesses = Guesses.of(list(passes))
    if guesses is None:
        return None
    before_s = answered.prefill_s + answered.decode_s
    after_s = answered.prefill_s + answered.decode_s / guesses.gain
    return Guessing(guesses, Gains(before_s / after_s, 1.0, guesses.gain), answered.setting)
