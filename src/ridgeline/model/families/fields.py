"""Typed, bounded reading of a checkpoint's metadata: sizes are checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ridgeline.types import CheckpointError

T = TypeVar("T")
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_CONTEXT = 1 << 30
MAX_VOCABULARY = 1 << 24
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
"""Numbers end up in float32 arithmetic: outside of this range they would be denormal or infinite."""


@dataclass(frozen=True, slots=True)
class Fields:
    """A mapping from metadata keys to values; `prefix` stands before every key that is asked for.

    All readers raise CheckpointError with the key, what was seen and what would be accepted. `default`
    None means that the key must be there; a key that holds None counts as absent.
    """

    values: Mapping[str, Any]
    prefix: str = ""

    def __contains__(self, key: str) -> bool:
        return self.values.get(self.prefix + key) is not None

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = MAX_WIDTH) -> int:
        value = self._get(key, default)
        ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return int(self._accept(ok, key, value, f"a whole number from {low} to {high}"))

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero that float32 holds."""
        value = self._get(key, default)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        ok = real and _SMALLEST <= value <= _LARGEST
        return float(self._accept(ok, key, value, f"a number from {_SMALLEST:.3g} to {_LARGEST:.3g}"))

    def number_or_none(self, key: str) -> float | None:
        return self.number(key) if key in self else None

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of `count` numbers above zero that float32 holds."""
        values = self._get(key, None)
        ok = isinstance(values, list) and len(values) == count
        entries = self._accept(ok, key, values, f"{count} numbers")
        return [Fields({key: value}).number(key) for value in entries]

    def integers(self, key: str, high: int) -> list[int]:
        """A list of whole numbers from 0 to `high`; empty where there is none."""
        values = self._get(key, [])
        ok = isinstance(values, list) and all(type(value) is int and 0 <= value <= high for value in values)
        return list(self._accept(ok, key, values, f"whole numbers from 0 to {high}"))

    def entries(self, key: str, count: int, choices: Mapping[Any, T]) -> list[T] | None:
        """What stands for each of `count` words or flags, one a layer; None where there is no list."""
        values = self._get(key, None)
        if values is None:
            return None
        ok = isinstance(values, list) and len(values) == count
        ok = ok and all(isinstance(value, str | int) and value in choices for value in values)
        known = " or ".join(map(str, choices))
        return [choices[v] for v in self._accept(ok, key, values, f"{known} for each of {count} layers")]

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        return bool(self._accept(isinstance(value, bool), key, value, "true or false"))

    def choice(self, key: str, choices: Mapping[str, T], default: str | None = None) -> T:
        """The value that stands for the metadata's word."""
        value = self._get(key, default)
        known = isinstance(value, str) and value in choices
        return choices[self._accept(known, key, value, ", ".join(choices))]

    def section(self, key: str) -> Fields:
        """A nested mapping; empty where there is none."""
        value = self._get(key, {})
        return Fields(self._accept(isinstance(value, Mapping), key, value, "an object"))

    def refuse(self, key: str, *accepted: object) -> None:
        """Refuse a setting that would change the result and that we do not implement."""
        value = self._get(key, None)
        self._accept(value is None or value in accepted, key, value, ", ".join(map(repr, accepted)) or "none")

    def _get(self, key: str, default: T | None) -> Any:
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def _accept(self, ok: bool, key: str, value: Any, accepted: str) -> Any:
        if ok:
            return value
        seen = "missing" if value is None else repr(value)[:80]
        raise CheckpointError(f"model metadata: {self.prefix}{key} is {seen}; accepted: {accepted}")
