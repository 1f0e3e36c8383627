"""OpenAI's harmony format, which gpt-oss writes: messages with a header that names a channel and a recipient.

https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ridgeline.server.parsers.deltas import Delta, Output
from ridgeline.server.parsers.markers import PIECE, MarkerSearch, SpecialCutter

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
HARMONY_MARKERS = frozenset({START, CHANNEL, CONSTRAIN, MESSAGE, *_ENDS})

_MAX_HEADER = 512  # characters
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
# A header, or the beginning of one: role, recipient, channel, recipient, type of the content.
_TO = r"\s*(?:t|to|to=[^\s<]*)?\s*"
_TYPE = r"(?:<\|constrain\|>)?\s*\w*\s*"
_HEADER = re.compile(rf"(?:<\|start\|>\w*)?{_TO}(?:<\|channel\|>\s*\w*{_TO}{_TYPE})?")
_FUNCTIONS = "functions."
_PEOPLE = frozenset({"assistant", "user", "all"})


class HarmonyParser:
    """Channel analysis is reasoning, a message to a function a tool call (unless final), the rest content.

    The prompt ends with the role of the first message. `cutter`, `special` and `strip` as for `MarkupParser`.
    Without `tools`, messages to functions are content.
    """

    def __init__(
        self,
        tools: bool,
        cutter: SpecialCutter | None = None,
        special: frozenset[str] = frozenset(),
        strip: bool = True,
    ) -> None:
        self._out = Output()
        self._tools = tools
        self._cutter = cutter
        self._special = special
        self._strip = strip
        self._search = MarkerSearch(HARMONY_MARKERS - special)
        self._held = ""  # what may be the beginning of a marker
        self._header: list[str] | None = []  # None in a message
        self._header_size = 0
        self._show: Callable[[str], None] = self._out.content

    @property
    def needs_special_tokens(self) -> bool:
        return not self._special.isdisjoint(HARMONY_MARKERS)

    @property
    def called_tools(self) -> bool:
        return self._out.calls > 0

    def feed(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        """What `text` adds. See `OutputParser`."""
        if self._cutter is None:
            self._read(text)
        else:
            for piece in self._cutter.cut(text, token_ids):
                if not piece.special:
                    self._read(piece.text)
                elif piece.text in HARMONY_MARKERS:
                    self._release()
                    self._mark(piece.text)
                elif not self._strip:
                    self._read(piece.text)
        return self._out.take()

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        for piece in self._cutter.finish() if self._cutter is not None else []:
            self._read(piece.text)
        self._release()
        self._drop_header()
        return self._out.take()

    def _read(self, text: str) -> None:
        for at in range(0, len(text), PIECE):
            self._read_piece(text[at : at + PIECE])

    def _read_piece(self, text: str) -> None:
        text, self._held = self._held + text, ""
        at = 0
        while (found := self._search.find(text, at)) is not None:
            self._take(text[at : found[0]])
            self._mark(text[found[0] : found[1]])
            at = found[1]
        text = text[at:]
        certain = self._search.certain(text)
        self._take(text[:certain])
        self._held = text[certain:]

    def _release(self) -> None:
        held, self._held = self._held, ""
        self._take(held)

    def _take(self, text: str) -> None:
        """Text between markers."""
        if self._header is None:
            self._show(text)
            return
        taken = text[: _MAX_HEADER - self._header_size]
        if taken:
            self._add_to_header(taken)
            # A model that was not made for the format, or has lost it, just answers.
            if self._header_size >= _MAX_HEADER or not self._may_be_header():
                self._lose_header()
                self._show(text[len(taken) :])

    def _may_be_header(self) -> bool:
        header = "".join(self._header or [])
        return CHANNEL in header or _HEADER.fullmatch(header) is not None

    def _add_to_header(self, text: str) -> None:
        assert self._header is not None
        self._header.append(text)
        self._header_size += len(text)

    def _mark(self, marker: str) -> None:
        if marker == MESSAGE:
            if self._header is not None:
                self._begin_message("".join(self._header))
        elif marker == CONSTRAIN:
            if self._header is not None:
                self._add_to_header(marker)
        elif marker == CHANNEL and self._header is not None and CHANNEL not in self._header:
            self._add_to_header(marker)
        else:
            self._drop_header()
            self._show = self._out.content
            if marker in (START, CHANNEL):
                self._header, self._header_size = [], 0
                self._add_to_header(marker)

    def _begin_message(self, header: str) -> None:
        self._header = None
        self._show = self._out.content
        found, to = _CHANNEL.search(header), _RECIPIENT.search(header)
        channel = found[1] if found is not None else ""
        name = to[1] if to is not None else ""
        # Names with a dot are those of the model's own tools, which nobody gave it here.
        function = name.startswith(_FUNCTIONS) or (name and "." not in name and name not in _PEOPLE)
        if self._tools and function and name != _FUNCTIONS and channel != "final":
            self._out.call(name.removeprefix(_FUNCTIONS))
            self._show = self._out.arguments
        elif channel == "analysis":
            self._show = self._out.reasoning

    def _drop_header(self) -> None:
        """A header that no message follows: text, unless it is one that was cut short."""
        header = "".join(self._header or [])
        marked = header.lstrip().startswith((START, CHANNEL, "to="))
        if not marked or _HEADER.fullmatch(header) is None:
            self._lose_header()
        self._header = None

    def _lose_header(self) -> None:
        header, self._header = self._header or [], None
        self._show = self._out.content
        self._out.content("".join(header))
