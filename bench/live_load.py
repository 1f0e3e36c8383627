"""A server under several loads at once: requests that are begun and left to run, and its steps meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
from server_runs import asking_of

from ridgeline.apps.explain.attach import kinds_of, parse_step
from ridgeline.apps.load.client import Answer, Asking, ask
from ridgeline.apps.load.connections import Connections
from ridgeline.apps.load.dataset import Sample
from ridgeline.apps.load.events import EventParser
from ridgeline.apps.load.failures import FailureError
from ridgeline.records import StepRecord
from ridgeline.types import RequestError, ServiceClass

PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Figure:
    """Something that was measured, and what it may be at most, or with `least` at least; None is no limit."""

    name: str
    value: float
    limit: float | None = None
    unit: str = ""
    least: bool = False

    @property
    def passes(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        shown = f"  {self.name:<58} {self.value:>11.4g} {self.unit:<6}"
        if self.limit is None:
            return shown.rstrip()
        return f"{shown} {'at least' if self.least else 'at most '} {self.limit:<8.4g} " + (
            "pass" if self.passes else "FAIL"
        )


@dataclass
class Live:
    """One server, its API as `asking` asks for it, and everything that was begun on it."""

    url: str
    connections: Connections
    asking: Asking
    steps: list[StepRecord] = field(default_factory=list)
    _tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Let something run beside all else; it ends with the scenario at the latest."""
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    async def ask(
        self, sample: Sample, of: ServiceClass | None = None, into: Callable[[Answer], None] | None = None
    ) -> Answer:
        """One answer, whole. `into` gets it when it is asked for. Raises RequestError where it fails."""
        asking = replace(self.asking, service_tier=of)
        answer = await ask(self.connections, asking, sample, into or (lambda answer: None))
        check([answer])
        return answer

    async def clients(
        self,
        count: int,
        samples: Iterator[Sample],
        answers: list[Answer],
        of: ServiceClass | None = None,
    ) -> None:
        """A closed loop without end, or until the samples are used up."""

        async def client() -> None:
            for sample in samples:
                await self.ask(sample, of, answers.append)

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(client())

    def check(self) -> None:
        """Raise what ended something that was begun."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error if not isinstance(error, BaseExceptionGroup) else error.exceptions[0]

    async def until(self, done: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
        """Wait for something, for so long at most; whether it came."""
        end_s = time.monotonic() + patience_s
        while not done():
            self.check()
            if time.monotonic() > end_s:
                return False
            await asyncio.sleep(0.02)
        return True

    async def follow(self) -> None:
        """Take in the server's steps as they end, some tenths of a second later."""
        parser = EventParser()

        def receive(status: int, data: bytes, _: float) -> None:
            if status != 200:
                raise FailureError(f"status {status}", "/v1/steps")
            for event in parser.feed(data):
                if event.data and not event.name:
                    self.steps.append(parse_step(event.data))

        await self.connections.exchange("GET", "/v1/steps", b"", receive, PATIENCE_S)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.connections.close()


@asynccontextmanager
async def live(url: str, api_key: str | None = None, follow: bool = False) -> AsyncIterator[Live]:
    """A server that has answered one request, and whose steps are followed if that is wished."""
    connections = Connections(url, api_key)
    found = Live(url, connections, await asking_of(url, connections))
    try:
        if follow:
            found.begin(found.follow())
        yield found
        found.check()
    finally:
        await found.close()


def check(answers: Sequence[Answer]) -> None:
    """Raise RequestError where one of them failed."""
    for answer in answers:
        if answer.cause is not None:
            raise RequestError(f"a request failed: {answer.cause}: {answer.detail}")


def ttft_s(answer: Answer) -> float:
    """Time to the first token."""
    return answer.text_s[0] - answer.start_s


def gaps_s(answers: Sequence[Answer], begin_s: float, end_s: float) -> list[float]:
    """The gaps between chunks of each answer that end in a time."""
    found: list[float] = []
    for answer in answers:
        at = np.array(answer.text_s)
        found += np.diff(at)[(at[1:] > begin_s) & (at[1:] <= end_s)].tolist()
    return found


def tokens_between(answers: Sequence[Answer], begin_s: float, end_s: float) -> int:
    """Chunks with text that came in a time: tokens, as a server sends each by itself."""
    return sum(begin_s < at_s <= end_s for answer in answers for at_s in answer.text_s)


def wall_s(at_s: float) -> float:
    """A moment of `time.perf_counter` in seconds since 1970."""
    return at_s - time.perf_counter() + time.time()


def steps_between(steps: Sequence[StepRecord], begin_s: float, end_s: float) -> list[StepRecord]:
    """Those planned between two moments of `time.perf_counter`."""
    begin_s, end_s = wall_s(begin_s), wall_s(end_s)
    return [step for step in steps if begin_s <= step.time_s < end_s]


def describe(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """Steps by kind: how many, how long, how much longer than predicted."""
    found: dict[str, Any] = {}
    for kind in kinds_of(steps):
        some = [step for step in steps if step.kind == kind.kind]
        ratios = [step.elapsed_s / step.predicted_s for step in some if step.predicted_s]
        outside = median(step.wall_s - step.elapsed_s for step in some)
        found[kind.kind] = {
            "steps": kind.steps,
            "rows": kind.rows,
            "prompt_tokens": sum(step.prompt_tokens for step in some),
            "ms": [1e3 * float(q) for q in np.percentile([step.elapsed_s for step in some], (50, 90, 99))],
            "outside_ms": 1e3 * outside,
            "of_prediction": [float(q) for q in np.percentile(ratios, (10, 50, 90, 99))] if ratios else None,
        }
    return found
