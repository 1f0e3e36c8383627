"""Bad input, as a user meets it: one line, exit code 1, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoint_files import STRING, Gguf, key_value, open_descriptors, string, write_folder
from command_line import Cli, command_line


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


def folder_of(config: bytes) -> Callable[[Path], Path]:
    return lambda folder: write_folder(folder / "model", config=config)


OTHER_FAMILY = replace(Gguf(), keys=(key_value("general.architecture", STRING, string("mamba9")),))
FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a path that leads nowhere": (lambda folder: folder / "model.gguf", "does not exist"),
    "a folder without a model": (lambda folder: folder, "has no model in it"),
    "an unknown family, GGUF": (
        written(OTHER_FAMILY.to_bytes()),
        "architecture is 'mamba9'; accepted: those of `ridgeline list --families`",
    ),
    "an unknown family, config": (folder_of(b'{"model_type": "mamba9"}'), "model_type is 'mamba9'"),
    "a config that is no JSON": (folder_of(b"{model_type"), "not valid JSON"),
}


@pytest.mark.parametrize("verb", ["run", "show"])
@pytest.mark.parametrize("kind", FILES)
def test_bad_model_files(ridgeline: Cli, cache: Path, tmp_path: Path, kind: str, verb: str) -> None:
    make, said = FILES[kind]
    (tmp_path / "here").mkdir()
    model = make(tmp_path / "here")
    arguments = ("show", model) if verb == "show" else ("run", "--model", model, "hi")
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
