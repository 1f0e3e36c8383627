"""What computing takes from the world: energy, the CO2 of making it, and money.

A model from nameplate power, not a measurement: devices are taken to draw all of their power all of the time.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

from ridgeline.types import ConfigError

_FILE = Path(__file__).with_name("grids.toml")

DEFAULT_PUE = 1.56
"""Average of the data centres in Uptime Institute's Global Data Center Survey 2024."""

DEFAULT_GRID = "world"


@functools.cache
def _grids() -> tuple[dict[str, float], str]:
    content = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return {name: float(grams) for name, grams in content["g_per_kwh"].items()}, content["source"]


def grids_g_per_kwh() -> dict[str, float]:
    """Grams of CO2-equivalent per kWh of electricity, by ISO 3166 code, and of the world and the EU."""
    return dict(_grids()[0])


def grids_source() -> str:
    """Whose figures these are."""
    return _grids()[1]


def parse_grid(text: str) -> float:
    """Grams of CO2-equivalent per kWh: of a grid by its name, or the number itself.

    Raises ConfigError with the names that are known.
    """
    grids = grids_g_per_kwh()
    if text.lower() in grids:
        return grids[text.lower()]
    try:
        grams = float(text)
    except ValueError:
        grams = -1.0
    if not 0 <= grams <= 10_000:
        raise ConfigError(f"grid is {text!r}; accepted: grams of CO2 per kWh, or one of {', '.join(grids)}")
    return grams


def energy_kwh(power_w: float, seconds: float) -> float:
    """Energy that equipment takes at a constant power."""
    return power_w * seconds / 3.6e6


def facility_kwh(equipment_kwh: float, pue: float) -> float:
    """Energy of the whole building. `pue`, power usage effectiveness (ISO/IEC 30134-2), is its ratio to the
    equipment's: cooling and conversion are the part above 1."""
    return equipment_kwh * pue


def co2_kg(kwh: float, g_per_kwh: float) -> float:
    """CO2-equivalent of making that much electricity."""
    return kwh * g_per_kwh / 1000


def cost_usd(devices: float, seconds: float, usd_per_hour: float) -> float:
    """What renting devices costs, by the hour and device."""
    return devices * seconds / 3600 * usd_per_hour
