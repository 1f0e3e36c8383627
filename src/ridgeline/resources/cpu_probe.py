"""Measure a CPU: reading from its caches and its memory, arithmetic, and what its team of threads costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from ridgeline.native import (
    Team,
    probe_barrier,
    probe_cached_read,
    probe_peak,
    probe_read,
    probe_start,
)
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.machine import free_memory_bytes, last_level_cache_bytes, machine
from ridgeline.resources.measurement import Measurement, best, quickest, typical
from ridgeline.types import CapacityError

FORMATS = ("int8", "bf16", "fp32")

CACHED_BYTES = tuple(16 << 10 << 2 * step for step in range(7))
"""What each thread reads again and again, from what a first-level cache holds to 64 MiB."""

MOST_THREAD_COUNTS = 5
PAUSE_S = 2e-3
"""Longer than the team's threads wait awake for the next step."""

PASSES = 2
"""In which a set is read, as what other tenants do to a cache comes and goes."""

GRID_S = 0.05
COST_S = 0.1
"""Seconds for each working set of a cache, and for each cost."""

_WARM_S = 0.06
_CACHES_DEEP = 8
"""Working set in sizes of the last-level cache. A pass that a preempted thread breaks up finds there what the
pass before left, and looks faster than memory is: of a set of four caches, by a third."""

SHARED_BYTES = tuple(part << 21 + step for step in range(6) for part in (2, 3))
"""What each thread reads of a cache that all share: more than second-level caches hold, to 192 MiB."""

_NOTABLY_FASTER, _NOTABLE_SHARE = 1.2, 0.5

_MIN_WORKING_SET_BYTES = 128 << 20
_MAX_WORKING_SET_BYTES = 1 << 30


