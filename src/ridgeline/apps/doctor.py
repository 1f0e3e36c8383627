"""What is installed on this machine, what the engine would make of it, and what is in its way."""

from __future__ import annotations

import difflib
import os
import platform
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ridgeline.model.catalog import DEFAULT_MODEL, list_models
from ridgeline.resources import installation
from ridgeline.resources.ceilings import load_ceilings
from ridgeline.resources.cuda import GPU, choose_device, cuda_devices, cuda_driver, cuda_unavailable
from ridgeline.resources.energy import EnergySource, energy_source
from ridgeline.resources.installation import Package
from ridgeline.resources.machine import (
    Cores,
    choose_isa,
    cores,
    free_memory_bytes,
    huge_pages,
    machine,
    memory_limit_bytes,
)
from ridgeline.resources.paths import cache_dir
from ridgeline.types import ConfigError

SCARCE_MEMORY_BYTES = 1 << 30
"""Free memory below which hardly a model has room beside the process itself."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What was found and what to do about it, a line together. With a `fatal` one no model can be run."""

    found: str
    remedy: str
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Levels:
    """Instruction-set levels, best first: of the build, and those of them that this machine runs. `chosen` is
    None where RIDGELINE_ISA names none of these, and all is empty where the native module does not load."""

    built: tuple[str, ...] = ()
    usable: tuple[str, ...] = ()
    chosen: str | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """`limit_bytes` is the cgroup's; `available_bytes` keeps to it."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None
    huge_pages: str


@dataclass(frozen=True, slots=True)
class Cuda:
    """The GPUs that can be used, or the reason why none can. `driver` is a version, empty if unknown."""

    gpus: tuple[GPU, ...]
    driver: str | None
    unavailable: str | None


@dataclass(frozen=True, slots=True)
class Cache:
    """The folder of models and measurements. `packed` models have packed weights in `packed_path`, which is
    empty where the native module does not load. `ceilings_age_days` is None where nothing was measured for
    this number of threads and this level."""

    path: str
    writable: bool
    free_bytes: int
    models: int
    models_bytes: int
    packed: int
    packed_bytes: int
    packed_bound_bytes: int
    packed_path: str
    ceilings_age_days: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """`threads` and `device` are what an engine would take that is not told otherwise, and `energy` is what
    counts its joules; `version` is None in a source tree."""

    version: str | None
    python: str
    platform: str
    processor: str
    levels: Levels
    cores: Cores
    threads: int
    memory: Memory
    cuda: Cuda
    device: str | None
    energy: EnergySource
    cache: Cache
    packages: tuple[Package, ...]
    environment: dict[str, str]
    problems: tuple[Problem, ...]

    @property
    def runs(self) -> bool:
        """Whether a model can be run."""
        return not any(problem.fatal for problem in self.problems)


def examine(threads: int | None = None, device: str | None = None, settings: Collection[str] = ()) -> Report:
    """Look at everything; nothing is measured, fetched or changed.

    `threads` and `device` are what the user asks of the engine, `settings` the environment variables with our
    prefix that mean something.
    """
    levels, broken = _levels()
    found_cores = cores()
    threads = threads or found_cores.usable
    memory = Memory(machine().memory_bytes, free_memory_bytes(), memory_limit_bytes(), huge_pages())
    cuda = Cuda(cuda_devices(), cuda_driver(), cuda_unavailable())
    chosen, refused = _device(device or "auto")
    cache = _cache(threads, levels)
    packages = tuple(installation.packages())
    problems = [
        *broken,
        *_level_problems(levels),
        *refused,
        *_package_problems(packages),
        *_core_problems(found_cores, threads),
        *_memory_problems(memory),
        *_cuda_problems(cuda),
        *_cache_problems(cache),
        *_setting_problems(settings),
    ]
    return Report(
        version=installation.package_version(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=platform.platform(),
        processor=machine().cpu,
        levels=levels,
        cores=found_cores,
        threads=threads,
        memory=memory,
        cuda=cuda,
        device=chosen,
        energy=energy_source(chosen or "cpu"),
        cache=cache,
        packages=packages,
        environment=installation.environment(),
        problems=tuple(problems),
    )


# ----------------------------------------------------------------------------------------------- facts


def _levels() -> tuple[Levels, list[Problem]]:
    try:
        from ridgeline.native import isa_levels
    except ImportError as error:
        reason = f"the native module does not load ({error})"
        return Levels(), [Problem(reason, "install ridgeline again: pip install --force-reinstall", True)]
    built, usable = tuple(isa_levels(built=True)), tuple(isa_levels())
    try:
        return Levels(built, usable, choose_isa()), []
    except ConfigError as error:
        return Levels(built, usable), [Problem(str(error), "unset it, or name one of these", True)]


def _device(asked: str) -> tuple[str | None, list[Problem]]:
    try:
        return choose_device(asked), []
    except ConfigError as error:
        return None, [Problem(str(error), "unset RIDGELINE_DEVICE to use the CPU", True)]


def _cache(threads: int, levels: Levels) -> Cache:
    folder = cache_dir()
    there = next(above for above in (folder, *folder.parents) if above.exists())
    models = list_models()
    ceilings = load_ceilings(threads, levels.chosen) if levels.chosen else None
    return Cache(
        path=str(folder),
        writable=os.access(there, os.W_OK | os.X_OK),
        free_bytes=shutil.disk_usage(there).free,
        models=len(models),
        models_bytes=sum(model.size_bytes for model in models),
        **_packed(levels),
        ceilings_age_days=_age_days(ceilings.measured_at) if ceilings is not None else None,
    )


def _packed(levels: Levels) -> dict[str, Any]:
    """The fields of packed weights."""
    if not levels.built:
        return {"packed": 0, "packed_bytes": 0, "packed_bound_bytes": 0, "packed_path": ""}
    from ridgeline.execution.cpu.packed_cache import PackedCache

    usage = PackedCache().usage()
    return {
        "packed": usage.files,
        "packed_bytes": usage.used_bytes,
        "packed_bound_bytes": usage.bound_bytes,
        "packed_path": str(usage.folder),
    }


def _age_days(measured_at: str) -> float | None:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(measured_at)).total_seconds() / 86400
    except (TypeError, ValueError):
        return None  # written by hand: as good as not measured


# -------------------------------------------------------------------------------------------- problems


def _level_problems(levels: Levels) -> Iterator[Problem]:
    if levels.chosen is not None and levels.chosen != levels.usable[0]:
        found = f"RIDGELINE_ISA forces {levels.chosen} and this machine runs {levels.usable[0]}"
        yield Problem(found, "unset it for full speed")


def _package_problems(packages: Collection[Package]) -> Iterator[Problem]:
    for package in packages:
        if package.extra == "" and not package.fits:
            state = f"is {package.version}" if package.version else "is not installed"
            wanted = package.name + package.accepted
            yield Problem(f"{package.name} {state}", f"pip install '{wanted}'", package.version is None)


def _core_problems(found: Cores, threads: int) -> Iterator[Problem]:
    usable = f"{found.usable} of {found.physical} cores usable"
    if found.quota is not None and int(found.quota) < found.allowed:
        raised = "raise it (--cpus of a container) for more speed"
        if found.quota < 1:
            yield Problem(f"the cgroup's CPU quota of {found.quota:.2g} cores stops even one thread", raised)
        else:
            yield Problem(f"{usable}: the cgroup's CPU quota is {found.quota:.3g}", raised)
    if found.allowed < found.physical:
        yield Problem(
            f"{usable}: the affinity mask has {found.allowed}",
            "start it without taskset or a cpuset",
        )
    if found.asked is not None and found.asked == found.usable < found.allowed:
        yield Problem(f"{usable}: OMP_NUM_THREADS is {found.asked}", "unset it for more speed")
    if threads > found.usable:
        yield Problem(
            f"{threads} threads are asked for and {found.usable} cores are usable",
            "unset RIDGELINE_THREADS: threads that share a core wait for each other",
        )


def _memory_problems(memory: Memory) -> Iterator[Problem]:
    if memory.available_bytes < SCARCE_MEMORY_BYTES:
        limit = f" of the {memory.limit_bytes >> 20} MiB that the cgroup allows" if memory.limit_bytes else ""
        free = f"{memory.available_bytes >> 20} MiB of memory are free{limit}"
        yield Problem(free, "end other programs, or raise the limit (--memory of a container)")
    if memory.huge_pages == "never":
        yield Problem(
            "transparent huge pages are off, which slows reading weights",
            "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _cuda_problems(cuda: Cuda) -> Iterator[Problem]:
    if cuda.driver is not None and cuda.unavailable is not None:
        found, _, accepted = cuda.unavailable.partition("; accepted: ")
        yield Problem(f"there is an NVIDIA driver, but {found}", accepted)


def _cache_problems(cache: Cache) -> Iterator[Problem]:
    if not cache.writable:
        yield Problem(f"{cache.path} cannot be written", "set RIDGELINE_CACHE to a folder of your own")
    if not cache.models and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        pull = f"unset it and run `ridgeline pull {DEFAULT_MODEL}`, or name a file with --model"
        yield Problem("HF_HUB_OFFLINE is set and no model is in the cache", pull)


def _setting_problems(settings: Collection[str]) -> Iterator[Problem]:
    known = {*settings, *installation.SETTINGS}
    for name in os.environ:
        if name.startswith(installation.PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            remedy = f"perhaps {close[0]} is meant" if close else "`ridgeline VERB --help` lists the flags"
            yield Problem(f"{name} is set and means nothing", remedy)
