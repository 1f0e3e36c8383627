"""How much fits into a step in time: rows for which a prediction keeps the targets of running streams.

A step's token budget is the largest for which the step-time model predicts that streams keep their class's
time between tokens (after the choice of the chunk size in Agrawal et al., "Taming Throughput-Latency Tradeoff
in LLM Inference with Sarathi-Serve", OSDI 2024). Three rules bound the time of a step:

- Beside streams of their own class, prefills take what the target leaves, and at least as long as the streams
  themselves: where a machine misses the target anyway, half of its time still goes to prompts. Nor is such a
  step longer than half of a higher class's target for a first token: somebody may come while it runs.
- Rows of a lower class lengthen a step of a higher one by its guaranteed `SHARE`, or by `LATE_SHARE` once its
  oldest prompt is later than its target for a first token. This share is all that they get while a prompt of
  the higher class is in the step.
- Beside streams only, decodes of a lower class may take all that the streams' target leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ridgeline.config import PAGE_TOKENS, ClassTarget
from ridgeline.model.program import MemoryGroup, StepLoad
from ridgeline.resources.step_time import StepTimeModel
from ridgeline.scheduling.plan import Chunk
from ridgeline.types import Segment, SequenceRows, Step, StepWork

SHARE, LATE_SHARE = 1 / 6, 1 / 3
"""How much longer rows of a lower class may make a step: of the time without them. Steps a third longer than
predicted still keep streams within 1.6 times the time between tokens that they have without."""
LEAST_ROWS = PAGE_TOKENS
"""Rows of prompts that go on beside streams of their own class, whatever they take."""
_TRIES = 6
_UNUSED = 0.01
"""Share of a limit that rows may leave unused: looking for them takes time too."""


class WorkCounts(Protocol):
    """What a compiled program knows of its steps: `execution.lowering.WorkModel`."""

    def parts(self, load: StepLoad) -> StepWork: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """Predicts steps of one program, and has the classes' targets, the highest class first. Whoever owns
    `times` tells it what steps took."""

    work: WorkCounts
    times: StepTimeModel
    groups: Sequence[MemoryGroup]
    targets: Sequence[ClassTarget]

    def seconds(self, load: StepLoad) -> float:
        """What a step of this load will take."""
        return self.times.predict(self.work.parts(load)).seconds

    def computing_s(self, begin: int, end: int, at_once: int) -> float:
        """What it takes to compute a sequence's tokens from `begin` to `end` and the one behind them, as many
        as `at_once` in a step, beyond what that one takes: it is run in any case."""
        starts = range(begin, end + 1, at_once)
        loads = [self.load_of(start, min(at_once, end + 1 - start), 1) for start in starts]
        return max(sum(map(self.seconds, loads)) - self.seconds(self.load_of(end, 1, 1)), 0.0)

    def own_limit_s(self, level: int) -> float:
        """How long a step may be that only has rows of one class: its streams wait for it, and so does who
        comes meanwhile of a higher class, for half of the time to a first token at most."""
        higher = [target.first_token_s / 2 for target in self.targets[:level]]
        return min([self.targets[level].inter_token_s, *higher])

    def load_of(self, start: int, rows: int, outputs: int) -> StepLoad:
        """The load of a sequence's next rows."""
        segment = Segment(((),) * len(self.groups), start + rows)
        asked = SequenceRows(range(rows), start, (segment,), range(rows - outputs, rows))
        return StepLoad.of(Step((asked,)), self.groups)

    def load_of_decodes(self, contexts: Sequence[int]) -> StepLoad:
        """The load of decodes whose rows see so many slots each, themselves included."""
        seen = tuple(
            sum(contexts) if group.window is None else sum(min(group.window, each) for each in contexts)
            for group in self.groups
        )
        return StepLoad(len(contexts), len(contexts), seen, seen, len(contexts))

    def load_of_chunks(self, chunks: Sequence[Chunk]) -> StepLoad:
        """The load of what is planned of a step."""
        load = self.load_of_decodes([sequence.computed + 1 for sequence, count, _ in chunks if count == 1])
        for sequence, count, outputs in chunks:
            if count > 1:
                load += self.load_of(sequence.computed, count, len(outputs))
        return load


