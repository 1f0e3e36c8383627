"""How a server shares the machine: streams beside long prompts, a keystroke beside a batch, two API keys."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from live_load import (
    Figure,
    Live,
    describe,
    gaps_s,
    live,
    steps_between,
    tokens_between,
    ttft_s,
)

from ridgeline.apps.load.client import Answer
from ridgeline.apps.load.dataset import WORDS, Lengths, Sample, random_samples
from ridgeline.config import PAGE_TOKENS
from ridgeline.records import StepRecord

TOLD_S = 0.5
"""Steps are told of within this time."""


@dataclass(frozen=True, slots=True)
class Result:
    figures: list[Figure]
    details: dict[str, Any]


async def exact(server: Live, tokens: int, count: int, seed: int) -> list[Sample]:
    """Random prompts of that many tokens: a word is one, and what a vocabulary adds is asked for."""
    draw = random.Random(seed)
    words = [draw.choices(WORDS, k=tokens) for _ in range(count)]
    tried = await server.ask(Sample(" ".join(words[0][:8]), output_tokens=1))
    extra = (tried.input_tokens or 8) - 8
    return [Sample(" ".join(each[: tokens - extra])) for each in words]


# -------------------------------------------------------------------------- streams beside long prompts


@dataclass(frozen=True, slots=True)
class Beside:
    """`streams` clients go on asking their own prompts again, which are cached but for the last token, for
    `stream_output` tokens each: so their steps are as long at the end as at the beginning.

    The prompts come in `rounds`. Their clients leave when `window_s` has passed and come back in the next
    round, when what was read of a prompt is in the prefix cache: a machine whose speed changes by the minute
    is compared with itself a moment before."""

    streams: int = 16
    stream_prompt: int = 257
    stream_output: int = 64
    prompts: int = 4
    prompt_tokens: int = 6000
    prompt_output: int = 8
    rounds: int = 6
    before_s: float = 2.0
    window_s: float = 4.0


async def streams_beside_prompts(url: str, sizes: Beside) -> Result:
    """The streams' time between tokens while long prompts of class `batch` come, by their median before."""
    async with live(url, follow=True) as server:
        tokens = sizes.stream_prompt // PAGE_TOKENS * PAGE_TOKENS + 1
        own = await exact(server, tokens, sizes.streams, seed=1)
        long = [
            replace(each, output_tokens=sizes.prompt_output)
            for each in await exact(server, sizes.prompt_tokens, sizes.prompts, seed=2)
        ]
        answers: list[list[Answer]] = [[] for _ in own]
        for number, (sample, into) in enumerate(zip(own, answers, strict=True)):
            first = 1 + (number + 1) * sizes.stream_output // sizes.streams  # they end at different times
            server.begin(server.clients(1, _again(sample, first, sizes.stream_output), into))
        await server.until(lambda: all(len(each) > 1 for each in answers))
        times = []
        while long and len(times) < sizes.rounds:
            begin_s = time.perf_counter()
            await asyncio.sleep(sizes.before_s)
            came_s = time.perf_counter()
            long = await _come(server, long, sizes.window_s)
            times.append((begin_s, came_s, time.perf_counter()))
        await asyncio.sleep(TOLD_S)
        return _slowed(list(itertools.chain(*answers)), times, server.steps, sizes.prompts - len(long))


async def _come(server: Live, prompts: list[Sample], window_s: float) -> list[Sample]:
    """Ask for all at once, for so long at most; which of them have not been answered by then."""
    asked = [server.begin(server.ask(each, "batch")) for each in prompts]
    await server.until(lambda: all(task.done() for task in asked), window_s)
    left = [each for each, task in zip(prompts, asked, strict=True) if not task.done()]
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    return left


def _slowed(
    answers: list[Answer], times: list[tuple[float, float, float]], steps: list[StepRecord], read: int
) -> Result:
    """Gaps of each round by the median of its time before the prompts came."""
    before, during, medians_s = [], [], []
    steps_before, steps_during = [], []
    for begin_s, came_s, end_s in times:
        usual = gaps_s(answers, begin_s, came_s)
        medians_s.append(median(usual))
        before += [gap / medians_s[-1] for gap in usual]
        during += [gap / medians_s[-1] for gap in gaps_s(answers, came_s, end_s)]
        steps_before += steps_between(steps, begin_s, came_s)
        steps_during += steps_between(steps, came_s, end_s)
    return Result(
        [
            Figure("median between tokens before the prompts", 1e3 * median(medians_s), unit="ms"),
            Figure("p99 before, by the median", float(np.percentile(before, 99))),
            Figure("p50 while prompts are read, by the median before", median(during)),
            Figure("p99 while prompts are read, by the median before", float(np.percentile(during, 99)), 1.6),
        ],
        {
            "rounds": len(times),
            "seconds": sum(end_s - came_s for _, came_s, end_s in times),
            "prompts_answered": read,
            "prompt_tokens_run": sum(step.prompt_tokens for step in steps_during),
            "medians_ms": [1e3 * each for each in medians_s],
            "by_median_before": [float(q) for q in np.percentile(during, (1, 10, 50, 90, 99, 99.9, 100))],
            "steps_before": describe(steps_before),
            "steps": describe(steps_during),
        },
    )


