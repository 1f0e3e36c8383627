"""The command line, run in this process as a user would run it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

from ridgeline.cli.main import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


def command_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cache: Path) -> Cli:
    """What runs `ridgeline` with its arguments, with a cache of its own and no network."""
    monkeypatch.setenv("RIDGELINE_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("RIDGELINE_ISA", "portable")

    def call(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ridgeline", *map(str, arguments)])
        with piped(stdin) as source, pytest.raises(SystemExit) as left:  # noqa: PT012
            monkeypatch.setattr(sys, "stdin", source)
            capfd.readouterr()  # what fixtures printed is not the command's
            main()
        out, err = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return Outcome(left.value.code, out, err)

    return call


def piped(text: str) -> TextIO:
    """Standard input as a pipe that has ended; /dev/null for no text."""
    if not text:
        return Path(os.devnull).open(encoding="utf-8")
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as file:
        file.write(text)
    return os.fdopen(reader, encoding="utf-8")
