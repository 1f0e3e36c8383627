"""Measure a loaded engine: the speed of reading prompts and of decoding, beside the machine's limits.

Prompts are random tokens of a fixed seed, decoding is greedy and passes over end tokens. Every time that they
are read they have a cache salt of their own, so that nothing is found in a prefix cache. Each round reads
the prompts alone, and then times decode steps in which every sequence of the batch has exactly one row.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from ridgeline.engine import Engine
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.roofline import mbu, mfu
from ridgeline.types import CapacityError, Request, RequestError, SamplingParams, Work

_WARM_STEPS = 2
"""Steps of a batch size that are not timed: a GPU records its graph in the first."""


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch` sequences with `prompt_tokens` each; `output_tokens` are decoded for each of them."""

    prompt_tokens: int
    output_tokens: int
    batch: int

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("output_tokens", 2), ("batch", 1)):
            value = getattr(self, name)
            if value < least:
                raise RequestError(f"{name} is {value}; accepted: at least {least}")


@dataclass(frozen=True, slots=True)
class Phase:
    """Wall time, tokens and work of one phase of a round; `executor_s` is the part inside the executor."""

    tokens: int
    steps: int
    elapsed_s: float
    executor_s: float
    work: Work

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.elapsed_s


@dataclass(frozen=True, slots=True)
class Round:
    prefill: Phase
    decode: Phase


def measure(engine: Engine, workload: Workload, max_step_tokens: int, repeats: int) -> list[Round]:
    """Run one round to warm up and `repeats` to keep. The engine must be idle; it is idle again afterwards.

    `max_step_tokens` is the engine's token budget. Raises RequestError when prompt and output exceed the
    context, CapacityError when the KV cache cannot hold the whole batch.
    """
    _check_repeats(repeats)
    prompts = _prompts(workload, engine.model.vocabulary_size)
    slack = _slack(workload, max_step_tokens)
    _check_context(engine, workload, slack)
    meter = _Meter(engine, prompts)
    short = Workload(workload.prompt_tokens, 2, workload.batch)
    meter.prefill()
    meter.decode(short, slack)
    return [Round(meter.prefill(), meter.decode(workload, slack)) for _ in range(repeats)]


def sweep(
    engine: Engine, workload: Workload, batches: Sequence[int], max_step_tokens: int, repeats: int
) -> dict[int, list[Phase]]:
    """Decode at one context with each of `batches` sequences, `repeats` times; of `workload` the batch is
    not used. Otherwise as `measure`, and it raises the same.
    """
    _check_repeats(repeats)
    found: dict[int, list[Phase]] = {}
    for batch in batches:
        one = replace(workload, batch=batch)
        prompts = _prompts(one, engine.model.vocabulary_size)
        slack = _slack(one, max_step_tokens) + _WARM_STEPS
        _check_context(engine, one, slack)
        meter = _Meter(engine, prompts)
        found[batch] = [meter.decode(one, slack, _WARM_STEPS) for _ in range(repeats)]
    return found


def sweep_summary(found: Mapping[int, Sequence[Phase]], ceilings: Ceilings) -> list[dict[str, Any]]:
    """Of each batch the medians over its rounds and where it lies on the roofline, ready for JSON.

    `ops_per_byte` is the arithmetic intensity by the program's own account, `ops_per_s` what was reached;
    `mbu` and `mfu` are its shares of the read bandwidth and of the arithmetic peaks.
    """
    return [
        {
            "batch": batch,
            "tokens_per_s": median(p.tokens_per_s for p in phases),
            "spread": _spread(phases),
            "step_s": median(p.elapsed_s / p.steps for p in phases),
            "ops_per_byte": phases[0].work.ops / phases[0].work.bytes,
            "ops_per_s": median(p.work.ops / p.elapsed_s for p in phases),
            "mbu": median(mbu(p.work, p.elapsed_s, ceilings) for p in phases),
            "mfu": median(mfu(p.work, p.elapsed_s, ceilings) for p in phases),
        }
        for batch, phases in found.items()
    ]


def summary(rounds: Sequence[Round], workload: Workload, ceilings: Ceilings) -> dict[str, Any]:
    """Medians over the rounds, their spread, and the shares of the ceilings, ready for JSON.

    `mbu` is the decode steps' share of the read bandwidth, `mfu` the prefill's share of the arithmetic
    peaks, weighted by the time that each format takes at its own.
    """
    prefill = [one.prefill for one in rounds]
    decode = [one.decode for one in rounds]
    return {
        "prefill_tokens_per_s": median(p.tokens_per_s for p in prefill),
        "decode_tokens_per_s": median(d.tokens_per_s for d in decode),
        "prefill_spread": _spread(prefill),
        "decode_spread": _spread(decode),
        **asdict(workload),
        "repeats": len(rounds),
        "mbu": median(mbu(d.work, d.elapsed_s, ceilings) for d in decode),
        "mfu": median(mfu(p.work, p.elapsed_s, ceilings) for p in prefill),
        "decode_mfu": median(mfu(d.work, d.elapsed_s, ceilings) for d in decode),
        "prefill_mbu": median(mbu(p.work, p.elapsed_s, ceilings) for p in prefill),
        "decode_step_s": median(d.elapsed_s / d.steps for d in decode),
        "decode_host_s": median((d.elapsed_s - d.executor_s) / d.steps for d in decode),
        "ceilings": ceilings.to_json(),
    }


