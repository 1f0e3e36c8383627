"""By how many times something is faster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gains:
    """By how many times speeds grow: of a whole run, and of its phases."""

    run: float
    prefill: float
    decode: float