def _again(sample: Sample, first: int, rest: int) -> Iterator[Sample]:
    yield replace(sample, output_tokens=first)
    while True:
        yield replace(sample, output_tokens=rest)


# ------------------------------------------------------------------------------ a keystroke and a batch


@dataclass(frozen=True, slots=True)
class Keystrokes:
    """`load` requests of class batch are under way all the time. `batch_output` None: for longer than it
    takes, so that all decode; else new ones come as others end."""

    keystrokes: int = 12
    prompt_tokens: int = 200
    output_tokens: int = 8
    load: int = 64
    batch_prompt: int = 130
    batch_output: int = 3000
    settle_s: float = 2.0
    pause_s: float = 1.2
    look_back_s: float = 1.0


async def keystroke_beside_batch(url: str, sizes: Keystrokes) -> Result:
    """The time to a keystroke's first token, by that on an idle server and the steps before it came."""
    draw = random.Random(3)
    async with live(url, follow=True) as server:
        typed = [
            replace(each, output_tokens=sizes.output_tokens)
            for each in await exact(server, sizes.prompt_tokens, 2 * sizes.keystrokes, seed=4)
        ]
        alone = [await server.ask(each, "keystroke") for each in typed[: sizes.keystrokes]]
        solo_s = median(ttft_s(each) for each in alone)
        others: list[Answer] = []
        samples = random_samples(Lengths(sizes.batch_prompt, sizes.batch_output), seed=5)
        server.begin(server.clients(sizes.load, samples, others, "batch"))
        await server.until(lambda: sum(bool(each.text_s) for each in others) >= sizes.load)
        await asyncio.sleep(sizes.settle_s)
        among = []
        for each in typed[sizes.keystrokes :]:
            among.append(await server.ask(each, "keystroke"))
            await asyncio.sleep(sizes.pause_s * draw.uniform(1, 1.5))  # the batch is by itself again
        await asyncio.sleep(TOLD_S)
        each_step_s, waits = [], []
        for answer in among:
            before = steps_between(server.steps, answer.start_s - sizes.look_back_s, answer.start_s)
            each_step_s.append(median(step.wall_s for step in before))
            waits.append((ttft_s(answer) - solo_s) / each_step_s[-1])
        span = steps_between(server.steps, among[0].start_s, among[-1].start_s)
        return Result(
            [
                Figure("time to first token alone", 1e3 * solo_s, unit="ms"),
                Figure("time to first token among them, median", 1e3 * median(map(ttft_s, among)), unit="ms"),
                Figure("median step before", 1e3 * median(each_step_s), unit="ms"),
                Figure("beyond alone, in such steps, median", median(waits), 2.0, "steps"),
                Figure("beyond alone, in such steps, worst", max(waits), 2.0, "steps"),
            ],
            {
                "alone_ms": [1e3 * ttft_s(each) for each in alone],
                "among_ms": [1e3 * ttft_s(each) for each in among],
                "step_ms": [1e3 * each for each in each_step_s],
                "steps": describe(span),
            },
        )


# ---------------------------------------------------------------------------------------- two API keys


@dataclass(frozen=True, slots=True)
class Keys:
    """One key has `light` requests open all the time, as many as there are seats; the other has `times` as
    many."""

    light: int = 16
    times: int = 10
    prompt_tokens: int = 64
    output_tokens: int = 64
    window_s: float = 40.0


async def two_keys(url: str, sizes: Keys, light_key: str, heavy_key: str) -> Result:
    """The light key's share of the tokens that are generated, from its first request on."""
    lengths = Lengths(sizes.prompt_tokens, sizes.output_tokens)
    async with live(url, heavy_key) as heavy, live(url, light_key) as light:
        theirs: list[Answer] = []
        own: list[Answer] = []
        heavy.begin(heavy.clients(sizes.times * sizes.light, random_samples(lengths, 6), theirs))
        await heavy.until(lambda: sum(bool(each.text_s) for each in theirs) >= sizes.light)
        light.begin(light.clients(sizes.light, random_samples(lengths, 7), own))
        begin_s = time.perf_counter()
        await asyncio.sleep(sizes.window_s)
        light.check()
        heavy.check()
        end_s = time.perf_counter()
        mine, others = tokens_between(own, begin_s, end_s), tokens_between(theirs, begin_s, end_s)
        asked = sum(each.start_s <= end_s for each in theirs) / sum(each.start_s <= end_s for each in own)
        return Result(
            [
                Figure("requests open, of the other key by the light one's", sizes.times),
                Figure("tokens a second, both", (mine + others) / (end_s - begin_s)),
                Figure("the light key's share of the tokens", mine / (mine + others), 0.45, least=True),
            ],
            {"light_tokens": mine, "other_tokens": others, "requests_ratio": asked},
        )
