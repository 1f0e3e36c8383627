"""Energy: joules as the machine counts them, else as its datasheet makes likely; always saying which.

CPUs count in Intel's RAPL, which AMD's have too and Linux shows under /sys/class/powercap ("Power Capping
Framework" in the kernel's documentation); NVIDIA's GPUs count since Volta, which NVML tells. A counter is of
the whole socket or board: what else runs there is in it.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ridgeline.resources.cuda import cuda_device, cuda_uuid
from ridgeline.resources.fleet import preset_of
from ridgeline.resources.machine import machine
from ridgeline.types import ConfigError

POWERCAP = Path("/sys/class/powercap")

Source = Literal["rapl", "nvml", "model", "none"]


class Meter(Protocol):
    """A counter of joules. `every_s` is how often it is worth reading: counters are updated now and then.

    `joules` is since the meter was made; it raises OSError where it cannot be read any more.
    """

    source: Source
    detail: str
    every_s: float

    def joules(self) -> float: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EnergySource:
    """What there is to say of energy on this machine: `detail` names counters or a datasheet, or why there
    is neither."""

    source: Source
    detail: str

    def __str__(self) -> str:
        return f"{_NAMES[self.source]}: {self.detail}"


_NAMES: dict[Source, str] = {
    "rapl": "RAPL",
    "nvml": "NVML",
    "model": "not measured, a model from the datasheet",
    "none": "not known",
}


def open_meter(device: str, powercap: Path = POWERCAP) -> tuple[Meter | None, EnergySource]:
    """The best meter for an engine's device ("cuda": the current GPU; else the CPU), None if there is none,
    and what to say of it. Its counters stay open until it is closed."""
    counted = _open_nvml() if device == "cuda" else _open_rapl(powercap)
    meter: Meter | None = counted if not isinstance(counted, str) else _modelled(device)
    if meter is not None:
        why = f" ({counted})" if isinstance(counted, str) else ""
        return meter, EnergySource(meter.source, meter.detail + why)
    return None, EnergySource("none", str(counted))


def energy_source(device: str) -> EnergySource:
    """What `open_meter` would find."""
    meter, source = open_meter(device)
    if meter is not None:
        meter.close()
    return source


# ---------------------------------------------------------------------------------------------- RAPL


class RaplMeter:
    """The sum of some zones of the power capping framework."""

    source: Source = "rapl"
    every_s = 0.05

    def __init__(self, zones: Sequence[Path]) -> None:
        """Raises OSError when a counter cannot be read, ValueError when it holds no number."""
        self._zones: list[_Zone] = []
        try:
            for zone in zones:
                self._zones.append(_Zone(zone))
        except (OSError, ValueError):
            self.close()
            raise
        self.detail = ", ".join(zone.name for zone in self._zones)

    def joules(self) -> float:
        try:
            return sum(zone.microjoules() for zone in self._zones) / 1e6
        except ValueError as error:
            raise OSError(f"a RAPL counter holds no number: {error}") from None

    def close(self) -> None:
        for zone in self._zones:
            os.close(zone.file)
        self._zones.clear()


class _Zone:
    """One counter of microjoules, which begins again at 0 behind its range: some minutes at full power."""

    __slots__ = ("_last", "_range", "_total", "file", "name")

    def __init__(self, folder: Path) -> None:
        self.name = _text(folder / "name")
        self._range = int(_text(folder / "max_energy_range_uj") or 0)
        self.file = os.open(folder / "energy_uj", os.O_RDONLY)
        try:
            self._last = self._read()
        except (OSError, ValueError):
            os.close(self.file)
            raise
        self._total = 0

    def microjoules(self) -> int:
        """Since the zone was opened. It must be read once in every turn of the counter."""
        now = self._read()
        grown = now - self._last
        self._total += grown if grown >= 0 else max(grown + self._range, 0)
        self._last = now
        return self._total

    def _read(self) -> int:
        return int(os.pread(self.file, 32, 0))


def _open_rapl(powercap: Path) -> RaplMeter | str:
    """The packages, and the memory beside them; or why there are none. Cores and graphics are parts of a
    package, "psys" contains all packages, and a package may show a second time through memory-mapped
    registers (intel-rapl-mmio): those would be counted twice."""
    zones = [
        zone
        for zone in sorted(powercap.glob("intel-rapl:*"))
        if (name := _text(zone / "name")).startswith("package") or name == "dram"
    ]
    if not zones:
        return f"no RAPL counters in {powercap}"
    try:
        return RaplMeter(zones)
    except PermissionError:
        return f"RAPL counters are there, but may not be read: chmod a+r {powercap}/intel-rapl:*/energy_uj"
    except (OSError, ValueError) as error:
        return f"RAPL counters cannot be read: {error}"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------- NVML


class NvmlMeter:
    """The energy counter of one GPU."""

    source: Source = "nvml"
    every_s = 0.25  # drivers update it every 20 to 100 ms, and asking takes longer than reading a file

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self._nvml = nvml
        self._handle = handle
        self.detail = name
        self._began_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def joules(self) -> float:
        try:
            now_mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None
        return float(now_mj - self._began_mj) / 1e3

    def close(self) -> None:
        self._nvml.nvmlShutdown()


def _open_nvml() -> NvmlMeter | str:
    """The counter of the current GPU, or why there is none."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return "nvidia-ml-py is not installed: pip install 'ridgeline[cuda]'"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return f"NVML: {error}"
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(cuda_uuid())
        return NvmlMeter(nvml, handle, cuda_device().name)
    except (nvml.NVMLError, ConfigError) as error:
        nvml.nvmlShutdown()
        return f"NVML: {error}"


