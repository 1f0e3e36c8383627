"""The command line on what it must refuse: one line, exit code 1, and nothing left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from checkpoint_files import open_descriptors
from command_line import Cli

from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.types import CheckpointError


@dataclass(frozen=True)
class Command:
    """`ridgeline` with a cache of its own, in this process."""

    run: Cli
    cache: Path

    def fails(self, *arguments: object) -> str:
        """The one line of a command that fails and leaves no file, descriptor or process behind."""
        descriptors, children = open_descriptors(), psutil.Process().children()
        outcome = self.run(*arguments)
        assert (outcome.code, outcome.out) == (1, ""), outcome
        # What a server logs before it fails is not the error.
        *logged, last = outcome.err.splitlines()
        assert last.startswith("error: "), outcome.err
        assert not logged or arguments[0] == "serve", outcome.err
        assert "Traceback" not in outcome.err
        assert last.isprintable()
        assert open_descriptors() <= descriptors
        assert psutil.Process().children() == children
        assert self.files() == []
        return last

    def refuses(self, model: Path) -> str:
        """The line that every verb has for a model; the same for all."""
        lines = {
            self.fails("show", model),
            self.fails("run", "--model", model, "hi"),
            self.fails("serve", model, "--port", 0),
        }
        (line,) = lines
        return line

    def files(self) -> list[str]:
        """Every file of the cache but locks, notes and what was measured of the machine: what a failure might
        have left behind."""
        ours, machine = (".lock", ".verified"), self.cache / "ceilings"
        found = (
            file
            for file in self.cache.rglob("*")
            if file.is_file() and file.suffix not in ours and machine not in file.parents
        )
        return sorted(str(file.relative_to(self.cache)) for file in found)


def refused(path: Path) -> str:
    """The one line with which the reader, which all verbs share, refuses a model. What was opened on the way
    is closed again."""
    before = open_descriptors()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).close()
    assert open_descriptors() == before
    message = str(caught.value)
    assert message.isprintable()
    return message
