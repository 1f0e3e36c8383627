"""What steps cost beside the ceilings: the distance between a bound and an expectation, as constants.

Those of a machine and a weight format are fitted to steps that were timed there (`step_fit`), and kept beside
its ceilings. Where nothing was timed, one set stands for each kind of machine; `docs/performance.md` has the
measurements that it is from, and how far from them predictions are.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ridgeline.resources.ceilings import PROBE_VERSION, Ceilings
from ridgeline.resources.paths import cache_dir, write_atomic
from ridgeline.resources.roofline import launch_overhead_s
from ridgeline.types import ConfigError

COSTS_VERSION = 5
"""Raised when the model of a step changes: older figures are then fitted again."""

SHARES = ("memory", "arithmetic", "attention_memory", "attention_arithmetic", "tile_share")
FITTED = (*SHARES, "step_s", "launch_s", "output_s")


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What a step reaches of the ceilings, and what it takes besides.

    Of the read bandwidth and of the arithmetic peaks these are shares, 0 to 1: of attention its own, of all
    other launches `memory` and `arithmetic`. These compute `tile_rows` rows in a turn, and of a full turn's
    time `tile_share` goes by with a single row, too: unpacking the weights. `step_s` goes by in every step,
    `launch_s` in every launch and `output_s` for every output, as tokens are drawn and taken in, the host's
    time included. A last-level cache holds `cache_bytes` of what is read in every step, and weights there are
    read `cache_speed` times as fast as from memory; 0 bytes where that is not known. `source` says where all
    of that is from.
    """

    memory: float
    arithmetic: float
    attention_memory: float
    attention_arithmetic: float
    source: str
    step_s: float = 0.0
    launch_s: float = 0.0
    output_s: float = 0.0
    cache_bytes: float = 0.0
    cache_speed: float = 1.0
    tile_rows: int = 1
    tile_share: float = 0.2

    def __post_init__(self) -> None:
        for name in SHARES:
            share = getattr(self, name)
            if not 0 < share <= 1:
                raise ConfigError(f"the share of {name} is {share}; accepted: more than 0, at most 1")
        for name in ("step_s", "launch_s", "output_s", "cache_bytes"):
            figure = getattr(self, name)
            if not 0 <= figure < math.inf:
                raise ConfigError(f"{name} is {figure}; accepted: 0 or more")
        for name in ("cache_speed", "tile_rows"):
            figure = getattr(self, name)
            if not 1 <= figure < math.inf:
                raise ConfigError(f"{name} is {figure}; accepted: 1 or more")

    def full_rows(self, rows: int) -> float:
        """The rows of full turns whose arithmetic takes as long as that of so many rows."""
        turns = -(-rows // self.tile_rows)
        return rows + self.tile_share * (turns * self.tile_rows - rows)

    def cached_share(self, moved_bytes: float) -> float:
        """Of the bytes that a step moves: those that are still in the last-level cache since the step before.

        All, up to the cache's size. Beyond it a cache that gives up what was read longest ago would hold none
        of what comes next. Real ones choose otherwise, and keep less and less up to twice their size.
        """
        return min(max(2 - moved_bytes / self.cache_bytes, 0.0), 1.0) if self.cache_bytes else 0.0


STEP_COSTS = {
    "cpu": StepCosts(
        memory=0.85,
        arithmetic=0.59,
        attention_memory=0.87,
        attention_arithmetic=0.5,
        step_s=0.41e-3,
        launch_s=3e-6,
        output_s=54e-6,
        source="fitted on 2 Zen 4 cores to steps of a made-up W4A8-g32 model (docs/performance.md)",
    ),
    "gpu": StepCosts(
        memory=0.75,
        arithmetic=0.5,
        attention_memory=0.75,
        attention_arithmetic=0.5,
        source="not measured by us: others publish 0.69 (A100) to 0.9 (RTX 4090) of the datasheet's "
        "bandwidth for decode at batch 1, and 0.4 to 0.5 of the peak for training; launches count "
        "where they were measured",
    ),
}
"""By kind of machine: of measured ceilings for the CPU, of the datasheet for GPUs."""


def costs_of(kind: str) -> StepCosts:
    """Those of a preset's kind; an Apple chip's GPU counts as a GPU."""
    return STEP_COSTS["cpu" if kind == "cpu" else "gpu"]


def costs_of_device(ceilings: Ceilings) -> StepCosts:
    """Those of its kind, for a machine of measured ceilings; what a launch costs a GPU is one of these."""
    if ceilings.device == "cpu":
        return costs_of("cpu")
    return replace(costs_of("gpu"), launch_s=launch_overhead_s(1, ceilings, graph=True))


def costs_here(ceilings: Ceilings, weights: str) -> StepCosts:
    """Those of the machine of measured ceilings, for a model whose matrices are mostly in the format
    `weights`: fitted ones where there are any, else those of its kind."""
    return load_costs(ceilings, weights) or costs_of_device(ceilings)


def load_costs(ceilings: Ceilings, weights: str) -> StepCosts | None:
    """What was fitted earlier on this machine for a weight format; None where nothing was."""
    try:
        return StepCosts(**json.loads(_path(ceilings, weights).read_bytes()))
    except (OSError, ValueError, TypeError, ConfigError):
        return None  # not fitted, or a damaged file: fitting again mends both


def save_costs(costs: StepCosts, ceilings: Ceilings, weights: str) -> Path:
    """Keep what was fitted for later processes; raises CapacityError when the cache cannot be written."""
    path = _path(ceilings, weights)
    write_atomic(path, (json.dumps(asdict(costs), indent=2) + "\n").encode())
    return path


def _path(ceilings: Ceilings, weights: str) -> Path:
    """Shares are of ceilings, so they hold for those of one version of the probe only."""
    subject = f"{COSTS_VERSION} {PROBE_VERSION} {ceilings.device} {ceilings.machine} {weights}"
    name = hashlib.sha256(subject.encode()).hexdigest()[:16]
    return cache_dir() / "step-costs" / f"{name}-{ceilings.threads}-{ceilings.isa}.json"
