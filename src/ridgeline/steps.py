"""What every step of an engine was: its rows, its work, what its time was to be and what it came to.

The engine adds each step once, in some ten microseconds; whoever wants to know reads the recent ones, from
any thread.
"""

from __future__ import annotations

import time
import weakref
from typing import Any, Protocol

from ridgeline.model.program import StepLoad
from ridgeline.outcome import RequestState
from ridgeline.records import RECENT_STEPS, Kind, Recent, StepRecord
from ridgeline.resources.energy import Meter, Source, StepEnergy
from ridgeline.resources.roofline import mbu, mfu
from ridgeline.resources.step_time import StepTimeModel
from ridgeline.scheduling.plan import Plan
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.types import Step, StepResult


class StepWatcher(Protocol):
    """Hears of everything as it happens, on the engine's thread. Times are `time.perf_counter`'s."""

    def arrived(self, state: RequestState) -> None: ...

    def step(self, record: StepRecord, plan: Plan, began_s: float, ended_s: float) -> None: ...

    def ended(self, state: RequestState) -> None: ...

    def close(self) -> None: ...


class StepLog:
    """The records of one engine. `model` predicts and is told what came, `meter` counts joules, by
    `energy_source`."""

    def __init__(
        self,
        scheduler: Scheduler,
        model: StepTimeModel | None = None,
        meter: Meter | None = None,
        watcher: StepWatcher | None = None,
    ) -> None:
        self.recent: Recent[StepRecord] = Recent(RECENT_STEPS)
        self.model = model
        self.energy_source: Source = "none" if meter is None else meter.source
        self._scheduler = scheduler
        self._energy = None if meter is None else StepEnergy(meter)
        self._watcher = watcher
        self._epoch_s = time.time() - time.perf_counter()
        # Not kept: the next step is planned in the memory that this one's plan was in.
        self._last: weakref.ref[Plan] | None = None
        self._ended_s = 0.0

    def add(
        self, plan: Plan, result: StepResult, ended_s: float, accepted: int = 0, handle: Any = None
    ) -> None:
        """A step's results are there, and so many of its guesses were right; `handle` is the program's that
        guesses are verified by. A plan that was the last one's too is passed over: an interrupt struck while
        its results were taken in."""
        if self._last is not None and plan is self._last():
            return
        began_s = max(plan.planned_s, self._ended_s)
        self._last, self._ended_s = weakref.ref(plan), ended_s
        unguessed_s = self._unguessed_s(plan, handle)  # before the step has taught the model anything
        record = self._record(plan, result, began_s, ended_s, (accepted, unguessed_s))
        self.recent.append(record)
        if self._watcher is not None:
            self._watcher.step(record, plan, began_s, ended_s)

    def arrived(self, state: RequestState) -> None:
        if self._watcher is not None:
            self._watcher.arrived(state)

    def ended(self, state: RequestState) -> None:
        if self._watcher is not None:
            self._watcher.ended(state)

    def expected_s(self, plan: Plan, handle: Any) -> float | None:
        """What a step under way is to take, if the machine is known. From any thread."""
        if self.model is None:
            return None
        return self._predicted_s(self.model, plan.step, handle)

    def close(self) -> None:
        """Idempotent."""
        if self._watcher is not None:
            self._watcher.close()
        if self._energy is not None:
            self._energy.close()

    def _unguessed_s(self, plan: Plan, handle: Any) -> float | None:
        if not plan.drafted or self.model is None or handle is None:
            return None
        return self._predicted_s(self.model, plan.unguessed, handle)

    @staticmethod
    def _predicted_s(model: StepTimeModel, step: Step, handle: Any) -> float:
        return model.predict(handle.work.parts(StepLoad.of(step, handle.program.groups))).seconds

    def _record(
        self,
        plan: Plan,
        result: StepResult,
        began_s: float,
        ended_s: float,
        guessed: tuple[int, float | None],
    ) -> StepRecord:
        """`guessed` are the guesses that were right, and what the step was to take without any."""
        accepted, unguessed_s = guessed
        work, elapsed_s, model, cache = result.work, result.elapsed_s, self.model, self._scheduler.cache
        total = work.total
        predicted_s = bound = reached_mbu = reached_mfu = None
        if model is not None:
            expected = model.observe(work, elapsed_s)
            predicted_s, bound = expected.seconds, expected.bound
            reached_mbu, reached_mfu = (
                mbu(total, elapsed_s, model.limits),
                mfu(total, elapsed_s, model.limits),
            )
        prompt, decoded = _tokens(plan)
        guesses = plan.guesses if plan.drafted else 0
        return StepRecord(
            number=self.recent.count,
            time_s=self._epoch_s + plan.planned_s,
            kind=_kind(plan, work.rows - guesses, prompt),
            rows=work.rows,
            sequences=work.sequences,
            prompt_tokens=prompt,
            decoded_tokens=decoded - guesses + accepted,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_pages=sum([pool.used_pages for pool in cache.pools]),
            kv_usage=cache.usage,
            flops=total.ops,
            attention_flops=work.attention.ops,
            bytes=total.bytes,
            weight_bytes=work.weight_bytes,
            kv_bytes=work.kv_bytes,
            launches=work.launches,
            elapsed_s=elapsed_s,
            wall_s=ended_s - began_s,
            predicted_s=predicted_s,
            bound=bound,
            mbu=reached_mbu,
            mfu=reached_mfu,
            energy_j=None if self._energy is None else self._energy.joules(began_s, ended_s),
            drafted_tokens=guesses,
            accepted_tokens=accepted,
            unguessed_s=unguessed_s,
        )


def _tokens(plan: Plan) -> tuple[int, int]:
    """Rows of prompts, and tokens that were drawn for sequences behind theirs."""
    prompt = plan.prompt_rows
    if plan.pooled:
        return prompt, 0
    if not prompt:  # as in most steps: every output is behind its prompt
        return 0, len(plan.sampled)
    drawn = zip(plan.sampled, plan.positions, strict=True)
    return prompt, sum([position >= sequence.prompt_length for sequence, position in drawn])


def _kind(plan: Plan, rows: int, prompt: int) -> Kind:
    if plan.pooled:
        return "embed"
    if not prompt:
        return "decode"
    return "prefill" if prompt == rows else "mixed"
