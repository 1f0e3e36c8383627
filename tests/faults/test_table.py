"""docs/reliability.md says of every row where its tests are, or that it is open."""

from __future__ import annotations

import re
from pathlib import Path

FAULTS = Path(__file__).parent
TABLE = FAULTS.parents[1] / "docs" / "reliability.md"


def rows_of_table() -> dict[int, set[str]]:
    """The last cell of each row."""
    found = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len({number for number, _ in found}) == len(found)
    return {int(number): set(re.findall(r"\w+(?:\.py)?", tests)) for number, tests in found}


def rows_of_tests() -> dict[int, set[str]]:
    """The files with tests of each row."""
    files: dict[int, set[str]] = {}
    for path in FAULTS.glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        for number in re.findall(r"^ *(?:async )?def test_row_(\d\d)_", text, re.MULTILINE):
            files.setdefault(int(number), set()).add(path.name)
    return files


def test_every_row_has_tests_or_is_open() -> None:
    table, tests = rows_of_table(), rows_of_tests()
    assert set(table) == set(range(1, 75)) - {26, 30, 51, 64, 67, 69}
    told = {number: files for number, files in table.items() if files != {"open"}}
    assert told == tests
