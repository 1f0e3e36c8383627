"""Start a server, put a load on it, and stop it: what the server benchmarks here share."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ridgeline.apps.load.client import Asking, chosen_model, served_models, settle
from ridgeline.apps.load.connections import Connections
from ridgeline.apps.load.dataset import Lengths, random_samples
from ridgeline.apps.load.drive import Load, Run, drive

START_S = 300.0
STOP_S = 30.0


@dataclass(frozen=True)
class Sizes:
    """A closed loop of random prompts; `requests` in all."""

    clients: int
    prompt_tokens: int
    output_tokens: int
    requests: int


def leave_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does: the server that runs is stopped first."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@contextmanager
def running(command: Sequence[str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server on a free port, wait until its /health is 200, and stop it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=said, stderr=said)
        try:
            url = f"http://127.0.0.1:{port}"
            end_s = time.monotonic() + START_S
            while not is_healthy(url):
                if process.poll() is not None or time.monotonic() > end_s:
                    said.seek(0)
                    lines = said.read().decode(errors="replace").strip().splitlines()
                    raise SystemExit(f"error: {command[0]} does not start: {lines[-1] if lines else ''}")
                time.sleep(0.1)
            yield url, process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


async def asking_of(url: str, connections: Connections) -> Asking:
    """How this server is asked for completions past the end token; one request has tried it."""
    asking = Asking(chosen_model(await served_models(connections), None), "completions", ignore_eos=True)
    asking, notes = await settle(connections, asking, next(random_samples(Lengths(8, 2), seed=-1)))
    if notes:
        raise SystemExit(f"error: {url}: {notes[0]}")
    return asking


async def closed_loop(url: str, sizes: Sizes, seed: int) -> Run:
    """Warm the server up with a request of each client, and put the load on it."""
    connections = Connections(url)
    samples = random_samples(Lengths(sizes.prompt_tokens, sizes.output_tokens), seed)
    try:
        asking = await asking_of(url, connections)
        await drive(connections, asking, samples, Load(sizes.clients, sizes.clients))
        return await drive(connections, asking, samples, Load(sizes.requests, sizes.clients))
    finally:
        await connections.close()
