"""What a user is told about an error: one line, or that the fault is ours."""

from __future__ import annotations

from typing import Any

import typer

_UsageError: type[Exception] = typer.BadParameter.__bases__[
    0
]  # of flags and arguments; typer does not name it


def user_message(error: Exception) -> str | None:
    """One line about a mistake of the user's or a lack of the machine's; None for a fault of ours."""
    from ridgeline.types import RidgelineError

    if isinstance(error, _UsageError):
        text = _usage_message(error)
    elif isinstance(error, RidgelineError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError):
        text = "out of memory"
    else:
        return None
    return " ".join(text.split())


def _usage_message(error: Exception) -> str:
    """What typer says, the value where its parser leaves it out, and where to read what is accepted."""
    text = str(getattr(error, "format_message", error.__str__)()).removesuffix(".")
    details: list[Any] = getattr(error.__cause__, "errors", list)()
    if details:
        text += f": {details[0].get('input')!r}"
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "ridgeline"
    return f"{text} (`{command} --help` lists what is accepted)"