def working_set_bytes() -> int:
    """How much memory the read test walks through: enough that caches hardly help, at most half of what
    is free. Raises CapacityError when even that is too little."""
    wanted = _CACHES_DEEP * last_level_cache_bytes()
    wanted = min(max(wanted, _MIN_WORKING_SET_BYTES), _MAX_WORKING_SET_BYTES)
    free = free_memory_bytes()
    if free < 2 * _MIN_WORKING_SET_BYTES:
        need = 2 * _MIN_WORKING_SET_BYTES >> 20
        raise CapacityError(f"{free >> 20} MiB of memory are free; measuring the bandwidth takes {need} MiB")
    return min(wanted, free // 2)


def measure_ceilings(threads: int, isa: str, seconds: float) -> tuple[Measurement, ...]:
    """What `ceilings_from` needs, at one number of threads: memory, the peaks, the barrier.

    `seconds` for each access pattern and each peak. Beside each peak is the share of the threads' time in
    which the system let them run. Raises CapacityError when there is too little memory to measure.
    """
    with _team(threads, isa) as team:
        barrier = quickest("barrier", "s", probe_barrier(team, min(seconds, COST_S)), threads=threads)
        return (
            _memory(team, working_set_bytes(), seconds),
            *(found for name in FORMATS for found in _peak(team, isa, name, seconds)),
            barrier,
        )


def measure_levels(threads: int, isa: str, seconds: float = GRID_S) -> tuple[Measurement, ...]:
    """Reading by working set and number of threads, and the peaks by number of threads.

    Leaves out what `measure_ceilings` measures: memory and peaks at `threads`. Raises CapacityError.
    """
    found: list[Measurement] = []
    memory_bytes = working_set_bytes()
    for count in thread_counts(threads):
        with _team(count, isa) as team:
            for each in CACHED_BYTES:
                if each * count < memory_bytes:
                    rates = probe_cached_read(team, isa, each, seconds)
                    found.append(best("cache read", "B/s", rates, threads=count, bytes_each=each))
            if count != threads:
                found.append(_memory(team, memory_bytes, seconds))
                for name in FORMATS:
                    found += _peak(team, isa, name, 2 * seconds)[:1]
    return tuple(found)


def measure_starts(threads: int, isa: str, seconds: float = COST_S) -> tuple[Measurement, ...]:
    """What the start of a step takes: of a team that is awake, and of one that a pause let sleep."""
    with _team(threads, isa) as team:
        return (
            quickest("start", "s", probe_start(team, 0.0, seconds), threads=threads),
            quickest("start after a pause", "s", probe_start(team, PAUSE_S, seconds), threads=threads),
        )


def measure_cache(ceilings: Ceilings, seconds: float = GRID_S) -> tuple[float, float]:
    """How many bytes the last-level cache holds for all threads, as far as others leave it to them, and how
    many times as fast as memory it is read; 0 and 1 where it is not notably faster.

    Found by reading sets of growing size, `seconds` each: the system tells the size of a processor's cache,
    not what a virtual machine gets of it. Raises CapacityError when there is too little memory to measure.
    """
    threads, memory = ceilings.threads, ceilings.read_bytes_per_s
    most = working_set_bytes() // threads
    sets = [each for each in SHARED_BYTES if each <= most]
    rates = dict.fromkeys(sets, memory)
    with _team(threads, ceilings.isa) as team:
        for each in PASSES * sets:
            found = probe_cached_read(team, ceilings.isa, each, seconds / PASSES)
            rates[each] = max(rates[each], *found)
    return cache_from([(threads * each, rate / memory) for each, rate in rates.items()])


def cache_from(speeds: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Size and speed of a cache, from how many times as fast as memory sets of some bytes were read: the
    largest set of which a notable share was still in the cache tells its size (`StepCosts.cached_share`)."""
    best = max((speed for _, speed in speeds), default=1.0)
    if best < _NOTABLY_FASTER:
        return 0.0, 1.0
    shares = [(size, (1 - 1 / speed) / (1 - 1 / best)) for size, speed in speeds]
    size, share = max(one for one in shares if one[1] >= _NOTABLE_SHARE)
    return size / (2 - share), best


def ceilings_from(found: tuple[Measurement, ...], threads: int, isa: str, seconds: float) -> Ceilings:
    """The figures of `measure_ceilings`; the peak of a format that was not found is 0."""
    figures = {one.what: one.figure for one in found if one.threads == threads}
    return Ceilings(
        read_bytes_per_s=figures["memory read"],
        int8_ops_per_s=figures.get("int8", 0.0),
        bf16_flops_per_s=figures.get("bf16", 0.0),
        fp32_flops_per_s=figures["fp32"],
        barrier_s=figures["barrier"],
        threads=threads,
        isa=isa,
        machine=machine().name,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds_each=seconds,
    )


def thread_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4 … and `most`; of more than MOST_THREAD_COUNTS, the smallest and largest and some between."""
    doubling = [1 << step for step in range(most.bit_length()) if 1 << step < most]
    counts = [*doubling, most]
    while len(counts) > MOST_THREAD_COUNTS:
        del counts[len(counts) // 2]
    return tuple(counts)


@contextmanager
def _team(threads: int, isa: str) -> Iterator[Team]:
    """A team at work: only busy threads does the system spread over the cores."""
    team = Team(threads)
    try:
        probe_peak(team, isa, "fp32", _WARM_S)
        yield team
    finally:
        team.close()


def _memory(team: Team, memory_bytes: int, seconds: float) -> Measurement:
    """The access pattern that has the fastest pass."""
    found = (
        best("memory read", "B/s", rates, threads=team.threads, how=pattern)
        for pattern, rates in probe_read(team, memory_bytes, seconds)
    )
    return max(found, key=lambda one: one.figure)


def _peak(team: Team, isa: str, name: str, seconds: float) -> list[Measurement]:
    """The peak of a format, and what share of the time the threads could run; nothing if there is none."""
    start, start_cpu = time.perf_counter(), time.process_time()
    rates = probe_peak(team, isa, name, seconds)
    if not rates:
        return []
    share = (time.process_time() - start_cpu) / (time.perf_counter() - start) / team.threads
    return [
        best(name, "op/s", rates, threads=team.threads),
        typical("share of the cores", "share", [min(share, 1.0)], threads=team.threads, how=name),
    ]
