"""The little that the executor asks of a device beside kernels: pinned memory, events and graphs.

`Gpu` is an NVIDIA GPU. `Emulated` stands in for one where there is none: kernels then run in Triton's
interpreter on ordinary memory, and a graph is a call that is made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A place in the order of what was launched."""

    def record(self) -> None: ...

    def synchronize(self) -> None:
        """Wait until everything launched before the event was recorded is done."""

    def elapsed_time(self, end: Event, /) -> float:
        """Milliseconds between two events that have passed."""


class Device(Protocol):
    """`where` tensors live, and how many multiprocessors there are to fill."""

    where: torch.device
    multiprocessors: int

    def host(self, count: int, dtype: torch.dtype) -> Tensor:
        """Host memory that can be copied to and from the device while other work goes on."""

    def event(self) -> Event: ...

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches, without doing it; the result does it."""


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.where = torch.device("cuda", torch.cuda.current_device())
        self.multiprocessors = torch.cuda.get_device_properties(self.where).multi_processor_count
        self._pool: Any = None
        # float32 products stay float32, and long bfloat16 sums are kept in float32.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def host(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, pin_memory=True)

    def event(self) -> Event:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return event  # type: ignore[no-any-return]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


@dataclass(slots=True)
class _Passed:
    """Everything is done as soon as it is launched; the clock is the host's."""

    at_s: float = 0.0

    def record(self) -> None:
        self.at_s = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event, /) -> float:
        return (end.at_s - self.at_s) * 1e3 if isinstance(end, _Passed) else 0.0


class Emulated:
    """Ordinary memory ("cpu"), or none at all ("meta": shapes without contents)."""

    def __init__(self, where: str = "cpu", multiprocessors: int = 2) -> None:
        self.where = torch.device(where)
        self.multiprocessors = multiprocessors

    def host(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype)

    def event(self) -> Event:
        return _Passed()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run
