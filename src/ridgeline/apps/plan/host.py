"""The machine of a plan: this one by its measured ceilings, or others by their datasheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ridgeline.precision.formats import FILE_FORMATS, FORMATS
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.fleet import Fleet
from ridgeline.resources.footprint import cost_usd, energy_kwh
from ridgeline.resources.memory import GPU_POOL_SHARE, POOL_SHARE
from ridgeline.resources.roofline import Limits
from ridgeline.resources.step_costs import StepCosts, costs_of, costs_of_device, load_costs


@dataclass(frozen=True, slots=True)
class Rates:
    """Implements `Limits`: what all devices of a host do together."""

    read_bytes_per_s: float
    int8_ops_per_s: float
    bf16_flops_per_s: float
    fp32_flops_per_s: float

    @classmethod
    def between(cls, before: Limits, after: Limits) -> Rates:
        """The middle of what was measured before something and after it."""
        return cls(
            (before.read_bytes_per_s + after.read_bytes_per_s) / 2,
            (before.int8_ops_per_s + after.int8_ops_per_s) / 2,
            (before.bf16_flops_per_s + after.bf16_flops_per_s) / 2,
            (before.fp32_flops_per_s + after.fp32_flops_per_s) / 2,
        )

    @classmethod
    def of(cls, limits: Limits, count: int) -> Rates:
        """`count` times those of one: as if the work were split evenly and nothing had to be told between."""
        return cls(
            limits.read_bytes_per_s * count,
            limits.int8_ops_per_s * count,
            limits.bf16_flops_per_s * count,
            limits.fp32_flops_per_s * count,
        )


@dataclass(frozen=True, slots=True)
class Host:
    """What a plan knows of a machine of `count` equal devices.

    `device` is what runs the model there ("cpu", "cuda"), `rates` and `memory_bytes` are of all devices
    together. `costs` are those of its kind, `fitted` those found there, by weight format. `power_w` and
    `usd_per_hour` are of one device, None where nobody says.
    """

    name: str
    count: int
    device: str
    rates: Rates
    costs: StepCosts
    memory_bytes: int
    power_w: float | None
    usd_per_hour: float | None
    source: str
    fitted: Mapping[str, StepCosts] = field(default_factory=dict)

    def costs_of(self, weights: str) -> StepCosts:
        """What steps cost of a model whose matrices are mostly in a format."""
        return self.fitted.get(weights, self.costs)

    @property
    def pool_share(self) -> float:
        """The share of the free memory that KV pools take unasked."""
        return GPU_POOL_SHARE if self.device == "cuda" else POOL_SHARE

    def joules(self, seconds: float) -> float | None:
        """Energy of all devices at full power."""
        return None if self.power_w is None else energy_kwh(self.power_w * self.count, seconds) * 3.6e6

    def usd(self, seconds: float) -> float | None:
        """What renting all devices costs."""
        return None if self.usd_per_hour is None else cost_usd(self.count, seconds, self.usd_per_hour)


def host_of_fleet(fleet: Fleet, power_w: float | None = None, usd_per_hour: float | None = None) -> Host:
    """Machines by their datasheets, with another power and price where these are given."""
    preset, count = fleet.preset, fleet.count
    return Host(
        name=preset.name,
        count=count,
        device="cpu" if preset.kind == "cpu" else "cuda",
        rates=Rates.of(preset, count),
        costs=costs_of(preset.kind),
        memory_bytes=preset.memory_bytes * count,
        power_w=preset.power_w if power_w is None else power_w,
        usd_per_hour=preset.usd_per_hour if usd_per_hour is None else usd_per_hour,
        source=preset.source,
    )


def host_here(
    ceilings: Ceilings, free_bytes: int, power_w: float | None = None, usd_per_hour: float | None = None
) -> Host:
    """This machine, or its GPU, with the memory that is free on it now."""
    return Host(
        name=ceilings.machine,
        count=1,
        device=ceilings.device,
        rates=Rates.of(ceilings, 1),
        costs=costs_of_device(ceilings),
        memory_bytes=free_bytes,
        power_w=power_w,
        usd_per_hour=usd_per_hour,
        source=f"measured {ceilings.measured_at}, {ceilings.threads} "
        + ("threads" if ceilings.device == "cpu" else "multiprocessors")
        + f", {ceilings.isa}; the memory is what is free now",
        fitted={name: costs for name in FORMATS | FILE_FORMATS if (costs := load_costs(ceilings, name))},
    )
