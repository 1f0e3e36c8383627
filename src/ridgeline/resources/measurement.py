"""One measured figure with the samples that it was taken from, so that how much they spread can be said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

_UNITS = ("B/s", "op/s", "s", "share")
_DIGITS = 5
_Rule = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured (`what`), in `unit`: "B/s", "op/s", "s" or "share".

    `figure` is what counts of the `samples`. `threads` is 0 where it is not for choosing, `bytes_each` what
    each thread read again and again (of a GPU: all of it), 0 where that is not the point; `how` says which of
    several ways was the best or had to be taken.
    """

    what: str
    unit: str
    figure: float
    samples: tuple[float, ...]
    threads: int = 0
    bytes_each: int = 0
    how: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError unless the figure and the samples are finite numbers and the unit is known."""
        numbers = (self.figure, *self.samples)
        if self.unit not in _UNITS or not self.samples:
            raise ValueError(f"{self.what} has {len(self.samples)} samples in {self.unit!r}")
        if not all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in numbers):
            raise ValueError(f"{self.what} has samples that are not finite numbers")

    @property
    def spread(self) -> float:
        """How far the samples lie apart: from the 10th to the 90th percentile, in medians."""
        return spread(self.samples)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"samples": list(self.samples), "spread": round(self.spread, 4)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Measurement:
        """Raises TypeError or ValueError for anything that `to_json` did not make."""
        given = {name: value for name, value in fields.items() if name != "spread"}
        return cls(**given | {"samples": tuple(given["samples"])})


def best(what: str, unit: str, samples: Sequence[float], **more: Any) -> Measurement:
    """A rate: the best sample counts, because whatever else runs on the machine only makes it lower."""
    return _measured(max, what, unit, samples, more)


def quickest(what: str, unit: str, samples: Sequence[float], **more: Any) -> Measurement:
    """A cost that whatever else runs only makes higher: the median of the lowest quarter counts, for the
    very lowest is luck."""
    return _measured(_of_lowest_quarter, what, unit, samples, more)


def typical(what: str, unit: str, samples: Sequence[float], **more: Any) -> Measurement:
    """A cost that is paid each time, or a rate that the hardware itself varies: the median counts."""
    return _measured(median, what, unit, samples, more)


def together(passes: Sequence[Sequence[Measurement]]) -> tuple[Measurement, ...]:
    """What was measured of a CPU in several passes, each thing once, with the samples of all passes: rates at
    their best, costs at their quickest, shares of time as they usually were."""
    found: dict[tuple[object, ...], list[Measurement]] = {}
    for one in (one for each in passes for one in each):
        key = (one.what, one.threads, one.bytes_each, one.how if one.unit == "share" else "")
        found.setdefault(key, []).append(one)
    return tuple(_together(same) for same in found.values())


def _together(same: Sequence[Measurement]) -> Measurement:
    first = same[0]
    rules: dict[str, _Rule] = {"s": _of_lowest_quarter, "share": median}
    how = max(same, key=lambda one: one.figure).how  # of rates: the way that was the best of all
    samples = [sample for one in same for sample in one.samples]
    more = {"threads": first.threads, "bytes_each": first.bytes_each, "how": how}
    return _measured(rules.get(first.unit, max), first.what, first.unit, samples, more)


def _measured(
    figure: _Rule,
    what: str,
    unit: str,
    samples: Sequence[float],
    more: Mapping[str, Any],
) -> Measurement:
    kept = _rounded(samples)
    return Measurement(what, unit, figure(kept), kept, **more)


def _of_lowest_quarter(samples: Sequence[float]) -> float:
    return median(sorted(samples)[: -(-len(samples) // 4)])


def spread(samples: Sequence[float]) -> float:
    """From the 10th to the 90th percentile in medians, interpolated; 0 for fewer than two samples."""
    ordered = sorted(samples)
    middle = median(ordered)
    if len(ordered) < 2 or middle <= 0:
        return 0.0
    return (_percentile(ordered, 0.9) - _percentile(ordered, 0.1)) / middle


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _rounded(samples: Sequence[float]) -> tuple[float, ...]:
    """Noise needs no more digits, and files with fewer are a third as large."""
    return tuple(float(f"{x:.{_DIGITS}g}") for x in samples)
