"""What the lower tiers of the KV cache hold and do, for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ridgeline.records import TiersRecord

_HELD = {"pages": "Pages that a lower tier holds.", "bytes": "Bytes of the pages that a lower tier holds."}
_FETCHED = {
    "fetched_pages": "Pages that came up, by the tier they came from.",
    "fetch_seconds": "Time in which they were read.",
}
_TOTALS = {
    "fetched_tokens": "Tokens that need not be computed, as their pages came up.",
    "misses": "Looks for the next pages of a prompt that found none below.",
    "declined": "Looks that found some which are computed sooner than read.",
    "spilled_pages": "Pages that went down.",
    "dropped_pages": "Pages that did not, as too many were on their way.",
    "damaged_pages": "Pages whose checksum was wrong.",
}


class TierMetrics(Collector):
    """Totals add up over the engine processes, what is held is the last one's. An engine without tiers shows
    none of it."""

    def __init__(self) -> None:
        self._now: TiersRecord | None = None
        self._before: Counter[tuple[str, str]] = Counter()  # of engine processes that are no more

    def take(self, record: TiersRecord | None) -> None:
        """How things stand in the engine."""
        self._now = record

    def end(self) -> None:
        """The engine process is no more."""
        self._before, self._now = self._counted(), None

    def collect(self) -> Iterator[Metric]:
        counted = self._counted()
        if not counted:
            return
        for name, text in _HELD.items():
            gauge = GaugeMetricFamily(f"ridgeline_kv_tier_{name}", text, labels=["tier"])
            for tier in self._now.tiers if self._now is not None else ():
                gauge.add_metric([tier.name], getattr(tier, name))
            yield gauge
        for name, text in _FETCHED.items():
            counter = CounterMetricFamily(f"ridgeline_kv_tier_{name}", text, labels=["tier"])
            for (total, tier_name), value in counted.items():
                if total == name:
                    counter.add_metric([tier_name], value)
            yield counter
        for name, text in _TOTALS.items():
            yield CounterMetricFamily(f"ridgeline_kv_tier_{name}", text, counted[name, ""])

    def _counted(self) -> Counter[tuple[str, str]]:
        """Totals by name and tier."""
        counted, now = Counter(self._before), self._now
        if now is not None:
            for name in _TOTALS:
                counted[name, ""] += getattr(now, name)
            for tier in now.tiers:
                for name in _FETCHED:
                    counted[name, tier.name] += getattr(tier, name)
        return counted
