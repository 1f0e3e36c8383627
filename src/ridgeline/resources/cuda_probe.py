"""Measure a GPU's ceilings: read bandwidth, matrix peaks, what a launch costs, the link to the host; and
its caches.

`ceilings_from` makes rates of times and needs no GPU; `Workbench` is the one part that does. Work repeats
back to back between two events on the GPU, often enough that issuing the first of it does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any, Protocol

import torch

from ridgeline.resources.ceilings import FULL_PROBE_S, Ceilings
from ridgeline.resources.cuda import GPU, cuda_device, cuda_free_memory_bytes
from ridgeline.resources.cuda_read import BLOCK, read_sums
from ridgeline.resources.measurement import Measurement, typical
from ridgeline.types import CapacityError

SAMPLES = 5
LEAST_FP8_CAPABILITY = (8, 9)

_PROGRAMS_PER_MULTIPROCESSOR = (4, 6)
"""Grids of the read test, of which the faster counts; more than 6 programs do not fit at once."""

_GIB = 1 << 30
_LEAST_L2_SHARE = 8
"""Least working set in sizes of the L2. Of what the cache keeps from pass to pass, an eighth is too much."""

_CACHE_S = 0.1
_CACHE_PASSES = 64
"""Passes over a working set in one CUDA graph: a launch takes longer than reading some megabytes."""

_WIDEST_MATRIX = 8192
_NARROWEST_MATRIX = 2048
_LINK_BYTES = 32 << 20
_LAUNCHES = 1000

KINDS = (
    *(f"read-{programs}" for programs in _PROGRAMS_PER_MULTIPROCESSOR),
    *("bf16", "fp8", "int8", "fp32"),
    *("launch", "graph-launch", "host-to-device", "device-to-host"),
)
"""What the ceilings are made of. `read-n` reads with n programs on each multiprocessor; a survey also times
`cached-n`, which reads n bytes again and again."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the measured work is: bytes read, width of the square matrices, bytes over the host link,
    kernels in a chain."""

    read_bytes: int
    matrix_width: int
    link_bytes: int = _LINK_BYTES
    launches: int = _LAUNCHES


class Bench(Protocol):
    """Prepares and times one kind of work at a time."""

    def prepare(self, kind: str, sizes: Sizes) -> Callable[[], object] | None:
        """The work, ready to be run again and again; None where the GPU has no instructions for it."""
        ...

    def elapsed_s(self, work: Callable[[], object], times: int) -> float:
        """Seconds on the GPU of running `work` that many times back to back."""
        ...


def measure_gpu(seconds: float = FULL_PROBE_S, index: int | None = None) -> Ceilings:
    """Measure the ceilings of a GPU, `seconds` for each kind of work.

    Raises ConfigError when CUDA cannot be used, CapacityError when too little device memory is free.
    """
    with _on_gpu(index) as (bench, gpu, sizes):
        return ceilings_from(gpu, sizes, measure_times(bench, sizes, seconds), seconds)


def survey_gpu(
    seconds: float = FULL_PROBE_S, index: int | None = None
) -> tuple[Ceilings, tuple[Measurement, ...]]:
    """The ceilings of a GPU with the samples behind them, and its read bandwidth by working set.

    Raises as `measure_gpu` does.
    """
    with _on_gpu(index) as (bench, gpu, sizes):
        samples = measure_samples(bench, sizes, seconds)
        kinds = [f"cached-{size_bytes}" for size_bytes in cached_sizes(gpu, sizes)]
        cached = measure_samples(bench, sizes, min(seconds, _CACHE_S), kinds)
    times = {kind: median(found) for kind, found in samples.items()}
    return ceilings_from(gpu, sizes, times, seconds), measurements_from(sizes, samples | cached)


@contextmanager
def _on_gpu(index: int | None) -> Iterator[tuple[Workbench, GPU, Sizes]]:
    """A bench on the GPU; a lack of its memory in the body becomes a CapacityError."""
    gpu = cuda_device(index)
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    try:
        with torch.cuda.device(device):
            yield Workbench(device, gpu), gpu, choose_sizes(gpu, cuda_free_memory_bytes(device.index))
    except torch.cuda.OutOfMemoryError as error:
        raise CapacityError("the GPU's memory was taken by others while it was measured") from error
    finally:
        torch.cuda.empty_cache()  # what the measurements took is not kept from other processes


def choose_sizes(gpu: GPU, free_bytes: int) -> Sizes:
    """Work that caches hardly help and that leaves most of the free memory alone. Raises CapacityError."""
    wanted = min(max(64 * gpu.l2_bytes, _GIB), 4 * _GIB)
    read_bytes = min(wanted, free_bytes // 4) // (4 * BLOCK) * (4 * BLOCK)
    least = max(_LEAST_L2_SHARE * gpu.l2_bytes, 3 * 4 * _NARROWEST_MATRIX**2)
    if read_bytes < least:
        need = 4 * least >> 20
        raise CapacityError(f"{free_bytes >> 20} MiB of GPU memory are free; measuring it takes {need} MiB")
    width = _WIDEST_MATRIX
    while 3 * 4 * width**2 > free_bytes // 2:
        width //= 2
    return Sizes(read_bytes, width)


def measure_times(bench: Bench, sizes: Sizes, seconds: float) -> dict[str, float]:
    """Seconds of each of KINDS, the median of its samples; those without instructions are missing."""
    return {kind: median(found) for kind, found in measure_samples(bench, sizes, seconds).items()}


def measure_samples(
    bench: Bench, sizes: Sizes, seconds: float, kinds: Sequence[str] = KINDS
) -> dict[str, list[float]]:
    """Samples of the seconds that each of `kinds` takes; those without instructions are missing."""
    samples: dict[str, list[float]] = {}
    for kind in kinds:
        work = bench.prepare(kind, sizes)
        if work is not None:
            samples[kind] = _samples_s(bench, work, seconds)
        del work  # its memory is needed for the next
    return samples


def _samples_s(bench: Bench, work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of running `work` once: SAMPLES of them, which together take about `seconds`."""
    bench.elapsed_s(work, 1)  # compiles, loads libraries and wakes the clocks
    once_s = bench.elapsed_s(work, 1)
    times = max(math.ceil(seconds / SAMPLES / max(once_s, 1e-6)), 1)
    return [bench.elapsed_s(work, times) / times for _ in range(SAMPLES)]


