"""`ridgeline serve` as a process: its start, its end, and what it says when it cannot start."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from command_line import Cli, command_line
from serving import ServerProcess, server_process

from ridgeline.cli.serve import listed, memory_bytes
from ridgeline.types import ConfigError


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Cli]:
    return command_line(monkeypatch, capfd, tmp_path)


def test_what_cannot_start_says_why_in_a_line(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = cli("serve", tiny_llama, "--port", port)
        assert outcome.code == 1
        assert f"127.0.0.1:{port}" in outcome.err
    for arguments in (
        (tmp_path / "none.gguf",),
        (tiny_llama, "--max-num-seqs", 0),
        (tiny_llama, "--port", 70000),
        (tiny_llama, "--api-key-file", tmp_path / "none"),
        (tiny_llama, "--kv-cache-memory", "lots"),
        (tiny_llama, "--chat-template", tmp_path / "none"),
        (tiny_llama, "--log-format", "xml"),
        (tiny_llama, "--api-key", "a b"),
    ):
        outcome = cli("serve", *arguments)
        assert outcome.code == 1, arguments
        assert outcome.err.count("\n") == 1
        assert outcome.err.startswith("error: ")


def test_what_the_engine_cannot_load_ends_the_server(cli: Cli, tiny_llama: Path) -> None:
    outcome = cli("serve", tiny_llama, "--port", 0, "--max-model-len", 100_000)
    assert outcome.code == 1
    assert "max_model_len is 100000" in outcome.err.splitlines()[-1]


def test_lists_and_sizes() -> None:
    assert listed(["a,b", " c "]) == ("a", "b", "c")
    assert [memory_bytes(text) for text in ("5", "2K", "1.5GiB", "3mb")] == [5, 2048, 3 << 29, 3 << 20]
    for text in ("", "-1", "2X", "1e9", "K"):
        with pytest.raises(ConfigError):
            memory_bytes(text)


def begin(server: ServerProcess, **headers: str) -> tuple[threading.Thread, list[str]]:
    """Begin a long stream in a thread; its lines, once the first has come."""
    lines: list[str] = []
    first = threading.Event()

    def read() -> None:
        body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        url = f"{server.url}/v1/completions"
        try:
            with httpx.stream("POST", url, json=body, timeout=60, headers=headers) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    first.set()
        except httpx.HTTPError as error:
            lines.append(type(error).__name__)
        first.set()

    reading = threading.Thread(target=read)
    reading.start()
    assert first.wait(60)
    return reading, lines


def test_a_signal_drains_and_environment_twins_count(tiny_llama: Path) -> None:
    twins = {
        "RIDGELINE_API_KEY": "sk-one,sk-two",
        "RIDGELINE_SERVED_MODEL_NAME": "env",
        "RIDGELINE_PORT": "1",
    }
    with server_process(tiny_llama, "--log-format", "text", **twins) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        key = {"Authorization": "Bearer sk-two"}
        models = httpx.get(f"{server.url}/v1/models", headers=key).json()
        assert models["data"][0]["id"] == "env"
        engine = server.engine
        reading, lines = begin(server, **key)
        assert server.end(signal.SIGTERM) == 0
        reading.join(30)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert not engine.is_running()
        assert not any("sk-" in line for line in server.log)


def test_a_second_signal_ends_at_once(tiny_llama: Path) -> None:
    one_only = ("--max-num-seqs", 1, "--max-queue", 0, "--max-num-batched-tokens", 64)
    with server_process(tiny_llama, "--drain-timeout", 300, *one_only) as server:
        engine = server.engine
        engine.suspend()  # nothing will ever end
        outcome: list[object] = []

        def ask() -> None:
            try:
                outcome.append(httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=60))
            except httpx.HTTPError as error:
                outcome.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        while httpx.post(f"{server.url}/v1/completions", json={}).status_code != 429:  # until it is in
            time.sleep(0.02)
        server.process.send_signal(signal.SIGINT)
        server.await_log("open_requests=1")
        assert server.process.poll() is None
        assert server.end(signal.SIGINT) == 0
        asking.join(30)
        assert isinstance(outcome[0], httpx.HTTPError)
        assert not engine.is_running()


def test_a_killed_engine_comes_back_and_a_killed_server_takes_it_along(tiny_llama: Path) -> None:
    with server_process(tiny_llama) as server:
        ask = {"prompt": "The ridge", "max_tokens": 5, "temperature": 0, "ignore_eos": True}

        def answer() -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json=ask, timeout=60)

        before = answer().json()["choices"][0]["text"]
        first = server.engine
        reading, lines = begin(server)
        first.kill()
        reading.join(30)
        end = [line for line in lines if line][-1]
        assert '"engine_stopped"' in end or end == "data: [DONE]"
        while httpx.get(f"{server.url}/health").status_code != 200:
            assert server.process.poll() is None
            time.sleep(0.02)
        assert answer().json()["choices"][0]["text"] == before
        second = server.engine
        server.process.kill()
        second.wait(30)
