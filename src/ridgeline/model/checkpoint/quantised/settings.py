"""What `config.json` says about quantisation, read with errors that name the setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ridgeline.model.checkpoint.files import shown
from ridgeline.types import CheckpointError

T = TypeVar("T", int, str)
_LARGEST_GROUP = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """A JSON object with settings; `where` is its name in errors, which are CheckpointErrors."""

    path: Path
    where: str
    values: Mapping[str, Any]

    def choice(self, key: str, accepted: tuple[T, ...], default: T | None = None) -> T:
        """The value of a setting, one of `accepted`; `default` where it is absent, unless that is None."""
        value = self.values.get(key)
        if value is None:
            value = default
        for one in accepted:
            if type(value) is type(one) and value == one:
                return one
        raise self.error(key, ", ".join(map(str, accepted)))

    def size(self, key: str, default: int | None = None) -> int:
        """A group's size; -1 for whole rows."""
        value = self.values.get(key)
        if value is None:
            value = default
        if type(value) is not int or not (value == -1 or 1 <= value <= _LARGEST_GROUP):
            raise self.error(key, f"-1 or a whole number from 1 to {_LARGEST_GROUP}")
        return value

    def block(self, key: str) -> tuple[int, int] | None:
        """Rows and columns of a block; None where the setting is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, list) and len(value) == 2:
            rows, cols = value
            if all(type(each) is int and 1 <= each <= _LARGEST_GROUP for each in value):
                return rows, cols
        raise self.error(key, f"two whole numbers from 1 to {_LARGEST_GROUP}")

    def refuse(self, key: str, accepted: str = "no such setting") -> None:
        """Raise where a setting that we do not follow is there and says something."""
        if self.values.get(key):
            raise self.error(key, accepted)

    def section(self, key: str) -> Settings:
        """The object under a key; an empty one where it is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return Settings(self.path, f"{self.where}.{key}", value or {})

    def error(self, key: str, accepted: str) -> CheckpointError:
        seen = shown(self.values[key]) if self.values.get(key) is not None else "missing"
        return CheckpointError(f"{self.path}: {self.where}: {key} is {seen}; accepted: {accepted}")
