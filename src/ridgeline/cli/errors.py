"""What a user is told about an error: one line, or that the fault is ours."""

from __future__ import annotations

import typer

_UsageError: type[Exception] = typer.BadParameter.__bases__[
    0
]  # of flags and arguments; typer does not name it


def user_message(error: Exception) -> str | None:
    """One line about a mistake of the user's or a lack of the machine's; None for a fault of ours."""
    from ridgeline.types import RidgelineError

    if isinstance(error, _UsageError):
        text = str(getattr(error, "format_message", error.__str__)())
    elif isinstance(error, RidgelineError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError):
        text = "out of memory"
    else:
        return None
    return " ".join(text.split())
