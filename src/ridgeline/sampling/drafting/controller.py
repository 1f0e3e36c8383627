"""How much to draft, decided in each step from what was measured.

Of all trees that the drafters propose for a step, the nodes are taken in the order of the probability with
which they are accepted, for as long as tokens per second rise: with B sequences and their r best nodes the
step gives B + Σ p tokens and takes t(rows + r). For a batch that is all alike this is the size k that
maximises E(k) · t(B) / t(B (k+1)) (Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding", 2023); for any other, the sequences that gain most get most. A full batch leaves the rows no slack,
and drafts shrink and end by themselves. What t counts of a guess is its rows in the step as predicted,
corrected by what steps of so many rows have taken, and the measured time in which the host then takes it on,
and what such steps have still taken longer than predicted.

Asking has its price, too. What it and wrong guesses have cost about a sequence, less what right ones brought,
is its debt in tokens, and the greater it is, the more rarely the sequence is asked about.

What is not known to pay (asking a drafter that had nothing for long, verifying guesses that were wrong) is
still tried now and then, from an allowance: a share of the time of the steps, which bounds its cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from ridgeline.sampling.drafting.acceptance import MOST, Acceptance, kind_of, trials
from ridgeline.sampling.drafting.costs import Curve, Curves, StepCost, best_size
from ridgeline.sampling.drafting.drafter import DraftedSequence
from ridgeline.sampling.drafting.tree import NO_DRAFT, DraftTree

MOST_NODES = 16
"""Guesses for one sequence where its request does not say."""

_SAVED_STEPS = 32
"""So many steps' allowance is kept at most."""
_PROBE_NODES = 2
_GAIN_WEIGHT = 0.1
_LEAST_GAIN = 0.02
"""By so much more tokens per second guesses have to promise: no prediction is more exact than that."""
_HANDLING_WEIGHT, _MOST_HANDLING_WEIGHT = 0.05, 0.25
"""Of each guess of a step, and of all of them: by many the step's noise is divided."""
_MOST_WRONG = 0.3
"""What a step takes longer than predicted counts up to this share: beyond it others have disturbed it."""
_CREDIT = 2.0
"""Tokens: so much at most of what asking about a sequence brought beyond its cost excuses later failures."""
_PATIENCE = 0.1
"""Tokens that asking about a sequence may cost beyond what it brings; so many more double a rest."""
LONGEST_REST = 7
"""Of eight steps, one is asked in: text that begins to repeat itself is found that much later, and all other
text drafted for that much more cheaply."""
_MOST_DEBT = _PATIENCE * (LONGEST_REST.bit_length() + 1)
_START_WEIGHT = 0.1
_HANDLING_FADING = 0.999
"""In each step for which guesses were looked for: where they took too much, they are measured again."""


@dataclass(slots=True)
class DraftTime:
    """A drafter's measured seconds, decayed: for asking it about one sequence, and of that for each token."""

    ask_s: float = 1e-5
    token_s: float = 0.0

    def observe(self, asked: int, drafted: int, elapsed_s: float) -> None:
        """Take in one call that proposed `drafted` tokens for `asked` sequences."""
        if asked:
            self.ask_s += 0.1 * (elapsed_s / asked - self.ask_s)
        if drafted:
            self.token_s += 0.1 * (elapsed_s / drafted - self.token_s)


@dataclass(slots=True)
class _Record:
    """What is known of a sequence: its acceptance; the tokens that asking has cost beyond what it brought;
    and the decayed mean of tokens that it gave."""

    acceptance: Acceptance
    debt: float
    gain: float = 1.0

    def gained(self, tokens: int) -> None:
        self.gain += _GAIN_WEIGHT * (tokens - self.gain)

    def pay(self, cost: float) -> None:
        """Asking has cost so many tokens, less what it brought."""
        self.debt = min(max(self.debt + cost, -_CREDIT), _MOST_DEBT)


@dataclass(slots=True)
class _Choice:
    """How much of the trees a step takes: `rows` nodes in all, those of a value above `least`, and of those
    equal to it `equals`, in the order of the sequences."""

    rows: int = 0
    least: float = 2.0
    equals: int = 0

    def take(self, tree: DraftTree, values: list[float]) -> DraftTree:
        """The part that is taken of a tree whose nodes have these values."""
        if max(values) < self.least:
            return NO_DRAFT
        if min(values) > self.least:
            return tree
        kept = [node for node, value in enumerate(values) if self._takes(value)]
        return tree.subtree(kept) if kept else NO_DRAFT

    def _takes(self, value: float) -> bool:
        if value == self.least and self.equals:
            self.equals -= 1
            return True
        return value > self.least


