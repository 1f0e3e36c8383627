"""What this process really has: processor, cores, caches and free memory, container limits included."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ridgeline.types import ConfigError

_CPUS = Path("/sys/devices/system/cpu")
_UNLIMITED_BYTES = 1 << 60
"""cgroup v1 writes a number near 2^63 where there is no limit."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware as measurements on it are filed: the processor and how much of it there is."""

    cpu: str
    physical_cores: int
    memory_bytes: int

    @property
    def name(self) -> str:
        cores = f"{self.physical_cores} core{'s' if self.physical_cores != 1 else ''}"
        return f"{self.cpu}, {cores}, {round(self.memory_bytes / 2**30)} GiB"


@functools.cache
def machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(_cpu_name(), cores().physical, _memory("MemTotal"))


@dataclass(frozen=True, slots=True)
class Cores:
    """How many cores there are, and what limits how many of them this process can use.

    `allowed` counts the physical cores of the affinity mask, `quota` is the cgroup's CPU quota in cores and
    `asked` what OMP_NUM_THREADS says; None where there is none.
    """

    logical: int
    physical: int
    allowed: int
    quota: float | None
    asked: int | None

    @property
    def usable(self) -> int:
        """Cores on which this process can run threads at full speed, at least 1.

        One per physical core of the affinity mask, at most the cgroup's CPU quota (whole cores: a fraction
        would have one thread stopped while the others wait for it), at most OMP_NUM_THREADS.
        """
        limits = [self.allowed]
        if self.quota is not None:
            limits.append(int(self.quota))
        if self.asked is not None:
            limits.append(self.asked)
        return max(min(limits), 1)


def cores() -> Cores:
    """The cores as they are now: affinity and quota can change while a process runs."""
    logical = os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return Cores(
        logical=logical,
        physical=_physical_cores(set(range(logical))),
        allowed=_physical_cores(_affinity()),
        quota=_cpu_quota(),
        asked=int(asked) if asked.isdecimal() and int(asked) > 0 else None,
    )


def usable_cores() -> int:
    """Cores on which this process can run threads at full speed, at least 1."""
    return cores().usable


def choose_isa() -> str:
    """The instruction-set level that kernels run at: RIDGELINE_ISA, else the best that this machine has.

    Raises ConfigError when RIDGELINE_ISA names a level that cannot run here.
    """
    from ridgeline.native import isa_levels

    levels = isa_levels()
    chosen = os.environ.get("RIDGELINE_ISA") or levels[0]
    if chosen not in levels:
        raise ConfigError(f"RIDGELINE_ISA is {chosen!r}; accepted on this machine: {', '.join(levels)}")
    return chosen


def free_memory_bytes() -> int:
    """Memory that can still be taken without swapping: the system's, or less where a cgroup limits it."""
    free = _memory("MemAvailable")
    for limit, used in _memory_limits():
        free = min(free, limit - used)
    return max(free, 0)


def resident_bytes() -> int:
    """Memory that this process has taken and touched; what it only maps of files is not counted where the
    system tells them apart."""
    found = re.search(r"^Anonymous:\s+(\d+) kB", _read(Path("/proc/self/smaps_rollup")), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    import psutil  # type: ignore[import-untyped]

    return int(psutil.Process().memory_info().rss)


def memory_limit_bytes() -> int | None:
    """The smallest memory limit of a cgroup that holds for this process; None where there is none."""
    return min((limit for limit, _ in _memory_limits()), default=None)


def huge_pages() -> str:
    """When the system backs memory with huge pages: always, madvise (where asked, as for weights) or never;
    empty where it does not say."""
    found = re.search(r"\[(\w+)\]", _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")))
    return found[1] if found else ""


def last_level_cache_bytes() -> int:
    """Size of all last-level caches together; 0 where the system does not say."""
    total, counted = 0, set[str]()
    for cpu in range(os.cpu_count() or 1):
        largest = max(_caches(_CPUS / f"cpu{cpu}/cache"), default=None)
        if largest is not None and largest[1] not in counted:
            counted.add(largest[1])
            total += largest[0]
    return total


# ---------------------------------------------------------------------------------------- processor


def _read(path: Path) -> str:
    """The text of a small system file, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    try:
        command = ["/usr/sbin/sysctl", "-n", name]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    first = _read(Path("/proc/cpuinfo")).partition("\n\n")[0]
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    name = facts.get("model name") or platform.processor() or platform.machine()
    # Virtual machines shorten the name; family and model still tell the generations apart.
    if "cpu family" in facts and "model" in facts:
        return f"{name} (family {facts['cpu family']} model {facts['model']})"
    if "CPU part" in facts:
        return f"{name} (implementer {facts.get('CPU implementer', '?')} part {facts['CPU part']})"
    return name


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int]) -> int:
    """How many physical cores the logical ones in `cpus` belong to."""
    if sys.platform == "darwin":
        performance = _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")
        return int(performance) if performance.isdecimal() else len(cpus)
    cores = set[str]()
    for cpu in cpus:
        topology = _CPUS / f"cpu{cpu}/topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.add(siblings or str(cpu))
    return max(len(cores), 1)


def _caches(folder: Path) -> Iterator[tuple[int, str]]:
    """(bytes, who shares it) of each cache that one logical core can see."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    for index in range(8):
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(folder / f"index{index}/size"))
        if size:
            shared = f"{index}:{_read(folder / f'index{index}/shared_cpu_list')}"
            yield int(size[1]) * units.get(size[2], 1), shared


# ------------------------------------------------------------------------------------------- memory


def _memory(fact: str) -> int:
    """MemTotal or MemAvailable in bytes."""
    found = re.search(rf"^{fact}:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.total if fact == "MemTotal" else memory.available)


# ------------------------------------------------------------------------------------------ cgroups


def _cgroup_folders(controller: str) -> list[Path]:
    """This process's cgroup for a controller and the ones above it, innermost first; v1 and v2."""
    if not sys.platform.startswith("linux"):
        return []
    groups: dict[str, str] = {}
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(","):
            groups[name] = path
    folders: list[Path] = []
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.partition(" ")
        legacy = kind == "cgroup" and controller in options.split(" ")[-1].split(",")
        group = groups.get(controller) if legacy else groups.get("") if kind == "cgroup2" else None
        if group is None:
            continue
        root, mount = left.split(" ")[3:5]
        inside = group if root == "/" else group.removeprefix(root) if group.startswith(root) else "/"
        folder = Path(mount) / inside.strip("/")
        folders += [folder, *(above for above in folder.parents if above.is_relative_to(mount))]
    return folders


def _cpu_quota() -> float | None:
    """The smallest CPU quota that holds for this process, in cores; None where there is none."""
    quotas: list[float] = []
    for folder in _cgroup_folders("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that the kernel cannot drop) of each cgroup that limits this process's memory."""
    for folder in _cgroup_folders("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if not (limit.isdecimal() and used.isdecimal()) or int(limit) >= _UNLIMITED_BYTES:
            continue
        files = re.findall(
            r"^(?:total_)?(?:in)?active_file (\d+)", _read(folder / "memory.stat"), re.MULTILINE
        )
        # v1 lists every figure twice, for the group and with the groups below; the totals come last.
        yield int(limit), max(int(used) - sum(int(n) for n in files[-2:]), 0)
