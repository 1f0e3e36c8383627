"""Compiling what a request asks for in the engine's process, where it holds up no step.

The library bounds its own work by counters, but not all of it, so there is a limit of time too. A thread that
passes it cannot be stopped: it is left behind, a few of them at most, and another takes its place.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ridgeline.types import RequestError

LIMIT_S = 10.0
MAX_LEFT_BEHIND = 2

TOO_LONG = "structured_outputs cannot be used: compiling takes too long"


@dataclass(slots=True)
class _Job:
    work: Callable[[], None]
    done: Callable[[Exception | None], None]
    began_s: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    told: bool = False

    def tell(self, error: Exception | None) -> None:
        """Once, by whoever comes first: its thread, or who watches the time."""
        with self.lock:
            if self.told:
                return
            self.told = True
        self.done(error)


class Compiling:
    """Runs jobs one after the other in a thread; `done` is called there, with the error of one that
    failed."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._current: _Job | None = None
        self._left_behind: list[threading.Thread] = []
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None], done: Callable[[Exception | None], None]) -> None:
        """Raises RequestError while too many jobs that passed the limit are still running."""
        self._left_behind = [thread for thread in self._left_behind if thread.is_alive()]
        if len(self._left_behind) >= MAX_LEFT_BEHIND:
            raise RequestError(TOO_LONG)
        if self._thread is None:
            self._start()
        self._jobs.put(_Job(work, done))

    def watch(self) -> None:
        """End a job that passed the limit; to be called every now and then."""
        job = self._current
        if job is None or job.began_s is None or time.monotonic() - job.began_s < self._limit_s or job.told:
            return
        assert self._thread is not None
        self._left_behind.append(self._thread)
        self._start()
        job.tell(RequestError(TOO_LONG))

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="ridgeline-compile", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while threading.current_thread() is self._thread:
            job = self._jobs.get()
            job.began_s = time.monotonic()
            self._current = job
            try:
                job.work()
                error = None
            except Exception as raised:
                error = raised
            job.tell(error)
