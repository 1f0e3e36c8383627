"""Put a load on a server: clients in a closed loop, or arrivals that wait for nobody."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

from ridgeline.apps.load.arrivals import arrival_times
from ridgeline.apps.load.client import Answer, Asking, ask
from ridgeline.apps.load.connections import Connections
from ridgeline.apps.load.dataset import Sample
from ridgeline.types import ConfigError


@dataclass(frozen=True, slots=True)
class Load:
    """`requests` in all. With `concurrency` alone that many clients ask one after the other. With a rate they
    arrive at random times (`burstiness` as in `arrival_times`), all at once where it is infinite;
    `concurrency` is then the most that are open, and who waits for that has not been sent."""

    requests: int
    concurrency: int | None = None
    request_rate_per_s: float = math.inf
    burstiness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.requests <= 10_000_000:
            raise ConfigError(f"num_prompts is {self.requests}; accepted: 1 to 10000000")
        if self.concurrency is not None and not 0 < self.concurrency <= 65_536:
            raise ConfigError(f"concurrency is {self.concurrency}; accepted: 1 to 65536")
        arrival_times(1, self.request_rate_per_s, self.burstiness)


@dataclass(frozen=True, slots=True)
class Run:
    """The answers to a load, and what the load generator itself took. `late_s` is how much later than it was
    due a request was sent at worst."""

    load: Load
    answers: list[Answer]
    duration_s: float
    cpu_s: float
    late_s: float


async def drive(
    connections: Connections,
    asking: Asking,
    samples: Iterator[Sample],
    load: Load,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> Run:
    """Put the load on the server and wait for every answer. Failed requests are answers too."""
    chosen = list(itertools.islice(samples, load.requests))
    answers: list[Answer] = []

    async def one(sample: Sample) -> None:
        answer = await ask(connections, asking, sample)
        answers.append(answer)
        on_answer(answer)

    cpu_s, start_s = time.process_time(), time.perf_counter()
    if load.concurrency is not None and math.isinf(load.request_rate_per_s):
        late_s = 0.0
        await _closed(one, chosen, load.concurrency)
    else:
        late_s = await _open(one, chosen, load)
    return Run(load, answers, time.perf_counter() - start_s, time.process_time() - cpu_s, late_s)


_Ask = Callable[[Sample], Awaitable[None]]


async def _closed(one: _Ask, samples: list[Sample], clients: int) -> None:
    waiting = iter(samples)

    async def client() -> None:
        for sample in waiting:
            await one(sample)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(clients, len(samples))):
            group.create_task(client())


async def _open(one: _Ask, samples: list[Sample], load: Load) -> float:
    due = arrival_times(len(samples), load.request_rate_per_s, load.burstiness, load.seed)
    room = asyncio.Semaphore(load.concurrency) if load.concurrency is not None else None

    async def arrive(sample: Sample) -> None:
        async with AsyncExitStack() as stack:
            if room is not None:
                await stack.enter_async_context(room)
            await one(sample)

    late_s, start_s = 0.0, time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for sample, due_s in zip(samples, due, strict=True):
            wait_s = due_s - (time.perf_counter() - start_s)
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            late_s = max(late_s, time.perf_counter() - start_s - due_s)
            group.create_task(arrive(sample))
    return late_s