@dataclass(slots=True)
class Controller:
    """Decides for each step and sequence. `allowance_share` of the time of steps may be spent on what is not
    known to pay. Sequences are known from the first step to `forget`."""

    allowance_share: float = 0.02
    most_nodes: int = MOST_NODES
    _own: DraftTime = field(default_factory=lambda: DraftTime(0.0))
    _common: Acceptance = field(default_factory=Acceptance)
    _records: dict[int, _Record] = field(default_factory=dict)
    _curves: Curves = field(default_factory=Curves)
    _allowance_s: float = 0.0
    _turn: int = 0
    _host_s: float = 0.0  # for a guess, when it is taken on
    _late_s: float = 0.0  # for a guess, that steps with guesses took longer than predicted
    _curve: Curve | None = None  # of the last step with guesses
    _expected_s: float = 0.0  # what that was to take
    _token_s: float = 0.0  # of the last step's, without guesses
    _ask: float = 0.0  # what asking about one of its sequences takes, in tokens
    _row: float = 0.0  # what verifying one of its guesses does
    _start: float = 0.0  # the decayed mean of debts with which sequences ended: new ones begin with it

    def handled(self, guesses: int, elapsed_s: float, step_s: float | None = None) -> None:
        """Take in what it took to follow the guesses of one step, beside the step itself, and what that took:
        guesses that are rare take longer than steps of so many rows do in a row, by which they are predicted.
        """
        weight = min(_HANDLING_WEIGHT * guesses, _MOST_HANDLING_WEIGHT)
        # More than a token is not counted: nothing pays then.
        self._host_s += weight * (min(elapsed_s / guesses, self._token_s) - self._host_s)
        if step_s is not None:
            if self._curve is not None:
                self._curve.took(guesses, step_s)
            most_s = _MOST_WRONG * self._expected_s
            late_s = min(max(step_s - self._expected_s, -most_s), most_s)
            self._late_s += weight * (min(late_s / guesses, self._token_s) - self._late_s)

    @property
    def _handling_s(self) -> float:
        """What a guess takes beside its row as it is predicted. Steps that are still over sooner than
        that are so without guesses, too: it makes none of them cheaper."""
        return self._host_s + max(self._late_s, 0.0)

    def rest(self, sequence: DraftedSequence) -> int:
        """Let the sequence alone in steps whose number has any of these bits: ever more rarely asked about is
        who costs more than it brings."""
        debt = self._record(sequence).debt
        return 0 if debt < _PATIENCE else min((1 << int(debt / _PATIENCE)) - 1, LONGEST_REST)

    def limits(
        self, sequences: Sequence[DraftedSequence], times: Sequence[DraftTime], cost: StepCost
    ) -> list[int]:
        """For each sequence, with the times of its drafter, how many nodes at most are to be proposed; 0: do
        not ask."""
        curve = self._curves.of(cost)
        self._token_s = curve.token_s
        self._host_s *= _HANDLING_FADING
        self._late_s *= _HANDLING_FADING
        saved = _SAVED_STEPS * self.allowance_share * curve.base_s
        self._allowance_s = min(self._allowance_s + self.allowance_share * curve.base_s, saved)
        limits = [0] * len(sequences)
        if cost.room < 1 or not sequences:
            return limits
        self._ask = sum(map(self._asking_s, times)) / len(times) / curve.token_s
        unsure = []
        for i, (sequence, time) in enumerate(zip(sequences, times, strict=True)):
            limit = self._limit(sequence, curve, cost, time)
            if limit > 0 and self._record(sequence).gain * curve.token_s < self._asking_s(time):
                unsure.append(i)
            limits[i] = limit
        self._spend_on_asking(unsure, limits, times)
        return limits

    def took(self, asked: int, elapsed_s: float) -> None:
        """Take in what a step's drafting for `asked` sequences took beside the drafters' own times."""
        self._own.observe(asked, 0, elapsed_s)

    def _asking_s(self, time: DraftTime) -> float:
        """What asking about a sequence takes."""
        return time.ask_s + self._own.ask_s

    def _limit(self, sequence: DraftedSequence, curve: Curve, cost: StepCost, time: DraftTime) -> int:
        params = sequence.speculation
        if params is None:
            return 0
        ceiling = self._ceiling(curve, cost.decodes, time, params.max_tokens or self.most_nodes)
        # The target gives one token more than it accepts.
        return min(ceiling, sequence.limit - len(sequence.token_ids) - 1, cost.room)

    def _ceiling(self, curve: Curve, batch: int, time: DraftTime, most: int) -> int:
        """The size, up to `most`, that would pay if everything were accepted."""
        size = curve.ceilings.get((id(time), most))
        if size is None:
            token_s = time.token_s + self._handling_s
            size = best_size(MOST, batch, lambda rows: curve.at(rows - batch), token_s * batch, most)
            if size == 0 and self._any_pays(curve, batch, token_s):
                size = 1
            curve.ceilings[id(time), most] = size
        return size

    def _any_pays(self, curve: Curve, batch: int, draft_s: float) -> bool:
        """Whether guesses for some of the sequences would, each of which takes so long beside the step."""
        worth_s = MOST * curve.token_s - draft_s
        return any(extra * worth_s > curve.at(extra) - curve.base_s for extra in range(1, batch))

    def _spend_on_asking(self, unsure: Sequence[int], limits: list[int], times: Sequence[DraftTime]) -> None:
        """Of sequences that asking does not pay for, leave those in whose turn it is and that the allowance
        is enough for."""
        if not unsure:
            return
        first, spent = self._turn % len(unsure), 0
        for i in (*unsure[first:], *unsure[:first]):
            if self._allowance_s >= self._asking_s(times[i]):
                self._allowance_s -= self._asking_s(times[i])
                spent += 1
            else:
                limits[i] = 0
        self._turn += spent

    def choose(
        self,
        sequences: Sequence[DraftedSequence],
        limits: Sequence[int],
        trees: Sequence[DraftTree],
        cost: StepCost,
    ) -> list[DraftTree]:
        """The parts of the proposed trees that the step is to verify."""
        chosen = [NO_DRAFT] * len(trees)
        if any(tree.tokens for tree in trees):
            chosen = self._worth_while(sequences, trees, cost)
        for sequence, limit, tree in zip(sequences, limits, chosen, strict=True):
            if limit and not len(tree):
                record = self._record(sequence)
                record.gained(0)
                record.pay(self._ask)
        return chosen

    def _worth_while(
        self, sequences: Sequence[DraftedSequence], trees: Sequence[DraftTree], cost: StepCost
    ) -> list[DraftTree]:
        """What is likely to raise tokens per second, and what is tried."""
        curve = self._curves.of(cost)
        values = [
            self._record(sequence).acceptance.values(tree) if len(tree) else []
            for sequence, tree in zip(sequences, trees, strict=True)
        ]
        best = max(max(each) for each in values if each)
        chosen = [NO_DRAFT] * len(trees)
        if best * curve.token_s > curve.row_s(self.most_nodes * cost.decodes) + self._handling_s:
            choice = self._choose(values, curve, cost)
            if choice.rows:
                chosen = [
                    choice.take(tree, value) if value else NO_DRAFT
                    for tree, value in zip(trees, values, strict=True)
                ]
        self._probe(trees, values, chosen, curve)
        rows = sum(map(len, chosen))
        if rows:
            self._curve, self._expected_s = curve, curve.at(rows)
            self._row = ((curve.at(rows) - curve.base_s) / rows + self._handling_s) / curve.token_s
        return chosen

    def _choose(self, values: Sequence[list[float]], curve: Curve, cost: StepCost) -> _Choice:
        best_values: list[float] = []
        for each in values:
            best_values += each
        best_values.sort(reverse=True)
        choice = _Choice()
        # Rows of prompts are worth what their part of the step takes.
        tokens = curve.base_s / curve.token_s
        best_rate = (1 + _LEAST_GAIN) * tokens / curve.base_s
        sums = list(accumulate(best_values))
        handling_s = self._handling_s
        for rows, seconds in curve.sizes(min(len(best_values), cost.room)):
            rate = (tokens + sums[rows - 1]) / (seconds + rows * handling_s)
            if rate > best_rate:
                best_rate, choice.rows = rate, rows
        if choice.rows:
            choice.least = best_values[choice.rows - 1]
            choice.equals = choice.rows - best_values.index(choice.least)
        return choice

    def _probe(
        self,
        trees: Sequence[DraftTree],
        values: Sequence[list[float]],
        chosen: list[DraftTree],
        curve: Curve,
    ) -> None:
        """Take the beginnings of some trees that do not seem to pay, while the allowance is enough, so that
        they can show that they do: by turns the one that seems the best, and the one whose turn it is."""
        left_out = [i for i, tree in enumerate(trees) if len(tree) and not len(chosen[i])]
        rows = sum(map(len, chosen))
        while left_out:
            self._turn += 1
            if self._turn % 2:
                i = max(left_out, key=lambda i: values[i][0])
            else:
                i = left_out[self._turn // 2 % len(left_out)]
            probe = trees[i].head(_PROBE_NODES)
            cost_s = curve.at(rows + len(probe)) - curve.at(rows) + len(probe) * self._handling_s
            if rows + len(probe) > curve.room or cost_s > self._allowance_s:
                self._turn -= 1  # as soon as there is enough
                return
            self._allowance_s -= cost_s
            left_out.remove(i)
            rows += len(probe)
            chosen[i] = probe

    def observe(self, sequence: DraftedSequence, tree: DraftTree, nodes: Sequence[int]) -> None:
        """Take in how far the target has followed a tree that was verified."""
        record = self._record(sequence)
        record.acceptance.add(kind_of(tree), *trials(tree, nodes))
        record.gained(len(nodes))
        record.pay(self._ask + self._row * len(tree) - len(nodes))

    def forget(self, sequence: DraftedSequence) -> None:
        """Drop what is known of a sequence."""
        record = self._records.pop(sequence.arrival, None)
        if record is not None:
            self._start += _START_WEIGHT * (record.debt - self._start)

    def _record(self, sequence: DraftedSequence) -> _Record:
        record = self._records.get(sequence.arrival)
        if record is None:
            record = self._records[sequence.arrival] = _Record(Acceptance(self._common), self._start)
        return record
