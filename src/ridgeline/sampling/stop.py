"""When a text has ended, and which part of it may be shown already."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds stop strings in text that arrives in pieces; never shows a part of one.

    The match that ends first wins, and of those that end together the longest, so the result does not
    depend on how the text was cut into pieces. One Knuth-Morris-Pratt automaton per string: linear time.
    """

    __slots__ = ("_borders", "_first", "_held", "_include", "_states", "_stops", "matched")

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._borders = tuple(_borders(stop) for stop in self._stops)
        self._states = [0] * len(self._stops)
        self._first = frozenset(stop[0] for stop in self._stops)
        self._held = ""  # text that may be the beginning of a stop string
        self._include = include_in_output
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Take the next piece and return the text that is now certain; after a match, nothing."""
        if self.matched is not None:
            return ""
        if not self._held and self._first.isdisjoint(piece):
            return piece
        text = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            stop = self._advance(character)
            if stop is not None:
                self.matched, self._held = stop, ""
                return text[:end] if self._include else text[: end - len(stop)]
        certain = len(text) - max(self._states)
        self._held = text[certain:]
        return text[:certain]

    def copy(self) -> StopMatcher:
        """Another one with the same text before it."""
        other = StopMatcher.__new__(StopMatcher)
        other._stops, other._borders, other._first = self._stops, self._borders, self._first
        other._states, other._held, other._include = [*self._states], self._held, self._include
        other.matched = self.matched
        return other

    def flush(self) -> str:
        """The text held back, once it is known that no more follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Move every automaton by one character; the longest stop string that is complete, if any."""
        found = None
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            state = self._states[i]
            while state and stop[state] != character:
                state = borders[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                found = found or stop
                state = borders[state - 1]
            self._states[i] = state
        return found


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper border (the failure function)."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        if text[i] == text[length]:
            length += 1
        borders[i] = length
    return borders
