"""A GPU's facts, ceilings and memory: on a made-up GPU, and measured where there is one."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import Cli, command_line
from test_resources import CEILINGS, TOKEN_BYTES, demand

from ridgeline.cli.figures import known_ceilings
from ridgeline.resources import cuda, cuda_probe, disk, probe, roofline
from ridgeline.resources.ceilings import FULL_PROBE_S, Ceilings, load_ceilings, save_ceilings
from ridgeline.resources.cuda import GPU, choose_device, cuda_free_memory_bytes, cuda_unavailable
from ridgeline.resources.cuda_probe import (
    KINDS,
    Sizes,
    Workbench,
    cached_sizes,
    ceilings_from,
    choose_sizes,
    measure_samples,
    measure_times,
    measurements_from,
)
from ridgeline.resources.cuda_read import BLOCK, read_sums
from ridgeline.resources.measurement import Measurement, typical
from ridgeline.resources.memory import GPU_POOL_SHARE, plan_memory
from ridgeline.resources.survey import Survey
from ridgeline.types import CapacityError, ConfigError, Work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GIB = 1 << 30
MADE_UP = GPU("Made-up GPU", (9, 0), multiprocessors=132, memory_bytes=141 * 10**9, l2_bytes=60 << 20)
GPU_CEILINGS = dataclasses.replace(
    CEILINGS,
    read_bytes_per_s=4e12,
    int8_ops_per_s=1.5e15,
    bf16_flops_per_s=750e12,
    fp8_flops_per_s=1.4e15,
    fp32_flops_per_s=50e12,
    launch_s=8e-6,
    graph_launch_s=1.5e-6,
    host_to_device_bytes_per_s=50e9,
    device_to_host_bytes_per_s=45e9,
    device="cuda",
    threads=132,
    isa="sm_90",
    machine=MADE_UP.description,
)


class FakePyTorch:
    """What `resources.cuda` asks of PyTorch, the packages and the driver, on a machine made for the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpu: GPU | None = MADE_UP) -> None:
        self.packages = {"torch", "triton"}
        self.driver = True
        self.gpu = gpu
        self.free_bytes = 100 * GIB
        found = SimpleNamespace(
            is_available=lambda: self.gpu is not None,
            current_device=lambda: 0,
            device_count=lambda: 1,
            get_device_properties=lambda index: self.properties(),
            mem_get_info=lambda index: (self.free_bytes, 141 * 10**9),
            memory_reserved=lambda index: 7 * GIB,
            memory_allocated=lambda index: 5 * GIB,
        )
        self.torch = SimpleNamespace(cuda=found, version=SimpleNamespace(cuda="13.0"))
        monkeypatch.setitem(sys.modules, "torch", self.torch)
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (name in self.packages or None) if name in ("torch", "triton") else find_spec(name),
        )
        monkeypatch.setattr(ctypes, "CDLL", self.load)

    def load(self, name: str) -> object:
        if not self.driver:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    def properties(self) -> SimpleNamespace:
        assert self.gpu is not None
        major, minor = self.gpu.capability
        return SimpleNamespace(
            name=self.gpu.name,
            major=major,
            minor=minor,
            multi_processor_count=self.gpu.multiprocessors,
            total_memory=self.gpu.memory_bytes,
            L2_cache_size=self.gpu.l2_bytes,
        )


@pytest.fixture
def machine_with_gpu(monkeypatch: pytest.MonkeyPatch) -> FakePyTorch:
    return FakePyTorch(monkeypatch)


@pytest.fixture
def machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> FakePyTorch:
    return FakePyTorch(monkeypatch, gpu=None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path))
    return tmp_path


# --------------------------------------------------------------------------------------------- facts


def test_facts_of_a_gpu(machine_with_gpu: FakePyTorch) -> None:
    assert cuda_unavailable() is None
    assert cuda.cuda_device() == cuda.cuda_device(0) == MADE_UP
    assert (MADE_UP.isa, MADE_UP.description) == ("sm_90", "Made-up GPU, 132 multiprocessors, 131 GiB")
    with pytest.raises(ConfigError, match="index is 1; accepted: 0 to 0"):
        cuda.cuda_device(1)


def test_free_memory_counts_what_pytorch_holds_unused(machine_with_gpu: FakePyTorch) -> None:
    assert cuda_free_memory_bytes() == 102 * GIB


