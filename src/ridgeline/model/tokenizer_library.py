"""Calls into Hugging Face's `tokenizers` with data from a stranger's file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ridgeline.types import CheckpointError


@contextmanager
def library_call(path: Path, what: str) -> Iterator[None]:
    """Turn whatever `tokenizers` raises on damaged data into a CheckpointError that names `what`."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        # The library's panics derive from BaseException alone.
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path}: {what} is damaged: {reason or type(error).__name__}") from None
