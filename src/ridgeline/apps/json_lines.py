"""Files of JSON lines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from ridgeline.types import ConfigError

MAX_LINE_BYTES = 16 << 20


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1, without a byte order mark. Raises OSError, and
    ConfigError for a line of more than MAX_LINE_BYTES."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            text = file.readline(MAX_LINE_BYTES + 1)
            if not text:
                return
            if len(text) > MAX_LINE_BYTES:
                raise ConfigError(f"{path}, line {number}, is longer than {MAX_LINE_BYTES} bytes")
            if number == 1:
                text = text.removeprefix(b"\xef\xbb\xbf")
            if text.strip():
                yield number, text
