"""What a command line says of the systems that it compares, each by the name that it gives them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def pairs(flag: str, texts: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE, each name once. Raises ValueError."""
    found: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not (name and separator and value) or name in found:
            raise ValueError(f"{flag} has {text!r}; accepted: NAME=VALUE, each name once")
        found[name] = value
    return found


def settings(flag: str, texts: Iterable[str]) -> dict[str, list[str]]:
    """NAME:KEY=VALUE: the KEY=VALUEs of each name. Raises ValueError."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, separator, setting = text.partition(":")
        if not separator or "=" not in setting:
            raise ValueError(f"{flag} is {text!r}; accepted: NAME:KEY=VALUE")
        found.setdefault(name, []).append(setting)
    return found


def check_names(names: Iterable[str], systems: Iterable[str]) -> None:
    """Raise ValueError for a name that is none of the systems'."""
    known = list(systems)
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is none of the systems; accepted: {', '.join(known)}")


def absolute(path: str | Path) -> str:
    """A path that a driver finds from its own folder."""
    return str(Path(path).expanduser().absolute())


def program(python: str) -> str:
    """A Python by its path, or by a name that is looked up."""
    return absolute(python) if "/" in python else python
