"""What steps make of the machine and its memory, added up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ridgeline.cache.kv import KVCache
from ridgeline.resources.roofline import Limits, mbu, mfu
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.types import StepWork, Work


@dataclass(slots=True)
class Usage:
    """Sums over the steps of one scheduler. What is in use is weighted by the time of the step that is
    launched with it."""

    scheduler: Scheduler
    steps: int = 0
    rows: int = 0
    busy_s: float = 0.0
    work: Work = field(default_factory=Work)
    kv_peak: float = 0.0
    kv_s: float = 0.0
    running_s: float = 0.0

    @property
    def cache(self) -> KVCache:
        return self.scheduler.cache

    def step(self, work: StepWork, seconds: float) -> None:
        """A step is launched."""
        used = self.cache.usage
        self.steps += 1
        self.rows += work.rows
        self.busy_s += seconds
        self.work = self.work + work.total
        self.kv_peak = max(self.kv_peak, used)
        self.kv_s += used * seconds
        self.running_s += len(self.scheduler.running) * seconds

    def figures(self, duration_s: float, limits: Limits) -> dict[str, Any]:
        """Ready for JSON; shares are 0 to 1. Without a step, those of steps are None."""
        busy = self.busy_s
        return {
            "steps": self.steps,
            "rows_per_step": self.rows / self.steps if self.steps else None,
            "busy": busy / duration_s if duration_s else None,
            "mbu_while_busy": mbu(self.work, busy, limits) if busy else None,
            "mfu_while_busy": mfu(self.work, busy, limits) if busy else None,
            "running": self.running_s / busy if busy else None,
            "kv_cache": self.kv_s / busy if busy else None,
            "kv_cache_peak": self.kv_peak,
        }
