"""Where a step's time goes, operation by operation, beside what the machine could do.

The first thing to look at when a model is slower than its roofline: which operations are far from their
ceilings, and how much of the step they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ridgeline.apps.benchmark import Round, Workload, measure
from ridgeline.engine import Engine
from ridgeline.execution.profiling import Profile, ProfilingExecutor, TimedExecutor
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.roofline import arithmetic_s, mbu, memory_s, mfu
from ridgeline.types import RequestError


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
