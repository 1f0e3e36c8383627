"""A trace, replayed in simulated time, or served for real by an engine that runs its model."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ridgeline.apps.simulate.executor import Answer
from ridgeline.apps.simulate.jump import Jumper
from ridgeline.apps.simulate.setting import Simulation
from ridgeline.apps.simulate.trace import Part, TraceRequest, tokens_of
from ridgeline.engine import Engine
from ridgeline.outcome import RequestState
from ridgeline.records import StepRecord
from ridgeline.resources.step_time import StepTimeModel
from ridgeline.scheduling.plan import Plan
from ridgeline.scheduling.sequence import Sequence as Decoding
from ridgeline.steps import StepLog
from ridgeline.types import Request, RequestError, SamplingParams


@dataclass(slots=True)
class Served:
    """What became of a request. Times are in seconds since the trace began; `text_s` has one for each token.
    `refused` says why it was not served, None where it was."""

    request: TraceRequest
    start_s: float
    end_s: float = 0.0
    text_s: array[float] = field(default_factory=lambda: array("d"))
    cached_tokens: int = 0
    preemptions: int = 0
    refused: str | None = None

    @property
    def output_tokens(self) -> int:
        return len(self.text_s)


@dataclass(frozen=True, slots=True)
class Replay:
    """All requests, in the trace's order. Of the steps, `jumped` were not planned one by one."""

    simulation: Simulation
    served: Sequence[Served]
    jumped: int

    @property
    def duration_s(self) -> float:
        """From the first request to the last token."""
        begin = min(each.start_s for each in self.served)
        return max(each.end_s for each in self.served) - begin


def replay(simulation: Simulation, trace: Sequence[TraceRequest], jump: bool = True) -> Replay:
    """Serve a trace in simulated time. With `jump`, runs of steps in which nothing changes are passed at
    once, and nothing else is different."""
    answers = simulation.executor.answers
    life = _Life(simulation.engine, simulation.clock, trace, answers)
    jumper = Jumper(simulation, life.take_run, life.step_on)
    jumped = life.run(jumper.jump if jump else None)
    return Replay(simulation, life.in_order(), jumped)


@dataclass(frozen=True, slots=True)
class Run:
    """All requests, in the trace's order, and how long each step took, with what came before it since the
    step before or, where the engine was idle, since the request that ended that."""

    served: Sequence[Served]
    step_s: Sequence[float]


def serve(engine: Engine, trace: Sequence[TraceRequest], times: StepTimeModel | None = None) -> Run:
    """Serve a trace in real time, on an engine of which nobody else asks anything; `times` is told what steps
    took. Answers have the lengths that the trace gives, and the tokens that the model gives."""
    clock = _WallClock()
    engine.clock = clock
    life = _Life(engine, clock, trace, None, times)
    life.run(None)
    return Run(life.in_order(), life.step_s)


class Time(Protocol):
    """Tells the seconds since a trace began, and lets them pass."""

    @property
    def now_s(self) -> float: ...

    def pass_to(self, time_s: float) -> None: ...


class _WallClock:
    def __init__(self) -> None:
        self._began_s = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began_s

    @property
    def now_s(self) -> float:
        return self()

    def pass_to(self, time_s: float) -> None:
        while (left_s := time_s - self.now_s) > 0:
            time.sleep(left_s)


