"""What a step costs the host besides the model: scheduler, cache and commit, with an idle executor.

    python bench/scheduler_cost.py [--sequences 256 512 1024 2048] [--steps 200] [--streams] [--json]

Sequences decode side by side, each greedily on pages of its own; every 16th step each takes a page. The times
are the process's CPU time, so that they stand on a busy machine; the smallest of several rounds counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ridgeline.cache.kv import KVCache
from ridgeline.config import pages_for
from ridgeline.engine import Engine, ModelFacts
from ridgeline.execution.draw import Drawer
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.types import Request, SamplingParams, Step, StepResult, StepWork, Work

PROMPT = 48
ROUNDS = 5
VOCABULARY = 50_000


class IdleExecutor:
    """Answers every output with one token, at once."""

    asynchronous = False

    def __init__(self) -> None:
        self.drawer = Drawer()
        self._work = StepWork(Work(), Work(), 0, 0, 0, 0)
        self._tokens = np.full(1 << 16, 7, np.int32)
        self._logits = np.zeros((0, VOCABULARY), np.float32)
        self._outputs = 0

    def run(self, handle: Any, step: Step) -> IdleExecutor:
        self._outputs = len(step.draws)
        return self

    def result(self) -> StepResult:
        return StepResult(self._logits, self._tokens[: self._outputs], 0.001, self._work)

    def transfer(self, moves: Sequence[Any]) -> None:
        """Nothing is stored."""

    def close(self) -> None:
        """Nothing is held."""


class OneLetter:
    """A detokenizer to which every token is the same letter."""

    def push(self, token_id: int) -> str:
        return "x"

    def finish(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of CPU time that a step takes of the host, all in all and by part."""

    sequences: int
    step_ms: float
    schedule_ms: float
    advance_ms: float
    commit_ms: float


class _Timed:
    """A function and the CPU time that is spent in it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.spent_s = 0.0

    def __call__(self, *arguments: Any) -> Any:
        began_s = time.process_time()
        try:
            return self.call(*arguments)
        finally:
            self.spent_s += time.process_time() - began_s


def decoding(sequences: int, steps: int, streams: bool) -> Engine:
    """An engine all of whose sequences decode, for so many steps more."""
    longest = PROMPT + steps + 32
    cache = KVCache((None,), (sequences * (pages_for(longest) + 1),), True)
    scheduler = Scheduler(cache, sequences, sequences * PROMPT)
    facts = ModelFacts(VOCABULARY, longest + 1)
    engine = Engine(IdleExecutor(), "handle", scheduler, facts, lambda skip: OneLetter())  # type: ignore[arg-type]
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for index in range(sequences):
        prompt = tuple((index * 7919 + place * 31) % VOCABULARY for place in range(PROMPT))
        engine.add(Request(str(index), prompt, params), stream=streams)
    while any(s.computed < PROMPT for s in scheduler.running) or scheduler.waiting:
        engine.step()
    return engine


def cost(sequences: int, steps: int, streams: bool) -> Cost:
    """The cost of a step with that many rows."""
    engine = decoding(sequences, steps * (ROUNDS + 1), streams)
    scheduler: Any = engine.scheduler
    whole = []
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        began_s = time.process_time()
        for _ in range(steps):
            engine.step()
        whole.append((time.process_time() - began_s) / steps)
    timed = [_Timed(scheduler.schedule), _Timed(scheduler.advance), _Timed(engine._commit)]
    scheduler.schedule, scheduler.advance = timed[:2]
    engine._commit = timed[2]  # type: ignore[method-assign]
    for _ in range(steps):
        engine.step()
    gc.enable()
    return Cost(sequences, 1e3 * min(whole), *(1e3 * each.spent_s / steps for each in timed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--streams", action="store_true", help="report every token, as to streaming clients")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    costs = [cost(count, options.steps, options.streams) for count in options.sequences]
    if options.json:
        json.dump([{name: getattr(c, name) for name in Cost.__slots__} for c in costs], sys.stdout)
        print()
        return
    print("sequences  step ms  schedule  advance  commit  µs per sequence")
    for c in costs:
        parts = f"{c.schedule_ms:9.3f} {c.advance_ms:8.3f} {c.commit_ms:7.3f}"
        print(f"{c.sequences:9d} {c.step_ms:8.3f} {parts} {1e3 * c.step_ms / c.sequences:16.2f}")


if __name__ == "__main__":
    main()
