"""A number of equal devices by name: `H200x8`, `8xH100`, `a100-80g`, `rtx4090`."""

from __future__ import annotations

import difflib
import itertools
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


_OTHER = {"d", "design", "laptop", "mig", "mobile", "nvl", "super", "ti"}
"""Words in the name of a device that is not the one without them: a part of it, or of less or more power."""


def preset_of(hardware: str) -> Preset | None:
    """What a driver or the system calls by this name (`NVIDIA A100-SXM4-80GB`, `Intel(R) Xeon(R) Platinum
    8480+`), None where that is no preset for sure."""
    words = re.findall(r"[a-z0-9+]+", _gigabytes(hardware.lower()))
    if _OTHER & set(words):
        return None
    said = {*words, *(first + second for first, second in itertools.pairwise(words))}
    found: tuple[int, Preset | None] = (0, None)
    for preset in presets().values():
        for name in (preset.name, *preset.aliases):
            wanted = set(re.findall(r"[a-z0-9+]+", name.lower()))
            if wanted <= said and len(wanted) > found[0]:
                found = len(wanted), preset
    return found[1]


def _gigabytes(name: str) -> str:
    return re.sub(r"(\d)gi?b", r"\1g", name)


def _key(name: str) -> str:
    """What two spellings of a machine have in common: a100-80GB, A100_80g."""
    plain = re.sub(r"[×*:]", "x", name.lower())
    return _gigabytes(re.sub(r"[^a-z0-9]", "", plain))
