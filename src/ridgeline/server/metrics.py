"""What the server counts, for Prometheus.

`Metrics` hears what is said to and by the engine, and of every HTTP answer; what has a value at any moment is
read when somebody asks. Labels have few values, whatever clients send.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

import psutil  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ridgeline.server.draft_metrics import DraftMetrics
from ridgeline.server.engine_client import EngineClient, State
from ridgeline.server.messages import (
    Abort,
    Add,
    Begun,
    Cause,
    Command,
    Embed,
    Embedded,
    Event,
    Failed,
    Piece,
    Pieces,
    Pulse,
    Refused,
    Search,
    Steps,
)
from ridgeline.server.step_metrics import StepMetrics
from ridgeline.server.tier_metrics import TierMetrics

_TTFT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60)
_ITL_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2)
_WHOLE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

ENDS_WELL = ("stop", "length", "embedded")
ENDS_BADLY = ("aborted", "engine_stopped", "error", "expired", "refused")
_REFUSED: dict[Cause, str] = {
    "invalid": "refused",
    "expired": "expired",
    "capacity": "error",
    "fault": "error",
}


@dataclass(slots=True)
class _Life:
    """A request from its arrival to its end."""

    arrived_s: float
    prompt_tokens: int
    streamed: bool
    generated_tokens: int = 0
    reason: str = ""
    last_s: dict[int, float] = field(default_factory=dict)  # when each choice gained its last token


class Metrics:
    """Everything that is told of one server. Belongs to one event loop; requests are known by the engine's
    numbers for them."""

    def __init__(self, client: EngineClient, model: str, version: str) -> None:
        self.registry = CollectorRegistry()
        self._client = client
        self._lives: dict[int, _Life] = {}
        self._steps = 0  # of this engine process, as it last said
        self._define_requests()
        self._define_http()
        self._step_metrics = StepMetrics(self.registry, self._energy_source)
        self._tier_metrics, self._draft_metrics = TierMetrics(), DraftMetrics()
        self.registry.register(self._tier_metrics)
        self.registry.register(self._draft_metrics)
        ProcessCollector(registry=self.registry)
        self.registry.register(_State(client, model, version))

    def _define_requests(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that were begun.")
        self._queried_tokens = self._counter("prefix_cache_queries", "Prompt tokens that were looked for.")
        self._cached_tokens = self._counter("prefix_cache_hits", "Prompt tokens that were found.")
        self._generated_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self._engine_steps = self._counter("engine_steps", "Steps of the engine.")
        self._succeeded = self._counter("request_success", "Requests that ended well.", "finished_reason")
        self._failed = self._counter("request_failure", "Requests that did not end well.", "reason")
        for reason in ENDS_WELL:
            self._succeeded.labels(reason)
        for reason in ENDS_BADLY:
            self._failed.labels(reason)
        self._ttft_s = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token of a streamed request.", _TTFT_S
        )
        self._itl_s = self._histogram(
            "inter_token_latency_seconds", "Between tokens of a choice of a streamed request.", _ITL_S
        )
        self._e2e_s = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end of a request that ended well.", _WHOLE_S
        )
        self._queue_s = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step with the request.", _TTFT_S
        )
        self._per_prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens of requests that ended well.", _TOKENS
        )
        self._per_answer = self._histogram(
            "request_generation_tokens", "Generated tokens of requests that ended well.", _TOKENS
        )

    def _define_http(self) -> None:
        self._answers = self._counter("http_requests", "Answers, by endpoint and status.", "path", "status")
        self._answer_s = self._histogram(
            "http_request_duration_seconds", "From a request's headers to its answer's end.", _WHOLE_S, "path"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ridgeline_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"ridgeline_{name}", text, labels, registry=self.registry, buckets=buckets)

    def _energy_source(self) -> str:
        card = self._client.card
        return "none" if card is None else card.energy_source

    # ------------------------------------------------------------------------------------------- http

    def answered(self, route: str, status: int, seconds: float) -> None:
        """An answer has ended. `route` is an endpoint's path as it is described; status 0: there was none."""
        self._answers.labels(route, str(status or "none")).inc()
        self._answer_s.labels(route).observe(seconds)

    # --------------------------------------------------------------------------------------- requests

    def hear(self, message: Event | Command) -> None:
        """Something was said to the engine, or by it."""
        if isinstance(message, Pieces):
            self._take(message)
        elif isinstance(message, Add | Embed | Search):
            streamed = isinstance(message, Add) and message.stream
            self._lives[message.id] = _Life(message.arrived_s, len(message.tokens), streamed)
        elif isinstance(message, Begun):
            self._begin(message)
        elif isinstance(message, Pulse):
            self._engine_steps.inc(max(0, message.steps - self._steps))
            self._steps = message.steps
            self._tier_metrics.take(message.tiers)
            self._draft_metrics.take(message.drafters)
        elif isinstance(message, Steps):
            self._step_metrics.take(message.records)
        elif isinstance(message, Embedded):
            if (life := self._lives.pop(message.id, None)) is not None:
                self._count_prompt(life, message.cached_tokens)
                self._end_well(life, "embedded", time.monotonic())
        elif isinstance(message, Refused):
            self._end_badly(message.id, _REFUSED[message.cause])
        elif isinstance(message, Abort):
            self._end_badly(message.id, "aborted")
        elif isinstance(message, Failed):
            self._steps = 0
            self._tier_metrics.end()
            self._draft_metrics.end()
            for number in list(self._lives):
                self._end_badly(number, "engine_stopped")

    def _begin(self, begun: Begun) -> None:
        for number in begun.ids:
            if (life := self._lives.get(number)) is not None:
                self._queue_s.observe(max(0.0, begun.at_s - life.arrived_s))

    def _take(self, step: Pieces) -> None:
        now_s, tokens = time.monotonic(), 0
        for piece in step.pieces:
            if (life := self._lives.get(piece.id)) is not None:
                tokens += len(piece.tokens)
                self._grow(life, piece, now_s)
        self._generated_tokens.inc(tokens)
        for number in step.ended:
            if (life := self._lives.get(number)) is None:
                continue
            if life.reason in ("error", "abort"):
                self._end_badly(number, "aborted" if life.reason == "abort" else "error")
            else:
                del self._lives[number]
                self._end_well(life, life.reason, now_s)

    def _grow(self, life: _Life, piece: Piece, now_s: float) -> None:
        if piece.finish_reason is not None and life.reason != "error":
            life.reason = piece.finish_reason
        self._cached_tokens.inc(piece.cached_tokens)
        if not life.last_s:
            self._count_prompt(life)
            if life.streamed and piece.tokens:
                self._ttft_s.observe(now_s - life.arrived_s)
        elif life.streamed and piece.tokens and piece.choice in life.last_s:
            self._itl_s.observe(now_s - life.last_s[piece.choice])
        life.generated_tokens += len(piece.tokens)
        life.last_s[piece.choice] = now_s

    def _count_prompt(self, life: _Life, cached_tokens: int = 0) -> None:
        self._prompt_tokens.inc(life.prompt_tokens)
        self._cached_tokens.inc(cached_tokens)
        card = self._client.card
        if card is not None and card.prefix_caching:
            self._queried_tokens.inc(life.prompt_tokens)

    def _end_well(self, life: _Life, reason: str, now_s: float) -> None:
        self._succeeded.labels(reason).inc()
        self._e2e_s.observe(now_s - life.arrived_s)
        self._per_prompt.observe(life.prompt_tokens)
        if reason != "embedded":
            self._per_answer.observe(life.generated_tokens)

    def _end_badly(self, number: int, reason: str) -> None:
        if self._lives.pop(number, None) is not None:
            self._failed.labels(reason).inc()


