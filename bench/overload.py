"""A crowd at the door: many clients at once against a short queue, while /health is asked all the time.

    python bench/overload.py MODEL [--clients 1000] [--max-queue 64] [--bursts 3]
    python bench/overload.py --url http://127.0.0.1:8000

Every client opens a connection of its own and asks for a short answer; half of them stream. What each gets is
counted: an answer, a 429 or 503, or nothing. /health is polled from a process of its own, every 20 ms, over
one connection that is kept and over a new one each time. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import queue
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

POLL_S = 0.02
PATIENCE_S = 300.0
"""A client that has nothing by then counts as hanging."""
CALM_S = 1.0
"""How long /health is asked before and after each burst."""
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


# ------------------------------------------------------------------------------------------ /health


class Poller:
    """Asks for /health from a process of its own, so that the crowd's work does not count."""

    def __init__(self, host: str, port: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._found: multiprocessing.Queue[dict[str, list[float]]] = spawn.Queue()
        self._stop = spawn.Event()
        self._process = spawn.Process(target=_poll, args=(host, port, self._stop, self._found), daemon=True)
        self._process.start()

    def end(self) -> dict[str, list[float]]:
        """Seconds of each answer, by kind of connection; infinite where there was none."""
        self._stop.set()
        found = self._found.get(timeout=60)
        self._process.join()
        return found


def _poll(host: str, port: int, stop: Event, found: multiprocessing.Queue[dict[str, list[float]]]) -> None:
    seconds: dict[str, list[float]] = {"kept": [], "fresh": []}
    each = [
        threading.Thread(target=_ask_until, args=(host, port, stop, kind, taken))
        for kind, taken in seconds.items()
    ]
    for one in each:
        one.start()
    for one in each:
        one.join()
    found.put(seconds)


def _ask_until(host: str, port: int, stop: Event, kind: str, seconds: list[float]) -> None:
    connection: socket.socket | None = None
    while not stop.is_set():
        began_s = time.perf_counter()
        try:
            if connection is None:
                connection = socket.create_connection((host, port), timeout=10)
            connection.sendall(HEALTH)
            answer = b""
            while not answer.endswith(b"}"):  # its body
                part = connection.recv(4096)
                if not part:
                    raise ConnectionError
                answer += part
            seconds.append(time.perf_counter() - began_s if b" 200 " in answer[:16] else float("inf"))
        except OSError:
            seconds.append(float("inf"))
            kind = "fresh"  # the kept one is lost
        if kind == "fresh" and connection is not None:
            connection.close()
            connection = None
        time.sleep(max(0.0, POLL_S - (time.perf_counter() - began_s)))


# --------------------------------------------------------------------------------------------- clients


async def burst(host: str, port: int, clients: int, tokens: int) -> list[tuple[str, float]]:
    """What each client got, and after how many seconds."""
    return await asyncio.gather(*(_client(host, port, number, tokens) for number in range(clients)))


async def _client(host: str, port: int, number: int, tokens: int) -> tuple[str, float]:
    began_s = time.perf_counter()
    try:
        async with asyncio.timeout(PATIENCE_S):
            answer = await _ask(host, port, number, tokens)
    except TimeoutError:
        outcome = "hangs"
    except OSError as error:
        outcome = type(error).__name__
    else:
        outcome = _outcome(answer)
    return outcome, time.perf_counter() - began_s


async def _ask(host: str, port: int, number: int, tokens: int) -> bytes:
    body = json.dumps(
        {
            "prompt": f"Client {number} stands in a long line and says:",
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": number % 2 == 0,
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(head.encode() + body)
        return await reader.read()
    finally:
        writer.close()


def _outcome(answer: bytes) -> str:
    """The status, if the answer is whole."""
    status = answer[9:12].decode("latin-1")
    if status == "200":
        streamed = b"text/event-stream" in answer
        whole = b"data: [DONE]" in answer if streamed else b'"finish_reason":"length"' in answer
        return status if whole else "200, broken off"
    return status or "nothing"


# ---------------------------------------------------------------------------------------------- server


@contextmanager
def serving(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Where the server is: a given one, or one of our own for as long as this lasts."""
    if arguments.url:
        where = urlsplit(arguments.url)
        yield where.hostname or "127.0.0.1", where.port or 80
        return
    # A session of its own, as a service has: some systems share processors out by session.
    command = [sys.executable, "-m", "ridgeline.cli.main", "serve", arguments.model, "--port", "0"]
    command += ["--max-queue", str(arguments.max_queue), "--log-format", "json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    ports: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    threading.Thread(target=_read_log, args=(process.stderr, ports), daemon=True).start()
    try:
        port = ports.get(timeout=600)
        if port is None:
            sys.exit("the server did not start")
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait(60)


def _read_log(lines: Any, ports: queue.SimpleQueue[int | None]) -> None:
    port = None
    for line in lines:
        record = json.loads(line) if line.startswith("{") else {"event": line.strip()}
        if record["event"] == "listening":
            port = record["port"]
        elif record["event"] == "ready":
            ports.put(port)
        elif record.get("level") in ("error", None):
            print(line, end="", file=sys.stderr)
    ports.put(None)


# ---------------------------------------------------------------------------------------------- report


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    each = sorted(seconds) or [float("nan")]
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    found = {
        name: round(1e3 * each[min(int(share * len(each)), len(each) - 1)], 2) for name, share in at.items()
    }
    return {"count": len(seconds), **found, "over_100_ms": sum(one > 0.1 for one in each)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="length of an answer")
    parser.add_argument("--bursts", type=int, default=3)
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    outcomes: Counter[str] = Counter()
    refusals_s: list[float] = []
    bursts_s = []
    with serving(arguments) as (host, port):
        asyncio.run(burst(host, port, 2, arguments.tokens))  # nobody's first
        poller = Poller(host, port)
        time.sleep(2 * CALM_S)
        for _ in range(arguments.bursts):
            began_s = time.perf_counter()
            got = asyncio.run(burst(host, port, arguments.clients, arguments.tokens))
            bursts_s.append(round(time.perf_counter() - began_s, 2))
            outcomes.update(outcome for outcome, _ in got)
            refusals_s += [seconds for outcome, seconds in got if outcome == "429"]
            time.sleep(CALM_S)
        health_s = poller.end()
    report = {
        "clients": arguments.clients,
        "max_queue": arguments.max_queue,
        "bursts_s": bursts_s,
        "outcomes": dict(outcomes),
        "refusal_ms": summary(refusals_s),
        "health_ms": {kind: summary(seconds) for kind, seconds in health_s.items()},
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
