"""Measure the machine's ceilings, quickly for a figure beside an answer or in full for `ridgeline probe`.

Every function takes a `device`: "cuda" means the current GPU, whose threads and instruction set are not for
choosing, and everything else the CPU. They raise ConfigError where "cuda" cannot be used.
"""

from __future__ import annotations

from contextlib import suppress

from ridgeline.resources.ceilings import FULL_PROBE_S, Ceilings, load_ceilings, save_ceilings
from ridgeline.resources.cuda import cuda_device
from ridgeline.resources.machine import choose_isa, usable_cores
from ridgeline.resources.measurement import Measurement, together
from ridgeline.resources.paths import cache_dir
from ridgeline.resources.survey import Survey, load_survey, save_survey
from ridgeline.types import CapacityError

PASSES = 3
"""Of the full probe of a CPU, which takes its time in so many parts."""

QUICK_PROBE_S = 0.05
BESIDE_PROBE_S = 0.1
"""Seconds for each measurement beside a benchmark, which is measured before and after it."""


def measure(
    threads: int | None = None, isa: str | None = None, seconds: float = FULL_PROBE_S, device: str = "cpu"
) -> Ceilings:
    """Measure the ceilings, `seconds` for each access pattern, of which the best counts.

    Raises CapacityError when there is too little memory to measure.
    """
    if device == "cuda":
        from ridgeline.resources.cuda_probe import measure_gpu

        return measure_gpu(seconds)
    from ridgeline.resources.cpu_probe import ceilings_from, measure_ceilings

    threads, isa = threads or usable_cores(), isa or choose_isa()
    return ceilings_from(measure_ceilings(threads, isa, seconds), threads, isa, seconds)


def known_ceilings(
    threads: int | None = None, isa: str | None = None, device: str = "cpu"
) -> Ceilings | None:
    """The ceilings measured earlier, None if there are none; never measures."""
    return load_ceilings(threads, isa, cuda_device() if device == "cuda" else None)


def quick_ceilings(threads: int | None = None, isa: str | None = None, device: str = "cpu") -> Ceilings:
    """The cached ceilings, or quick measurements, which are then kept. Raises CapacityError."""
    known = known_ceilings(threads, isa, device)
    if known is not None:
        return known
    ceilings = measure(threads, isa, QUICK_PROBE_S, device)
    with suppress(CapacityError):  # where nothing can be written, the next process measures again
        save_ceilings(ceilings)
    return ceilings


def survey(
    threads: int | None = None, isa: str | None = None, force: bool = False, device: str = "cpu"
) -> Survey:
    """All measurements in full, from the cache unless there are none or `force` asks for fresh ones.

    They take about ten seconds; their ceilings are kept as those of the machine, where other work disturbed
    them only as far as they are better than what was known. Raises CapacityError when there is too little
    memory to measure.
    """
    gpu = cuda_device() if device == "cuda" else None
    threads, isa = (gpu.multiprocessors, gpu.isa) if gpu else (threads or usable_cores(), isa or choose_isa())
    known = None if force else load_survey(threads, isa, gpu)
    if known is not None:
        return known
    found = _survey_gpu() if gpu else _survey_cpu(threads, isa)
    with suppress(CapacityError):
        save_survey(found)
        save_ceilings(_to_keep(found, load_ceilings(threads, isa, gpu)))
    return found


def _to_keep(found: Survey, before: Ceilings | None) -> Ceilings:
    """Other work makes measurements slower: that is no news of the machine."""
    if before is None or found.disturbance is None:
        return found.ceilings
    return found.ceilings.best_with(before)


def _survey_cpu(threads: int, isa: str) -> Survey:
    """In several passes: what comes and goes within seconds, as other tenants do, is then in the spread, and
    the best of all passes is steadier than that of one."""
    from ridgeline.resources import cpu_probe

    passes = []
    for _ in range(PASSES):
        found = cpu_probe.measure_ceilings(threads, isa, FULL_PROBE_S / PASSES)
        found += cpu_probe.measure_levels(threads, isa, cpu_probe.GRID_S / PASSES)
        passes.append(found + cpu_probe.measure_starts(threads, isa, cpu_probe.COST_S / PASSES))
    whole = together(passes)
    return _with_disk(cpu_probe.ceilings_from(whole, threads, isa, FULL_PROBE_S), whole)


def _survey_gpu() -> Survey:
    from ridgeline.resources.cuda_probe import survey_gpu

    return _with_disk(*survey_gpu(FULL_PROBE_S))


def _with_disk(ceilings: Ceilings, found: tuple[Measurement, ...]) -> Survey:
    """The disk is measured where the models lie. A machine whose disk is full still has ceilings."""
    from ridgeline.resources.disk import measure_disk

    try:
        return Survey(ceilings, (*found, measure_disk(cache_dir() / "models")))
    except CapacityError as error:
        return Survey(ceilings, found, {"disk": str(error)})
