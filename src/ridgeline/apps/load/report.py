"""The figures of a run.

All are of the requests that were answered whole, and times are the client's, from the moment a request was
sent (a new connection's handshake is in it; kept connections are used again):

- TTFT, time to first token: to the arrival of the first chunk that carries text.
- ITL, inter-token latency: each gap between two chunks that carry text, of all requests together. A chunk
  that holds several tokens is one chunk, as in vLLM's `bench serve`: this is what a reader sees.
- TPOT, time per output token: of each request, (E2E - TTFT) / (output tokens - 1). This one is divided.
- E2E: to the last event of the stream.

Tokens are what the server's usage says; where it says nothing, chunks that carry text. Percentiles are
interpolated linearly. Goodput counts the requests that met every target; a request's ITL is for this the
99th percentile of its own gaps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ridgeline.apps.load.client import Answer
from ridgeline.apps.load.drive import Run
from ridgeline.types import ConfigError

TARGETS = ("ttft", "itl", "tpot", "e2e")
PERCENTILES = (50, 90, 99)


def figures(run: Run, targets_ms: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What is told of a run, ready for JSON; figures that nothing was measured for are None."""
    whole = [answer for answer in run.answers if answer.cause is None]
    failed = [answer for answer in run.answers if answer.cause is not None]
    input_tokens = sum(answer.input_tokens or 0 for answer in whole)
    output_tokens = sum(answer.output_tokens for answer in whole)
    times = [request_times_ms(answer) for answer in whole]
    return {
        **_load(run),
        "requests": len(run.answers),
        "ok": len(whole),
        "failed": dict(Counter(answer.cause for answer in failed)),
        "examples": {answer.cause: answer.detail for answer in reversed(failed)},
        "short_answers": sum(answer.output_tokens < answer.asked_tokens for answer in whole),
        "duration_s": run.duration_s,
        "requests_per_s": len(whole) / run.duration_s,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "input_tokens_per_s": input_tokens / run.duration_s,
        "output_tokens_per_s": output_tokens / run.duration_s,
        "tokens_counted_by": _counted_by(whole),
        "ttft_ms": spread(each["ttft"] for each in times),
        "itl_ms": spread(gap for answer in whole for gap in gaps_ms(answer)),
        "tpot_ms": spread(each["tpot"] for each in times),
        "e2e_ms": spread(each["e2e"] for each in times),
        "goodput": goodput(times, run.duration_s, targets_ms) if targets_ms else None,
        "client": _client(run),
    }


def _load(run: Run) -> dict[str, Any]:
    rate = run.load.request_rate_per_s
    return {
        "concurrency": run.load.concurrency,
        "request_rate_per_s": None if math.isinf(rate) else rate,
        "burstiness": run.load.burstiness,
        "seed": run.load.seed,
    }


class Timed(Protocol):
    """What a request's times are made of, in seconds: when it was sent, when each piece of its answer came,
    and when it ended."""

    @property
    def start_s(self) -> float: ...

    @property
    def text_s(self) -> Sequence[float]: ...

    @property
    def end_s(self) -> float: ...

    @property
    def output_tokens(self) -> int: ...


def gaps_ms(answer: Timed) -> list[float]:
    """The gaps between chunks that carry text."""
    return [float(gap) for gap in np.diff(answer.text_s) * 1e3]


def request_times_ms(answer: Timed) -> dict[str, float | None]:
    """TTFT, ITL, TPOT and E2E of one request, None where it had too few tokens for it."""
    e2e_ms = (answer.end_s - answer.start_s) * 1e3
    ttft_ms = (answer.text_s[0] - answer.start_s) * 1e3 if answer.text_s else None
    gaps = gaps_ms(answer)
    rest = answer.output_tokens - 1
    return {
        "ttft": ttft_ms,
        "itl": float(np.percentile(gaps, 99)) if gaps else None,
        "tpot": (e2e_ms - ttft_ms) / rest if ttft_ms is not None and rest > 0 else None,
        "e2e": e2e_ms,
    }


def spread(
    values: Iterable[float | None], percentiles: tuple[int, ...] = PERCENTILES
) -> dict[str, float] | None:
    """Mean, percentiles and maximum of the values that there are, None where there are none."""
    kept = [value for value in values if value is not None]
    if not kept:
        return None
    found = np.percentile(kept, percentiles)
    named = {f"p{number}": float(value) for number, value in zip(percentiles, found, strict=True)}
    return {"mean": float(np.mean(kept)), **named, "max": max(kept)}


def _counted_by(answers: Sequence[Answer]) -> str | None:
    ways = {"usage" if answer.counted else "chunks" for answer in answers}
    return ways.pop() if len(ways) == 1 else ("mixed" if ways else None)


def goodput(
    times: Sequence[Mapping[str, float | None]], duration_s: float, targets_ms: Mapping[str, float]
) -> dict[str, Any]:
    """A request that had no second token has no gaps, and these meet any target; one without text has not
    met a target for its first token."""
    good = 0
    for each in times:
        measured = {name: each[name] for name in targets_ms}
        without_text = "ttft" in measured and measured["ttft"] is None
        late = any(value is not None and value > targets_ms[name] for name, value in measured.items())
        good += not (late or without_text)
    return {"targets_ms": dict(targets_ms), "ok": good, "requests_per_s": good / duration_s}


def _client(run: Run) -> dict[str, Any]:
    chunks = sum(answer.chunks for answer in run.answers)
    return {
        "cpu_s": run.cpu_s,
        "cpu_us_per_chunk": run.cpu_s / chunks * 1e6 if chunks else None,
        "chunks": chunks,
        "late_ms": run.late_s * 1e3,
    }


def targets_of(text: str) -> dict[str, float]:
    """Targets in ms out of "ttft=500,itl=50". Raises ConfigError."""
    targets = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            targets[name] = float(value)
        except ValueError:
            targets[name] = math.nan
        if name not in TARGETS or not (targets[name] > 0 and math.isfinite(targets[name])):
            raise ConfigError(
                f"goodput is {text!r}; accepted: milliseconds of {', '.join(TARGETS)}, as ttft=500,itl=50"
            )
    return targets
