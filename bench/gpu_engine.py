"""The engine end to end on random prompts: reading, decoding in batches, drawing, and what a batch changes.

Times are taken twice: on the device, between a step's first and last kernel, and as wall time per step, where
what the host adds shows. Decode steps are measured in one run of requests that are aborted down to smaller
and smaller batches, so that prompts are read only once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from gpu_kernels import SAMPLED, Bench
from gpu_models import KV_FORMAT, Model, Ready, Rows, make_ready, page_nbytes

from ridgeline.cache.kv import KVCache
from ridgeline.engine import Engine, ModelFacts
from ridgeline.execution.base import Limits
from ridgeline.execution.cuda.executor import CudaHandle
from ridgeline.execution.cuda.inputs import StepSize
from ridgeline.execution.cuda.launches import AttentionLaunch
from ridgeline.model.program import Rope
from ridgeline.resources.roofline import launch_overhead_s, mbu, mfu, predicted_s
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.types import CapacityError, Request, SamplingParams, Work

_MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Workload:
    """What the engine is given. `batches` are decode batches, the largest first. `warm_steps` after a change
    are not timed: a bucket's first two compile and record."""

    batches: tuple[int, ...] = (128, 64, 32, 8, 1)
    prompt_tokens: int = 512
    decode_steps: int = 20
    warm_steps: int = 4
    prefills: tuple[int, ...] = (512, 2048)
    repeats: int = 3
    sampled_batch: int = 32
    identity_batch: int = 32
    identity_alone: int = 8
    identity_tokens: int = 24

    @property
    def most_tokens(self) -> int:
        """What a sequence may grow to: each batch decodes with graphs and without, behind a slow start."""
        steps = 2 * len(self.batches) * (self.decode_steps + self.warm_steps)
        return self.prompt_tokens + steps + self.batches[0] * self.prompt_tokens // max(self.prefills) + 32


@dataclass(frozen=True)
class EngineLine:
    """One load. Seconds are those of a step; `predicted_s` is the roofline's, launches included. Where fewer
    rows than the batch has sequences run in a decode step, the engine does not keep all of them busy."""

    model: str
    format: str
    load: str
    batch: int
    graphs: bool
    rows_per_step: float
    tokens_per_s: float
    wall_s: float
    device_s: float
    predicted_s: float
    bandwidth_share: float
    arithmetic_share: float
    work: Work


@dataclass(frozen=True)
class Identity:
    """How many of the requests got the same tokens alone as in a batch."""

    model: str
    format: str
    drawing: str
    batch: int
    requests: int
    identical: int


@dataclass(frozen=True)
class _Span:
    """What an engine did between two moments."""

    steps: int
    rows: int
    wall_s: float
    device_s: float
    work: Work


class _NoText:
    """Tokens that read as nothing."""

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def _name(number: int) -> str:
    return f"bench-{number}"


def kernel_count(handle: CudaHandle) -> int:
    """Kernels of a step: one for each launch, one more where attention merges, and the rotary angles."""
    ropes = {op.spec for op in handle.program.operations if isinstance(op, Rope)}
    merges = sum(isinstance(launch, AttentionLaunch) for launch in handle.launches)
    return len(handle.launches) + merges + len(ropes)


