"""A running server, what it was like in the beginning, and whether it is like that still."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from serving import ServerProcess, server_process

CANARY: dict[str, Any] = {
    "prompt": "The ridge",
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 0,
}
SETTLE_S = 30.0
"""How long a server gets to have forgotten a fault."""
MEMORY_SLACK_BYTES = 64 << 20
"""What allocators may keep; a leak is found by the soak."""
POOLED_THREADS = 2 + (os.cpu_count() or 1)
"""Those that start only when a crowd or a long text comes: ours for text, and the tokenizer's."""
_PATHS = re.compile(r"/(tmp|home|root|usr|var|opt)/|site-packages|Traceback|0x[0-9a-f]{6,}")


@dataclass(frozen=True)
class Belongings:
    """What the server and its engine hold."""

    children: int
    descriptors: int
    threads: int
    memory_bytes: int

    @classmethod
    def of(cls, server: ServerProcess) -> Belongings:
        process = psutil.Process(server.process.pid)
        children = process.children(recursive=True)
        each = [process, *children]
        return cls(
            len(children),
            sum(one.num_fds() for one in each),
            sum(one.num_threads() for one in each),
            sum(one.memory_info().rss for one in each),
        )


@dataclass
class House:
    """`check` is the oracle of every fault."""

    server: ServerProcess
    canary: dict[str, Any] = field(default_factory=dict)
    before: Belongings = field(default_factory=lambda: Belongings(0, 0, 0, 0))
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(cls, model: Path, *arguments: object, **headers: str) -> Iterator[Self]:
        """`ridgeline serve` with a few seats and a short queue unless `arguments` say otherwise."""
        limits = ("--max-num-seqs", 4, "--max-queue", 16, "--kv-cache-memory", "2M")
        with server_process(model, *limits, *arguments) as server:
            house = cls(server, headers=headers)
            house.canary = house.sing()
            house.sing()
            house.before = Belongings.of(server)
            yield house

    @property
    def url(self) -> str:
        return self.server.url

    def web(self, **options: Any) -> httpx.Client:
        return httpx.Client(**{"base_url": self.url, "timeout": 30, "headers": self.headers, **options})

    def sing(self) -> dict[str, Any]:
        """The canary's tokens and their log-probabilities."""
        with self.web() as web:
            answer = web.post("/v1/completions", json=CANARY)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return {"text": choice["text"], "logprobs": choice["logprobs"]}

    def check(self) -> None:
        """The canary sings as before; no request, page, process, descriptor, thread or memory is left."""
        until(self.is_ready, "ready again")
        until(self.is_empty, "without requests and pages")
        assert self.sing() == self.canary
        until(self.is_tidy, lambda: f"as it was: {self.before}, now {Belongings.of(self.server)}")

    def is_ready(self) -> bool:
        assert self.server.process.poll() is None, self.server.log[-20:]
        with self.web() as web:
            return web.get("/health").status_code == 200

    def is_empty(self) -> bool:
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(self.gauge(name) == 0 for name in names)

    def is_tidy(self) -> bool:
        now, before = Belongings.of(self.server), self.before
        return (
            now.children == before.children
            and now.descriptors <= before.descriptors
            and now.threads <= before.threads + POOLED_THREADS
            and now.memory_bytes <= before.memory_bytes + MEMORY_SLACK_BYTES
        )

    def gauge(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with self.web() as web:
            text = web.get("/metrics").text
        lines = [line for line in text.splitlines() if re.match(rf"ridgeline_{name}(\{{| )", line)]
        assert lines, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def until(condition: Callable[[], bool], wanted: str | Callable[[], str], limit_s: float = SETTLE_S) -> None:
    """Wait for what must come to be."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"not {wanted() if callable(wanted) else wanted}"
        time.sleep(0.02)


def error_of(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's shape and tells nothing of the machine."""
    assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert not _PATHS.search(answer.text), answer.text
    assert "\n" not in error["message"]
    return error


def short(value: object) -> str:
    """A value in the name of a test."""
    return repr(value)[:40]
