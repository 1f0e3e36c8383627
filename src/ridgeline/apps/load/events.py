"""Server-sent events out of bytes that are cut anywhere (WHATWG HTML, "Parsing an event stream")."""

from __future__ import annotations

from typing import NamedTuple

from ridgeline.apps.load.failures import BROKEN, FailureError

MAX_EVENT_BYTES = 1 << 20


class Event(NamedTuple):
    """The data of an event, its lines joined, and its name, empty where it has none."""

    name: bytes
    data: bytes


class EventParser:
    """Lines end with LF, CR or CRLF; comments, ids and retry times are passed over. An event that its blank
    line does not end never was one."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False
        self._begun = False
        self._name = b""
        self._data: list[bytes] = []
        self._held_bytes = 0

    def feed(self, data: bytes) -> list[Event]:
        """The events that these bytes complete. Raises FailureError for one that is longer than 1 MiB."""
        if self._after_cr and data[:1] == b"\n":
            data = data[1:]
            self._after_cr = False
        if not data:
            return []
        self._after_cr = data[-1] == 13
        data = self._rest + data
        lines = data.splitlines()
        self._rest = b"" if data[-1] in b"\r\n" else lines.pop()
        if len(self._rest) + self._held_bytes > MAX_EVENT_BYTES:
            raise FailureError(BROKEN, f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: bytes) -> Event | None:
        if not self._begun:
            self._begun = True
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            event = Event(self._name, b"\n".join(self._data)) if self._data else None
            self._name, self._data, self._held_bytes = b"", [], 0
            return event
        field, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if field == b"data":
            self._data.append(value)
            self._held_bytes += len(value)
        elif field == b"event":
            self._name = value
        return None
