"""What guessed tokens have brought, for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from ridgeline.records import DraftTotals

_TOTALS = {
    "drafted": ("num_draft_tokens", "Tokens that were guessed and verified."),
    "accepted": ("num_accepted_tokens", "Of those, the ones that were right."),
    "passes": ("num_drafts", "Guesses that were verified, each for one sequence."),
    "elapsed_s": ("draft_seconds", "Time that guessing took."),
}


class DraftMetrics(Collector):
    """By drafter; they add up over the engine processes. Tokens of a pass are accepted / passes + 1."""

    def __init__(self) -> None:
        self._now: Mapping[str, DraftTotals] = {}
        self._before: Counter[tuple[str, str]] = Counter()  # of engine processes that are no more

    def take(self, totals: Mapping[str, DraftTotals]) -> None:
        """How things stand in the engine."""
        self._now = totals

    def end(self) -> None:
        """The engine process is no more."""
        self._before, self._now = self._counted(), {}

    def collect(self) -> Iterator[Metric]:
        counted = self._counted()
        for field, (name, text) in _TOTALS.items():
            family = CounterMetricFamily(f"ridgeline_spec_decode_{name}", text, labels=["drafter"])
            for (of, drafter), value in counted.items():
                if of == field:
                    family.add_metric([drafter], value)
            yield family

    def _counted(self) -> Counter[tuple[str, str]]:
        """Totals by name and drafter."""
        counted = Counter(self._before)
        for drafter, totals in self._now.items():
            for field in _TOTALS:
                counted[field, drafter] += getattr(totals, field)
        return counted
