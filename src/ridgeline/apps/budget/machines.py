"""Devices at work: how much they compute in a time or for a price, and what a run on them takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ridgeline.resources.footprint import Grid, co2_kg, cost_usd, energy_kwh, facility_kwh
from ridgeline.resources.presets import PEAKS, Preset
from ridgeline.types import ConfigError

DEFAULT_MFU = 0.4
"""What good training runs of large models reach: PaLM 0.46 (arXiv:2204.02311, table 3), Llama 3 0.38 to 0.43
(arXiv:2407.21783, table 4)."""

DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Workers:
    """Devices and how they work: what each achieves, costs and wastes.

    `flops_per_s` is what each reaches in training. `count` None is to be worked out from a time, and one
    where there is none.
    """

    preset: Preset
    count: int | None
    peak_format: str
    flops_per_s: float
    usd_per_hour: float | None
    pue: float
    grid: Grid

    @property
    def mfu(self) -> float:
        """The share of the peak of `peak_format` that each device reaches."""
        return self.flops_per_s / self.preset.peaks[self.peak_format]

    def flops_in(self, seconds: float, count: float) -> float:
        return count * self.flops_per_s * seconds

    def flops_for(self, usd: float) -> float:
        """The compute that the money rents, on however many devices. Raises ConfigError as below."""
        return self.flops_in(self.device_seconds_for(usd), 1)

    def affordable(self, usd: float, seconds: float) -> Workers:
        """As many devices as the money rents for that long. Raises ConfigError where it is not one."""
        count = math.floor(self.device_seconds_for(usd) / seconds * (1 + 1e-12))
        if count < 1:
            rate = f"{self.usd_per_hour:g} USD an hour"
            days = seconds / DAY_S
            raise ConfigError(
                f"usd is {usd:g}; accepted for {days:g} days at {rate}: at least one device's price"
            )
        return replace(self, count=count)

    def device_seconds_for(self, usd: float) -> float:
        """What the money rents. Raises ConfigError where no price is known."""
        if self.usd_per_hour is None:
            raise ConfigError(f"usd is {usd:g}, and {self.preset.name} has no price; accepted: --price too")
        return usd / self.usd_per_hour * 3600

    def run(self, flops: float, seconds: float | None) -> Run:
        """A run of that much compute, in `seconds` where the number of devices is to be found."""
        count = self.count or 1
        if self.count is None and seconds is not None:
            # A rate that divides exactly must not take one more for a rounding error.
            count = max(math.ceil(flops / self.flops_in(seconds, 1) * (1 - 1e-12)), 1)
        elapsed_s = flops / self.flops_in(1, count)
        power_w = self.preset.power_w
        equipment = energy_kwh(power_w * count, elapsed_s) if power_w is not None else None
        facility = facility_kwh(equipment, self.pue) if equipment is not None else None
        return Run(
            devices=count,
            seconds=elapsed_s,
            equipment_kwh=equipment,
            facility_kwh=facility,
            co2_kg=co2_kg(facility, self.grid) if facility is not None else None,
            usd=cost_usd(count, elapsed_s, self.usd_per_hour) if self.usd_per_hour is not None else None,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """What a training run takes. Energy and CO2 are None where the power of the device is not known, money
    where its price is not."""

    devices: int
    seconds: float
    equipment_kwh: float | None
    facility_kwh: float | None
    co2_kg: float | None
    usd: float | None


def training_format(preset: Preset, asked: str | None) -> str:
    """The format whose peak counts: the one asked for, else bf16, else fp32. Raises ConfigError."""
    if asked is None:
        return "bf16" if "bf16" in preset.peaks else "fp32"
    if asked not in preset.peaks:
        known = "" if asked in PEAKS else ", which is no format"
        raise ConfigError(f"format is {asked!r}{known}; accepted on {preset.name}: {', '.join(preset.peaks)}")
    return asked
