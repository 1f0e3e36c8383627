"""What is compiled beside the engine's steps: in order, with a limit of time, and without end only twice."""

from __future__ import annotations

import queue
import threading

import pytest

from ridgeline.server.compiling import MAX_LEFT_BEHIND, Compiling
from ridgeline.types import RequestError


def watched(compiling: Compiling, done: queue.SimpleQueue[Exception | None]) -> Exception | None:
    for _ in range(2000):
        compiling.watch()
        try:
            return done.get(timeout=0.01)
        except queue.Empty:
            continue
    raise AssertionError("nothing was told")


def test_jobs_run_one_after_the_other_and_tell_how_they_ended() -> None:
    compiling, done = Compiling(), queue.SimpleQueue[Exception | None]()
    order: list[int] = []

    def fail() -> None:
        raise RequestError("no")

    compiling.submit(lambda: order.append(1), done.put)
    compiling.submit(fail, done.put)
    compiling.submit(lambda: order.append(2), done.put)
    told = [watched(compiling, done) for _ in range(3)]
    assert (told[0], str(told[1]), told[2]) == (None, "no", None)
    assert order == [1, 2]


def test_a_job_without_end_is_left_behind_and_the_next_one_runs() -> None:
    compiling, done = Compiling(limit_s=0.05), queue.SimpleQueue[Exception | None]()
    release = threading.Event()
    for _ in range(MAX_LEFT_BEHIND):
        compiling.submit(lambda: release.wait(60) and None, done.put)
        assert "takes too long" in str(watched(compiling, done))
    with pytest.raises(RequestError, match="takes too long"):
        compiling.submit(lambda: None, done.put)
    release.set()
    for thread in compiling._left_behind:
        thread.join(20)
    compiling.submit(lambda: None, done.put)
    assert watched(compiling, done) is None
    assert done.empty(), "what was left behind tells nothing any more"
