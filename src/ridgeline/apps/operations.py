"""Where a step's time goes, operation by operation, beside what the machine could do.

The first thing to look at when a model is slower than its roofline: which operations are far from their
ceilings, and how much of the step they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ridgeline.apps.benchmark import Round, Workload, measure
from ridgeline.config import EngineConfig
from ridgeline.engine import Engine
from ridgeline.execution.profiling import Profile, ProfilingExecutor, TimedExecutor
from ridgeline.loading import LoadedModel, load_engine
from ridgeline.resources import probe
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.roofline import arithmetic_s, mbu, memory_s, mfu
from ridgeline.types import CapacityError, RequestError

Timed = Literal["all", "once", "none"]
Result = TypeVar("Result")


def measure_operations(
    engine: Engine, workload: Workload, max_step_tokens: int, repeats: int
) -> tuple[list[Round], ProfilingExecutor]:
    """As `benchmark.measure`, with every launch timed. Timing makes steps of many short launches slower.

    Raises RequestError when the engine's executor cannot time its launches.
    """
    executor: Any = engine.executor
    if not hasattr(executor, "profile"):
        raise RequestError("--ops is not there on this device; accepted: device cpu")
    timed: TimedExecutor = executor
    profiling = ProfilingExecutor(timed)
    engine.executor = profiling
    try:
        rounds = measure(engine, workload, max_step_tokens, repeats)
        profiling.count()
        return rounds, profiling
    finally:
        engine.executor = executor


@dataclass(frozen=True, slots=True)
class Run:
    """A workload that was measured by settings with nothing left to choose, and the machine's ceilings then;
    `profiling` has the times of operations, None where nobody asked for them or the device cannot."""

    config: EngineConfig
    workload: Workload
    rounds: Sequence[Round]
    ceilings: Ceilings
    profiling: ProfilingExecutor | None = None


def bench_config(batch: int, **settings: Any) -> EngineConfig:
    """The settings with room for a batch of the benchmark."""
    # Pages that prefixes keep would have every round take cold memory; a step is to be of the batch's tokens;
    # and prompts that wait for those who decode already are read after these have ended.
    return EngineConfig(
        **settings,
        **bench_room(batch),
        enable_prefix_caching=False,
        speculation="off",
        measured_budget=False,
    )


def bench_room(batch: int) -> dict[str, Any]:
    """The settings that a batch of the benchmark has room by."""
    room = EngineConfig()
    return {
        "max_num_seqs": max(batch, room.max_num_seqs),
        "max_num_batched_tokens": max(2 * batch, room.max_num_batched_tokens),
    }


def run(
    config: EngineConfig,
    workload: Workload,
    repeats: int,
    timed: Timed = "none",
    first: Callable[[LoadedModel], object] | None = None,
) -> Run:
    """Load a model, measure it and the machine's ceilings before and after, and close it. Before
    all that, `first` does what else is wanted of the model.

    Operations are `timed` in all rounds ("all"; RequestError where the device cannot), in none, or in one
    more where the device can ("once").
    """
    loaded = load_engine(config)
    engine, limit = loaded.engine, loaded.config.max_num_batched_tokens

    def measured() -> tuple[list[Round], ProfilingExecutor | None]:
        if first is not None:
            first(loaded)
        if timed == "all":
            return measure_operations(engine, workload, limit, repeats)
        rounds = measure(engine, workload, limit, repeats)
        if timed == "none" or not hasattr(engine.executor, "profile"):
            return rounds, None
        return rounds, measure_operations(engine, workload, limit, 1)[1]

    (rounds, profiling), ceilings = beside_ceilings(loaded, measured)
    return Run(loaded.config, workload, rounds, ceilings, profiling)


def beside_ceilings(loaded: LoadedModel, run: Callable[[], Result]) -> tuple[Result, Ceilings]:
    """What `run` gives, and the ceilings as they were around it; the engine is closed.

    Other tenants share the memory: what the machine gives now counts, not what it gave some day.
    """
    config = loaded.config

    def now() -> Ceilings:
        return probe.measure(config.threads, seconds=probe.BESIDE_PROBE_S, device=config.device)

    before = None
    try:
        with suppress(CapacityError):  # the engine may have left a GPU too little memory to measure with
            before = now()
        result = run()
    finally:
        loaded.engine.close()
    after = now()
    return result, after.best_with(before) if before is not None else after


def shares(profile: Profile, ceilings: Ceilings) -> list[dict[str, Any]]:
    """For each operation of an average step: time, work, its share of the step and of the ceilings, and which
    of them bounds it. Ready for JSON; in the order of the step."""
    rows = []
    for label, total in profile.parts.items():
        work, seconds = total.work, total.elapsed_s
        bound = "memory" if memory_s(work, ceilings) >= arithmetic_s(work, ceilings) else "arithmetic"
        rows.append(
            {
                "operation": label,
                "launches": total.launches / profile.steps,
                "step_s": seconds / profile.steps,
                "share": seconds / profile.elapsed_s,
                "bytes": work.bytes / profile.steps,
                "ops": work.ops / profile.steps,
                "mbu": mbu(work, seconds, ceilings),
                "mfu": mfu(work, seconds, ceilings),
                "bound": bound if work.bytes or work.ops else None,
            }
        )
    return rows


def by_phase(profiling: ProfilingExecutor, ceilings: Ceilings) -> dict[str, Sequence[dict[str, Any]]]:
    """The shares of prefill and decode steps, those that there were."""
    profiles = {"prefill": profiling.prefill, "decode": profiling.decode}
    return {phase: shares(profile, ceilings) for phase, profile in profiles.items() if profile.steps}
