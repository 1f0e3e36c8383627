"""Whether to fetch what is kept elsewhere, or to compute it again.

Fetching pays where bytes / bandwidth is less than the time of computing. The bandwidth of each link is
learned from its transfers; what computing takes, the step-time model says. The way down, on which nobody
waited for a page, is paid by then and does not count.
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
    """Chooses for one machine. `links` are the rates of the links by their names, in bytes a second;
    `device_bytes_per_s` is that of the link from host memory to the device, which everything takes in the
    end, 0 where these are one.

    What was never measured is tried. So is, every now and then, what did not pay: a link that was slow once
    would otherwise never be measured again.
    """

    def __init__(self, device_bytes_per_s: float = 0.0) -> None:
        self.links: dict[str, Rate] = {}
        self._device_bytes_per_s = device_bytes_per_s
        self._declined = 0

    def link(self, name: str) -> Rate:
        return self.links.setdefault(name, Rate())

    def pays(self, nbytes: Mapping[str, int], compute_s: float | None) -> bool:
        """Whether to fetch so many bytes, by link, or else to compute for so long; None: nobody knows how
        long."""
        fetching = [self.link(name).seconds(count) for name, count in nbytes.items() if count]
        if self._device_bytes_per_s:
            fetching.append(sum(nbytes.values()) / self._device_bytes_per_s)
        known = [seconds for seconds in fetching if seconds is not None]
        if compute_s is None or len(known) < len(fetching) or sum(known) < compute_s:
            return True
        self._declined += 1
        return self._declined % _TRIED_AGAIN == 0
