"""How launches are timed, and the time that the whole measurement may take."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol, TypeVar

import torch

from ridgeline.resources.cuda import GPU
from ridgeline.types import CapacityError

SAMPLES = 7
_SAMPLE_S = 2e-3
"""A sample takes about this long, beside which what it takes to start the first replay does not count."""
_MOST_NODES = 4096
_L2_TIMES = 2
"""Working sets in sizes of the L2: what one launch left there is gone when its turn comes again."""

T = TypeVar("T")
Launch = Callable[[], object]


class Timer(Protocol):
    """Times launches that take turns."""

    def seconds(self, launches: Sequence[Launch]) -> float:
        """Seconds on the device of one of `launches`, which run one after the other, again and again."""

    @property
    def working_set_bytes(self) -> int:
        """How much the launches must touch in a turn, so that caches hold none of it."""

    def check_alive(self) -> None:
        """Wait for the device. Raises whatever has broken it for good."""


class GpuTimer:
    """Replays of a CUDA graph between two events: what the host does is not in the time."""

    def __init__(self, gpu: GPU) -> None:
        self.working_set_bytes = _L2_TIMES * gpu.l2_bytes

    def seconds(self, launches: Sequence[Launch]) -> float:
        for launch in launches:
            launch()  # compiles, which a graph must not see
        eager_s = self._between(launches)
        # Launched one by one they take longer: these turns alone may be over sooner.
        turns = min(max(math.ceil(_SAMPLE_S / eager_s), 1), max(_MOST_NODES // len(launches), 1))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(turns):
                for launch in launches:
                    launch()
        graph.replay()
        replays = max(math.ceil(_SAMPLE_S / self._between([graph.replay])), 1)
        samples = [self._between([graph.replay] * replays) for _ in range(SAMPLES)]
        return median(samples) / (replays * turns * len(launches))

    def check_alive(self) -> None:
        torch.cuda.synchronize()

    def _between(self, works: Sequence[Launch]) -> float:
        """Seconds on the device of all of them, one after the other."""
        event: Any = torch.cuda.Event  # PyTorch leaves it without types
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for work in works:
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def turns_for(timer: Timer, set_bytes: int, most: int) -> int:
    """How many sets of this size the timer wants to take turns, from 1 to `most`."""
    return min(max(math.ceil(timer.working_set_bytes / max(set_bytes, 1)), 1), most)


class DeviceDeadError(Exception):
    """An error after which nothing runs on the device any more."""


@dataclass
class Session:
    """Runs cases while there is time for them, and notes which were skipped and which failed.

    A case is begun when at least as much time is left as the longest of its kind has taken so far.
    """

    timer: Timer
    seconds: float
    clock: Callable[[], float] = time.monotonic
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _longest_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begun_s = self.clock()

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self._begun_s

    @property
    def left_s(self) -> float:
        return self.seconds - self.elapsed_s

    def run(self, kind: str, name: str, work: Callable[[], T], least_s: float = 1.0) -> T | None:
        """The result of `work`, None where there was no time for it or it failed.

        `least_s` is what the first of its kind is expected to take. Raises DeviceDeadError when a failure
        has left the device unusable.
        """
        if self.left_s < self._longest_s.get(kind, least_s):
            self.skipped.append(name)
            print(f"  skipped for lack of time: {name}", flush=True)
            return None
        begun_s = self.clock()
        try:
            return work()
        except DeviceDeadError:
            raise
        except CapacityError as error:
            self._fail(name, str(error))
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            self._fail(name, f"{type(error).__name__}: {error}")
        finally:
            took_s = self.clock() - begun_s
            self._longest_s[kind] = max(took_s, self._longest_s.get(kind, 0.0))
        return None

    def _fail(self, name: str, why: str) -> None:
        self.failed.append(f"{name}: {why}")
        print(f"  FAILED {name}: {why}", flush=True)
        try:
            self.timer.check_alive()
        except Exception as error:
            raise DeviceDeadError(f"the device is of no use any more after {name}") from error
