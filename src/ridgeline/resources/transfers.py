"""Whether to fetch what is kept elsewhere, or to compute it again.

Fetching pays where bytes / bandwidth is less than the time of computing. Both sides are learned from what was
measured: the bandwidth of each link from its transfers, the time of computing from the steps that computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

_RECENT = 9
"""Measurements that count: their median is not moved by the few in which the machine was busy elsewhere."""
_TRIED_AGAIN = 16


class Rate:
    """How much is done in a second, by the median of recent measurements; None before the first."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.per_s: float | None = None

    def observe(self, amount: float, elapsed_s: float) -> None:
        """Take in a measurement. Times and amounts that are not positive are passed over."""
        if amount > 0 and elapsed_s > 0:
            self._recent.append(amount / elapsed_s)
            self.per_s = median(self._recent)

    def seconds(self, amount: float) -> float | None:
        return None if self.per_s is None else amount / self.per_s


class FetchChoice:
    """Chooses for one machine. `links` are the rates of the links by their names, in bytes a second, and
    `computing` that of steps that read prompts, in tokens a second.

    What was never measured is tried. So is, every now and then, what did not pay: a link that was slow once
    would otherwise never be measured again.
    """

    def __init__(self) -> None:
        self.links: dict[str, Rate] = {}
        self.computing = Rate()
        self._declined = 0

    def link(self, name: str) -> Rate:
        return self.links.setdefault(name, Rate())

    def pays(self, nbytes: Mapping[str, int], tokens: int, compute_s: float | None = None) -> bool:
        """Whether to fetch so many bytes, by link, or else to compute so many tokens, in `compute_s` if a
        model of steps says so."""
        fetching = [self.link(name).seconds(count) for name, count in nbytes.items() if count]
        if compute_s is None:
            compute_s = self.computing.seconds(tokens)
        known = [seconds for seconds in fetching if seconds is not None]
        if compute_s is None or len(known) < len(fetching) or sum(known) < compute_s:
            return True
        self._declined += 1
        return self._declined % _TRIED_AGAIN == 0
