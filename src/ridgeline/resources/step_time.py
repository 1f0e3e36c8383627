"""How long a step takes: the only place that makes seconds of a step's work.

The roofline lets memory and arithmetic run at the same time and at their best. In a step neither is at its
best all of the time, and they overlap in part: reading weights and multiplying them take the root of the sum
of both squares, which is near the larger one where they differ, and 1.4 times it where they are alike.
Rows are multiplied a few at a time, and unpacking the weights for each of these turns takes its time, however
few rows it has: one row more may take next to nothing, and another one much.
Activations are moved before and after that, most of them by launches that do little else. Attention takes
turns within each row: its two times add up. Launches, outputs and the step itself cost besides. What a
last-level cache still holds of a step's weights, keys and values need not come from memory in the next: this
makes dense launches faster, and attention, which has to unpack keys and values, so little that it does not
count there. How fast the machine runs just now is learned from the steps that were measured.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Literal

import msgspec

from ridgeline.resources.roofline import Limits
from ridgeline.resources.step_costs import StepCosts
from ridgeline.types import StepWork, Work

Bound = Literal["weights", "KV cache", "activations", "arithmetic", "overhead"]


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The seconds that a step will likely take, and what takes most of them."""

    seconds: float
    bound: Bound


class StepTimeModel:
    """Predicts steps on one machine, and corrects itself by those that were measured.

    What it learns is how fast memory and arithmetic are just now, by each step as far as they took its time:
    so what decodes have shown of memory holds for steps of any size, and the times of steps of many sizes lie
    on one curve. Not safe for concurrent use.
    """

    def __init__(self, limits: Limits, costs: StepCosts) -> None:
        fp32 = limits.fp32_flops_per_s
        self.limits, self.costs = limits, costs
        self._int8_s = 1 / (limits.int8_ops_per_s or fp32)
        self._bf16_s = 1 / (limits.bf16_flops_per_s or fp32)
        self._fp32_s = 1 / fp32
        self._byte_s = 1 / limits.read_bytes_per_s
        self._memory, self._arithmetic = _Speed(), _Speed()
        self._errors: deque[float] = deque(maxlen=_REMEMBERED)
        self._seen = 0

    @classmethod
    def of(cls, limits: Limits, costs: StepCosts) -> StepTimeModel:
        """The model of a machine of these ceilings, and of what steps cost beside them."""
        return cls(limits, costs)

    def predict(self, work: StepWork) -> Prediction:
        """What to expect of a step, corrected by the steps that were observed."""
        seconds, bound, _, _ = self._parts(work)
        return Prediction(seconds, bound)

    def observe(self, work: StepWork, elapsed_s: float) -> Prediction:
        """Take in what a step took, and say what was to be expected. Times that are no positive number are
        passed over."""
        seconds, bound, memory, arithmetic = self._parts(work)
        if 0 < elapsed_s < math.inf:
            self._learn(min(max(elapsed_s / seconds, 1e-6), 1e6), memory, arithmetic)
        return Prediction(seconds, bound)

    def _learn(self, ratio: float, memory: float, arithmetic: float) -> None:
        """A step took `ratio` times what was expected, of which so large shares were memory and arithmetic.
        Both move so far that its prediction moves by a part of what was wrong: by their shares, and by half
        of the other's, as what slows one (a neighbour, the clock) is likely to slow both. It is a normalised
        gradient step in the logarithms (Widrow and Hoff, "Adaptive Switching Circuits", 1960)."""
        self._errors.append(abs(ratio - 1))
        self._seen += 1
        allowed = math.log(_STEP_LIMIT)
        # The first steps count as much as each other, so that a start is not slow.
        part = max(_DECAY, 1 / self._seen) * min(max(math.log(ratio), -allowed), allowed)
        by_memory = memory + _ALIKE * arithmetic
        by_arithmetic = arithmetic + _ALIKE * memory
        length = memory * by_memory + arithmetic * by_arithmetic
        if length > 0:
            self._memory.move(part * by_memory / length)
            self._arithmetic.move(part * by_arithmetic / length)

    @property
    def error(self) -> float:
        """The median of |measured / predicted - 1| of recent steps, each predicted before it was observed;
        0 before the first."""
        return median(self._errors) if self._errors else 0.0

    def _parts(self, work: StepWork) -> tuple[float, Bound, float, float]:
        """A step's seconds and what takes most of them; the shares by which the seconds grow with those of
        memory and of arithmetic."""
        costs, dense, attention = self.costs, work.dense, work.attention
        memory, arithmetic = self._memory.factor, self._arithmetic.factor
        from_memory_s = memory * self._byte_s
        byte_s = from_memory_s * self._uncached(work)
        weight_bytes = min(work.weight_bytes, dense.bytes)
        reading = byte_s * weight_bytes / costs.memory
        moving = byte_s * (dense.bytes - weight_bytes) / costs.memory
        turns = costs.full_rows(work.rows) / work.rows if work.rows else 1.0
        computing = arithmetic * turns * self._arithmetic_s(dense) / costs.arithmetic
        attending_reads = from_memory_s * attention.bytes / costs.attention_memory
        attending_computes = arithmetic * self._arithmetic_s(attention) / costs.attention_arithmetic
        overhead = costs.step_s + work.launches * costs.launch_s + work.outputs * costs.output_s
        both = math.hypot(reading, computing) or 1.0
        by_memory = reading * reading / both + moving + attending_reads
        by_arithmetic = computing * computing / both + attending_computes
        seconds = by_memory + by_arithmetic + overhead
        bound = _bound(work, reading + moving + attending_reads, computing + attending_computes, overhead)
        whole = seconds or 1.0  # nothing to do takes no time
        return seconds, bound, by_memory / whole, by_arithmetic / whole

    def _uncached(self, work: StepWork) -> float:
        """What a byte takes on average of those in the cache and those in memory, in times of the latter."""
        cached = self.costs.cached_share(work.total.bytes)
        return 1 - cached + cached / self.costs.cache_speed

    def _arithmetic_s(self, work: Work) -> float:
        return work.int8_ops * self._int8_s + work.bf16_flops * self._bf16_s + work.fp32_flops * self._fp32_s


def _bound(work: StepWork, reading: float, computing: float, overhead: float) -> Bound:
    if overhead > reading and overhead > computing:
        return "overhead"
    if computing > reading:
        return "arithmetic"
    activations = work.total.bytes - work.weight_bytes - work.kv_bytes
    if work.weight_bytes >= max(work.kv_bytes, activations):
        return "weights"
    return "KV cache" if work.kv_bytes >= activations else "activations"


_DECAY = 0.1
"""Share by which one step moves the correction."""

_ALIKE = 0.5
"""How far memory and arithmetic are taken to be slowed alike."""

_STEP_LIMIT = 1.5
"""The most by which one step can say that the last correction was wrong: a step that the system interrupted
moves it no further."""

_LIMIT = 16.0
"""The most that a correction can be, up or down. Ceilings that were measured while a machine was busy are
wrong by its other work, several times over; beyond this they are another machine's."""

_REMEMBERED = 128
"""Steps whose errors are remembered."""


class _Speed:
    """A correction of the seconds of one resource."""

    __slots__ = ("_log", "factor")

    def __init__(self) -> None:
        self.factor = 1.0
        self._log = 0.0

    def move(self, change: float) -> None:
        most = math.log(_LIMIT)
        self._log = min(max(self._log + change, -most), most)
        self.factor = math.exp(self._log)
