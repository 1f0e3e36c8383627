"""What computing takes from the world: energy, the CO2 of making it, and money.

A model from nameplate power, not a measurement: devices are taken to draw all of their power all of the time.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ridgeline.types import ConfigError

_FILE = Path(__file__).with_name("grids.toml")

DEFAULT_PUE = 1.56
"""Average of the data centres in Uptime Institute's Global Data Center Survey 2024."""

DEFAULT_GRID = "world"


@dataclass(frozen=True, slots=True)
class Grid:
    """Electricity: the grams of CO2-equivalent that making a kWh emits, and who says so."""

    name: str
    g_per_kwh: float
    source: str


@functools.cache
def grids() -> dict[str, Grid]:
    """The grids that are known, by ISO 3166 code, and the averages of the world and the EU."""
    content = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    source = content["source"]
    return {name: Grid(name, float(grams), source) for name, grams in content["g_per_kwh"].items()}


def parse_grid(text: str) -> Grid:
    """A grid by its name, or by its grams of CO2-equivalent per kWh.

    Raises ConfigError with the names that are known.
    """
    known = grids()
    if text.lower() in known:
        return known[text.lower()]
    try:
        grams = float(text)
    except ValueError:
        grams = -1.0
    if not 0 <= grams <= 10_000:
        raise ConfigError(f"grid is {text!r}; accepted: grams of CO2 per kWh, or one of {', '.join(known)}")
    return Grid(text, grams, "as given")


def energy_kwh(power_w: float, seconds: float) -> float:
    """Energy that equipment takes at a constant power."""
    return power_w * seconds / 3.6e6


def facility_kwh(equipment_kwh: float, pue: float) -> float:
    """Energy of the whole building. `pue`, power usage effectiveness (ISO/IEC 30134-2), is its ratio to the
    equipment's: cooling and conversion are the part above 1."""
    return equipment_kwh * pue


def co2_kg(kwh: float, grid: Grid) -> float:
    """CO2-equivalent of making that much electricity."""
    return kwh * grid.g_per_kwh / 1000


def cost_usd(devices: float, seconds: float, usd_per_hour: float) -> float:
    """What renting devices costs, by the hour and device."""
    return devices * seconds / 3600 * usd_per_hour
