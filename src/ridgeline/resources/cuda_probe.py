"""Measure a GPU's ceilings: read bandwidth, matrix peaks, what a launch costs, the link to the host.

`ceilings_from` makes rates of times and needs no GPU; `Workbench` is the one part that does. Work repeats
back to back between two events on the GPU, often enough that issuing the first of it does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any, Protocol

import torch

from ridgeline.resources.ceilings import FULL_PROBE_S, Ceilings
from ridgeline.resources.cuda import GPU, cuda_device, cuda_free_memory_bytes
from ridgeline.resources.cuda_read import BLOCK, read_sums
from ridgeline.types import CapacityError

SAMPLES = 5
LEAST_FP8_CAPABILITY = (8, 9)

_PROGRAMS_PER_MULTIPROCESSOR = (4, 6)
"""Grids of the read test, of which the faster counts; more than 6 programs do not fit at once."""

_GIB = 1 << 30
_LEAST_L2_SHARE = 8
"""Least working set in sizes of the L2. Of what the cache keeps from pass to pass, an eighth is too much."""

_WIDEST_MATRIX = 8192
_NARROWEST_MATRIX = 2048
_LINK_BYTES = 32 << 20
_LAUNCHES = 1000

KINDS = (
    *(f"read-{programs}" for programs in _PROGRAMS_PER_MULTIPROCESSOR),
    *("bf16", "fp8", "int8", "fp32"),
    *("launch", "graph-launch", "host-to-device", "device-to-host"),
)
"""Everything that is timed. `read-n` reads with n programs on each multiprocessor."""


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
    gpu = cuda_device(index)
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    try:
        with torch.cuda.device(device):
            sizes = choose_sizes(gpu, cuda_free_memory_bytes(device.index))
            times = measure_times(Workbench(device, gpu), sizes, seconds)
    except torch.cuda.OutOfMemoryError as error:
        raise CapacityError("the GPU's memory was taken by others while it was measured") from error
    finally:
        torch.cuda.empty_cache()  # what the measurements took is not kept from other processes
    return ceilings_from(gpu, sizes, times, seconds)


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
    """Seconds of each of KINDS; those without instructions are missing."""
    times: dict[str, float] = {}
    for kind in KINDS:
        work = bench.prepare(kind, sizes)
        if work is not None:
            times[kind] = median_s(bench, work, seconds)
        del work  # its memory is needed for the next
    return times


def median_s(bench: Bench, work: Callable[[], object], seconds: float) -> float:
    """Seconds of running `work` once: the median of SAMPLES, which together take about `seconds`."""
    bench.elapsed_s(work, 1)  # compiles, loads libraries and wakes the clocks
    once_s = bench.elapsed_s(work, 1)
    times = max(math.ceil(seconds / SAMPLES / max(once_s, 1e-6)), 1)
    return median(bench.elapsed_s(work, times) / times for _ in range(SAMPLES))


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
