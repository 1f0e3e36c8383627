"""What must hold after every fault: the house is as it was.

Tests of this folder are named by the row of the table in docs/reliability.md that they show. Those that take
the fixture `house` share a server; after each of them a canary request must give the tokens that it gave on
the first day, and nothing may be left behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import command_line

from faults.commands import Command
from faults.house import House


@pytest.fixture(scope="package")
def shared_house(tiny_llama: Path) -> Iterator[House]:
    with House.open(tiny_llama) as house:
        yield house


@pytest.fixture
def house(shared_house: House) -> Iterator[House]:
    """A server, checked when the test is over."""
    yield shared_house
    shared_house.check()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command line, with an empty cache and no network."""
    cache = tmp_path / "cache"
    return Command(command_line(monkeypatch, capfd, cache), cache)