def cached_sizes(gpu: GPU, sizes: Sizes) -> tuple[int, ...]:
    """Working sets around the size of the L2, in bytes, all smaller than what the read test walks through."""
    step = 4 * BLOCK
    wanted = (max(gpu.l2_bytes * eighths // 8 // step, 1) * step for eighths in (1, 2, 4, 8, 16, 32, 64))
    return tuple(sorted({size_bytes for size_bytes in wanted if size_bytes < sizes.read_bytes}))


def measurements_from(sizes: Sizes, samples: dict[str, list[float]]) -> tuple[Measurement, ...]:
    """The rates and costs that the samples of KINDS and of `cached-n` mean."""
    matrix_ops = 2 * sizes.matrix_width**3
    fastest = min(
        (kind for kind in samples if kind.startswith("read-")), key=lambda kind: median(samples[kind])
    )
    found: list[Measurement] = []
    for kind, times in samples.items():
        name, _, detail = kind.partition("-")
        if kind == fastest:
            how = f"{detail} programs on each multiprocessor"
            found.append(typical("memory read", "B/s", [sizes.read_bytes / s for s in times], how=how))
        elif name == "cached":
            rates = [int(detail) * _CACHE_PASSES / s for s in times]
            found.append(typical("cache read", "B/s", rates, bytes_each=int(detail)))
        elif name in ("launch", "graph"):
            found.append(typical(kind, "s", [s / sizes.launches for s in times]))
        elif name in ("host", "device"):
            found.append(typical(kind, "B/s", [sizes.link_bytes / s for s in times]))
        elif name != "read":
            found.append(typical(kind, "op/s", [matrix_ops / s for s in times]))
    return tuple(found)


def ceilings_from(gpu: GPU, sizes: Sizes, times: dict[str, float], seconds: float) -> Ceilings:
    """The rates and costs that the times of KINDS mean."""
    matrix_ops = 2 * sizes.matrix_width**3
    return Ceilings(
        read_bytes_per_s=sizes.read_bytes / min(s for kind, s in times.items() if kind.startswith("read-")),
        int8_ops_per_s=matrix_ops / times.get("int8", math.inf),
        bf16_flops_per_s=matrix_ops / times.get("bf16", math.inf),
        fp32_flops_per_s=matrix_ops / times["fp32"],
        fp8_flops_per_s=matrix_ops / times.get("fp8", math.inf),
        launch_s=times["launch"] / sizes.launches,
        graph_launch_s=times["graph-launch"] / sizes.launches,
        host_to_device_bytes_per_s=sizes.link_bytes / times["host-to-device"],
        device_to_host_bytes_per_s=sizes.link_bytes / times["device-to-host"],
        device="cuda",
        threads=gpu.multiprocessors,
        isa=gpu.isa,
        machine=gpu.description,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds_each=seconds,
    )


# --------------------------------------------------------------------------------------- on the GPU


class Workbench:
    """The work itself on a PyTorch device. Preparing, all but timing and graphs, works on a CPU as well."""

    def __init__(self, device: torch.device, gpu: GPU) -> None:
        self._device = device
        self._gpu = gpu
        self._random = torch.Generator(device).manual_seed(0)

    def elapsed_s(self, work: Callable[[], object], times: int) -> float:
        event: Any = torch.cuda.Event  # PyTorch leaves it without types
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def prepare(self, kind: str, sizes: Sizes) -> Callable[[], object] | None:
        name, _, detail = kind.partition("-")
        if name == "read":
            return self._read(sizes.read_bytes, int(detail) * self._gpu.multiprocessors)
        if name == "cached":
            return self._graph(self._passes(int(detail)))
        if kind == "launch":
            return self._launches(sizes.launches)
        if kind == "graph-launch":
            return self._graph(self._launches(sizes.launches))
        if kind in ("host-to-device", "device-to-host"):
            return self._copy(sizes.link_bytes, to_device=kind == "host-to-device")
        return self._product(kind, sizes.matrix_width)

    def _read(self, size_bytes: int, programs: int) -> Callable[[], object]:
        x = self._normal(size_bytes // 4)
        sums = torch.empty(programs, device=self._device)
        return lambda: read_sums(x, sums)

    def _passes(self, size_bytes: int) -> Callable[[], object]:
        """Reads the same values again and again."""
        read = self._read(size_bytes, _PROGRAMS_PER_MULTIPROCESSOR[0] * self._gpu.multiprocessors)

        def passes() -> None:
            for _ in range(_CACHE_PASSES):
                read()

        return passes

    def _launches(self, count: int) -> Callable[[], object]:
        """A chain of kernels that read one block each: launched as the executor launches its own."""
        x, total = self._normal(BLOCK), torch.empty(1, device=self._device)

        def chain() -> None:
            for _ in range(count):
                read_sums(x, total)

        return chain

    def _graph(self, work: Callable[[], object]) -> Callable[[], object]:
        work()  # what is compiled and loaded on first use must not happen while the graph records
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Another thread of this process may be using the GPU for something else.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()

        def replay(kept: object = work) -> None:  # the tensors whose addresses are in the graph live on
            graph.replay()

        return replay

    def _copy(self, size_bytes: int, to_device: bool) -> Callable[[], object]:
        pinned = self._device.type == "cuda"  # the driver copies only such memory at the link's speed
        host = torch.ones(size_bytes, dtype=torch.uint8, pin_memory=pinned)
        there = torch.ones(size_bytes, dtype=torch.uint8, device=self._device)
        target, source = (there, host) if to_device else (host, there)
        return lambda: target.copy_(source, non_blocking=True)

    def _product(self, kind: str, width: int) -> Callable[[], object] | None:
        """A product of two square matrices. The operands are random: a GPU given zeros draws less power and
        holds higher clocks. The second lies column by column where the instructions want that."""
        if kind == "fp8":
            if self._gpu.capability < LEAST_FP8_CAPABILITY:
                return None
            a, b = (self._matrix(width).to(torch.float8_e4m3fn) for _ in range(2))
            one = torch.ones((), device=self._device)
            return lambda: torch._scaled_mm(
                a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=self._device.type == "cuda"
            )
        if kind == "int8":
            a, b = (self._matrix(width).mul(40).clamp(-127, 127).to(torch.int8) for _ in range(2))
            return lambda: torch._int_mm(a, b.t())
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
        a, b = (self._matrix(width).to(dtype) for _ in range(2))
        return lambda: _exact_mm(a, b)

    def _normal(self, count: int) -> torch.Tensor:
        return torch.randn(count, device=self._device, generator=self._random)

    def _matrix(self, width: int) -> torch.Tensor:
        return self._normal(width * width).view(width, width)


def _exact_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, float32 without the shortcut of TF32 whatever the process has chosen."""
    settings: Any = torch.backends.cuda.matmul
    # From 2.9 on PyTorch has a new setting, and refuses to read the old one where the new one was used.
    name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    chosen = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        return torch.mm(a, b)
    finally:
        setattr(settings, name, chosen)
