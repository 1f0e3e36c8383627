"""Tool calls whose name stands before the JSON of their arguments, read as they arrive."""

from __future__ import annotations

import re

from ridgeline.server.parsers.deltas import Output
from ridgeline.server.parsers.json_calls import JsonCalls, ValueScanner

_MAX_HEAD = 256  # characters between the marker and the arguments

MISTRAL_MARKS = ("[ARGS]", "[CALL_ID]")
DEEPSEEK_MARKS = ("<｜tool▁sep｜>",)
MISTRAL_HEAD = re.compile(r"\s*([\w.\-]+)\s*(?:\[CALL_ID\][\w\-]*)?\s*(?:\[ARGS\])?\s*")
DEEPSEEK_HEAD = re.compile(
    r"\s*(?:function<｜tool▁sep｜>)?([\w.\-]+)\s*(?:<｜tool▁sep｜>)?\s*(?:```json)?\s*", re.ASCII
)


class NamedCall:
    """One call: a head that `pattern` matches, whose group is the name, and an object.

    What begins with a bracket or a brace instead is read as `JsonCalls`. `before` as there.
    """

    def __init__(self, out: Output, before: str, pattern: re.Pattern[str], marks: tuple[str, ...]) -> None:
        self.ended = False
        self._out = out
        self._before = before
        self._pattern = pattern
        self._marks = marks
        self._head = ""
        self._json: JsonCalls | None = None
        self._arguments: ValueScanner | None = None

    def feed(self, text: str) -> int:
        """How many characters were read; fewer than all only where it has `ended`."""
        if self._json is None and self._arguments is None:
            taken = self._read_head(text)
            if self.ended or taken == len(text):
                return taken
            return taken + self.feed(text[taken:])
        if self._json is not None:
            taken = self._json.feed(text)
            self.ended = self._json.ended
            return taken
        assert self._arguments is not None
        taken = self._arguments.scan(text, 0)
        self._out.arguments(text[:taken])
        self.ended = self._arguments.done or self._arguments.broken
        return taken

    def special(self, text: str) -> bool:
        """Whether a special token belongs here; it is then read as its text."""
        if text not in self._marks or self._json is not None or self._arguments is not None:
            return False
        self._head += text
        return True

    def unread(self) -> str:
        """The text that no call accounts for."""
        if self._json is not None:
            return self._json.unread()
        return self._before + self._head if self._arguments is None else ""

    def _read_head(self, text: str) -> int:
        """Reads up to the brace of the arguments, which `feed` then reads."""
        room = max(0, _MAX_HEAD - len(self._head))
        if not self._head.strip():
            lead = len(text) - len(text.lstrip())
            if lead < room and text[lead : lead + 1] in ("[", "{"):
                return self._as_json(text, lead)
        at = text.find("{", 0, room)
        taken = at if at >= 0 else min(len(text), room)
        self._head += text[:taken]
        found = self._pattern.fullmatch(self._head) if at >= 0 else None
        if found is not None:
            self._out.call(found[1])
            self._arguments = ValueScanner()
        elif at >= 0 or len(self._head) >= _MAX_HEAD:
            self.ended = True
        return taken

    def _as_json(self, text: str, lead: int) -> int:
        self._json = JsonCalls(self._out, self._before + self._head + text[:lead])
        return lead