class _Life:
    """The requests of a trace, from when they come to when they end. Implements `StepWatcher`, to learn when
    tokens came. `answers` are told to an executor that knows none itself."""

    def __init__(
        self,
        engine: Engine,
        clock: Time,
        trace: Sequence[TraceRequest],
        answers: dict[int, Answer] | None,
        times: StepTimeModel | None = None,
    ) -> None:
        self._engine, self._clock, self._trace, self._answers = engine, clock, trace, answers
        engine.steps = StepLog(engine.scheduler, times, watcher=self)
        self.step_s = array("d")
        self._served: dict[int, Served] = {}  # by place in the trace
        self._owners: dict[int, tuple[Decoding, Served]] = {}  # by arrival of the sequence
        self._followers: dict[str, list[int]] = defaultdict(list)
        self._due: list[tuple[float, int]] = []
        self._told: dict[str, list[int]] = {}  # answers of a model, by name
        self._last: list[Decoding] = []  # those of whose rows the last step had outputs
        self._ended_s = 0.0  # when the last step was
        for place, request in enumerate(trace):
            if request.arrival_s is not None:
                self._due.append((request.arrival_s, place))
            else:
                assert request.after is not None
                self._followers[request.after].append(place)
        heapq.heapify(self._due)

    def run(self, jump: Callable[[float], int] | None) -> int:
        """Serve them all; how many steps were jumped."""
        engine, clock, jumped = self._engine, self._clock, 0
        while self._due or engine.has_work:
            if not engine.has_work:
                self._ended_s = max(self._ended_s, self._due[0][0])
                clock.pass_to(self._due[0][0])
            while self._due and self._due[0][0] <= clock.now_s:
                self._add(*heapq.heappop(self._due))
            if not engine.has_work:
                continue
            if jump is not None:
                passed = jump(self._due[0][0] if self._due else math.inf)
                jumped += passed
                if passed and not engine.executor.asynchronous:
                    continue  # who has come meanwhile is in the next step
            self.step_on()
        return jumped

    def in_order(self) -> list[Served]:
        return [self._served[place] for place in range(len(self._trace))]

    def step_on(self) -> None:
        """Run a step of the engine."""
        self._last.clear()
        self._engine.step()
        for sequence in self._last:
            if (found := self._owners.get(sequence.arrival)) is not None:
                self._note(*found)

    def take_run(self, sequences: Sequence[Decoding], ends_s: array[float]) -> None:
        """Sequences have taken on tokens in steps that were jumped."""
        self._ended_s = ends_s[-1]
        for sequence in sequences:
            self._owners[sequence.arrival][1].text_s.extend(ends_s)

    def _add(self, due_s: float, place: int) -> None:
        request, served = self._trace[place], Served(self._trace[place], due_s)
        prompt = tuple(itertools.chain.from_iterable(map(self._tokens, request.prompt)))
        if self._answers is not None:
            tokens = self._tokens((request.answer, request.output_tokens))
            self._answers[place] = Answer(len(prompt), tokens)
        # Warm, so that the draw of each token carries the seed by which its answer is found.
        params = SamplingParams(
            temperature=1.0, seed=place, max_tokens=request.output_tokens, ignore_eos=True
        )
        # As in the server: who has another key does not find what this one has computed.
        asked = Request(str(place), prompt, params, request.tenant, request.service_class, request.tenant)
        self._served[place] = served
        try:
            self._engine.add(asked, stream=False)
        except RequestError as error:
            served.refused, served.end_s = str(error), due_s
            self._forget(place)

    def _tokens(self, part: Part) -> list[int]:
        name, count = part
        told = self._told.get(name, [])
        return told[:count] if len(told) >= count else tokens_of([part], self._engine.model.vocabulary_size)

    def _forget(self, place: int) -> None:
        """A request has ended: let those come who wait for that."""
        if self._answers is not None:
            del self._answers[place]
        for follower in self._followers.pop(self._trace[place].id, ()):
            due_s = self._served[place].end_s + self._trace[follower].delay_s
            heapq.heappush(self._due, (due_s, follower))

    def _note(self, sequence: Decoding, served: Served) -> None:
        """The tokens that a sequence has taken on with the last step."""
        for _ in range(sequence.generated - len(served.text_s)):
            served.text_s.append(self._ended_s)

    # ------------------------------------------------------------------------ what the engine tells

    def arrived(self, state: RequestState) -> None:
        sequence: Decoding = state.choices[0].sequence
        self._owners[sequence.arrival] = sequence, self._served[int(state.id)]

    def step(self, record: StepRecord, plan: Plan, began_s: float, ended_s: float) -> None:
        self._last.extend(plan.sampled)
        self.step_s.append(ended_s - self._ended_s)
        self._ended_s = ended_s

    def ended(self, state: RequestState) -> None:
        place = int(state.id)
        served, sequence = self._served[place], state.choices[0].sequence
        self._note(sequence, served)
        served.end_s = self._ended_s
        served.cached_tokens, served.preemptions = sequence.cached_tokens, sequence.preemptions
        del self._owners[sequence.arrival]
        if self._answers is None and served.request.output:
            self._told[served.request.output] = sequence.token_ids[sequence.prompt_length :]
        self._forget(place)

    def close(self) -> None:
        """Nothing is held."""
