"""A benchmark of a server: look at it, warm it up, run one load after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ridgeline.apps.load.client import Answer, Asking, chosen_model, served_models, settle
from ridgeline.apps.load.connections import Connections
from ridgeline.apps.load.dataset import Lengths, Sample, file_samples, random_samples
from ridgeline.apps.load.drive import Load, drive
from ridgeline.apps.load.report import figures, request_times_ms
from ridgeline.types import ConfigError

RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`loads` are run in turn, after `warmup` requests. `dataset` is "random" or a file. `asking.model` is
    empty for the first that the server names."""

    url: str
    asking: Asking
    loads: tuple[Load, ...]
    dataset: str = RANDOM
    lengths: Lengths = field(default_factory=Lengths)
    output_tokens: int | None = None  # overrides what a file says
    seed: int = 0
    warmup: int = 1
    targets_ms: dict[str, float] | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ConfigError(f"warmup is {self.warmup}; accepted: at least 0")
        if not self.loads:
            raise ConfigError("there is no load to run; accepted: at least one")

    def samples(self) -> Iterator[Sample]:
        """Requests without end, none twice before a file has run out. Raises ConfigError, OSError."""
        if self.dataset == RANDOM:
            return random_samples(self.lengths, self.seed)
        needed = 1 + self.warmup + sum(load.requests for load in self.loads)
        return file_samples(Path(self.dataset), needed, self.output_tokens, self.asking.endpoint)


@dataclass(frozen=True, slots=True)
class Listener:
    """Is told how a benchmark goes: notes, each answer, and each load's figures."""

    note: Callable[[str], None] = lambda text: None
    answer: Callable[[Answer], None] = lambda answer: None
    ran: Callable[[dict[str, Any]], None] = lambda figures: None


async def run_benchmark(
    benchmark: Benchmark, listener: Listener, keep: Callable[[list[dict[str, Any]]], None] | None = None
) -> dict[str, Any]:
    """The figures of each load, ready for JSON; `keep` gets every request of each.

    Raises ConfigError where the server cannot be reached or does not serve the model, RequestError where it
    refuses the first request.
    """
    samples = benchmark.samples()
    connections = Connections(benchmark.url, benchmark.api_key)
    try:
        names = await served_models(connections, min(20.0, benchmark.asking.timeout_s))
        asking = replace(benchmark.asking, model=chosen_model(names, benchmark.asking.model or None))
        asking, notes = await settle(connections, asking, next(samples))
        for text in notes:
            listener.note(text)
        if benchmark.warmup:
            clients = max(load.concurrency or 1 for load in benchmark.loads)
            await drive(connections, asking, samples, Load(benchmark.warmup, clients))
        runs = []
        for load in benchmark.loads:
            run = await drive(connections, asking, samples, load, listener.answer)
            runs.append(figures(run, benchmark.targets_ms))
            listener.ran(runs[-1])
            if keep is not None:
                keep([_request(answer) for answer in run.answers])
    finally:
        await connections.close()
    return {
        "url": benchmark.url,
        "model": asking.model,
        "endpoint": asking.endpoint,
        "dataset": benchmark.dataset,
        "temperature": asking.temperature,
        "ignore_eos": asking.ignore_eos,
        "notes": notes,
        "runs": runs,
    }


def _request(answer: Answer) -> dict[str, Any]:
    """One request for a file: counts, times in ms, and why it failed."""
    times = {f"{name}_ms": value for name, value in request_times_ms(answer).items()}
    return {
        "asked_tokens": answer.asked_tokens,
        "input_tokens": answer.input_tokens,
        "output_tokens": answer.output_tokens,
        **times,
        "cause": answer.cause,
    }
