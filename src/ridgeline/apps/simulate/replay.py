"""A trace, replayed in simulated time."""

from __future__ import annotations

import heapq
import math
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ridgeline.apps.simulate.executor import Answer
from ridgeline.apps.simulate.jump import Jumper
from ridgeline.apps.simulate.setting import Simulation
from ridgeline.apps.simulate.trace import TraceRequest, tokens_of
from ridgeline.outcome import RequestState
from ridgeline.records import StepRecord
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
    """Serve a trace. With `jump`, runs of steps in which nothing changes are passed at once, and nothing else
    is different."""
    return _Replay(simulation, trace).run(jump)


class _Replay:
    """Implements `StepWatcher`, to learn when tokens came."""

    def __init__(self, simulation: Simulation, trace: Sequence[TraceRequest]) -> None:
        self._simulation, self._trace = simulation, trace
        self._engine, self._clock = simulation.engine, simulation.clock
        self._engine.steps = StepLog(simulation.scheduler, watcher=self)
        self._served: dict[int, Served] = {}  # by place in the trace
        self._owners: dict[int, tuple[Decoding, Served]] = {}  # by arrival of the sequence
        self._followers: dict[str, list[int]] = defaultdict(list)
        self._due: list[tuple[float, int]] = []
        self._last: list[Decoding] = []  # those of whose rows the last step had outputs
        self._jumper = Jumper(simulation, self._take_run, self._step)
        for place, request in enumerate(trace):
            if request.arrival_s is not None:
                self._due.append((request.arrival_s, place))
            else:
                assert request.after is not None
                self._followers[request.after].append(place)
        heapq.heapify(self._due)

    def run(self, jump: bool) -> Replay:
        engine, clock, jumped = self._engine, self._clock, 0
        while self._due or engine.has_work:
            if not engine.has_work:
                clock.pass_to(self._due[0][0])
            while self._due and self._due[0][0] <= clock.now_s:
                self._add(*heapq.heappop(self._due))
            if not engine.has_work:
                continue
            if jump:
                passed = self._jumper.jump(self._due[0][0] if self._due else math.inf)
                jumped += passed
                if passed and not self._simulation.executor.asynchronous:
                    continue  # who has come meanwhile is in the next step
            self._step()
        served = [self._served[place] for place in range(len(self._trace))]
        return Replay(self._simulation, served, jumped)

    def _step(self) -> None:
        self._last.clear()
        self._engine.step()
        for sequence in self._last:
            if (found := self._owners.get(sequence.arrival)) is not None:
                self._note(*found)

    def _add(self, arrival_s: float, place: int) -> None:
        request, served = self._trace[place], Served(self._trace[place], arrival_s)
        vocabulary = self._engine.model.vocabulary_size
        prompt = tuple(tokens_of(request.prompt, vocabulary))
        answers = self._simulation.executor.answers
        answers[place] = Answer(len(prompt), tokens_of([(request.answer, request.output_tokens)], vocabulary))
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
            served.refused, served.end_s = str(error), arrival_s
            del answers[place]
            self._follow(request, arrival_s)

    def _follow(self, request: TraceRequest, ended_s: float) -> None:
        """Let those come who wait for the end of a request."""
        for place in self._followers.pop(request.id, ()):
            heapq.heappush(self._due, (ended_s + self._trace[place].delay_s, place))

    def _note(self, sequence: Decoding, served: Served) -> None:
        """The tokens that a sequence has taken on with the last step."""
        for _ in range(sequence.generated - len(served.text_s)):
            served.text_s.append(self._clock.now_s)

    def _take_run(self, sequences: Sequence[Decoding], ends_s: array[float]) -> None:
        for sequence in sequences:
            self._owners[sequence.arrival][1].text_s.extend(ends_s)

    # ------------------------------------------------------------------------ what the engine tells

    def arrived(self, state: RequestState) -> None:
        sequence: Decoding = state.choices[0].sequence
        self._owners[sequence.arrival] = sequence, self._served[int(state.id)]

    def step(self, record: StepRecord, plan: Plan, began_s: float, ended_s: float) -> None:
        self._last.extend(plan.sampled)

    def ended(self, state: RequestState) -> None:
        place = int(state.id)
        served, sequence = self._served[place], state.choices[0].sequence
        self._note(sequence, served)
        served.end_s = self._clock.now_s
        served.cached_tokens, served.preemptions = sequence.cached_tokens, sequence.preemptions
        del self._owners[sequence.arrival], self._simulation.executor.answers[place]
        self._follow(served.request, served.end_s)

    def close(self) -> None:
        """Nothing is held."""
