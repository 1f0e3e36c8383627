"""`ridgeline serve` as a process: its options, and what it says of wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from command_line import Cli, command_line
from serving import server_process

from ridgeline.cli.serve import listed, memory_bytes
from ridgeline.types import ConfigError


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Cli]:
    return command_line(monkeypatch, capfd, tmp_path)


def test_what_cannot_start_says_why_in_a_line(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    for arguments in (
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


def test_lists_and_sizes() -> None:
    assert listed(["a,b", " c "]) == ("a", "b", "c")
    assert [memory_bytes("any", text) for text in ("5", "2K", "1.5GiB", "3mb")] == [5, 2048, 3 << 29, 3 << 20]
    for text in ("", "-1", "2X", "1e9", "K"):
        with pytest.raises(ConfigError):
            memory_bytes("kv_cache_memory", text)


def test_environment_twins_count(tiny_llama: Path) -> None:
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
        assert server.end() == 0
        assert not any("sk-" in line for line in server.log)
