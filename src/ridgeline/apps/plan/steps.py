"""How long a step takes: the least by the roofline, what to expect, and what bounds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from ridgeline.apps.plan.host import Host
from ridgeline.apps.plan.model import FormattedModel
from ridgeline.model.program import Program, StepLoad
from ridgeline.resources.roofline import arithmetic_s, memory_s, predicted_s
from ridgeline.resources.step_time import Bound, StepTimeModel
from ridgeline.types import Segment, SequenceRows, Step, StepWork


@dataclass(frozen=True, slots=True)
class StepTime:
    """Of one step: its work and its times. `bound_s` is the least that is possible, `expected_s` what to
    expect, most of it for `bound`; `memory_s` and `arithmetic_s` are at the ceilings."""

    work: StepWork
    memory_s: float
    arithmetic_s: float
    overhead_s: float
    bound_s: float
    expected_s: float
    bound: Bound


class HasProgram(Protocol):
    """Whatever has a program: a model in a plan, or one that runs."""

    @property
    def program(self) -> Program: ...


def load_of(model: HasProgram, rows: int, context: int, batch: int = 1) -> StepLoad:
    """The load of `batch` sequences that each run `rows` rows, behind which they are `context` tokens long.
    One output of each is wanted."""
    groups = model.program.groups
    segment = Segment(((),) * len(groups), context)
    sequence = SequenceRows(range(rows), context - rows, (segment,), (rows - 1,))
    return StepLoad.of(Step((sequence,)), groups).times(batch)


def prompt_loads(model: HasProgram, prompt: int, max_rows: int) -> list[StepLoad]:
    """The loads of the steps that read a prompt, `max_rows` at a time; only the last has an output."""
    ends = [*range(max_rows, prompt, max_rows), prompt]
    loads = [load_of(model, end - begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    return [load.without_outputs for load in loads[:-1]] + loads[-1:]


def times_of(model: FormattedModel, host: Host) -> StepTimeModel:
    """What predicts the model's steps on a host."""
    return StepTimeModel.of(host.rates, host.costs_of(model.main_format))


def step_time(model: FormattedModel, load: StepLoad, host: Host) -> StepTime:
    """The times of a step of that load."""
    work = model.work.parts(load)
    expected = times_of(model, host).predict(work)
    # On a GPU what launches cost is a measured ceiling too; a CPU has launched nothing.
    overhead = work.launches * host.costs.launch_s if host.device == "cuda" else 0.0
    return StepTime(
        work=work,
        memory_s=memory_s(work.total, host.rates),
        arithmetic_s=arithmetic_s(work.total, host.rates),
        overhead_s=overhead,
        bound_s=predicted_s(work.total, host.rates, overhead),
        expected_s=expected.seconds,
        bound=expected.bound,
    )


MOST_SEQUENCES = 1 << 16


def ridge_batch(model: FormattedModel, host: Host, context: int | None = None) -> int | None:
    """The least number of sequences at which decoding takes as long for arithmetic as for memory.

    Without their KV cache, or at a context with it: there attention adds bytes with every sequence, and
    memory may stay the limit at any number (None).
    """

    def computes(batch: int) -> bool:
        load = load_of(model, 1, context or 1, batch)
        if context is None:
            nothing = (0,) * len(load.slots)
            load = replace(load, pairs=nothing, slots=nothing)
        work = model.work.at(load)
        return arithmetic_s(work, host.rates) >= memory_s(work, host.rates)

    low, high = 0, 1
    while not computes(high):
        low, high = high, 2 * high
        if high > MOST_SEQUENCES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if computes(middle) else (middle, high)
    return high