# ------------------------------------------------------------------------------------------ the model


class PowerModel:
    """Joules at a constant power: an upper bound for the time in which steps run."""

    source: Source = "model"
    every_s = 0.05

    def __init__(self, power_w: float, detail: str) -> None:
        self.power_w = power_w
        self.detail = detail
        self._began_s = time.perf_counter()

    def joules(self) -> float:
        return self.power_w * (time.perf_counter() - self._began_s)

    def close(self) -> None:
        """There is nothing to close."""


def _modelled(device: str) -> PowerModel | None:
    """The power on the datasheet of a GPU, or of as much of a processor as this machine is."""
    try:
        preset = preset_of(cuda_device().name if device == "cuda" else machine().cpu)
    except ConfigError:
        return None
    if preset is None or preset.power_w is None:
        return None
    if preset.kind != "cpu":
        return PowerModel(preset.power_w, f"{preset.name}, {preset.power_w:g} W")
    if not preset.cores:
        return None
    cores = machine().physical_cores
    share_w = preset.power_w * cores / preset.cores
    return PowerModel(
        share_w, f"{preset.name}, {preset.power_w:g} W for {preset.cores} cores: {share_w:.3g} W for {cores}"
    )


# ------------------------------------------------------------------------------------------- of steps


class StepEnergy:
    """Joules of single steps, from a meter that is read now and then.

    A step is charged the power of the last while in which steps ran without a pause, for as long as it took:
    what the machine takes while nothing runs is nobody's. None until there was such a while.
    """

    PAUSE_S = 0.02
    """The engine between two steps takes far less."""

    __slots__ = ("_ended_s", "_meter", "_power_w", "_read_j", "_read_s")

    def __init__(self, meter: Meter) -> None:
        self._meter: Meter | None = meter
        self._power_w: float | None = None
        self._read_s: float | None = None
        self._read_j = 0.0
        self._ended_s = 0.0

    def joules(self, began_s: float, ended_s: float) -> float | None:
        """Of the step between these times, in seconds on one clock. Steps come in order, and of two that
        overlap the second is charged what the first was not."""
        if self._meter is None:
            return None
        if began_s - self._ended_s > self.PAUSE_S:
            self._read_s = None
        began_s, self._ended_s = max(began_s, self._ended_s), ended_s
        try:
            self._read(ended_s)
        except OSError:  # the counter is gone: better no figure than an old one
            self.close()
            return None
        return None if self._power_w is None else self._power_w * max(ended_s - began_s, 0.0)

    def _read(self, now_s: float) -> None:
        assert self._meter is not None
        if self._read_s is not None and now_s - self._read_s < self._meter.every_s:
            return
        joules = self._meter.joules()
        if self._read_s is not None:
            self._power_w = (joules - self._read_j) / (now_s - self._read_s)
        self._read_s, self._read_j = now_s, joules

    def close(self) -> None:
        """Idempotent."""
        if self._meter is not None:
            self._meter.close()
            self._meter = None
