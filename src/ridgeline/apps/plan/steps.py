"""How long a step takes: the least by the roofline, what to expect, and what bounds it."""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.apps.plan.host import Host
from ridgeline.apps.plan.model import FormattedModel
from ridgeline.model.program import StepLoad
from ridgeline.resources.efficiency import expected_s
from ridgeline.resources.roofline import arithmetic_s, memory_s, predicted_s
from ridgeline.types import Segment, SequenceRows, Step, Work

BOUNDS = ("weights", "KV cache", "activations", "arithmetic", "overhead")


@dataclass(frozen=True, slots=True)
class Bytes:
    """What a step moves: weights that are read, keys and values that are read or written, all else."""

    weights: int
    kv: int
    activations: int


@dataclass(frozen=True, slots=True)
class StepTime:
    """Of one step: its work, the bytes by kind, and its times. `bound_s` is the least that is possible,
    `expected_s` what to expect; `memory_s` and `arithmetic_s` are at the ceilings, `bound` is of BOUNDS."""

    work: Work
    bytes: Bytes
    memory_s: float
    arithmetic_s: float
    overhead_s: float
    bound_s: float
    expected_s: float
    bound: str


def load_of(model: FormattedModel, rows: int, context: int, batch: int = 1) -> StepLoad:
    """The load of `batch` sequences that each run `rows` rows, behind which they are `context` tokens long.
    One output of each is wanted."""
    groups = model.program.groups
    segment = Segment(((),) * len(groups), context)
    sequence = SequenceRows(range(rows), context - rows, (segment,), (rows - 1,))
    one = StepLoad.of(Step((sequence,)), groups)
    return StepLoad(
        one.rows * batch,
        one.outputs * batch,
        tuple(pairs * batch for pairs in one.pairs),
        tuple(slots * batch for slots in one.slots),
    )


def together(one: StepLoad, other: StepLoad) -> StepLoad:
    """The load of a step that does both."""
    return StepLoad(
        one.rows + other.rows,
        one.outputs + other.outputs,
        tuple(map(sum, zip(one.pairs, other.pairs, strict=True))),
        tuple(map(sum, zip(one.slots, other.slots, strict=True))),
    )


def step_time(model: FormattedModel, load: StepLoad, host: Host) -> StepTime:
    """The times of a step of that load."""
    work = model.work.at(load)
    moved = _bytes(model, load, work)
    overhead = model.launches * host.launch_s
    memory, arithmetic = memory_s(work, host.rates), arithmetic_s(work, host.rates)
    least = predicted_s(work, host.rates, overhead)
    return StepTime(
        work=work,
        bytes=moved,
        memory_s=memory,
        arithmetic_s=arithmetic,
        overhead_s=overhead,
        bound_s=least,
        expected_s=expected_s(work, host.rates, host.efficiency, overhead),
        bound=_bound(moved, memory, arithmetic, overhead),
    )


def _bytes(model: FormattedModel, load: StepLoad, work: Work) -> Bytes:
    # What does not grow with rows is weights: all of them, and with outputs the head; and experts'.
    parts = model.work
    experts = sum(times * held.read_bytes(load) for held, times in parts.experts)
    weights = parts.fixed.read_bytes + min(load.outputs, 1) * parts.if_outputs.read_bytes + experts
    written = sum(model.kv_bytes_per_token) * load.rows
    read = Work.total(parts.per_slot, load.slots).read_bytes
    return Bytes(weights, read + written, work.bytes - weights - read - written)


def _bound(moved: Bytes, memory: float, arithmetic: float, overhead: float) -> str:
    if overhead > max(memory, arithmetic):
        return "overhead"
    if arithmetic > memory:
        return "arithmetic"
    kinds = {"weights": moved.weights, "KV cache": moved.kv, "activations": moved.activations}
    return max(kinds, key=lambda kind: kinds[kind])


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
            load = StepLoad(load.rows, load.outputs, nothing, nothing)
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
