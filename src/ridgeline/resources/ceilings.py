"""What the machine can do at most, as measured, and where those measurements are kept."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ridgeline.resources.machine import choose_isa, machine, usable_cores
from ridgeline.resources.paths import cache_dir, write_atomic

PROBE_VERSION = 1
"""Raised when the probe measures differently: older figures are then measured again."""

FULL_PROBE_S = 0.3
"""Seconds for each measurement of `ridgeline probe`; a quick probe takes less."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured limits of one machine at a number of threads and an instruction-set level.

    A multiply-add counts as two operations. A peak is 0 where the machine has no instructions for that
    format; `roofline` then charges such work at the fp32 peak. `seconds_each` says how long each
    measurement took, `measured_at` when (ISO 8601, UTC).
    """

    read_bytes_per_s: float
    int8_ops_per_s: float
    bf16_flops_per_s: float
    fp32_flops_per_s: float
    threads: int
    isa: str
    machine: str
    measured_at: str
    seconds_each: float = FULL_PROBE_S

    @property
    def full(self) -> bool:
        """Whether the measurements took long enough to compare others with."""
        return self.seconds_each >= FULL_PROBE_S

    def best_with(self, other: Ceilings) -> Ceilings:
        """The higher rate of each kind: whatever else ran on the machine only makes measurements slower."""
        rates = {name: max(getattr(self, name), getattr(other, name)) for name in _RATES}
        return replace(self, **rates)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_RATES = tuple(f.name for f in fields(Ceilings) if f.name.endswith("_per_s"))


def load_ceilings(threads: int | None = None, isa: str | None = None) -> Ceilings | None:
    """The ceilings measured earlier on this machine, None if there are none; never measures.

    `threads` defaults to the usable cores and `isa` to the level that the CPU executor chooses.
    """
    threads = threads or usable_cores()
    isa = isa or choose_isa()
    try:
        content = json.loads(_path(threads, isa).read_bytes())
        ceilings = Ceilings(**content)
    except (OSError, ValueError, TypeError):
        return None  # not measured, or a damaged file: measuring again mends both
    rates = [getattr(ceilings, name) for name in _RATES]
    if not all(isinstance(rate, int | float) and math.isfinite(rate) and rate >= 0 for rate in rates):
        return None
    known = ceilings.read_bytes_per_s > 0 and ceilings.fp32_flops_per_s > 0
    return ceilings if known and (ceilings.threads, ceilings.isa) == (threads, isa) else None


def save_ceilings(ceilings: Ceilings) -> Path:
    """Keep the ceilings for later processes; raises CapacityError when the cache cannot be written."""
    path = _path(ceilings.threads, ceilings.isa)
    write_atomic(path, (json.dumps(ceilings.to_json(), indent=2) + "\n").encode())
    return path


def _path(threads: int, isa: str) -> Path:
    name = hashlib.sha256(f"{PROBE_VERSION} {machine().name}".encode()).hexdigest()[:16]
    return cache_dir() / "ceilings" / f"{name}-{threads}-{isa}.json"
