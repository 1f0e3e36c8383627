"""The figures of a replay.

Times are from when the trace says that a request comes, as a client that is next to the engine would see
them: what HTTP, templates and tokenizers take is not in them. TTFT is the time to the first token, ITL each
gap between two tokens, of all requests together, E2E the time to the last token. Percentiles are interpolated
linearly. Goodput counts requests that met both targets of their class; a request's ITL is for this the 99th
percentile of its own gaps. Cached tokens are those of prompts that were found in the prefix cache.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ridgeline.apps.load.report import gaps_ms, goodput, request_times_ms, spread
from ridgeline.apps.simulate.replay import Replay, Served
from ridgeline.config import ClassTarget
from ridgeline.types import SERVICE_CLASSES

PERCENTILES = (50, 95, 99)


def figures(replay: Replay) -> dict[str, Any]:
    """What is told of a replay, ready for JSON; figures that there was nothing for are None."""
    simulation, duration_s = replay.simulation, replay.duration_s
    done = [each for each in replay.served if each.refused is None]
    refused = Counter(each.refused for each in replay.served if each.refused is not None)
    return {
        "duration_s": duration_s,
        **_requests(done, duration_s),
        "refused": refused.total(),
        "refusal": min(refused) if refused else None,
        "preemptions": simulation.scheduler.preemptions,
        "classes": {
            name: _of_class([each for each in done if each.request.service_class == name], target, duration_s)
            for name, target in zip(SERVICE_CLASSES, simulation.config.targets, strict=True)
            if any(each.request.service_class == name for each in replay.served)
        },
        "usage": simulation.executor.usage.figures(duration_s, simulation.host.rates),
    }


def _requests(done: Sequence[Served], duration_s: float) -> dict[str, Any]:
    prompts = sum(each.request.prompt_tokens for each in done)
    outputs = sum(each.output_tokens for each in done)
    cached = sum(each.cached_tokens for each in done)
    return {
        "requests": len(done),
        "prompt_tokens": prompts,
        "output_tokens": outputs,
        "cached_tokens": cached,
        "cache_hit_rate": cached / prompts if prompts else None,
        "output_tokens_per_s": outputs / duration_s if duration_s else None,
    }


def _of_class(done: Sequence[Served], target: ClassTarget, duration_s: float) -> dict[str, Any]:
    times = [request_times_ms(each) for each in done]
    targets_ms = {"ttft": target.first_token_s * 1e3, "itl": target.inter_token_s * 1e3}
    gaps = itertools.chain.from_iterable(map(gaps_ms, done))
    return {
        **_requests(done, duration_s),
        "preempted": sum(each.preemptions > 0 for each in done),
        "ttft_ms": spread((each["ttft"] for each in times), PERCENTILES),
        "itl_ms": spread(gaps, PERCENTILES),
        "e2e_ms": spread((each["e2e"] for each in times), PERCENTILES),
        "goodput": goodput(times, duration_s, targets_ms) if duration_s else None,
    }
