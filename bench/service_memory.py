"""How full the pages of a live server's KV cache are, and what is left when every request is gone."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import psutil
from live_load import Figure, Live, check, live
from server_cost import gauge
from service_classes import Result

from ridgeline.apps.load.client import Answer, ask
from ridgeline.apps.load.dataset import (
    SHAREGPT_PROMPT_TOKENS,
    SHAREGPT_TOTAL_TOKENS,
    WORDS,
    Lengths,
    Sample,
    random_samples,
)

MEAN_PROMPT, MEAN_OUTPUT = 161.31, 337.99
"""Tokens of ShareGPT's conversations (Kwon et al., "Efficient Memory Management for Large Language Model
Serving with PagedAttention", SOSP 2023, section 6.1)."""
SPREAD = 1.0
"""Of the logarithms of lengths: our assumption, as the paper shows the distributions in a picture only."""


@dataclass(frozen=True, slots=True)
class Mix:
    clients: int = 32
    settle_s: float = 20.0
    window_s: float = 30.0
    sample_s: float = 0.5


def sharegpt_like(seed: int) -> Iterator[Sample]:
    """Requests without end: lognormal lengths of ShareGPT's means, within the limits of vLLM's benchmark."""
    draw = random.Random(seed)

    def length(average: float) -> int:
        return math.ceil(draw.lognormvariate(math.log(average) - SPREAD**2 / 2, SPREAD))

    while True:
        prompt, output = length(MEAN_PROMPT), length(MEAN_OUTPUT)
        if prompt <= SHAREGPT_PROMPT_TOKENS and prompt + output <= SHAREGPT_TOTAL_TOKENS:
            yield Sample(" ".join(draw.choices(WORDS, k=prompt)), output_tokens=output)


async def filled_pages(url: str, sizes: Mix) -> Result:
    """The share of the slots of pages in use that hold tokens, at steady state."""
    async with live(url) as server:
        answers: list[Answer] = []
        server.begin(server.clients(sizes.clients, sharegpt_like(8), answers))
        await asyncio.sleep(sizes.settle_s)
        shares, used = [], []
        for _ in range(max(round(sizes.window_s / sizes.sample_s), 1)):
            server.check()
            await asyncio.sleep(sizes.sample_s)
            shares.append(await asyncio.to_thread(gauge, url, "kv_cache_filled_perc"))
            used.append(await asyncio.to_thread(gauge, url, "kv_cache_usage_perc"))
        whole = [each for each in answers if each.end_s]
        return Result(
            [
                Figure("share of the slots that hold tokens, mean", mean(shares), 0.95, least=True),
                Figure("the same, at its least", min(shares)),
            ],
            {
                "samples": len(shares),
                "pages_in_use": mean(used),
                "requests_ended": len(whole),
                "mean_prompt_tokens": mean(each.input_tokens or 0 for each in whole) if whole else None,
                "mean_output_tokens": mean(each.output_tokens for each in whole) if whole else None,
            },
        )


# -------------------------------------------------------------------------------- what is left at the end


@dataclass(frozen=True, slots=True)
class Ends:
    """`aborted` is the share of requests whose client leaves at a random moment. Memory counts from when a
    fifth of them are gone."""

    requests: int = 10_000
    clients: int = 16
    prompt_tokens: int = 60
    output_tokens: int = 6
    aborted: float = 0.5


async def ends_and_aborts(url: str, sizes: Ends, server_pid: int) -> Result:
    """Pages in use and resident memory, of both processes, after many requests have ended in all ways."""
    http = psutil.Process(server_pid)
    (engine,) = http.children()
    memory: list[tuple[int, int]] = []
    ended = {"whole": 0, "aborted": 0}
    draw = random.Random(9)
    numbers = itertools.count(1)
    samples = itertools.islice(
        random_samples(Lengths(sizes.prompt_tokens, sizes.output_tokens, 0.9), 10), sizes.requests
    )
    async with live(url) as server:

        async def client() -> None:
            for sample in samples:
                ended[await _ended(server, sample, draw, sizes.aborted)] += 1
                if next(numbers) % max(sizes.requests // 20, 1) == 0:
                    memory.append((http.memory_info().rss, engine.memory_info().rss))

        async with asyncio.TaskGroup() as group:
            for _ in range(sizes.clients):
                group.create_task(client())
        idle = await server.until(lambda: gauge(url, "num_requests_running") == 0, 30)
        await asyncio.sleep(1)
        used = gauge(url, "kv_cache_usage_perc")
    later = memory[len(memory) // 5 :]
    figures = [
        Figure("requests that ended", sum(ended.values())),
        Figure("share of pages in use afterwards", used if idle else 1.0, 0.0),
    ]
    for name, place in (("HTTP process", 0), ("engine", 1)):
        first, last = later[0][place] / 2**20, later[-1][place] / 2**20
        figures.append(Figure(f"growth of the {name}", last - first, 0.03 * first, "MiB"))
    details: dict[str, Any] = {**ended, "memory_bytes": memory}
    return Result(figures, details)


async def _ended(server: Live, sample: Sample, draw: random.Random, aborted: float) -> str:
    """Ask, and perhaps leave before the end."""
    asked = asyncio.create_task(ask(server.connections, server.asking, sample))
    if draw.random() < aborted:
        await asyncio.wait([asked], timeout=draw.expovariate(1 / 0.1))
        if not asked.done():
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            return "aborted"
    check([await asked])
    return "whole"
