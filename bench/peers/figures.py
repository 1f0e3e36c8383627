"""What the rounds of a comparison say: medians, spreads, ratios, shares of the machine's ceilings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from statistics import median
from typing import Any

from bench.peers.cells import Cell
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.roofline import mbu
from ridgeline.types import Work

OURS = "ridgeline"


@dataclass
class Measured:
    """What one system gave in one cell: an answer for each round, or why there is none."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None

    def rates(self, cell: Cell) -> list[float]:
        """Tokens (or starts) per second of each round."""
        return [cell.counted_tokens / answer["seconds"] for answer in self.rounds]


@dataclass
class Result:
    """A measured cell. `probes`: the ceilings before the first round and after each, one more than rounds."""

    cell: Cell
    probes: list[Ceilings] = field(default_factory=list)
    systems: dict[str, Measured] = field(default_factory=dict)

    def ceilings(self) -> list[Ceilings]:
        """Of each round: the better of what was measured before and after it."""
        return [before.best_with(after) for before, after in zip(self.probes, self.probes[1:], strict=False)]

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured, and what follows from it."""
        ours = self.systems.get(OURS, Measured(failed="not measured"))
        shown = {}
        for name, measured in self.systems.items():
            if measured.failed is not None:
                shown[name] = {"failed": measured.failed}
                continue
            rates = measured.rates(self.cell)
            figures: dict[str, Any] = {
                "seconds": [answer["seconds"] for answer in measured.rounds],
                "rate": spread(rates),
                **shares(self.cell, measured.rounds, self.ceilings()),
            }
            if name != OURS and ours.failed is None:
                figures["ridgeline_over_it"] = ratio(ours.rates(self.cell), rates)
            shown[name] = figures
        return {
            "what": self.cell.describe(),
            "unit": self.cell.unit,
            "batch": self.cell.batch,
            "context_tokens": self.cell.context,
            "tokens": self.cell.tokens,
            "read_bytes_per_s": spread([probe.read_bytes_per_s for probe in self.probes]),
            "int8_ops_per_s": spread([probe.int8_ops_per_s for probe in self.probes]),
            "probes": [probe.to_json() for probe in self.probes],
            "systems": shown,
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95%, of the centre of the ratios' logarithms: those centres that Wilcoxon's signed-rank test does not
    reject (Hodges and Lehmann; Hollander and Wolfe, "Nonparametric Statistical Methods", 3.3). It is exact
    for noise as likely to make either side slower, whatever its tails: a round that other work disturbed
    counts as one, however long that took. No numbers for fewer than six rounds: none is that sure."""
    place = _rejected(len(ratios))
    if place < 1:
        return math.nan, math.nan
    logs = [math.log(each) for each in ratios]
    means = sorted((one + other) / 2 for one, other in combinations_with_replacement(logs, 2))
    return math.exp(means[place - 1]), math.exp(means[-place])


def _rejected(rounds: int) -> int:
    """The least sum of signed ranks that is not rejected at 5%, two-sided."""
    ways = [1]  # in which signs of the ranks so far come to each sum
    for rank in range(1, rounds + 1):
        ways = [a + b for a, b in zip([*ways, *[0] * rank], [*[0] * rank, *ways], strict=True)]
    rejected, below = 0, 0
    while (below := below + ways[rejected]) < 0.025 * 2**rounds:
        rejected += 1
    return rejected


def of_rounds(ratios: Sequence[float]) -> dict[str, float]:
    """What is told of the rounds' ratios: their median, the least and the most, and the interval."""
    low, high = interval(ratios)
    return {
        "ratio": median(ratios), "least": min(ratios), "most": max(ratios), "low_95": low, "high_95": high
    }  # fmt: skip


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How many times as fast we are: of the medians, of the rounds' pairs, of each side's best round.

    Pairs see the same drift of the machine; the best rounds are those that other work disturbed least.
    """
    return {
        "of_medians": median(ours) / median(theirs),
        "of_pairs": spread([a / b for a, b in zip(ours, theirs, strict=True)]),
        "of_best": max(ours) / max(theirs),
    }


def shares(
    cell: Cell, rounds: Sequence[dict[str, Any]], ceilings: Sequence[Ceilings]
) -> dict[str, dict[str, float]]:
    """Shares of the ceilings of the same round, for a system that counts its work: of the read bandwidth
    where it decodes (MBU), of the int8 peak where it reads a prompt."""
    if cell.kind == "cold" or not all("work" in answer for answer in rounds):
        return {}
    counted = [(Work(**answer["work"]), answer["seconds"]) for answer in rounds]
    pairs = list(zip(counted, ceilings, strict=True))
    if cell.kind == "decode":
        return {"mbu": spread([mbu(work, seconds, limit) for (work, seconds), limit in pairs])}
    if not all(limit.int8_ops_per_s for limit in ceilings):
        return {}
    return {
        "int8_share": spread(
            [work.int8_ops / seconds / limit.int8_ops_per_s for (work, seconds), limit in pairs]
        )
    }
