"""Print an answer while it grows: rendered as markdown on a terminal, as plain text elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_CONTINUES = re.compile(r"\s|[-*+] |\d{1,9}[.)] ")
_REFRESH_S = 0.08


class AnswerPrinter(Protocol):
    def push(self, piece: str) -> None: ...


def fenced_lines(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of markdown, line ends kept, and whether each belongs to a code block between fences."""
    fence: str | None = None
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        yield line, fence is not None or mark is not None
        if mark and fence is None:
            fence = mark[1]
        elif mark and fence is not None and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = None


def split_blocks(text: str) -> tuple[str, str]:
    """Cut markdown into (blocks that no later text can change, the rest).

    A block ends at a blank line outside code fences, unless an indented line or a list item follows, which
    may belong to it. Only a line that is complete decides.
    """
    cut = offset = 0
    after_blank = inside = False
    for line, fenced in fenced_lines(text):
        starts = line.strip() and line.endswith("\n") and not _CONTINUES.match(line)
        if after_blank and starts and not inside:
            cut = offset
        after_blank = line.endswith("\n") and not line.strip()
        inside = fenced
        offset += len(line)
    return text[:cut], text[cut:]


def with_breaks(text: str) -> str:
    """Keep the line breaks that a model wrote, which markdown would join: poems, addresses, dialogues."""
    return "".join(
        line if fenced or not line.strip() else line.rstrip("\n") + "  \n"
        for line, fenced in fenced_lines(text)
    )


class PlainPrinter:
    """Text as it is, flushed piece by piece."""

    def push(self, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()


class MarkdownPrinter:
    """Finished blocks are printed for good; only the one that still grows is drawn again."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(), auto_refresh=False, vertical_overflow="ellipsis")
        self._rest = ""
        self._printed = False
        self._drawn_s = 0.0

    def start(self) -> None:
        self._live.start()

    def push(self, piece: str) -> None:
        done, self._rest = split_blocks(self._rest + piece)
        if done:
            self._print(done)
        now = time.monotonic()
        if done or now - self._drawn_s >= _REFRESH_S:
            self._draw(self._rest)
            self._drawn_s = now

    def close(self) -> None:
        """Draw the last block as it ended and let go of the terminal."""
        self._draw("")
        self._live.stop()
        if self._rest.strip():
            self._print(self._rest)

    def _print(self, text: str) -> None:
        from rich.markdown import Markdown

        if self._printed:
            self._live.console.print()
        self._live.console.print(Markdown(with_breaks(text.strip("\n"))))
        self._printed = True

    def _draw(self, text: str) -> None:
        from rich.console import Group
        from rich.markdown import Markdown

        gap = [""] if self._printed and text.strip() else []
        self._live.update(Group(*gap, Markdown(with_breaks(text))), refresh=True)


@contextmanager
def answer_printer(rendered: bool) -> Iterator[AnswerPrinter]:
    """A printer for one answer; the cursor stands on a new line afterwards, however the answer ended."""
    if not rendered:
        yield PlainPrinter()
        print(flush=True)
        return
    printer = MarkdownPrinter()
    printer.start()
    try:
        yield printer
    finally:
        printer.close()
