"""Where the markers of a format stand in text that arrives in pieces.

A marker that is a special token of the vocabulary is known by its token, and its spelling in ordinary tokens
is text: a model that quotes what it was given calls no tools by it. Other markers are known by their text.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

# Parsers read at most so many characters at a time: what is left after a marker is copied, and only where
# that is short is the work linear in the text.
PIECE = 256


class TokenStream(Protocol):
    """Gives the text of tokens, one after the other: a `Detokenizer` that does not skip special tokens."""

    def push(self, token_id: int) -> str: ...


class Piece(NamedTuple):
    """Some of the text; `special` says that it is one special token."""

    text: str
    special: bool


class SpecialCutter:
    """Cuts the text of one answer where special tokens stand in it.

    It spells the tokens itself, so it knows at which character each special token begins, however many tokens
    come at once and however far their text lags behind. `special` maps the ids to their texts.
    """

    def __init__(self, special: Mapping[int, str], stream: TokenStream) -> None:
        self._special = special
        self._stream = stream
        self._marks: deque[tuple[int, str]] = deque()  # where a special token begins, counted in characters
        self._spelled = 0  # characters of all tokens so far
        self._read = 0  # characters given out
        self._held = ""  # the beginning of a special token's text

    def cut(self, text: str, token_ids: Sequence[int]) -> list[Piece]:
        """The pieces of `text`; the text of a special token is one piece, and held back until it is whole."""
        for token in token_ids:
            spelled = self._stream.push(token)
            self._spelled += len(spelled)
            name = self._special.get(token)
            if name is not None and spelled.endswith(name):
                self._marks.append((self._spelled - len(name), name))
        if not self._marks:
            self._read += len(text)
            return [Piece(text, False)] if text else []
        return self._cut(text)

    def finish(self) -> list[Piece]:
        """The beginning of a special token that a stop string cut short."""
        held, self._held = self._held, ""
        return [Piece(held, False)] if held else []

    def _cut(self, text: str) -> list[Piece]:
        text = self._held + text
        pieces, at = [], 0
        while self._marks:
            start, name = self._marks[0]
            begin = start - self._read
            if begin >= len(text):
                break
            if begin < at or not name.startswith(text[begin : begin + len(name)]):
                self._marks.popleft()  # the text is not that of the tokens: leave it as it is
                continue
            if begin > at:
                pieces.append(Piece(text[at:begin], False))
            at = begin
            if len(text) - begin < len(name):
                break
            pieces.append(Piece(name, True))
            at += len(name)
            self._marks.popleft()
        held = bool(self._marks) and self._marks[0][0] - self._read == at
        if at < len(text) and not held:
            pieces.append(Piece(text[at:], False))
            at = len(text)
        self._held = text[at:]
        self._read += at
        return pieces


class MarkerSearch:
    """Finds the first of several markers in text."""

    def __init__(self, markers: Iterable[str]) -> None:
        markers = sorted(set(markers), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, markers))) if markers else None
        self._prefixes = frozenset(marker[:size] for marker in markers for size in range(1, len(marker)))
        self._firsts = frozenset(marker[0] for marker in markers)
        self._longest = max(map(len, markers), default=1) - 1

    def find(self, text: str, at: int = 0) -> tuple[int, int] | None:
        """Where the first marker from `at` on begins and ends."""
        found = self._pattern.search(text, at) if self._pattern is not None else None
        return None if found is None else found.span()

    def certain(self, text: str) -> int:
        """How many characters, of text without a marker, cannot be the beginning of one."""
        tail = text[-self._longest :] if self._longest else ""
        if self._firsts.isdisjoint(tail):
            return len(text)
        for size in range(len(tail), 0, -1):
            if tail[-size:] in self._prefixes:
                return len(text) - size
        return len(text)
