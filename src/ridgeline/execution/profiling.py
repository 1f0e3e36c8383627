"""Where the time of steps goes: each launch timed, beside its own work.

Timing costs a clock reading a launch, so it is off unless a `ProfilingExecutor` stands before the executor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ridgeline.execution.base import Executor, FinishedStep
from ridgeline.execution.lowering import Footprint, Launch, borders, launch_work
from ridgeline.model.program import Activate, Add, Operation, Program, Quantise, StepLoad
from ridgeline.model.weights import Weights
from ridgeline.types import Move, Step, Work

_LAYER = re.compile(r"^layers\.\d+\.")


@dataclass(frozen=True, slots=True)
class LaunchTime:
    """One launch of a step, or a part of the step that is none."""

    label: str
    elapsed_s: float
    work: Work = field(default_factory=Work)


class TimedExecutor(Executor, Protocol):
    """An executor that can say how long each launch took."""

    def profile(self, handle: Any, step: Step) -> tuple[FinishedStep, Callable[[], Sequence[LaunchTime]]]:
        """As `run`, waiting for the step, with the times of its parts in their order. Their work is counted
        when they are asked for, which takes longer than many a step."""


@dataclass(slots=True)
class LaunchTotals:
    """Sums over all launches of a label, in all steps."""

    launches: int = 0
    elapsed_s: float = 0.0
    work: Work = field(default_factory=Work)

    def add(self, time: LaunchTime) -> None:
        self.launches += 1
        self.elapsed_s += time.elapsed_s
        self.work = self.work + time.work


@dataclass(slots=True)
class Profile:
    """Where the steps' time went, by label in the order of the step."""

    steps: int = 0
    elapsed_s: float = 0.0
    parts: dict[str, LaunchTotals] = field(default_factory=dict)

    def add(self, elapsed_s: float, times: Sequence[LaunchTime]) -> None:
        self.steps += 1
        self.elapsed_s += elapsed_s
        for time in times:
            self.parts.setdefault(time.label, LaunchTotals()).add(time)


class ProfilingExecutor:
    """Stands before an executor and keeps the times of steps with one row per sequence apart from others.

    Work is counted by `count`, so that counting takes no time between the steps.
    """

    asynchronous = False

    def __init__(self, executor: TimedExecutor) -> None:
        self._executor = executor
        self.drawer = executor.drawer
        self.decode, self.prefill = Profile(), Profile()
        self._uncounted: list[tuple[Profile, float, Callable[[], Sequence[LaunchTime]]]] = []

    @property
    def numerics(self) -> str:
        return self._executor.numerics

    @property
    def host_page_bytes(self) -> tuple[int, ...]:
        return self._executor.host_page_bytes

    def count(self) -> None:
        """Add the steps since the last call to the profiles, while the executor still has its weights."""
        for profile, elapsed_s, times in self._uncounted:
            profile.add(elapsed_s, times())
        self._uncounted.clear()

    def run(self, handle: Any, step: Step) -> FinishedStep:
        finished, times = self._executor.profile(handle, step)
        profile = self.decode if len(step.sequences) == step.rows else self.prefill
        self._uncounted.append((profile, finished.step_result.elapsed_s, times))
        return finished

    def load(self, weights: Weights) -> None:
        self._executor.load(weights)

    def compile(self, program: Program) -> Any:
        return self._executor.compile(program)

    def transfer(self, moves: Sequence[Move]) -> None:
        self._executor.transfer(moves)

    def close(self) -> None:
        self._executor.close()


def label_of(launch: Launch) -> str:
    """A launch's name, the same in every layer: what its operations make, but for those that only follow."""
    leading = [op for op in launch.covers if not isinstance(op, Quantise | Add | Activate)]
    names: list[str] = []
    for op in leading or launch.covers:
        name = _name_of(op)
        if name not in names:
            names.append(name)
    return " + ".join(names)


def _name_of(op: Operation) -> str:
    return _LAYER.sub("", op.out.name)


def launch_works(
    program: Program, launches: Sequence[Launch], load: StepLoad, footprint: Footprint
) -> list[Work]:
    """The work of each launch in a step."""
    crossed = zip(launches, borders(program, launches), strict=True)
    return [launch_work(launch, border, load, footprint) for launch, border in crossed]