class _Meter:
    """Drives an engine's steps by hand and times them."""

    def __init__(self, engine: Engine, prompts: Sequence[tuple[int, ...]]) -> None:
        self._engine = engine
        self._prompts = prompts
        self._salts = map("benchmark {}".format, itertools.count())

    def prefill(self) -> Phase:
        ids = self._add(1)
        before = self._totals()
        start = time.perf_counter()
        try:
            while self._engine.has_work:
                self._engine.step()
        finally:
            self._abort(ids)
        elapsed_s = time.perf_counter() - start
        steps, executor_s, work = self._since(before)
        return Phase(sum(map(len, self._prompts)), steps, elapsed_s, executor_s, work)

    def decode(self, workload: Workload, slack: int, warm_steps: int = 0) -> Phase:
        """Time output_tokens - 1 steps of the whole batch: the first token belongs to the prefill. Before
        them come `warm_steps` that are not timed; `slack` has room for those too."""
        ids = self._add(workload.output_tokens + slack)
        wanted, steps = workload.output_tokens - 1, 0
        elapsed_s = executor_s = 0.0
        work = Work()
        try:
            while steps < wanted:
                if not self._engine.has_work:
                    raise CapacityError(
                        f"a batch of {len(ids)} does not fit the KV cache; accepted: a smaller one"
                    )
                before, rows = self._totals(), self._engine.stats.decode.rows
                start = time.perf_counter()
                self._engine.step()
                step_s = time.perf_counter() - start
                if self._engine.stats.decode.rows - rows != len(ids):
                    continue
                if warm_steps > 0:
                    warm_steps -= 1
                else:
                    _, inside_s, done = self._since(before)
                    elapsed_s, executor_s, work = elapsed_s + step_s, executor_s + inside_s, work + done
                    steps += 1
        finally:
            self._abort(ids)
        return Phase(steps * len(ids), steps, elapsed_s, executor_s, work)

    def _add(self, max_tokens: int) -> list[str]:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, speculation=False)
        ids = [f"bench-{index}" for index in range(len(self._prompts))]
        salt = next(self._salts)
        for request_id, prompt in zip(ids, self._prompts, strict=True):
            self._engine.add(Request(request_id, prompt, params, salt), stream=False)
        return ids

    def _abort(self, ids: Sequence[str]) -> None:
        for request_id in ids:
            self._engine.abort(request_id)

    def _totals(self) -> tuple[int, float, Work]:
        stats = self._engine.stats
        return (
            stats.prefill.steps + stats.decode.steps,
            stats.prefill.elapsed_s + stats.decode.elapsed_s,
            stats.prefill.work + stats.decode.work,
        )

    def _since(self, before: tuple[int, float, Work]) -> tuple[int, float, Work]:
        steps, elapsed_s, work = self._totals()
        return steps - before[0], elapsed_s - before[1], work - before[2]


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise RequestError(f"repeats is {repeats}; accepted: at least 1")


def _check_context(engine: Engine, workload: Workload, slack: int) -> None:
    longest = workload.prompt_tokens + workload.output_tokens + slack
    if longest > engine.model.max_model_len:
        raise RequestError(
            f"the benchmark needs {longest} tokens of context, {slack} of them while the batch fills; "
            f"accepted: at most {engine.model.max_model_len}"
        )


def _prompts(workload: Workload, vocabulary: int) -> list[tuple[int, ...]]:
    random = np.random.default_rng(0)
    shape = (workload.batch, workload.prompt_tokens)
    return [tuple(int(t) for t in row) for row in random.integers(0, vocabulary, shape)]


def _slack(workload: Workload, max_step_tokens: int) -> int:
    """Tokens that the first sequence may decode before the last one's prompt has been read."""
    room = max(max_step_tokens - workload.batch, 1)
    return -(-workload.batch * workload.prompt_tokens // room) if workload.batch > 1 else 0


def _spread(phases: Sequence[Phase]) -> list[float]:
    rates = [phase.tokens_per_s for phase in phases]
    return [min(rates), max(rates)]
