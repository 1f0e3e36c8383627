"""How long a step takes: the only place that makes seconds of a step's work.

The roofline lets memory and arithmetic run at the same time and at their best. In a step neither is at its
best all of the time, and they overlap in part: dense launches take the root of the sum of both squares, which
is near the larger one where they differ, and 1.4 times it where they are alike. Attention takes turns within
each row: its two times add up. Launches, sequences and the step itself cost besides. How fast the machine
runs just now is learned from the steps that were measured.
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


class Prediction(msgspec.Struct, frozen=True):
    """The seconds that a step will likely take, and what takes most of them."""

    seconds: float
    bound: Bound


class StepTimeModel:
    """Predicts steps on one machine, and corrects itself by those that were measured.

    Steps with one row per sequence and others are corrected apart, but for how fast the machine is just now:
    that each kind learns from the other too, as there may be none of it for long. Not safe for concurrent
    use.
    """

    def __init__(self, limits: Limits, costs: StepCosts) -> None:
        fp32 = limits.fp32_flops_per_s
        self.limits, self.costs = limits, costs
        self._int8_s = 1 / (limits.int8_ops_per_s or fp32)
        self._bf16_s = 1 / (limits.bf16_flops_per_s or fp32)
        self._fp32_s = 1 / fp32
        self._byte_s = 1 / limits.read_bytes_per_s
        self._regimes = (_Regime(), _Regime())

    @classmethod
    def of(cls, limits: Limits, costs: StepCosts) -> StepTimeModel:
        """The model of a machine of these ceilings, and of what steps cost beside them."""
        return cls(limits, costs)

    def predict(self, work: StepWork) -> Prediction:
        """What to expect of a step, corrected by the steps that were observed."""
        seconds, bound = self._uncorrected(work)
        return Prediction(seconds * self._regimes_of(work)[0].factor, bound)

    def observe(self, work: StepWork, elapsed_s: float) -> Prediction:
        """Take in what a step took, and say what was to be expected. Times that are no positive number are
        passed over."""
        seconds, bound = self._uncorrected(work)
        own, other = self._regimes_of(work)
        expected = Prediction(seconds * own.factor, bound)
        if 0 < elapsed_s < math.inf:
            own.learn(min(max(elapsed_s / seconds, 1e-6), 1e6), other)
        return expected

    @property
    def error(self) -> float:
        """The median of |measured / predicted - 1| of recent steps, each predicted before it was observed;
        0 before the first."""
        errors = [error for regime in self._regimes for error in regime.errors]
        return median(errors) if errors else 0.0

    def _regimes_of(self, work: StepWork) -> tuple[_Regime, _Regime]:
        """The step's own, and the other one."""
        decodes, others = self._regimes
        return (others, decodes) if work.rows > work.sequences else (decodes, others)

    def _uncorrected(self, work: StepWork) -> tuple[float, Bound]:
        costs, dense, attention = self.costs, work.dense, work.attention
        reading = dense.bytes * self._byte_s / costs.memory
        computing = self._arithmetic_s(dense) / costs.arithmetic
        attending_reads = attention.bytes * self._byte_s / costs.attention_memory
        attending_computes = self._arithmetic_s(attention) / costs.attention_arithmetic
        overhead = costs.step_s + work.launches * costs.launch_s + work.sequences * costs.sequence_s
        seconds = math.hypot(reading, computing) + attending_reads + attending_computes + overhead
        return seconds, _bound(work, reading + attending_reads, computing + attending_computes, overhead)

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

_COMMON = 0.9
"""How much of a change of one kind's correction is the machine's, and so the other kind's too. Less than all:
a kind that learns about itself while both are seen must get away from the other."""

_STEP_LIMIT = 1.5
"""The most by which one step can say that the last correction was wrong: a step that the system interrupted
moves it no further."""

_LIMIT = 4.0
"""The most that a correction can be, up or down: beyond it the ceilings are another machine's."""


class _Regime:
    """The correction of steps of one kind: a decayed mean of log(measured / predicted), clipped around
    itself."""

    __slots__ = ("_log", "_seen", "errors", "factor")

    def __init__(self) -> None:
        self.factor = 1.0
        self.errors: deque[float] = deque(maxlen=64)
        self._log = 0.0
        self._seen = 0

    def learn(self, ratio: float, other: _Regime) -> None:
        """Take in a step, and let another kind follow: all the way where it knows nothing of itself, not at
        all as long as this kind still learns about itself."""
        self.errors.append(abs(ratio / self.factor - 1))
        self._seen += 1
        allowed = math.log(_STEP_LIMIT)
        wrong = min(max(math.log(ratio) - self._log, -allowed), allowed)
        # The first steps count as much as each other, so that a start is not slow.
        first = 1 / self._seen
        before = self._log
        self._move(self._log + max(_DECAY, first) * wrong)
        if not other._seen:
            other._move(self._log)
        elif first < _DECAY:
            other._move(other._log + _COMMON * (self._log - before))

    def _move(self, log: float) -> None:
        most = math.log(_LIMIT)
        self._log = min(max(log, -most), most)
        self.factor = math.exp(self._log)
