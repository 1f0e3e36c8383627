"""What steps cost beside the ceilings: the distance between a bound and an expectation, as constants.

They are one set of numbers for each kind of machine, no model of it: `docs/performance.md` has the
measurements, and how far from them predictions are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.roofline import launch_overhead_s
from ridgeline.types import ConfigError


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Shares of the read bandwidth and of the arithmetic peaks that whole steps reach, 0 to 1, the seconds
    that each launch takes besides, and where all of that is from."""

    memory: float
    arithmetic: float
    source: str
    launch_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("memory", "arithmetic"):
            share = getattr(self, name)
            if not 0 < share <= 1:
                raise ConfigError(f"the share of {name} is {share}; accepted: more than 0, at most 1")


STEP_COSTS = {
    "cpu": StepCosts(
        memory=0.55,
        arithmetic=0.55,
        source="measured on 2 Zen 4 cores with SmolLM2-135M: decode at batch 1 and 32, prefill 512 "
        "(docs/performance.md)",
    ),
    "gpu": StepCosts(
        memory=0.75,
        arithmetic=0.5,
        source="not measured by us: others publish 0.69 (A100) to 0.9 (RTX 4090) of the datasheet's "
        "bandwidth for decode at batch 1, and 0.4 to 0.5 of the peak for training",
    ),
}
"""By kind of machine: of measured ceilings for the CPU, of the datasheet for GPUs."""


def costs_of(kind: str) -> StepCosts:
    """Those of a preset's kind; an Apple chip's GPU counts as a GPU."""
    return STEP_COSTS["cpu" if kind == "cpu" else "gpu"]


def costs_here(ceilings: Ceilings, weights: str) -> StepCosts:
    """Those of the machine of measured ceilings, for a model whose matrices are mostly in the format
    `weights`."""
    kind = "cpu" if ceilings.device == "cpu" else "gpu"
    return replace(costs_of(kind), launch_s=launch_overhead_s(1, ceilings, graph=True))
