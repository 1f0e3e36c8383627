"""Machines that we are not on, by their datasheets: what the roofline reads in place of measured ceilings.

The figures and their sources stand in `machines.toml` beside this file, which also says what each means.
"""

from __future__ import annotations

import functools
import math
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ridgeline.types import ConfigError

_FILE = Path(__file__).with_name("machines.toml")

KINDS = ("gpu", "cpu", "apple")

PEAKS = {
    "fp32": "fp32_flops_per_s",
    "bf16": "bf16_flops_per_s",
    "int8": "int8_ops_per_s",
    "fp8": "fp8_flops_per_s",
    "fp4": "fp4_flops_per_s",
}
"""The formats that have a peak, and the field that holds it."""


@dataclass(frozen=True, slots=True)
class Preset:
    """One device by its datasheet: a GPU, a CPU socket, or the GPU of an Apple chip.

    It has the rates of `Ceilings`, so that the roofline reads either. Peaks are dense, with a multiply-add as
    two operations, and 0 where a format has none above that of fp32; `bf16_flops_per_s` is of float16 where
    there is no bfloat16. Links count each direction, and are 0 where there is none to count.
    `cores` are a CPU's or an Apple GPU's. `power_w` and `usd_per_hour` are None where nobody says.
    """

    name: str
    kind: str
    memory_bytes: int
    read_bytes_per_s: float
    source: str
    fp32_flops_per_s: float
    bf16_flops_per_s: float = 0.0
    int8_ops_per_s: float = 0.0
    fp8_flops_per_s: float = 0.0
    fp4_flops_per_s: float = 0.0
    cores: int | None = None
    power_w: float | None = None
    link: str | None = None
    link_bytes_per_s: float = 0.0
    host_bytes_per_s: float = 0.0
    usd_per_hour: float | None = None
    price_source: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def peaks(self) -> dict[str, float]:
        """Operations per second of each format that has a rate."""
        rates = {name: float(getattr(self, field)) for name, field in PEAKS.items()}
        return {name: rate for name, rate in rates.items() if rate > 0}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def presets() -> dict[str, Preset]:
    """The machines that are known, by name, in the order of the file."""
    return read_presets(_FILE.read_text(encoding="utf-8"))


def read_presets(text: str) -> dict[str, Preset]:
    """The presets that a text in the form of `machines.toml` describes.

    Raises ConfigError for a field that is missing or unknown, and for figures that are no positive numbers.
    """
    return {name: _preset(name, dict(table)) for name, table in tomllib.loads(text).items()}


def _preset(name: str, table: dict[str, Any]) -> Preset:
    try:
        table["memory_bytes"] = int(table.pop("memory_gib") * 2**30)
        table["aliases"] = tuple(table.get("aliases", ()))
        if "per_cycle" in table:
            every_cycle = table["cores"] * table.pop("clock_hz")
            for peak, operations in table.pop("per_cycle").items():
                table[PEAKS[peak]] = operations * every_cycle
        preset = Preset(name=name, **table)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"machine {name}: field {error}; accepted: those that machines.toml lists"
        ) from error
    figures = [value for value in asdict(preset).values() if isinstance(value, int | float)]
    known = min(preset.memory_bytes, preset.read_bytes_per_s, preset.fp32_flops_per_s) > 0
    sane = known and all(math.isfinite(figure) and figure >= 0 for figure in figures)
    if preset.kind not in KINDS or not sane or not preset.source:
        raise ConfigError(f"machine {name}: {preset}; accepted: a kind of {KINDS}, figures ≥ 0, a source")
    return preset
