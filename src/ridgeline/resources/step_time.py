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


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The seconds that a step will likely take, and what takes most of them."""

    seconds: float
    bound: Bound


class StepTimeModel:
    """Predicts steps on one machine, and corrects itself by those that were measured.

    Steps with one row per sequence, those with guesses behind them, and others are corrected apart. Not safe
    for concurrent use.
    """

    def __init__(self, limits: Limits, costs: StepCosts) -> None:
        fp32 = limits.fp32_flops_per_s
        self.limits, self.costs = limits, costs
        self._int8_s = 1 / (limits.int8_ops_per_s or fp32)
        self._bf16_s = 1 / (limits.bf16_flops_per_s or fp32)
        self._fp32_s = 1 / fp32
        self._byte_s = 1 / limits.read_bytes_per_s
        self._decodes, self._guesses, self._prompts = self._regimes = (_Regime(), _Regime(), _Regime())

    @classmethod
    def of(cls, limits: Limits, costs: StepCosts) -> StepTimeModel:
        """The model of a machine of these ceilings, and of what steps cost beside them."""
        return cls(limits, costs)

    def predict(self, work: StepWork) -> Prediction:
        """What to expect of a step, corrected by the steps that were observed."""
        seconds, bound = self._uncorrected(work)
        regime = self._regime(work)
        if regime is self._guesses and not regime.errors:
            regime = self._decodes  # the nearest that is known
        return Prediction(seconds * regime.factor, bound)

    def observe(self, work: StepWork, elapsed_s: float) -> Prediction:
        """Take in what a step took, and say what was to be expected. Times that are no positive number are
        passed over."""
        seconds, bound = self._uncorrected(work)
        regime = self._regime(work)
        expected = Prediction(seconds * regime.factor, bound)
        if 0 < elapsed_s < math.inf:
            regime.observe(min(max(elapsed_s / seconds, 1e-6), 1e6))
        return expected

    @property
    def error(self) -> float:
        """The median of |measured / predicted - 1| of recent steps, each predicted before it was observed;
        0 before the first."""
        errors = [error for regime in self._regimes for error in regime.errors]
        return median(errors) if errors else 0.0

    def _regime(self, work: StepWork) -> _Regime:
        if work.rows <= work.sequences:
            return self._decodes
        return self._guesses if work.outputs > work.sequences else self._prompts

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

    def observe(self, ratio: float) -> None:
        self.errors.append(abs(ratio / self.factor - 1))
        self._seen += 1
        allowed = math.log(_STEP_LIMIT)
        wrong = min(max(math.log(ratio) - self._log, -allowed), allowed)
        most = math.log(_LIMIT)
        # The first steps count as much as each other, so that a start is not slow.
        self._log = min(max(self._log + max(_DECAY, 1 / self._seen) * wrong, -most), most)
        self.factor = math.exp(self._log)
