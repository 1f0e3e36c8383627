"""What the engine's steps were, for Prometheus: times beside predictions, shares of the ceilings, energy."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ridgeline.records import RECENT_STEPS, Kind, StepRecord
from ridgeline.resources.step_time import Bound

WINDOW_S = 30.0
"""Gauges are of the steps of so long."""

_STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)
_ERROR = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class StepMetrics:
    """Counts steps. `source` says of what meter their energy is, once an engine is loaded."""

    def __init__(self, registry: CollectorRegistry, source: Callable[[], str]) -> None:
        self._registry = registry
        self._source = source
        self._recent: deque[StepRecord] = deque(maxlen=RECENT_STEPS)
        self._step_s = self._histogram("step_time_seconds", "Times of steps as measured.", _STEP_S, "kind")
        self._error = self._histogram(
            "step_prediction_error_ratio", "How far off predictions were: |measured / predicted - 1|.", _ERROR
        )
        self._rows = self._histogram("iteration_tokens", "Rows of a step.", _ROWS)
        self._predicted_s = self._counter("step_predicted_seconds", "Times of steps as predicted.", "kind")
        self._bound_s = self._counter("step_bound_seconds", "Times of steps, by what bounds them.", "bound")
        self._memory_s = self._counter(
            "step_memory_seconds", "Seconds that the bytes of steps take at the machine's bandwidth."
        )
        self._arithmetic_s = self._counter(
            "step_arithmetic_seconds", "Seconds that the arithmetic of steps takes at the machine's peaks."
        )
        self._flops = self._counter("step_flops", "Operations of steps, a multiply-add as two.")
        self._bytes = self._counter("step_bytes", "Bytes that steps moved, by what they are.", "what")
        self._joules = self._counter("energy_joules", "Energy of steps, by who counts it.", "source")
        for kind in get_args(Kind):
            self._step_s.labels(kind)
            self._predicted_s.labels(kind)
        for bound in get_args(Bound):
            self._bound_s.labels(bound)
        for what in ("weights", "KV cache", "activations"):
            self._bytes.labels(what)
        registry.register(_Shares(self._recent))

    def take(self, records: Iterable[StepRecord]) -> None:
        for record in records:
            self._recent.append(record)
            self._count(record)

    def _count(self, record: StepRecord) -> None:
        elapsed_s = record.elapsed_s
        self._step_s.labels(record.kind).observe(elapsed_s)
        self._rows.observe(record.rows)
        self._flops.inc(record.flops)
        self._bytes.labels("weights").inc(record.weight_bytes)
        self._bytes.labels("KV cache").inc(record.kv_bytes)
        self._bytes.labels("activations").inc(max(record.bytes - record.weight_bytes - record.kv_bytes, 0))
        if record.predicted_s and record.bound:
            self._predicted_s.labels(record.kind).inc(record.predicted_s)
            self._error.observe(abs(elapsed_s / record.predicted_s - 1))
            self._bound_s.labels(record.bound).inc(elapsed_s)
        if record.mbu is not None and record.mfu is not None:
            self._memory_s.inc(record.mbu * elapsed_s)
            self._arithmetic_s.inc(record.mfu * elapsed_s)
        if record.energy_j is not None:
            self._joules.labels(self._source()).inc(max(record.energy_j, 0.0))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ridgeline_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"ridgeline_{name}", text, labels, registry=self._registry, buckets=buckets)


class _Shares(Collector):
    """What the recent steps reached; nothing of what is not known."""

    def __init__(self, recent: deque[StepRecord]) -> None:
        self._recent = recent

    def collect(self) -> Iterator[Metric]:
        known = list(self._recent)
        last = [record for record in known if record.time_s > time.time() - WINDOW_S]
        for name, text in (
            ("mbu", "Share of the memory bandwidth that steps used, of the last 30 s."),
            ("mfu", "Share of the arithmetic peaks that steps used, of the last 30 s."),
        ):
            yield _gauge(name, text, [_weighted(name, last)] if _has(known, name) else [])
        joules = sum(record.energy_j or 0.0 for record in last)
        tokens = sum(record.decoded_tokens for record in last if record.energy_j is not None)
        text = "Generated tokens for each joule that steps took, of the last 30 s."
        counted = _has(known, "energy_j")
        yield _gauge("tokens_per_joule", text, [tokens / joules if joules > 0 else 0.0] if counted else [])


def _has(records: Sequence[StepRecord], name: str) -> bool:
    return any(getattr(record, name) is not None for record in records)


def _weighted(name: str, records: Sequence[StepRecord]) -> float:
    """The mean of a share over the time of steps."""
    pairs = [(getattr(record, name), record.elapsed_s) for record in records]
    elapsed_s = sum(elapsed_s for share, elapsed_s in pairs if share is not None)
    used_s = sum(share * elapsed_s for share, elapsed_s in pairs if share is not None)
    return used_s / elapsed_s if elapsed_s > 0 else 0.0


def _gauge(name: str, text: str, values: Sequence[float]) -> Metric:
    family = GaugeMetricFamily(f"ridgeline_{name}", text, labels=[])
    for value in values:
        family.add_metric([], value)
    return family