class StepPace:
    """The time of one step as it is planned. `chunks` is the plan so far, which others make grow; `streams`
    are the contexts of decodes that wait for this step without being in it, and the level of the highest.

    Classes come in their order: `begin`, their decodes and `add_streams` where there are any,
    `begin_prefills` and the rows of their prompts.
    """

    def __init__(
        self, pace: Pace, chunks: list[Chunk], streams: Sequence[int] = (), highest: int = 0
    ) -> None:
        self._pace = pace
        self._chunks = chunks
        self._counted = 0
        self._level = 0
        self._base_s = 0.0  # of the rows of higher classes
        self._share = SHARE
        self._limit_s = math.inf
        self._least = 0
        self._streaming: set[int] = set()  # levels with decodes in this step, or waiting for it
        nothing = (0,) * len(pace.groups)
        self._load = StepLoad(0, 0, nothing, nothing, 0)
        if streams:
            self._load = pace.load_of_decodes(streams)
            self._streaming.add(highest)

    def begin(self, level: int, hurried: bool, late: bool) -> None:
        """Rows of a lower class are planned from here on. `hurried`: prompts of higher ones are in the step,
        `late`: a prompt of its own is later than its target."""
        load = self._planned()
        self._level = level
        self._share = LATE_SHARE if late else SHARE
        self._base_s = self._pace.seconds(load) if load.rows else 0.0
        higher = [self._pace.targets[each].inter_token_s for each in self._streaming if each < level]
        self._limit_s = math.inf
        if self._base_s:
            self._limit_s = (1 + self._share) * self._base_s
            if not hurried:
                self._limit_s = max(self._limit_s, min(higher, default=0.0))

    def decodes_that_fit(self, contexts: Sequence[int]) -> int:
        """How many of a class's decodes, in this order, may run; 1 at least, all where no higher ones do."""
        if self._limit_s == math.inf:
            return len(contexts)
        load, pace = self._planned(), self._pace
        fitting = _largest(
            lambda count: pace.seconds(load + pace.load_of_decodes(contexts[:count])),
            len(contexts),
            self._limit_s,
        )
        return max(fitting, 1)

    def add_streams(self, level: int) -> None:
        """Decodes of a class are in the step."""
        self._streaming.add(level)

    def begin_prefills(self, level: int) -> None:
        """Prompts of a class are planned from here on."""
        self._level = level
        own = self._level in self._streaming
        self._least = LEAST_ROWS if own and not self._base_s else 1
        if self._base_s and self._limit_s < math.inf:
            self._limit_s = min(self._limit_s, (1 + self._share) * self._pace.seconds(self._planned()))
        elif own:
            alone_s = self._pace.seconds(self._planned())
            self._limit_s = max(self._pace.own_limit_s(level), 2 * alone_s)

    def rows_that_fit(self, start: int, most: int, outputs: int) -> int:
        """How many of a prompt's next rows, `most` at most, keep the limit; a few do whatever they take."""
        if self._limit_s == math.inf:
            return most
        load, pace = self._planned(), self._pace
        fitting = _largest(
            lambda rows: pace.seconds(load + pace.load_of(start, rows, min(outputs, rows))),
            most,
            self._limit_s,
        )
        rows = max(fitting, min(self._least, most))
        self._least = max(self._least - rows, 0)
        return rows

    def _planned(self) -> StepLoad:
        """The load of the plan so far."""
        new = self._chunks[self._counted :]
        self._counted = len(self._chunks)
        if new:
            self._load += self._pace.load_of_chunks(new)
        return self._load


def _largest(seconds: Callable[[int], float], most: int, limit_s: float) -> int:
    """The largest count, 0 to `most`, that takes no more than the limit, or one that takes nearly as long: by
    interpolation from a count of 1 on, as times are nearly straight lines there. An end that stays where it
    is counts half as much each time (the Illinois method), as long prompts bend the lines."""
    if most < 1 or (above_s := seconds(most) - limit_s) <= 0:
        return most
    if most == 1 or (below_s := limit_s - seconds(1)) < 0:
        return 0
    low, high, rose = 1, most, False
    for attempt in range(_TRIES):
        if high - low == 1 or below_s < _UNUSED * limit_s:
            break
        guess = low + int((high - low) * below_s / (below_s + above_s))
        middle = min(max(guess, low + 1), high - 1)
        over_s = seconds(middle) - limit_s
        fits = over_s <= 0
        if fits:
            low, below_s = middle, -over_s
        else:
            high, above_s = middle, over_s
        if attempt and fits is rose:
            below_s, above_s = (below_s, above_s / 2) if fits else (below_s / 2, above_s)
        rose = fits
    return low
