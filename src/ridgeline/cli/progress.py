"""Progress of a download: a bar on standard error where that is a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Report = Callable[[str, int, int | None], None]


@contextmanager
def download_bar() -> Iterator[Report]:
    """Yields what takes (stage, bytes done, bytes in all or None). Nothing is drawn before its first call."""
    if not sys.stderr.isatty():
        yield lambda stage, done_bytes, total_bytes: None
        return
    with ExitStack() as stack:
        drawn: list[tuple[Progress, TaskID]] = []

        def report(stage: str, done_bytes: int, total_bytes: int | None) -> None:
            if not drawn:
                bar = stack.enter_context(_bar())
                drawn.append((bar, bar.add_task(stage)))
            bar, task = drawn[0]
            bar.update(task, description=stage, completed=done_bytes, total=total_bytes)

        yield report


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def fetch(model: str | None) -> None:
    """Have a model on this machine before it is loaded, with a bar while it comes."""
    from ridgeline.config import EngineConfig
    from ridgeline.model.catalog import resolve

    with download_bar() as report:
        resolve(EngineConfig().model if model is None else model, progress=report)
