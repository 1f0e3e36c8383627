"""A number of equal devices by name: `H200x8`, `8xH100`, `a100-80g`, `rtx4090`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ridgeline.resources.presets import Preset, presets
from ridgeline.types import ConfigError

MAX_COUNT = 10_000_000


@dataclass(frozen=True, slots=True)
class Fleet:
    """So many devices of a preset. `counted` says whether the name had the number, or it is a 1 unsaid."""

    preset: Preset
    count: int = 1
    counted: bool = True


def parse_fleet(name: str) -> Fleet:
    """The devices of that name, in any case, with or without hyphens, and with a number before or after.

    Raises ConfigError with the nearest name for one that is not known, and for a number out of range.
    """
    index = {_key(alias): preset for preset in presets().values() for alias in (preset.name, *preset.aliases)}
    key = _key(name)
    if key in index:
        return Fleet(index[key], counted=False)
    for pattern in (r"(?P<name>.+?)x(?P<count>\d{1,9})", r"(?P<count>\d{1,9})x(?P<name>.+)"):
        found = re.fullmatch(pattern, key)
        if found and found["name"] in index:
            if not 1 <= int(found["count"]) <= MAX_COUNT:
                raise ConfigError(f"machine is {name!r}; accepted: 1 to {MAX_COUNT} of {found['name']}")
            return Fleet(index[found["name"]], int(found["count"]))
    (near,) = difflib.get_close_matches(key, index, n=1, cutoff=0.0)
    raise ConfigError(
        f"machine is {name!r}; accepted: a name that `ridgeline list --machines` shows, the nearest is "
        f"{index[near].name}, and a number of them, as in {index[near].name}x8"
    )


def _key(name: str) -> str:
    """What two spellings of a machine have in common: a100-80GB, A100_80g."""
    plain = re.sub(r"[×*:]", "x", name.lower())
    return re.sub(r"(\d)gi?b", r"\1g", re.sub(r"[^a-z0-9]", "", plain))
