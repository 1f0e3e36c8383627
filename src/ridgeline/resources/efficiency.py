"""What share of a machine's ceilings whole steps reach: the distance between a bound and an expectation.

The roofline lets memory and arithmetic run at the same time and at their best. In a step they take turns, one
launch reading and the next computing, and neither is at its best all of the time. So the expected time is the
sum of both, each at its share of the ceiling. That is one pair of numbers for each kind of machine, no model
of it: `docs/performance.md` has the measurements, and how far from them it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.resources.roofline import Limits, arithmetic_s, memory_s
from ridgeline.types import ConfigError, Work


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the read bandwidth and of the arithmetic peaks, 0 to 1, and where they are from."""

    memory: float
    arithmetic: float
    source: str

    def __post_init__(self) -> None:
        for name in ("memory", "arithmetic"):
            share = getattr(self, name)
            if not 0 < share <= 1:
                raise ConfigError(f"the share of {name} is {share}; accepted: more than 0, at most 1")


EFFICIENCY = {
    "cpu": Efficiency(
        memory=0.55,
        arithmetic=0.55,
        source="measured on 2 Zen 4 cores with SmolLM2-135M: decode at batch 1 and 32, prefill 512 "
        "(docs/performance.md)",
    ),
    "gpu": Efficiency(
        memory=0.75,
        arithmetic=0.5,
        source="not measured by us: others publish 0.69 (A100) to 0.9 (RTX 4090) of the datasheet's "
        "bandwidth for decode at batch 1, and 0.4 to 0.5 of the peak for training",
    ),
}
"""By kind of machine: of measured ceilings for the CPU, of the datasheet for GPUs."""


def efficiency_of(kind: str) -> Efficiency:
    """That of a preset's kind; an Apple chip's GPU counts as a GPU."""
    return EFFICIENCY["cpu" if kind == "cpu" else "gpu"]


def expected_s(work: Work, limits: Limits, efficiency: Efficiency, overhead_s: float = 0.0) -> float:
    """Seconds that work will likely take; never less than `roofline.predicted_s` says."""
    reading = memory_s(work, limits) / efficiency.memory
    return reading + arithmetic_s(work, limits) / efficiency.arithmetic + overhead_s