class EngineBench:
    """One model's engine, and the loads that it is measured with."""

    def __init__(self, model: Model, bench: Bench, workload: Workload) -> None:
        self._bench = bench
        self._max_rows = max(workload.prefills)
        self._work = workload
        weights = sum(np.prod(weight.shape) for weight in model.program.weights()) * model.bits // 8
        room = int((bench.free_bytes() - 1.25 * weights) * _MEMORY_SHARE) // page_nbytes(model)
        per_sequence = Rows(1, workload.most_tokens).pages
        self.batches = tuple(batch for batch in workload.batches if batch * per_sequence <= room)
        pages = max((*self.batches, workload.sampled_batch)) * per_sequence
        if pages > room:
            raise CapacityError(f"{model.label}: {room} pages of KV cache fit; the least load takes {pages}")
        limits = Limits(self._max_rows, (pages,), KV_FORMAT, max((*self.batches, workload.sampled_batch)))
        self.ready: Ready = make_ready(model, bench.device, limits, graphs=True, memory=False)
        cache = KVCache(tuple(group.window for group in model.program.groups), limits.pages)
        scheduler = Scheduler(cache, limits.max_sequences, self._max_rows)
        facts = ModelFacts(model.spec.vocabulary, model.spec.context)
        self._engine = Engine(
            self.ready.executor, self.ready.handle, scheduler, facts, lambda _: _NoText(), seed=0
        )
        self._names = 0

    def close(self) -> None:
        self._engine.close()

    # -- the loads

    def prefill(self, tokens: int) -> EngineLine:
        """One prompt alone, up to its first token: the median of some."""
        spans = []
        for turn in range(self._work.repeats + 1):
            names = self._add(1, tokens, max_tokens=1, seed=turn)
            spans.append(self._span(partial(self._finish, names)))
        spans = spans[1:]  # the first one compiles
        middle = sorted(spans, key=lambda span: span.wall_s)[len(spans) // 2]
        graphed = self.ready.handle.graphs.bucket(StepSize(tokens, 1, False)) is not None
        return self._line(f"prefill {tokens}", 1, graphed, middle)

    def mixed(self) -> tuple[EngineLine, list[str]]:
        """All prompts of the largest batch at once, chunked beside the decodes of those that are done; the
        names of the requests, which go on."""
        names = self._add(self.batches[0], self._work.prompt_tokens, self._growth, seed=100)
        span = self._span(self._read_prompts)
        return self._line("mixed", self.batches[0], False, span), names

    def decode(self, names: list[str], batch: int) -> Iterator[EngineLine]:
        """Decode steps of the first `batch` of the requests, with CUDA graphs and without; the others end."""
        for name in names[batch:]:
            self._engine.abort(name)
        del names[batch:]
        for graphs in (True, False):
            yield self._decode(f"decode, context {self._work.prompt_tokens}", batch, graphs)

    def sampled(self) -> EngineLine:
        """Decode steps of sampled requests."""
        batch = self._work.sampled_batch
        self._add(batch, self._work.prompt_tokens, self._growth, seed=100, sampled=True)
        self._read_prompts()
        line = self._decode(f"decode, top_p, context {self._work.prompt_tokens}", batch, graphs=True)
        self.idle()
        return line

    def identity(self) -> Iterator[Identity]:
        """Requests of some lengths in one batch, and some of them once more alone."""
        count = self._work.identity_batch
        longest = max(self._work.prompt_tokens // 4, 1)
        lengths = np.random.default_rng(9).integers(-(-longest // 4), longest + 1, count).tolist()
        for sampled in (False, True):
            together = self._tokens(lengths, range(count), sampled)
            alone = range(min(self._work.identity_alone, count))
            same = [self._tokens(lengths, [i], sampled)[0] == together[i] for i in alone]
            drawing = "top_p" if sampled else "greedy"
            model = self.ready.model
            yield Identity(model.name, model.format, drawing, count, len(same), sum(same))

    def idle(self) -> None:
        """End all requests and take home what still runs."""
        for number in range(1, self._names + 1):
            self._engine.abort(_name(number))
        for _ in range(2):
            self._engine.step()

    # -- how they are run

    @property
    def _growth(self) -> int:
        return self._work.most_tokens - self._work.prompt_tokens

    def _decode(self, load: str, batch: int, graphs: bool) -> EngineLine:
        self.ready.executor.graphs = graphs
        self._steps(self._work.warm_steps)
        span = self._span(lambda: self._steps(self._work.decode_steps))
        self.ready.executor.graphs = True
        return self._line(load, batch, graphs, span)

    def _add(self, count: int, tokens: int, max_tokens: int, seed: int, sampled: bool = False) -> list[str]:
        random = np.random.default_rng(seed)
        prompts = random.integers(0, self._engine.model.vocabulary_size, (count, tokens)).tolist()
        return [self._request(tuple(prompt), max_tokens, sampled, i) for i, prompt in enumerate(prompts)]

    def _request(self, prompt: tuple[int, ...], max_tokens: int, sampled: bool, seed: int) -> str:
        self._names += 1
        name = _name(self._names)
        params = SamplingParams(
            temperature=SAMPLED.temperature if sampled else 0.0,
            top_p=SAMPLED.top_p if sampled else 1.0,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=True,
        )
        self._engine.add(Request(name, prompt, params), stream=False)
        return name

    def _tokens(self, lengths: list[int], which: Sequence[int], sampled: bool) -> list[tuple[int, ...]]:
        names = []
        for index in which:
            random = np.random.default_rng(1000 + index)
            prompt = random.integers(0, self._engine.model.vocabulary_size, lengths[index]).tolist()
            names.append(self._request(tuple(prompt), self._work.identity_tokens, sampled, index))
        found = self._finish(names)
        return [found[name] for name in names]

    def _finish(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Step until these requests have ended; their tokens."""
        found: dict[str, tuple[int, ...]] = {}
        while len(found) < len(names):
            for output in self._engine.step():
                (one,) = output.outputs
                if one.finish_reason != "length":
                    raise RuntimeError(f"a request ended with {one.finish_reason}: {one.stop_reason}")
                found[output.request_id] = one.token_ids
        return found

    def _read_prompts(self) -> None:
        scheduler = self._engine.scheduler
        while scheduler.waiting or any(s.computed < s.prompt_length for s in scheduler.running):
            self._engine.step()

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self._engine.step()

    def _span(self, work: Callable[[], object]) -> _Span:
        stats = self._engine.stats
        totals = (stats.prefill, stats.decode)
        steps, rows = sum(t.steps for t in totals), sum(t.rows for t in totals)
        device_s, done = sum(t.elapsed_s for t in totals), totals[0].work + totals[1].work
        begun_s = time.perf_counter()
        work()
        wall_s = time.perf_counter() - begun_s
        return _Span(
            sum(t.steps for t in totals) - steps,
            sum(t.rows for t in totals) - rows,
            wall_s,
            sum(t.elapsed_s for t in totals) - device_s,
            totals[0].work + totals[1].work - done,
        )

    def _line(self, load: str, batch: int, graphs: bool, span: _Span) -> EngineLine:
        steps, ceilings, model = span.steps, self._bench.ceilings, self.ready.model
        launches = steps * kernel_count(self.ready.handle)
        overhead_s = launch_overhead_s(launches, ceilings, graphs)
        return EngineLine(
            model=model.name,
            format=model.format,
            load=load,
            batch=batch,
            graphs=graphs,
            rows_per_step=span.rows / steps,
            tokens_per_s=span.rows / span.wall_s,
            wall_s=span.wall_s / steps,
            device_s=span.device_s / steps,
            predicted_s=predicted_s(span.work, ceilings, overhead_s) / steps,
            bandwidth_share=mbu(span.work, span.device_s, ceilings),
            arithmetic_share=mfu(span.work, span.device_s, ceilings),
            work=span.work,
        )
