"""What is installed: this package, the packages that it needs and may use, and the settings around it."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PREFIX = "RIDGELINE_"
SETTINGS = ("RIDGELINE_CACHE", "RIDGELINE_ISA")
"""Variables that are no flag's twin."""

HONOURED = (
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "NO_COLOR",
    "OMP_NUM_THREADS",
)
"""Variables without our prefix that this package or a library beneath it obeys."""

_BUILT = (".py", ".so", ".pyd", ".dylib")

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")


@dataclass(frozen=True, slots=True)
class Package:
    """One that this package needs, or that belongs to an `extra` of it. `version` is None where it is not
    installed; `accepted` is a version specifier, empty for any."""

    name: str
    extra: str
    version: str | None
    accepted: str
    fits: bool


def package_version() -> str | None:
    """The version of this package; None in a source tree that is not installed."""
    try:
        return metadata.version("ridgeline")
    except metadata.PackageNotFoundError:
        return None


def build_digest() -> bytes:
    """SHA-256 of everything in this package that decides the bits of what a model computes, so that what one
    build has kept is no other's."""
    root = Path(__file__).parents[1]
    found = hashlib.sha256(repr(package_version()).encode())
    rooms = (root / room for room in ("execution", "model", "precision", "native"))
    for path in sorted(path for room in rooms for path in room.rglob("*") if path.suffix in _BUILT):
        found.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode())
        found.update(path.read_bytes())
    return found.digest()


def packages() -> list[Package]:
    """What the installed package requires, the packages of its extras included; nothing in a source tree."""
    try:
        required = metadata.requires("ridgeline") or []
        extras = metadata.metadata("ridgeline").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []
    from packaging.requirements import Requirement

    return [
        _package(requirement, extra)
        for extra in ("", *sorted(extras))
        for requirement in map(Requirement, required)
        if _belongs(requirement, extra)
    ]


def environment() -> dict[str, str]:
    """The variables in force that this package or a library beneath it obeys. Secrets are only "set"."""
    names = [name for name in os.environ if name.startswith(PREFIX) or name in HONOURED]
    return {name: _shown(name, os.environ[name]) for name in sorted(names)}


def _belongs(requirement: Requirement, extra: str) -> bool:
    """Whether an extra asks for it, or with none the package itself: what is always needed is in no extra."""
    if requirement.marker is None:
        return extra == ""
    always = requirement.marker.evaluate({"extra": ""})
    return always if extra == "" else not always and requirement.marker.evaluate({"extra": extra})


def _package(requirement: Requirement, extra: str) -> Package:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        version = None
    fits = version is not None and requirement.specifier.contains(version, prereleases=True)
    return Package(requirement.name, extra, version, str(requirement.specifier), fits)


def _shown(name: str, value: str) -> str:
    # An address may carry a password: https://user:password@host.
    return "set" if _SECRET.search(name) or "@" in value else value
