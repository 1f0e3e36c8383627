"""Energy: counters in made-up folders and a made-up NVML, the model beside them, what a step is charged."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from ridgeline.resources import energy
from ridgeline.resources.energy import EnergySource, Meter, PowerModel, StepEnergy, energy_source, open_meter
from ridgeline.resources.fleet import preset_of
from ridgeline.resources.machine import Machine
from ridgeline.types import ConfigError

RANGE_UJ = 262_143_328_850


def zone(folder: Path, place: str, name: str, joules: float, range_uj: int = RANGE_UJ) -> Path:
    made = folder / place
    made.mkdir(parents=True, exist_ok=True)
    (made / "name").write_text(f"{name}\n")
    (made / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (made / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    return made


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two sockets, one with memory, and everything that is counted twice."""
    zone(tmp_path, "intel-rapl:0", "package-0", 100)
    zone(tmp_path, "intel-rapl:0:0", "core", 60)
    zone(tmp_path, "intel-rapl:0:1", "uncore", 5)
    zone(tmp_path, "intel-rapl:0:2", "dram", 20)
    zone(tmp_path, "intel-rapl:1", "package-1", 1000)
    zone(tmp_path, "intel-rapl:2", "psys", 9000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def opened(device: str, powercap: Path) -> tuple[Meter, EnergySource]:
    meter, source = open_meter(device, powercap)
    assert meter is not None
    return meter, source


def on(monkeypatch: pytest.MonkeyPatch, cpu: str, cores: int = 2) -> None:
    monkeypatch.setattr(energy, "machine", lambda: Machine(cpu, cores, 8 << 30))


# ---------------------------------------------------------------------------------------------- RAPL


def test_packages_and_memory_are_counted_once(powercap: Path) -> None:
    meter, source = opened("cpu", powercap)
    assert source == EnergySource("rapl", "package-0, dram, package-1")
    assert str(source) == "RAPL: package-0, dram, package-1"
    assert meter.joules() == 0
    zone(powercap, "intel-rapl:0", "package-0", 107)
    zone(powercap, "intel-rapl:0:0", "core", 66)
    zone(powercap, "intel-rapl:0:2", "dram", 22)
    zone(powercap, "intel-rapl:2", "psys", 9500)
    assert meter.joules() == pytest.approx(9)
    zone(powercap, "intel-rapl:1", "package-1", 1000.5)
    assert meter.joules() == pytest.approx(9.5)
    meter.close()
    meter.close()


def test_a_counter_that_begins_again_goes_on(powercap: Path) -> None:
    last = RANGE_UJ / 1e6
    zone(powercap, "intel-rapl:0", "package-0", last - 1)
    meter, _ = opened("cpu", powercap)
    zone(powercap, "intel-rapl:0", "package-0", 2)
    assert meter.joules() == pytest.approx(3)
    zone(powercap, "intel-rapl:0", "package-0", last)
    assert meter.joules() == pytest.approx(last + 1)
    zone(powercap, "intel-rapl:0", "package-0", 0.25)
    assert meter.joules() == pytest.approx(last + 1.25)


def test_a_range_that_nobody_says_never_makes_energy_fall(powercap: Path) -> None:
    zone(powercap, "intel-rapl:0", "package-0", 50, range_uj=0)
    meter, _ = opened("cpu", powercap)
    zone(powercap, "intel-rapl:0", "package-0", 10, range_uj=0)
    assert meter.joules() == 0
    zone(powercap, "intel-rapl:0", "package-0", 11, range_uj=0)
    assert meter.joules() == pytest.approx(1)


def test_why_there_are_no_counters(
    powercap: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, "AMD EPYC (family 25 model 17)")
    empty = tmp_path_factory.mktemp("empty")
    assert open_meter("cpu", empty) == (None, EnergySource("none", f"no RAPL counters in {empty}"))
    assert open_meter("cpu", empty / "none")[0] is None
    (powercap / "intel-rapl:1" / "energy_uj").write_text("nonsense")
    meter, source = open_meter("cpu", powercap)
    assert meter is None
    assert "cannot be read" in str(source)

    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(energy.os, "open", refuse)
    meter, source = open_meter("cpu", powercap)
    assert meter is None
    assert f"chmod a+r {powercap}/intel-rapl:*/energy_uj" in source.detail


def test_a_counter_that_breaks_is_an_os_error(powercap: Path) -> None:
    meter, _ = opened("cpu", powercap)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("")
    with pytest.raises(OSError, match="holds no number"):
        meter.joules()


# ---------------------------------------------------------------------------------------------- NVML


class FakeNvml(ModuleType):
    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.energy_mj = 5_000_000
        self.known = "GPU-1234"
        self.failing = False

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != self.known:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if self.failing:
            raise self.NVMLError("GPU is lost")
        assert handle == "handle"
        return self.energy_mj


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    from ridgeline.resources.cuda import GPU

    made = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(energy, "cuda_uuid", lambda: "GPU-1234")
    monkeypatch.setattr(energy, "cuda_device", lambda: GPU("NVIDIA H200", (9, 0), 132, 141 << 30, 50 << 20))
    return made


def test_a_gpu_counts_millijoules(nvml: FakeNvml) -> None:
    meter, source = open_meter("cuda")
    assert meter is not None
    assert source == EnergySource("nvml", "NVIDIA H200")
    nvml.energy_mj += 2500
    assert meter.joules() == 2.5
    nvml.failing = True
    with pytest.raises(OSError, match="GPU is lost"):
        meter.joules()
    meter.close()
    assert nvml.open == 0
    assert energy_source("cuda").source == "model", "NVML told nothing"
    assert nvml.open == 0


def test_a_gpu_without_a_counter_is_modelled(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.known = "MIG-1"
    meter, source = open_meter("cuda")
    assert isinstance(meter, PowerModel)
    assert meter.power_w == 700
    assert source == EnergySource("model", "H200, 700 W (NVML: Not Found)")
    assert nvml.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'ridgeline[cuda]'" in str(energy_source("cuda"))

    def absent() -> None:
        raise ConfigError("device is 'cuda': no NVIDIA driver is installed; accepted: cpu")

    monkeypatch.setattr(energy, "cuda_device", absent)
    assert energy_source("cuda").source == "none"


# ------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize(
    ("hardware", "preset"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A100 80GB PCIe", "A100-80G-PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100-40G-PCIe"),
        ("Tesla V100-SXM2-16GB", "V100-16G"),
        ("Tesla V100-SXM2-32GB", "V100-32G"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Apple M2 Pro", "M2-Pro"),
        ("Apple M2", "M2"),
        ("AMD EPYC 9654 96-Core Processor (family 25 model 17)", "EPYC-9654"),
        ("Intel(R) Xeon(R) Platinum 8480+", "Xeon-8480"),
        ("Intel(R) Xeon(R) Platinum 8380 CPU @ 2.30GHz", "Xeon-8380"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L40", None),
        ("AMD EPYC (family 25 model 17)", None),
        ("Intel(R) Xeon(R) Processor @ 2.30GHz", None),
        ("", None),
    ],
)
def test_devices_are_known_by_what_drivers_call_them(hardware: str, preset: str | None) -> None:
    found = preset_of(hardware)
    assert (None if found is None else found.name) == preset


def test_a_part_of_a_processor_takes_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "AMD EPYC 9654 96-Core Processor", cores=24)
    meter, source = open_meter("cpu", tmp_path)
    assert isinstance(meter, PowerModel)
    assert meter.power_w == 90
    assert source.source == "model"
    assert source.detail.startswith("EPYC-9654, 360 W for 96 cores: 90 W for 24 (no RAPL counters in ")
    before = meter.joules()
    assert 0 <= before <= meter.joules()
    on(monkeypatch, "Apple M2")  # nobody says what that takes
    assert open_meter("cpu", tmp_path)[0] is None


# ------------------------------------------------------------------------------------------- of steps


class Counter:
    """50 W while steps run, 5 W else; both are up to the test."""

    source: energy.Source = "rapl"
    detail = "made up"
    every_s = 0.05

    def __init__(self) -> None:
        self.now_j = 0.0
        self.reads = 0
        self.closed = 0
        self.broken = False

    def joules(self) -> float:
        self.reads += 1
        if self.broken:
            raise OSError("gone")
        return self.now_j

    def close(self) -> None:
        self.closed += 1


def test_steps_are_charged_the_power_of_the_time_in_which_steps_run() -> None:
    meter, now_s = Counter(), 100.0
    steps = StepEnergy(meter)

    def step(seconds: float, pause_s: float = 0.001) -> float | None:
        nonlocal now_s
        meter.now_j += pause_s * (5 if pause_s > 0.1 else 50) + seconds * 50
        now_s += pause_s + seconds
        return steps.joules(now_s - seconds, now_s)

    first = [step(0.009) for _ in range(5)]
    assert first == [None] * 5, "the counter is read, and has nothing to compare with"
    assert step(0.009) == pytest.approx(0.45)
    reads = meter.reads
    assert [step(0.009) for _ in range(4)] == pytest.approx([0.45] * 4)
    assert meter.reads == reads, "it is not read in every step"
    assert step(0.009, pause_s=30.0) == pytest.approx(0.45), "nobody is charged for the pause"
    assert [step(0.009) for _ in range(50)] == pytest.approx([0.45] * 50)
    charged = steps.joules(now_s - 0.004, now_s + 0.006)
    assert charged == pytest.approx(0.3), "of what overlaps, the second is charged the rest"


def test_a_counter_that_goes_away_is_asked_no_more() -> None:
    meter = Counter()
    steps = StepEnergy(meter)
    steps.joules(0.0, 0.1)
    meter.now_j = 10.0
    assert steps.joules(0.1, 0.2) == pytest.approx(10.0)
    meter.broken = True
    assert steps.joules(0.2, 0.3) is None
    meter.broken = False
    assert steps.joules(0.3, 0.4) is None
    steps.close()
    assert meter.closed == 1
