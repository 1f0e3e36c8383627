"""Runs of steps in which nothing changes, without planning each of them.

Where everybody decodes and nobody waits, comes or ends, the scheduler's next plan is its last one, a token
further. Such steps are passed here one by one, with the same predictions and the same calls of the cache in
the same order, but without plans, draws and requests' outputs: the state after them is that of the engine's
own steps. (One difference is out of sight: on an executor that is a step ahead of its results, the engine
stores a page of drawn tokens a step later.)
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from ridgeline.apps.simulate.setting import Simulation
from ridgeline.config import PAGE_TOKENS
from ridgeline.scheduling.pace import StepPace
from ridgeline.scheduling.plan import Chunk
from ridgeline.scheduling.sequence import Sequence as Decoding
from ridgeline.scheduling.waiting import OUTPUT_WEIGHT

_LEAST = 4
"""Steps that are worth it."""

Taken = Callable[[Sequence[Decoding], "array[float]"], None]


class Jumper:
    """Passes steps of a simulation. `taken` hears of the sequences that have taken on tokens, and when;
    `step` runs one of the engine's own."""

    def __init__(self, simulation: Simulation, taken: Taken, step: Callable[[], None]) -> None:
        self.simulation, self.taken = simulation, taken
        self._step = step

    def jump(self, until_s: float) -> int:
        """Pass steps that begin before `until_s`, when the next request comes; how many. Afterwards the next
        step is to be launched before anybody is added."""
        ahead = self.simulation.executor.asynchronous
        most = self._most_steps() - ahead
        if most < _LEAST or self.simulation.clock.now_s >= until_s:
            return 0
        if ahead:
            self._catch_up()
        return _Run(self, most).steps_until(until_s)

    def _most_steps(self) -> int:
        """Steps before one in which a sequence ends; 0 unless all are decodes that were in the last step, and
        none has a state, which every step may leave in another slot."""
        scheduler = self.simulation.scheduler
        cache = scheduler.cache
        if scheduler.waiting or cache.moves or cache.states is not None or not scheduler.running:
            return 0
        most = 1 << 30
        for sequence in scheduler.running:
            if sequence.remaining != 1 or sequence.served != scheduler.steps or not sequence.generated:
                return 0
            most = min(most, sequence.limit - len(sequence.token_ids) - 1)
        return most

    def _catch_up(self) -> None:
        """Take in the step that is under way, and launch none behind it."""
        executor = self.simulation.executor
        executor.asynchronous = False
        try:
            self._step()
        finally:
            executor.asynchronous = True


class _Run:
    """Steps of the same sequences, at most so many. Tokens are handed out when somebody wants to see them."""

    def __init__(self, jumper: Jumper, most: int) -> None:
        self._jumper, self._most = jumper, most
        self._scheduler, self._cache = jumper.simulation.scheduler, jumper.simulation.scheduler.cache
        self._running = list(self._scheduler.running)
        self._levels = sorted({sequence.level for sequence in self._running})
        self._planned = self._in_plan_order()
        # By the steps until a sequence's tokens fill its pages, and it needs the next one.
        self._growing, self._filling = (_by_phase(order) for order in (self._running, self._planned))

    def _in_plan_order(self) -> list[Decoding]:
        """Classes by level; the first as it runs, others by how long they have waited, then by arrival."""
        first, *others = (
            [sequence for sequence in self._running if sequence.level == level] for level in self._levels
        )
        return [*first, *(one for some in others for one in sorted(some, key=lambda each: each.arrival))]

    def steps_until(self, until_s: float) -> int:
        simulation = self._jumper.simulation
        executor, clock, pace = simulation.executor, simulation.clock, simulation.pace
        ends, done = array("d"), 0
        while done < self._most and clock.now_s < until_s:
            if not self._all_fit() or not self._grow(done):
                break
            load = pace.load_of_decodes([sequence.computed + 1 for sequence in self._running])
            end_s, _ = executor.launch(pace.work.parts(load))
            clock.pass_to(end_s)
            ends.append(end_s)
            done += 1
            self._scheduler.steps += 1
            for sequence in self._running:
                sequence.computed += 1
            self._store(done)
        for sequence in self._running:
            self._hand_out(sequence)
            sequence.served = self._scheduler.steps
            sequence.account.used += OUTPUT_WEIGHT * done
        if done:
            self._jumper.taken(self._running, ends)
        return done

    def _grow(self, done: int) -> bool:
        """Have a page for every row; False where somebody would have to give way for one."""
        if not self._cache.has_windows:
            growing = self._growing[done % PAGE_TOKENS]
            return all(self._cache.grow(sequence.pages, sequence.computed + 1) for sequence in growing)
        for sequence in self._running:
            self._cache.trim(sequence.pages, sequence.computed)
            if not self._cache.grow(sequence.pages, sequence.computed + 1):
                return False
        return True

    def _store(self, done: int) -> None:
        """Let others share the pages that the last step has filled; the first step those before it too."""
        for sequence in self._filling[done % PAGE_TOKENS] if done > 1 else self._planned:
            if sequence.computed // PAGE_TOKENS > sequence.pages.shared:
                self._hand_out(sequence)
                self._cache.store(sequence.pages, sequence.token_ids, sequence.computed)

    def _hand_out(self, sequence: Decoding) -> None:
        """Let a sequence have the tokens of the steps that were passed."""
        known = len(sequence.token_ids)
        answer = self._jumper.simulation.executor.answers[sequence.chooser.draw(known).seed]
        begin, end = (place - answer.prompt_tokens for place in (known, sequence.computed + 1))
        for token in answer.tokens[begin:end]:
            sequence.append(token)

    def _all_fit(self) -> bool:
        """Whether the next step has time for the decodes of all classes."""
        pace = self._scheduler.pace
        if pace is None or len(self._levels) == 1:
            return True
        chunks: list[Chunk] = []
        step = StepPace(pace, chunks)
        for level in self._levels:
            decodes = [sequence for sequence in self._planned if sequence.level == level]
            if chunks:
                step.begin(level, hurried=False, late=False)
                if step.decodes_that_fit([sequence.computed + 1 for sequence in decodes]) < len(decodes):
                    return False
            step.add_streams(level)
            chunks += ((sequence, 1, _FIRST) for sequence in decodes)
        return True


_FIRST = [0]


def _by_phase(order: Sequence[Decoding]) -> list[list[Decoding]]:
    found: list[list[Decoding]] = [[] for _ in range(PAGE_TOKENS)]
    for sequence in order:
        found[-sequence.computed % PAGE_TOKENS].append(sequence)
    return found
