"""Guesses behind the decodes of a step: for whom, and what verifying them is predicted to cost.

Guesses come last, in the room that prompts have left, and their price is what the step takes longer with
them: beside the rows of a prompt, which have made it a matter of arithmetic, little of them pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager

from ridgeline.model.program import StepLoad
from ridgeline.records import DraftTotals
from ridgeline.sampling.drafting.controller import Controller
from ridgeline.sampling.drafting.costs import Seconds, StepCost
from ridgeline.sampling.drafting.speculator import Speculator
from ridgeline.sampling.drafting.tree import DraftTree
from ridgeline.scheduling.pace import Pace
from ridgeline.scheduling.plan import Chunk, Drafted
from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import SpeculationParams


class Drafting:
    """Owns the speculator of an engine, which `make` makes around a controller. `pace` predicts the steps,
    `default` is for requests that do not say whether and how tokens are to be guessed; None: not at all."""

    def __init__(
        self, make: Callable[[Controller], Speculator], pace: Pace, default: SpeculationParams | None
    ) -> None:
        self._make = make
        self._controller = Controller()
        self._speculator = make(self._controller)
        self._pace = pace
        self._default = default

    @property
    def totals(self) -> dict[str, DraftTotals]:
        """What each drafter has brought, by its name."""
        return self._speculator.totals

    def wanted(self, asked: SpeculationParams | bool | None) -> SpeculationParams | None:
        """How the tokens of a request are guessed that asks for this."""
        if isinstance(asked, SpeculationParams):
            return asked
        if asked is None:
            return self._default
        return SpeculationParams() if asked else None

    def rests(self, rows: int) -> bool:
        """Whether nobody is to be drafted for in a planned step of so many rows: no call of `draft`."""
        return self._speculator.rests(rows)

    def draft(self, decodes: Many[Sequence], chunks: Many[Chunk], room: int) -> list[DraftTree]:
        """Guesses for some of the decodes in a planned step, of `room` rows in all at most."""
        pace = self._pace
        contexts = [sequence.computed + 1 for sequence, _, outputs in chunks if outputs]
        seconds = seconds_by_rows(pace, contexts, lambda: pace.load_of_chunks(chunks))
        planned_rows = sum([count for _, count, _ in chunks])
        with self._whole():
            return self._speculator.draft(decodes, StepCost(planned_rows, len(contexts), room, seconds))

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What fails in the block, or is interrupted, may have left indices half changed."""
        try:
            yield
        except BaseException:
            self.restart()
            raise

    def restart(self) -> None:
        """Forget all texts, past outputs included; how often guesses are right is still known, and what they
        have brought."""
        totals = self._speculator.totals
        self._speculator = self._make(self._controller)
        self._speculator.count_on(totals)

    def verified(self, drafted: Drafted, nodes: Many[int]) -> None:
        """Take in which guesses were right."""
        self._speculator.verified(drafted.sequence, drafted.tree, nodes)

    def handled(self, guesses: int, elapsed_s: float, step_s: float) -> None:
        """Taking in what became of so many guesses of a step took so long, and the step itself."""
        self._controller.handled(guesses, elapsed_s, step_s)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        if sequence.speculation is not None:
            with self._whole():
                self._speculator.forget(sequence)


def seconds_by_rows(
    pace: Pace, contexts: Many[int], planned: Callable[[], StepLoad] | None = None
) -> Seconds:
    """Predicts a step by its rows: the load that is `planned`, and more rows for guesses behind its decodes,
    whose own rows see so many slots each. Without a plan they are all of it."""
    loads: list[StepLoad] = []  # of the plan, and of its decodes: few steps ask for them

    def seconds(rows: int) -> float:
        nonlocal planned
        if not loads:
            alone = pace.load_of_decodes(contexts)
            loads.extend((alone if planned is None else planned(), alone))
            planned = None  # curves keep this function longer than the plan's sequences live
        whole, alone = loads
        if rows < whole.rows:
            return pace.seconds(pace.load_of_decodes(contexts[:rows]))
        return pace.seconds(whole + _guesses(alone, rows - whole.rows))

    return seconds


def _guesses(decodes: StepLoad, count: int) -> StepLoad:
    """The load of so many guesses, each of which sees what a decode does in the mean."""
    pairs = tuple(count * seen // decodes.rows for seen in decodes.pairs)
    return StepLoad(count, count, pairs, (count,) * len(pairs), 0)
