"""What a soak was to be, what was seen, and whether it was good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from faults.clients import CLIENTS

SETTLE_MINUTES = 5.0
SLOPE_MB_PER_MINUTE = 1.0


@dataclass(frozen=True)
class Plan:
    """How long, and how rough: `kill_s` is the mean time between what is done to the engine, `sloth_s` the
    longest that anybody reads slowly, `rest_s` the time from one look at the house to the next."""

    minutes: float = 60.0
    clients: int = 16
    think_s: float = 0.3
    kill_s: float = 60.0
    sloth_s: float = 45.0
    rest_s: float = 240.0
    sample_s: float = 2.0
    seed: int = 0

    @property
    def rough_minutes(self) -> float:
        """After these the engine is left in peace."""
        return self.minutes / 2


@dataclass
class Sample:
    """What the two processes held at a moment; the engine's part is None while there is none."""

    minute: float
    state: str
    server_mb: float
    descriptors: int
    threads: int
    engine: int | None = None
    engine_mb: float | None = None


@dataclass
class Slope:
    """Least squares: MB per minute, with the standard error."""

    mb_per_minute: float
    error: float
    from_minute: float
    samples: int

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Slope | None:
        """None for a time too short to have a slope."""
        if len(points) < 30:
            return None
        minutes, mb = np.array(points).T
        away = minutes - minutes.mean()
        slope = float(away @ mb / (away @ away))
        left = mb - mb.mean() - slope * away
        error = float(np.sqrt(left @ left / (len(points) - 2) / (away @ away)))
        return cls(slope, error, float(minutes[0]), len(points))


@dataclass
class Report:
    """Everything that was seen."""

    plan: Plan
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    longest_s: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    hangs: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    rests: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    def fail(self, what: str) -> None:
        print(f"FAILED {what}", flush=True)
        self.failures.append(what[:4000])

    @property
    def server_slope(self) -> Slope | None:
        return Slope.of(
            [(each.minute, each.server_mb) for each in self.samples if each.minute >= SETTLE_MINUTES]
        )

    @property
    def engine_slope(self) -> Slope | None:
        """Of the engine's last life, which began before `rough_minutes`."""
        since = self.plan.rough_minutes + SETTLE_MINUTES
        points = [(each.minute, each.engine_mb) for each in self.samples if each.minute >= since]
        return Slope.of([(minute, mb) for minute, mb in points if mb is not None])

    def criteria(self) -> dict[str, bool]:
        slopes = [slope for slope in (self.server_slope, self.engine_slope) if slope is not None]
        kinds = {client.__name__ for client in CLIENTS} if self.plan.minutes >= 5 else {"asker"}
        rests = [rest for rest in self.rests if rest["minute"] >= SETTLE_MINUTES] or self.rests[-1:]
        things = {tuple(rest[who][what] for who in _WHO for what in _WHAT) for rest in rests}
        return {
            "nothing hung": not self.hangs,
            "every answer was right": not self.failures,
            "memory grew by less than 1 MB a minute": all(
                slope.mb_per_minute < SLOPE_MB_PER_MINUTE for slope in slopes
            ),
            "descriptors, threads and children were the same at every rest": len(things) == 1,
            "every kind of client came, and the engine was killed": kinds <= set(self.outcomes)
            and "engine killed" in self.faults,
            "the server drained and ended well": self.exit_code == 0,
        }

    def as_json(self) -> dict[str, Any]:
        slopes = {"server": self.server_slope, "engine": self.engine_slope}
        return {
            "criteria": self.criteria(),
            "slopes": {name: slope and asdict(slope) for name, slope in slopes.items()},
            **asdict(self),
        }

    def summary(self) -> str:
        lines = [f"{'ok  ' if held else 'FAIL'} {name}" for name, held in self.criteria().items()]
        for name, slope in (("server", self.server_slope), ("engine", self.engine_slope)):
            if slope is not None:
                described = f"{slope.mb_per_minute:+.3f} ± {slope.error:.3f} MB/min"
                lines.append(f"{name}: {described} from minute {slope.from_minute:.0f} on")
        lines.append(f"/health: longest {self.longest_s.get('health', 0.0):.2f} s")
        lines.append("done to the engine: " + _counted(self.faults))
        for name, counts in self.outcomes.items():
            lines.append(f"{name}: {_counted(counts)}; longest {self.longest_s[name]:.1f} s")
        lines += [f"failure: {failure[:300]}" for failure in self.failures[:10]]
        return "\n".join(lines)


_WHO = ("server", "engine")
_WHAT = ("descriptors", "threads", "children")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(counts).most_common())
