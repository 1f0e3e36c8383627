"""What verifying drafts costs: the time of steps by their rows, and the sizes of drafts that pay."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

Seconds = Callable[[int], float]
"""The predicted time of a step by its rows, drafted ones included."""

_DENSE_ROWS = 32
_GROWTH = 1.125
_REFRESH_STEPS = 64
_MOST_CURVES = 128
_FEW_ROWS = 32
"""Steps of more rows have many turns of the kernels: one more or less of them hardly counts."""
_LEARNT = 0.1
_MOST_WRONG = math.log(1.3)
"""A step that was disturbed says no more than this, and no more than this is corrected."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """A step before drafts are added: its rows, those of them that give a sequence's next token, and for how
    many more rows there is room; and the time that it takes with any number of rows."""

    rows: int
    decodes: int
    room: int
    seconds: Seconds


def expected_tokens(acceptance: float, size: int) -> float:
    """Tokens of a pass that verifies a chain of `size` guesses: (1 − α^(k+1)) / (1 − α)."""
    if acceptance >= 1:
        return size + 1.0
    return float((1 - acceptance ** (size + 1)) / (1 - acceptance))


def best_size(acceptance: float, sequences: int, seconds: Seconds, draft_s: float, most: int) -> int:
    """How many tokens, up to `most`, to guess for each of a batch of sequences: the k that has the greatest
    E(k) · t(B) / (t(B (k+1)) + k · t_draft), the smaller of equals. `draft_s` is the drafter's time for one
    token of all sequences."""
    best, best_rate = 0, 1 / seconds(sequences)
    for size in range(1, most + 1):
        rate = expected_tokens(acceptance, size) / (seconds(sequences * (size + 1)) + size * draft_s)
        if rate > best_rate:
            best, best_rate = size, rate
    return best


class Curve:
    """The times of one step with more and more rows, asked for once: at each of the first `_DENSE_ROWS` more,
    then ever more rarely, up to `room`; straight lines between. `base_s` is the time with none, `token_s`
    what a token costs without drafts."""

    __slots__ = (
        "_corrections", "_cost", "_predicted_s", "_row_s", "age", "base_s", "ceilings", "extras", "room",
        "seconds", "token_s",
    )  # fmt: skip

    def __init__(self, cost: StepCost, corrections: dict[int, float] | None = None) -> None:
        self._cost = cost
        self._corrections = {} if corrections is None else corrections  # logarithms, by rows more
        self._row_s: float | None = None
        self.age = 0
        self.ceilings: dict[tuple[int, int], int] = {}  # the controller's, for as long as the curve serves
        self.room = cost.room
        self.extras = [0]
        self.base_s = cost.seconds(cost.rows)
        self._predicted_s = [self.base_s]
        self.seconds = [self.base_s]
        self.token_s = cost.seconds(cost.decodes) / max(cost.decodes, 1)

    def _reach(self, extra: int) -> None:
        while self.extras[-1] < extra:
            last = self.extras[-1]
            following = last + 1 if last < _DENSE_ROWS else int(last * _GROWTH)
            self.extras.append(following)
            predicted_s = self._cost.seconds(self._cost.rows + following)
            self._predicted_s.append(predicted_s)
            corrected_s = predicted_s * math.exp(self._corrections.get(following, 0.0))
            # A wider step is never the faster one, whatever a fitted model says.
            self.seconds.append(max(corrected_s, self.seconds[-1]))

    def at(self, extra: int) -> float:
        """Seconds of the step with so many rows more."""
        if extra < len(self.seconds) and extra <= _DENSE_ROWS:
            return self.seconds[extra]  # each of the first ones has a place of its own
        self._reach(extra)
        place = bisect_left(self.extras, extra)
        above, slower = self.extras[place], self.seconds[place]
        if above == extra:
            return slower
        below, faster = self.extras[place - 1], self.seconds[place - 1]
        return faster + (slower - faster) * (extra - below) / (above - below)

    def took(self, extra: int, step_s: float) -> None:
        """Take in what a step with so many rows more took: which kernels it takes, and how full these are, is
        not all in a model of steps of any size. Curves of the same kind of step that come later have it."""
        if self._cost.rows + extra > _FEW_ROWS or step_s <= 0:
            return
        self._reach(extra)
        wrong = min(max(math.log(step_s / self._predicted_s[extra]), -_MOST_WRONG), _MOST_WRONG)
        known = self._corrections.get(extra, 0.0)
        self._corrections[extra] = known + _LEARNT * (wrong - known)

    def row_s(self, most: int) -> float:
        """The least that a row more takes of the step's time, with any number of them up to `most`, which is
        the same for each call."""
        if self._row_s is None:
            self._row_s = min((seconds - self.base_s) / rows for rows, seconds in self.sizes(most))
        return self._row_s

    def sizes(self, most: int) -> list[tuple[int, float]]:
        """The numbers of rows more, up to `most`, that were asked for, and `most`; their times."""
        if most < 1:
            return []
        self._reach(most)
        end = bisect_left(self.extras, most)
        return [*zip(self.extras[1:end], self.seconds[1:end], strict=True), (most, self.at(most))]


class Curves:
    """Curves of recent steps, by rows and decodes: contexts grow slowly, so one serves for some steps."""

    def __init__(self) -> None:
        self._curves: dict[tuple[int, int], Curve] = {}
        self._corrections: dict[tuple[int, int], dict[int, float]] = {}

    def of(self, cost: StepCost) -> Curve:
        """The curve for a step."""
        key = cost.rows, cost.decodes
        curve = self._curves.get(key)
        if curve is None or curve.age >= _REFRESH_STEPS:
            if len(self._corrections) >= _MOST_CURVES:
                self._curves.clear()
                self._corrections.clear()
            curve = self._curves[key] = Curve(cost, self._corrections.setdefault(key, {}))
        curve.age += 1
        curve.room = cost.room
        return curve
