"""An executor that runs nothing: it says when a step would be over, and which tokens it would have drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ridgeline.apps.simulate.usage import Usage
from ridgeline.execution.draw import Drawer
from ridgeline.model.program import MemoryGroup, StepLoad
from ridgeline.resources.step_time import Prediction
from ridgeline.scheduling.pace import WorkCounts
from ridgeline.types import Draw, Move, Step, StepResult, StepWork


class StepTimes(Protocol):
    """What says how long a step takes: a `StepTimeModel`, or what was measured."""

    def predict(self, work: StepWork) -> Prediction: ...


class Clock:
    """Simulated time, in seconds since the trace began."""

    __slots__ = ("now_s",)

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def pass_to(self, time_s: float) -> None:
        self.now_s = max(self.now_s, time_s)


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens behind a prompt of that many."""

    prompt_tokens: int
    tokens: Sequence[int]


@dataclass(slots=True)
class ModelledExecutor:
    """Implements `Executor` in simulated time. Steps run one behind the other, and whoever asks for a result
    waits, by the clock, until it is there.

    A draw's seed says which of `answers` its token is from.
    """

    clock: Clock
    times: StepTimes
    work: WorkCounts
    groups: Sequence[MemoryGroup]
    asynchronous: bool
    usage: Usage
    answers: dict[int, Answer] = field(default_factory=dict)
    drawer: Drawer = field(default_factory=Drawer)
    numerics: str = "none"
    host_page_bytes: tuple[int, ...] = ()
    _free_s: float = 0.0

    def load(self, weights: Any) -> None:
        """There are none."""

    def compile(self, program: Any) -> Any:
        """Steps of any program are timed by `work`."""
        return program

    def run(self, handle: Any, step: Step) -> ModelledStep:
        work = self.work.parts(StepLoad.of(step, self.groups))
        end_s, seconds = self.launch(work)
        tokens = [-1 if draw is None else self.token(draw) for draw in step.draws]
        return ModelledStep(self, end_s, StepResult(_NOTHING, np.array(tokens, np.int32), seconds, work))

    def launch(self, work: StepWork) -> tuple[float, float]:
        """A step of that work, behind those that run already: when it will be over, and what it takes."""
        seconds = self.times.predict(work).seconds
        self._free_s = max(self._free_s, self.clock.now_s) + seconds
        self.usage.step(work, seconds)
        return self._free_s, seconds

    def token(self, draw: Draw) -> int:
        answer = self.answers[draw.seed]
        return answer.tokens[draw.position - answer.prompt_tokens]

    def transfer(self, moves: Sequence[Move]) -> None:
        """Copies of single pages take no time that counts."""

    def close(self) -> None:
        """Nothing is held."""


_NOTHING = np.zeros((0, 1), np.float32)


@dataclass(frozen=True, slots=True)
class ModelledStep:
    """Implements `StepFuture`."""

    executor: ModelledExecutor
    end_s: float
    done: StepResult

    def result(self) -> StepResult:
        self.executor.clock.pass_to(self.end_s)
        return self.done
