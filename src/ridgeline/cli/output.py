"""What verbs print: JSON, tables, and the dim line of figures under an answer."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console
    from rich.table import Table


_PIPED_COLUMNS = 80
"""Width of what is drawn for a pipe, which has none."""


def print_json(value: object) -> None:
    """One line of JSON on standard output. A Struct is an object of its fields."""
    from msgspec import structs

    print(json.dumps(value, allow_nan=False, default=structs.asdict), flush=True)


def console() -> Console:
    """Standard output with styles where it is a terminal; rich itself honours NO_COLOR."""
    from rich.console import Console

    # A pipe has no width: lines are for programs there and are not folded.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table in the house's style; the columns in `right` hold numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def facts(rows: dict[str, Any]) -> None:
    """A list of names and values, one a line."""
    from rich.text import Text

    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        console().print(Text.assemble((f"{name:<{width}}", "dim"), str(value)), soft_wrap=True)


def plot(lines: Callable[[int, bool], Sequence[str]]) -> None:
    """Lines that are drawn for a number of columns, and for a terminal that knows more than ASCII or not."""
    width = console().width if sys.stdout.isatty() else _PIPED_COLUMNS
    try:
        "─╱◆│┴".encode(sys.stdout.encoding or "ascii")
        unicode = True
    except (UnicodeEncodeError, LookupError):
        unicode = False
    print("\n".join(lines(width, unicode)), flush=True)


def note(text: str) -> None:
    """A dim line on standard error, plain where that is no terminal."""
    styled = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{text}\x1b[0m" if styled else text, file=sys.stderr, flush=True)


def size(size_bytes: float) -> str:
    """Bytes for people: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.1f} {unit}" if unit != "B" else f"{size_bytes:.0f} B"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def count(number: float) -> str:
    """A large count for people: 134.5M."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.1f}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.1f}T"


def figure(number: float) -> str:
    """Three digits, and no fewer than stand before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def milliseconds(seconds: float) -> str:
    """A time for people: 4.25 ms, from ten seconds on 12.3 s."""
    return f"{seconds:.3g} s" if seconds >= 10 else f"{figure(seconds * 1e3)} ms"
