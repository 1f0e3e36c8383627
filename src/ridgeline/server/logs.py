"""Logs: one line per event, for people or as JSON. What came from outside cannot end or colour a line."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("ridgeline.server")


def event(name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event and its fields; None is left out."""
    if logger.isEnabledFor(level):
        given = {key: value for key, value in fields.items() if value is not None}
        logger.log(level, name, extra={"fields": given})


def escaped(text: str) -> str:
    """Text whose control characters, line ends and unpaired surrogates are written out."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


class LineFormatter(logging.Formatter):
    """A record as one line: `time level event key=value …`, or one JSON object."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{moment}.{int(record.msecs):03d}Z"
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        message = record.getMessage()
        if record.exc_info:
            fields = {**fields, "cause": self.formatException(record.exc_info)}
        if self._as_json:
            head = {"time": stamp, "level": record.levelname.lower(), "event": message}
            return json.dumps({**head, **fields}, default=str)
        parts = [stamp, record.levelname.lower(), escaped(message)]
        parts += [f"{name}={_value(value)}" for name, value in fields.items()]
        return " ".join(parts)


def _value(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else escaped(str(value))
    plain = text and not any(char in ' "=' for char in text)
    return text if plain else '"' + text.replace('"', '\\"') + '"'


@contextmanager
def on_stderr(log_format: str) -> Iterator[None]:
    """Within this, our logs, and those of the HTTP library from warnings on, go to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(log_format == "json"))
    before = []
    for name, level in (("ridgeline", logging.INFO), ("uvicorn", logging.ERROR), ("asyncio", logging.ERROR)):
        named = logging.getLogger(name)
        before.append((named, named.handlers, named.propagate, named.level))
        named.handlers, named.propagate = [handler], False
        named.setLevel(level)
    try:
        yield
    finally:
        for named, named.handlers, named.propagate, level in before:
            named.setLevel(level)
