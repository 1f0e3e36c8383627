"""Rows 47, 48, 68 and 70 where they are about the KV cache's folder: full disks, damage, other tenants."""

from __future__ import annotations

import json
import os
import resource
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.house import House, until

LONG = "Where the ridge ends, the valley begins, and the river has always known it. " * 2
SETTLED_S = 2.5
"""A model's file that changed a moment ago is not known again."""


@pytest.fixture
def model(tiny_llama: Path) -> Path:
    def is_settled() -> bool:
        files = [tiny_llama] if tiny_llama.is_file() else list(tiny_llama.iterdir())
        return time.time() - max(path.stat().st_ctime for path in files) > SETTLED_S

    until(is_settled, "a model's file that has settled")
    return tiny_llama


def ask(house: House, **headers: str) -> tuple[dict[str, Any], int]:
    """The answer, and how many tokens of the prompt were found."""
    body = {"prompt": LONG, "temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
    with house.web(headers=headers) as web:
        answer = web.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    fields = answer.json()
    return fields["choices"][0], fields["usage"]["prompt_tokens_details"]["cached_tokens"]


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "kv").glob("*.kv"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_row_47_nothing_can_be_written_to_the_cache(model: Path, tmp_path: Path) -> None:
    with House.open(model, "--cache-dir", tmp_path) as house:
        until(lambda: bool(files_of(tmp_path)), "the canary's pages")
        before = files_of(tmp_path)
        engine = house.server.engine
        _, hard = engine.rlimit(resource.RLIMIT_FSIZE)
        engine.rlimit(resource.RLIMIT_FSIZE, (50, hard))
        first, _ = ask(house)
        again, found = ask(house)
        assert again == first
        assert found >= 64, "what is in memory is found all the same"
        house.server.await_log("cannot be written to")
        house.check()
        assert sum("cannot be written to" in line for line in house.server.log) == 1
        assert sorted((tmp_path / "kv").iterdir()) == before


HARMS: dict[str, Callable[[Path], None]] = {
    "a bit": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "another's": lambda path: path.write_bytes(files_of(path.parents[1])[-1].read_bytes()),
    "half-written": lambda path: path.write_bytes(path.read_bytes()[:40] + bytes(path.stat().st_size - 40)),
}


def test_row_48_damaged_pages_are_computed_again(model: Path, tmp_path: Path) -> None:
    with House.open(model, "--cache-dir", tmp_path) as house:
        expected, _ = ask(house)
        house.check()
    assert len(files_of(tmp_path)) >= 5
    with House.open(model, "--cache-dir", tmp_path) as house:
        answer, found = ask(house)
        assert answer == expected
        assert found >= 64, "the second server starts warm"
    for name, harm in HARMS.items():
        for path in files_of(tmp_path)[:-1]:
            harm(path)
        with House.open(model, "--cache-dir", tmp_path) as house:
            answer, found = ask(house)
            assert answer == expected, name
            assert found <= 16, name  # one file is whole, and may be the first page
            house.check()


def test_row_68_the_folder_divides_tenants_too(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": {name: {"key": f"sk-{name}"} for name in ("first", "second")}}))
    options = ("--api-key-file", keys, "--cache-dir", tmp_path)
    first, second = ({"authorization": f"Bearer sk-{name}"} for name in ("first", "second"))
    with House.open(model, *options, **second) as house:
        assert ask(house, **first)[1] == 0
    with House.open(model, *options, **second) as house:
        assert ask(house, **second)[1] == 0
        assert ask(house, **first)[1] >= 64


def test_row_70_nobody_else_can_read_the_folder(model: Path, tmp_path: Path) -> None:
    with House.open(model, "--cache-dir", tmp_path) as house:
        ask(house)
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    assert files_of(tmp_path)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files_of(tmp_path)} == {0o600}
    # Another format of the cache is another model to it.
    with House.open(model, "--cache-dir", tmp_path, "--kv-format", "KV8") as house:
        assert ask(house)[1] == 0
