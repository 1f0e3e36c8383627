"""What the machine can do at most, as measured, and where those measurements are kept."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ridgeline.resources.cuda import GPU
from ridgeline.resources.machine import choose_isa, machine, usable_cores
from ridgeline.resources.paths import cache_dir, write_atomic

PROBE_VERSION = 2
"""Raised when the probe measures differently: older figures are then measured again."""

FULL_PROBE_S = 0.3
"""Seconds for each measurement of `ridgeline probe`; a quick probe takes less."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured limits of one CPU or GPU.

    Of a CPU (`device` "cpu") at a number of threads and an instruction-set level; of a GPU (`device`
    "cuda") as a whole: there `threads` counts its multiprocessors and `isa` is its architecture (sm_90).
    A multiply-add counts as two operations. A peak is 0 where the hardware has no instructions for that
    format; `roofline` then charges such work at the fp32 peak. `launch_s` is what one kernel launch costs in
    a stream of many, `graph_launch_s` what one kernel costs in the replay of a CUDA graph; with the rates
    of the link to the host (page-locked memory) they are 0 for a CPU. `barrier_s` is what a CPU's threads
    take from the end of one operation to the start of the next, 0 for a GPU. `seconds_each` says how long
    each measurement took, `measured_at` when (ISO 8601, UTC).
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
    device: str = "cpu"
    fp8_flops_per_s: float = 0.0
    launch_s: float = 0.0
    graph_launch_s: float = 0.0
    host_to_device_bytes_per_s: float = 0.0
    device_to_host_bytes_per_s: float = 0.0
    barrier_s: float = 0.0

    def best_with(self, other: Ceilings) -> Ceilings:
        """The better figure of each kind: whatever else ran on the machine only makes measurements slower."""
        rates = {name: max(getattr(self, name), getattr(other, name)) for name in _RATES}
        costs = {name: min(getattr(self, name), getattr(other, name)) for name in _COSTS}
        return replace(self, **rates, **costs)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Ceilings:
        """Raises TypeError or ValueError for anything that `to_json` did not make."""
        ceilings = cls(**fields)
        figures = [getattr(ceilings, name) for name in _RATES + _COSTS]
        if not all(isinstance(f, int | float) and math.isfinite(f) and f >= 0 for f in figures):
            raise ValueError("a ceiling is not a finite number")
        if not (ceilings.read_bytes_per_s > 0 and ceilings.fp32_flops_per_s > 0):
            raise ValueError("a ceiling that every machine has is 0")
        return ceilings


_RATES = tuple(f.name for f in fields(Ceilings) if f.name.endswith("_per_s"))
_COSTS = ("launch_s", "graph_launch_s", "barrier_s")


def load_ceilings(
    threads: int | None = None, isa: str | None = None, gpu: GPU | None = None
) -> Ceilings | None:
    """The ceilings measured earlier on this machine, None if there are none; never measures.

    Those of `gpu`, or where none is named those of the CPU: there `threads` defaults to the usable cores
    and `isa` to the level that the CPU executor chooses.
    """
    if gpu is not None:
        device, threads, isa = "cuda", gpu.multiprocessors, gpu.isa
    else:
        device, threads, isa = "cpu", threads or usable_cores(), isa or choose_isa()
    try:
        content = json.loads(ceilings_path(threads, isa, gpu.description if gpu else None).read_bytes())
        ceilings = Ceilings.from_json(content)
    except (OSError, ValueError, TypeError):
        return None  # not measured, or a damaged file: measuring again mends both
    same = (ceilings.device, ceilings.threads, ceilings.isa) == (device, threads, isa)
    return ceilings if same else None


def save_ceilings(ceilings: Ceilings) -> Path:
    """Keep the ceilings for later processes; raises CapacityError when the cache cannot be written."""
    gpu = ceilings.machine if ceilings.device == "cuda" else None
    path = ceilings_path(ceilings.threads, ceilings.isa, gpu)
    write_atomic(path, (json.dumps(ceilings.to_json(), indent=2) + "\n").encode())
    return path


def ceilings_path(threads: int, isa: str, gpu: str | None) -> Path:
    """The file of the CPU's or of a GPU's ceilings. A GPU's are this machine's too: its launches and its
    link depend on both."""
    subject = f"{PROBE_VERSION} {machine().name}" + (f" {gpu}" if gpu else "")
    name = hashlib.sha256(subject.encode()).hexdigest()[:16]
    return cache_dir() / "ceilings" / f"{name}-{threads}-{isa}.json"