def test_a_driver_keeping_back_some_memory_is_the_same_gpu() -> None:
    other = dataclasses.replace(MADE_UP, memory_bytes=MADE_UP.memory_bytes - (50 << 20))
    assert other.description == MADE_UP.description


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_without_the_extra(machine_with_gpu: FakePyTorch, missing: str) -> None:
    machine_with_gpu.packages.remove(missing)
    assert cuda_unavailable() == ("the cuda extra is not installed; accepted: pip install 'ridgeline[cuda]'")


def test_without_a_driver_pytorch_is_not_even_imported(
    machine_without_gpu: FakePyTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_without_gpu.driver = False
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would raise
    assert cuda_unavailable() == "no NVIDIA driver is installed; accepted: cpu"


def test_reasons_that_pytorch_gives(machine_without_gpu: FakePyTorch) -> None:
    assert cuda_unavailable() == "CUDA finds no GPU; accepted: cpu"

    def too_old() -> bool:
        import warnings

        warnings.warn("The driver is too old (found version 11040). Please update it.", stacklevel=1)
        return False

    machine_without_gpu.torch.cuda.is_available = too_old
    assert cuda_unavailable() == "The driver is too old (found version 11040); accepted: cpu"
    machine_without_gpu.torch.version.cuda = None
    assert cuda_unavailable() == "the installed PyTorch is built without CUDA; accepted: a build for CUDA"


def test_an_old_gpu_is_refused(machine_with_gpu: FakePyTorch) -> None:
    machine_with_gpu.gpu = dataclasses.replace(MADE_UP, name="Old GPU", capability=(7, 5))
    assert cuda_unavailable() == "Old GPU has compute capability 7.5; accepted: 8.0 or newer"
    with pytest.raises(ConfigError, match=r"^device is 'cuda': Old GPU has"):
        cuda.cuda_device()


def test_choosing_a_device(machine_with_gpu: FakePyTorch) -> None:
    assert [choose_device(d) for d in ("auto", "cuda", "cpu", "reference")] == [
        "cuda",
        "cuda",
        "cpu",
        "reference",
    ]
    machine_with_gpu.packages.clear()
    assert choose_device("auto") == "cpu"
    with pytest.raises(ConfigError, match=r"^device is 'cuda': the cuda extra is not installed"):
        choose_device("cuda")


def test_the_package_knows_of_gpus_without_importing_pytorch() -> None:
    code = (
        "import sys; from ridgeline.resources import cuda, probe, ceilings, roofline; "
        "print({'torch', 'triton'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# --------------------------------------------------------------------------------------- measurements


@pytest.mark.parametrize("count", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 7 * BLOCK + 13, 16 * BLOCK])
@pytest.mark.parametrize("programs", [1, 3, 4])
def test_every_value_is_read_once_by_the_program_whose_turn_it_is(count: int, programs: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(count)
    held = torch.full((count + 8,), torch.nan, device=DEVICE)  # beyond the array lies something else
    x = held[:count].copy_(torch.randn(count, device=DEVICE, generator=generator))
    sums = torch.full((programs + 1,), torch.nan, device=DEVICE)
    read_sums(x, sums[:programs])
    padded = torch.zeros(-(-count // (BLOCK * programs)) * BLOCK * programs, dtype=torch.float64)
    padded[:count] = x
    turns = padded.view(-1, programs, BLOCK).sum(dim=(0, 2))
    torch.testing.assert_close(sums[:programs].double().cpu(), turns, rtol=1e-5, atol=1e-3)
    assert sums[:programs].double().sum().item() == pytest.approx(x.double().sum().item(), rel=1e-4, abs=1e-2)
    assert sums[programs].isnan()


class FakeBench:
    """Work that takes a stated time, plus a launch of 10 µs for whatever is timed together."""

    def __init__(self, once_s: dict[str, float]) -> None:
        self.once_s = once_s
        self.runs: dict[str, list[int]] = {}
        self.kind = ""

    def prepare(self, kind: str, sizes: Sizes) -> Callable[[], object] | None:
        self.kind = kind
        return (lambda: None) if kind in self.once_s else None

    def elapsed_s(self, work: Callable[[], object], times: int) -> float:
        done = self.runs.setdefault(self.kind, [])
        done.append(times)
        slow = 5.0 if len(done) in (1, 4) else 0.0  # the warm-up, and a hiccup in a sample
        return 10e-6 + times * self.once_s[self.kind] + slow


def test_times_are_medians_of_work_repeated_long_enough() -> None:
    once_s = dict.fromkeys(KINDS, 1e-3) | {"fp32": 0.5, "read-6": 2e-3}
    del once_s["fp8"]
    bench = FakeBench(once_s)
    times = measure_times(bench, Sizes(1 << 30, 8192), seconds=0.3)
    assert times == pytest.approx(once_s, rel=0.001)
    assert bench.runs["bf16"] == [1, 1, *[60] * 5]
    assert bench.runs["fp32"] == [1, 1, *[1] * 5]


def test_rates_from_times() -> None:
    times = {
        "read-4": 1.1e-3,
        "read-6": 1e-3,
        "bf16": 2e-3,
        "fp8": 1e-3,
        "int8": 1.25e-3,
        "fp32": 20e-3,
        "launch": 8e-3,
        "graph-launch": 1.5e-3,
        "host-to-device": 1e-3,
        "device-to-host": 2e-3,
    }
    assert set(times) == set(KINDS)
    sizes = Sizes(read_bytes=4 * 10**9, matrix_width=8000, link_bytes=50 * 10**6, launches=1000)
    found = ceilings_from(MADE_UP, sizes, times, seconds=0.3)
    assert (found.device, found.threads, found.isa) == ("cuda", 132, "sm_90")
    assert found.machine == MADE_UP.description
    assert found.seconds_each == 0.3
    assert found.read_bytes_per_s == pytest.approx(4e12)
    assert found.bf16_flops_per_s == pytest.approx(2 * 8000**3 / 2e-3)
    assert found.fp8_flops_per_s == pytest.approx(2 * 8000**3 / 1e-3)
    assert found.int8_ops_per_s == pytest.approx(2 * 8000**3 / 1.25e-3)
    assert found.fp32_flops_per_s == pytest.approx(2 * 8000**3 / 20e-3)
    assert (found.launch_s, found.graph_launch_s) == pytest.approx((8e-6, 1.5e-6))
    assert found.host_to_device_bytes_per_s == pytest.approx(50e9)
    assert found.device_to_host_bytes_per_s == pytest.approx(25e9)
    del times["fp8"]
    assert ceilings_from(MADE_UP, sizes, times, seconds=0.05).fp8_flops_per_s == 0


def test_samples_of_a_survey_become_measurements() -> None:
    once_s = dict.fromkeys(KINDS, 1e-3) | {"read-4": 2e-3, "cached-4096": 64e-9, "cached-8192": 128e-9}
    del once_s["fp8"]
    sizes = Sizes(read_bytes=4 * 10**9, matrix_width=8000, link_bytes=50 * 10**6, launches=1000)
    samples = measure_samples(FakeBench(once_s), sizes, 0.3, [*KINDS, "cached-4096", "cached-8192"])
    found = {(one.what, one.bytes_each): one for one in measurements_from(sizes, samples)}
    assert {unit: sum(one.unit == unit for one in found.values()) for unit in ("B/s", "op/s", "s")} == {
        "B/s": 5,
        "op/s": 3,
        "s": 2,
    }
    figures = {key: one.figure for key, one in found.items()}
    assert figures["memory read", 0] == pytest.approx(4e12, rel=0.001)
    assert found["memory read", 0].how == "6 programs on each multiprocessor"
    assert figures["int8", 0] == pytest.approx(2 * 8000**3 / 1e-3, rel=0.001)
    assert figures["graph-launch", 0] == pytest.approx(1e-6, rel=0.001)
    assert figures["host-to-device", 0] == pytest.approx(50e9, rel=0.001)
    assert figures["cache read", 4096] == pytest.approx(4096 * 64 / 64e-9, rel=0.05)
    assert figures["cache read", 8192] == pytest.approx(figures["cache read", 4096], rel=0.05)
    assert all(len(one.samples) == 5 for one in found.values())
    assert found["int8", 0].spread > 0.5  # the hiccup shows


def test_working_sets_lie_around_the_cache() -> None:
    sizes = choose_sizes(MADE_UP, 130 * GIB)
    sets = cached_sizes(MADE_UP, sizes)
    assert len(sets) == 7
    assert sets[0] < MADE_UP.l2_bytes / 7
    assert 7 * MADE_UP.l2_bytes < sets[-1] < sizes.read_bytes
    assert all(size_bytes % (4 * BLOCK) == 0 for size_bytes in sets)
    assert len(cached_sizes(dataclasses.replace(MADE_UP, l2_bytes=0), sizes)) == 1


def test_a_working_set_is_read_in_passes() -> None:
    few = dataclasses.replace(MADE_UP, multiprocessors=1)
    bench = Workbench(torch.device(DEVICE), few)
    read: list[int] = []
    bench._read = lambda size_bytes, programs: lambda: read.append(size_bytes)  # type: ignore[method-assign]
    bench._passes(4 * BLOCK)()
    assert read == [4 * BLOCK] * cuda_probe._CACHE_PASSES


def test_sizes_follow_the_cache_and_the_free_memory() -> None:
    roomy = choose_sizes(MADE_UP, 130 * GIB)
    assert roomy.matrix_width == 8192
    assert 60 * MADE_UP.l2_bytes < roomy.read_bytes <= 4 * GIB
    small_cache = dataclasses.replace(MADE_UP, l2_bytes=4 << 20)
    assert choose_sizes(small_cache, 130 * GIB).read_bytes == GIB
    for free in (GIB, 2 * GIB, 3 * GIB):
        sizes = choose_sizes(small_cache, free)
        assert sizes.read_bytes <= free // 4
        assert sizes.read_bytes % (4 * BLOCK) == 0
        assert 3 * 4 * sizes.matrix_width**2 <= free // 2
    with pytest.raises(CapacityError, match="1024 MiB of GPU memory are free; measuring it takes 1920 MiB"):
        choose_sizes(MADE_UP, GIB)
    with pytest.raises(CapacityError):
        choose_sizes(dataclasses.replace(MADE_UP, l2_bytes=0), 100 << 20)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "graph-launch"])
def test_work_can_be_prepared_and_repeated(kind: str) -> None:
    few = dataclasses.replace(MADE_UP, multiprocessors=1)
    bench = Workbench(torch.device(DEVICE), few)
    work = bench.prepare(kind, Sizes(4 * 10 * BLOCK, 64, link_bytes=1000, launches=3))
    assert work is not None
    for _ in range(2):
        result = work()
    if isinstance(result, torch.Tensor) and kind in ("int8", "fp8", "bf16", "fp32"):
        assert result.shape == (64, 64)
        dtypes = {"int8": torch.int32, "fp32": torch.float32}
        assert result.dtype == dtypes.get(kind, torch.bfloat16)
        assert result.double().std() > 1


def test_fp8_is_left_out_where_the_gpu_has_no_instructions() -> None:
    older = dataclasses.replace(MADE_UP, capability=(8, 6))
    assert Workbench(torch.device("cpu"), older).prepare("fp8", Sizes(4 * BLOCK, 64)) is None


def test_the_fp32_peak_leaves_the_choice_of_tf32_as_it_was() -> None:
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        cuda_probe._exact_mm(torch.ones(2, 2), torch.ones(2, 2))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(chosen)


def test_a_gpu_that_fills_up_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> dict[str, float]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")

    monkeypatch.setattr(cuda_probe, "cuda_free_memory_bytes", lambda index: 100 * GIB)
    monkeypatch.setattr(cuda_probe, "cuda_device", lambda index: MADE_UP)
    monkeypatch.setattr(cuda_probe, "Workbench", lambda *args: None)
    monkeypatch.setattr(cuda_probe, "measure_times", full)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    with pytest.raises(CapacityError, match="memory was taken by others"):
        cuda_probe.measure_gpu()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU that CUDA can use")
def test_a_real_gpu_is_plausible(cache: Path) -> None:
    quick = probe.quick_ceilings(device="cuda")
    assert 1e11 < quick.read_bytes_per_s < 2e13
    assert 1e12 < quick.fp32_flops_per_s < quick.bf16_flops_per_s < 1e16
    assert quick.int8_ops_per_s > quick.fp32_flops_per_s
    assert quick.fp8_flops_per_s == 0 or quick.fp8_flops_per_s > quick.bf16_flops_per_s
    assert 1e-7 < quick.graph_launch_s < quick.launch_s < 1e-3
    assert min(quick.host_to_device_bytes_per_s, quick.device_to_host_bytes_per_s) > 1e9
    assert probe.quick_ceilings(device="cuda") == quick


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU that CUDA can use")
def test_a_survey_of_a_real_gpu(cache: Path) -> None:
    found = probe.survey(device="cuda")
    read = {one.bytes_each: one.figure for one in found.of("cache read")}
    assert len(read) >= 4
    assert read[min(read)] > found.ceilings.read_bytes_per_s
    assert found.whole("disk") or "disk" in found.absent
    assert probe.survey(device="cuda") == found


# ------------------------------------------------------------------------------------------ ceilings


def test_ceilings_of_cpu_and_gpu_lie_side_by_side(cache: Path) -> None:
    files = {save_ceilings(CEILINGS), save_ceilings(GPU_CEILINGS)}
    assert len(files) == 2
    assert load_ceilings(2, "portable") == CEILINGS
    assert load_ceilings(gpu=MADE_UP) == GPU_CEILINGS
    assert load_ceilings(132, "sm_90") is None
    assert load_ceilings(gpu=dataclasses.replace(MADE_UP, name="Another GPU")) is None


def test_files_from_before_gpus_are_still_read(cache: Path) -> None:
    path = save_ceilings(CEILINGS)
    old = CEILINGS.to_json()
    for name in ("device", "fp8_flops_per_s", "launch_s", "graph_launch_s", "barrier_s"):
        del old[name]
    path.write_text(json.dumps(old), encoding="utf-8")
    assert load_ceilings(2, "portable") == CEILINGS
    path.write_text(json.dumps({**old, "launch_s": "fast"}), encoding="utf-8")
    assert load_ceilings(2, "portable") is None


def test_the_better_of_two_measurements_counts() -> None:
    other = dataclasses.replace(GPU_CEILINGS, read_bytes_per_s=3e12, launch_s=6e-6, graph_launch_s=2e-6)
    best = GPU_CEILINGS.best_with(other)
    assert (best.read_bytes_per_s, best.launch_s, best.graph_launch_s) == (4e12, 6e-6, 1.5e-6)


def test_a_gpu_is_measured_once(
    machine_with_gpu: FakePyTorch, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known_ceilings(None, device="cuda") is None
    asked: list[float] = []

    def measure(seconds: float) -> Ceilings:
        asked.append(seconds)
        return dataclasses.replace(GPU_CEILINGS, seconds_each=seconds)

    monkeypatch.setattr(cuda_probe, "measure_gpu", measure)
    for _ in range(2):
        quick = known_ceilings(None, measure=True, device="cuda")
        assert quick is not None
        assert quick.device == "cuda"
    assert asked == [probe.QUICK_PROBE_S]


def test_a_gpu_is_surveyed_once_and_its_ceilings_are_kept(
    machine_with_gpu: FakePyTorch, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def survey_gpu(seconds: float) -> tuple[Ceilings, tuple[Measurement, ...]]:
        asked.append(seconds)
        return GPU_CEILINGS, (typical("memory read", "B/s", [3.9e12, 4e12, 4.1e12]),)

    monkeypatch.setattr(cuda_probe, "survey_gpu", survey_gpu)
    monkeypatch.setattr(disk, "measure_disk", lambda folder: typical("disk", "B/s", [1e9]))
    found = probe.survey(device="cuda")
    assert probe.survey(device="cuda") == found
    assert asked == [FULL_PROBE_S]
    assert (found.ceilings, found.core_share) == (GPU_CEILINGS, 1.0)
    assert found.spread == pytest.approx(0.16 / 4)
    assert known_ceilings(None, device="cuda") == GPU_CEILINGS
    probe.survey(device="cuda", force=True)
    assert len(asked) == 2


def test_a_figure_that_cannot_be_had_is_left_out(machine_without_gpu: FakePyTorch, cache: Path) -> None:
    assert known_ceilings(None, measure=True, device="cuda") is None


# ------------------------------------------------------------------------- the step's time, the memory


def test_a_step_takes_its_work_and_its_launches() -> None:
    work = Work(bf16_flops=75 * 10**9, read_bytes=8 * 10**9)
    assert roofline.launch_overhead_s(200, GPU_CEILINGS, graph=True) == pytest.approx(0.3e-3)
    assert roofline.launch_overhead_s(200, GPU_CEILINGS, graph=False) == pytest.approx(1.6e-3)
    assert roofline.launch_overhead_s(200, CEILINGS, graph=False) == 0
    overhead_s = roofline.launch_overhead_s(200, GPU_CEILINGS, graph=True)
    assert roofline.predicted_s(work, GPU_CEILINGS, overhead_s) == pytest.approx(2.3e-3)


def test_a_gpus_pool_takes_what_is_free_but_the_reserve() -> None:
    free = 4 * GIB
    ledger = plan_memory(demand(max_num_seqs=1000), free, pool_share=GPU_POOL_SHARE, memory="GPU memory")
    assert 0.89 * free < ledger.bytes <= 0.9 * free
    assert ledger.kv_bytes > 1.9 * plan_memory(demand(max_num_seqs=1000), free).kv_bytes


def test_a_gpus_pool_is_no_larger_than_its_sequences_can_fill() -> None:
    ledger = plan_memory(demand(), 80 * GIB, pool_share=GPU_POOL_SHARE, memory="GPU memory")
    assert ledger.kv_bytes == 64 * 2048 * TOKEN_BYTES


def test_errors_name_the_memory_that_is_short() -> None:
    with pytest.raises(
        CapacityError, match=r"and 0\.05 GiB of GPU memory are free|MiB of GPU memory are free"
    ):
        plan_memory(demand(), 50 << 20, pool_share=GPU_POOL_SHARE, memory="GPU memory")
    with pytest.raises(CapacityError, match=r"MiB of GPU memory can be had; accepted: --max-model-len"):
        plan_memory(demand(), 140 << 20, pool_share=GPU_POOL_SHARE, memory="GPU memory")
    with pytest.raises(CapacityError, match="what GPU memory is free beside the weights"):
        plan_memory(demand(), GIB, GIB, pool_share=GPU_POOL_SHARE, memory="GPU memory")


# --------------------------------------------------------------------------------------- command line


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


def test_probe_of_a_gpu(
    ridgeline: Cli, machine_with_gpu: FakePyTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Sizes(read_bytes=4 * 10**9, matrix_width=8000)
    samples = measure_samples(FakeBench(dict.fromkeys((*KINDS, "cached-1048576"), 1e-3)), sizes, 0.3)
    found = measurements_from(sizes, samples | {"cached-1048576": [1e-5, 1e-5]})
    monkeypatch.setattr(cuda_probe, "survey_gpu", lambda seconds: (GPU_CEILINGS, found))
    monkeypatch.setattr(disk, "measure_disk", lambda folder: typical("disk", "B/s", [5e9], how=disk.DIRECT))
    told = json.loads(ridgeline("probe", "--device", "cuda", "--json").out)
    assert GPU_CEILINGS.to_json().items() <= told.items()
    shown = ridgeline("probe").out  # auto
    for expected in (
        "multiprocessors    132",
        "memory read        4000.0 GB/s",
        "int8               1500.0 Top/s",
        "fp8                1400.0 Tflop/s",
        "kernel launch      8.0 µs, 1.5 µs in a graph",
        "host to device     50.0 GB/s",
        "disk read          5.0 GB/s (O_DIRECT)",
        "ridges ◆ at int8 375, fp8 350, bf16 188, fp32 12.5",
    ):
        assert expected in shown
    assert re.search(r"^GB/s, reading +GPU *\n1 MiB +6711 *\nmemory +\d{4} *$", shown, re.MULTILINE)
    assert "barrier" not in shown


def test_a_gpu_without_fp8_says_so(
    ridgeline: Cli, machine_with_gpu: FakePyTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = dataclasses.replace(GPU_CEILINGS, fp8_flops_per_s=0.0)
    monkeypatch.setattr(cuda_probe, "survey_gpu", lambda seconds: (older, ()))
    monkeypatch.setattr(disk, "measure_disk", lambda folder: typical("disk", "B/s", [5e9]))
    assert "fp8                not at this level" in ridgeline("probe", "--device", "cuda").out


def test_auto_measures_the_cpu_where_there_is_no_gpu(
    ridgeline: Cli, machine_without_gpu: FakePyTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_survey_cpu", lambda threads, isa: Survey(CEILINGS, ()))
    shown = ridgeline("probe").out
    assert "threads            2" in shown
    assert "launch" not in shown
    assert "fp8" not in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "cuda"], "device is 'cuda': CUDA finds no GPU; accepted: cpu"),
        (["--device", "reference"], "device is 'reference'; accepted: auto, cpu, cuda"),
        (["--device", "cuda", "--threads", "2"], "threads is 2; accepted for a GPU: none"),
    ],
)
def test_probe_of_a_device_that_is_not_there(
    ridgeline: Cli, machine_without_gpu: FakePyTorch, arguments: list[str], told: str
) -> None:
    outcome = ridgeline("probe", *arguments)
    assert outcome.code != 0
    assert told in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