class _State(Collector):
    """What is so now: read from the engine's client, its last pulse and its process."""

    def __init__(self, client: EngineClient, model: str, version: str) -> None:
        self._client = client
        self._model = model
        self._version = version
        self._process: psutil.Process | None = None
        self._cpu_s = 0.0  # of this engine process
        self._earlier_cpu_s = 0.0  # of those before it

    def collect(self) -> Iterator[Metric]:
        yield from self._load()
        yield from self._life()
        yield from self._process_of_engine()

    def _load(self) -> Iterator[Metric]:
        pulse = self._client.pulse
        running, waiting, kv_used = (pulse.running, pulse.waiting, pulse.kv_used) if pulse else (0, 0, 0.0)
        kv_filled = pulse.kv_filled if pulse else 1.0
        yield _gauge("num_requests_running", "Sequences that run.", running)
        yield _gauge("num_requests_waiting", "Sequences that wait for a seat.", waiting)
        yield _gauge("kv_cache_usage_perc", "Share of the KV cache's pages that is in use, 0 to 1.", kv_used)
        text = "Share of those pages' slots that hold tokens, 0 to 1."
        yield _gauge("kv_cache_filled_perc", text, kv_filled)

    def _life(self) -> Iterator[Metric]:
        client = self._client
        state = GaugeMetricFamily("ridgeline_engine_state", "1 for the engine's state.", labels=["state"])
        for name in get_args(State):
            state.add_metric([name], float(client.state == name))
        yield state
        yield _gauge("engine_up", "Whether requests are served.", float(client.state == "ready"))
        yield _count("engine_restarts", "Times that the engine was started again.", client.restarts)
        device = client.card.device if client.card is not None else ""
        labels = {"version": self._version, "model": self._model, "device": device}
        yield InfoMetricFamily("ridgeline_build", "What runs.", labels)

    def _process_of_engine(self) -> Iterator[Metric]:
        memory_bytes = self._look()
        text = "Memory of the engine process that is resident."
        yield _gauge("engine_resident_memory_bytes", text, memory_bytes)
        text = "CPU time of the engine process and of those before it."
        yield _count("engine_cpu_seconds", text, self._earlier_cpu_s + self._cpu_s)

    def _look(self) -> int:
        """Bytes of the engine process, 0 while there is none; its CPU time is noted."""
        pid = self._client.pid
        if self._process is not None and self._process.pid != pid:
            self._process = None
            self._earlier_cpu_s, self._cpu_s = self._earlier_cpu_s + self._cpu_s, 0.0
        if pid is None:
            return 0
        try:
            self._process = self._process or psutil.Process(pid)
            with self._process.oneshot():
                times, memory = self._process.cpu_times(), self._process.memory_info()
        except psutil.Error:  # it has just died
            return 0
        self._cpu_s = max(self._cpu_s, times.user + times.system)
        return int(memory.rss)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"ridgeline_{name}", text, value)


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"ridgeline_{name}", text, value)
