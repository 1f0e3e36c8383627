"""Measure the machine's ceilings: read bandwidth and the arithmetic peak of each number format.

Every function takes a `device`: "cuda" means the current GPU, whose threads and instruction set are not for
choosing, and everything else the CPU. They raise ConfigError where "cuda" cannot be used.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

from ridgeline.resources.ceilings import FULL_PROBE_S, Ceilings, load_ceilings, save_ceilings
from ridgeline.resources.cuda import cuda_device
from ridgeline.resources.machine import (
    choose_isa,
    free_memory_bytes,
    last_level_cache_bytes,
    machine,
    usable_cores,
)
from ridgeline.types import CapacityError

QUICK_PROBE_S = 0.05
BESIDE_PROBE_S = 0.1
"""Seconds for each measurement beside a benchmark, which is measured before and after it."""

_MIN_WORKING_SET_BYTES = 128 << 20
_MAX_WORKING_SET_BYTES = 1 << 30


def working_set_bytes() -> int:
    """How much memory the read test walks through: enough that caches hardly help, at most half of what
    is free. Raises CapacityError when even that is too little."""
    wanted = min(max(4 * last_level_cache_bytes(), _MIN_WORKING_SET_BYTES), _MAX_WORKING_SET_BYTES)
    free = free_memory_bytes()
    if free < 2 * _MIN_WORKING_SET_BYTES:
        need = 2 * _MIN_WORKING_SET_BYTES >> 20
        raise CapacityError(f"{free >> 20} MiB of memory are free; measuring the bandwidth takes {need} MiB")
    return min(wanted, free // 2)


def read_bandwidth(threads: int, seconds: float = FULL_PROBE_S) -> dict[str, float]:
    """Bytes per second of each access pattern, in `seconds` each."""
    from ridgeline.native import Team, probe_read

    team = Team(threads)
    try:
        return {name: rate * 1e9 for name, rate in probe_read(team, working_set_bytes(), seconds)}
    finally:
        team.close()


def measure(
    threads: int | None = None, isa: str | None = None, seconds: float = FULL_PROBE_S, device: str = "cpu"
) -> Ceilings:
    """Measure the ceilings, `seconds` for each access pattern, of which the best counts.

    Raises CapacityError when there is too little memory to measure.
    """
    if device == "cuda":
        from ridgeline.resources.cuda_probe import measure_gpu

        return measure_gpu(seconds)
    from ridgeline.native import Team, probe_peak

    threads = threads or usable_cores()
    isa = isa or choose_isa()
    bandwidth = max(read_bandwidth(threads, seconds).values())
    team = Team(threads)
    try:
        peaks = {kind: probe_peak(team, isa, kind) for kind in ("int8", "bf16", "fp32")}
    finally:
        team.close()
    return Ceilings(
        read_bytes_per_s=bandwidth,
        int8_ops_per_s=peaks["int8"],
        bf16_flops_per_s=peaks["bf16"],
        fp32_flops_per_s=peaks["fp32"],
        threads=threads,
        isa=isa,
        machine=machine().name,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds_each=seconds,
    )


def known_ceilings(
    threads: int | None = None, isa: str | None = None, device: str = "cpu"
) -> Ceilings | None:
    """The ceilings measured earlier, None if there are none; never measures."""
    return load_ceilings(threads, isa, cuda_device() if device == "cuda" else None)


def full_ceilings(
    threads: int | None = None, isa: str | None = None, force: bool = False, device: str = "cpu"
) -> Ceilings:
    """The full measurements, from the cache unless there are none or `force` asks for fresh ones.

    Raises CapacityError when there is too little memory to measure.
    """
    known = None if force else known_ceilings(threads, isa, device)
    if known is not None and known.full:
        return known
    return _measured(threads, isa, FULL_PROBE_S, device)


def quick_ceilings(threads: int | None = None, isa: str | None = None, device: str = "cpu") -> Ceilings:
    """The cached ceilings, or quick measurements, which are then kept. Raises CapacityError."""
    return known_ceilings(threads, isa, device) or _measured(threads, isa, QUICK_PROBE_S, device)


def _measured(threads: int | None, isa: str | None, seconds: float, device: str) -> Ceilings:
    ceilings = measure(threads, isa, seconds, device)
    with suppress(CapacityError):  # where nothing can be written, the next process measures again
        save_ceilings(ceilings)
    return ceilings
