"""Drafting for a batch: who is asked, what is verified, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from ridgeline.records import DraftTotals
from ridgeline.sampling.drafting.controller import LONGEST_REST, Controller, DraftTime
from ridgeline.sampling.drafting.costs import StepCost
from ridgeline.sampling.drafting.drafter import DraftedSequence, Drafter
from ridgeline.sampling.drafting.grammar import GrammarDrafter
from ridgeline.sampling.drafting.histories import Histories
from ridgeline.sampling.drafting.ngram import NgramDrafter
from ridgeline.sampling.drafting.outputs import PastOutputs
from ridgeline.sampling.drafting.suffix import SuffixDrafter
from ridgeline.sampling.drafting.tree import NO_DRAFT, DraftTree

AUTO = "auto"


@dataclass(slots=True)
class _Source:
    drafter: Drafter
    time: DraftTime = field(default_factory=DraftTime)
    totals: DraftTotals = field(default_factory=DraftTotals)


class Speculator:
    """Guesses tokens for the sequences of each step, as their requests want and as far as it pays.

    `drafters` are those that a request can name; "auto" asks them in this order until one has a guess.
    Between two calls of `draft`, `verified` is called for each sequence whose draft was run.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        controller: Controller | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._sources = {drafter.name: _Source(drafter) for drafter in drafters}
        self._controller = controller or Controller()
        self._clock = clock
        self._steps = 0
        self._rows, self._rest = 0, 0  # of the last step for which guesses were looked for; the shortest rest
        self._drafters_s = 0.0  # of this step's drafting

    @classmethod
    def of_lookups(
        cls, controller: Controller | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> Speculator:
        """One with the drafters that need no model."""
        histories = Histories()
        lookups = SuffixDrafter(histories, PastOutputs()), NgramDrafter(histories)
        return cls((GrammarDrafter(), *lookups), controller, clock)

    @property
    def totals(self) -> dict[str, DraftTotals]:
        """What each drafter has brought, by its name."""
        return {name: source.totals for name, source in self._sources.items()}

    def count_on(self, totals: Mapping[str, DraftTotals]) -> None:
        """Go on from what the drafters of another one have brought."""
        for name, source in self._sources.items():
            source.totals = totals.get(name, source.totals)

    def rests(self, rows: int) -> bool:
        """Whether a step of so many rows is one in which nobody is asked about; it is over then. Sequences
        are not looked at: one that has come where another went is asked about when the others are."""
        if rows != self._rows or not (self._steps + 1) & self._rest:
            return False
        self._steps += 1
        return True

    def draft(self, sequences: Sequence[DraftedSequence], cost: StepCost) -> list[DraftTree]:
        """What is to be verified of each sequence in a step, with the token that it has last."""
        self._steps += 1
        trees = [NO_DRAFT] * len(sequences)
        self._rows, self._rest = cost.rows, LONGEST_REST
        due = [i for i, sequence in enumerate(sequences) if self._is_due(sequence)]
        if due:
            began_s = self._clock()
            self._drafters_s = 0.0
            drafts = self._draft([sequences[i] for i in due], cost)
            self._controller.took(len(due), self._clock() - began_s - self._drafters_s)
            for i, tree in zip(due, drafts, strict=True):
                trees[i] = tree
        return trees

    def _is_due(self, sequence: DraftedSequence) -> bool:
        """Whether to ask about a sequence: one that rests is let alone for some steps, all such together, as
        most of what a step's drafting takes is for the first one."""
        forced = sequence.forced
        rest = self._controller.rest(sequence)
        self._rest = min(self._rest, rest if forced is None else 0)
        return not self._steps & rest or bool(forced)

    def _draft(self, sequences: Sequence[DraftedSequence], cost: StepCost) -> list[DraftTree]:
        slowest = max((source.time for source in self._sources.values()), key=attrgetter("ask_s"))
        wanted = [_wanted(sequence) for sequence in sequences]
        times = [self._time_of(*each, slowest) for each in zip(sequences, wanted, strict=True)]
        limits = self._controller.limits(sequences, times, cost)
        if not any(limits):
            self._rest = LONGEST_REST  # as many sequences as these are, nothing pays
            return [NO_DRAFT] * len(sequences)
        trees = [NO_DRAFT] * len(sequences)
        for name, source in self._sources.items():
            places = [
                i
                for i, limit in enumerate(limits)
                if limit and not trees[i].tokens and (wanted[i] == AUTO or wanted[i] == name)
            ]
            if places:
                self._propose(source, sequences, limits, places, trees)
        return self._controller.choose(sequences, limits, trees, cost)

    def _time_of(self, sequence: DraftedSequence, wanted: str, slowest: DraftTime) -> DraftTime:
        """What asking about a sequence takes."""
        if wanted in self._sources:
            return self._sources[wanted].time
        return _NO_TIME if wanted and sequence.forced else slowest

    def _propose(
        self,
        source: _Source,
        sequences: Sequence[DraftedSequence],
        limits: Sequence[int],
        places: Sequence[int],
        trees: list[DraftTree],
    ) -> None:
        began_s = self._clock()
        proposed = source.drafter.propose([sequences[i] for i in places], [limits[i] for i in places])
        elapsed_s = self._clock() - began_s
        for i, tree in zip(places, proposed, strict=True):
            trees[i] = tree
        self._drafters_s += elapsed_s
        source.totals.elapsed_s += elapsed_s
        source.time.observe(len(places), sum(map(len, proposed)), elapsed_s)

    def verified(self, sequence: DraftedSequence, tree: DraftTree, nodes: Sequence[int]) -> None:
        """Take in which nodes of a draft the target said the same as, all of them taken on."""
        source = self._sources[tree.drafter]
        source.totals.drafted += len(tree)
        source.totals.accepted += len(nodes)
        source.totals.passes += 1
        source.drafter.accepted(sequence, tree, nodes)
        self._controller.observe(sequence, tree, nodes)
        self._rest = min(self._rest, self._controller.rest(sequence))

    def forget(self, sequence: DraftedSequence) -> None:
        """Note that a sequence has ended. Its output may serve others of its tenant from now on."""
        self._controller.forget(sequence)  # first, as it outlives drafters of which one fails
        for source in self._sources.values():
            source.drafter.forget(sequence)


_NO_TIME = DraftTime(0.0, 0.0)


def _wanted(sequence: DraftedSequence) -> str:
    params = sequence.speculation
    return "" if params is None else params.drafter
