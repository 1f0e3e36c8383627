"""The texts of the sequences that are under way, shared by the drafters that look tokens up in them."""

from __future__ import annotations

from ridgeline.sampling.drafting.drafter import DraftedSequence
from ridgeline.sampling.drafting.index import LONGEST_MATCH, Text, Trail

WINDOW_TOKENS = 1 << 15
"""The last tokens of a sequence in which its own past is looked up, at least; at most twice as many are
kept."""

MOST_OCCURRENCES = 8
"""Of one ending, that are looked at: the most recent ones."""


class History:
    """A sequence's own tokens, and where its end stood before."""

    __slots__ = ("_window", "length", "text", "trail")

    def __init__(self, window_tokens: int) -> None:
        self._window = window_tokens
        self.length = 0  # tokens of the sequence that were taken on
        self.text = Text()
        self.trail = Trail(self.text, MOST_OCCURRENCES)

    @property
    def alone(self) -> int:
        """The position after the last token's previous occurrence, or -1."""
        return self.text.last_of(self.text.tokens[-1]) if len(self.text) else -1

    def varied(self, most: int) -> list[tuple[int, int]]:
        """Where the text but for its last token stood before, as `Text.find`, the most recent first: the
        positions after the token that came then."""
        tokens = self.text.tokens
        found = self.text.find(tokens[-LONGEST_MATCH - 1 : -1], most + 1)
        return [(at + 1, length) for at, length in found if at + 1 < len(tokens)][:most]

    def take(self, sequence: DraftedSequence) -> None:
        """Take on what the sequence has said since."""
        said, text = sequence.token_ids, self.text
        count = len(said)
        new, self.length = count - self.length, count
        text.extend(said[count - min(new, 2 * self._window) :])
        if len(text) > 2 * self._window:
            text.keep_last(self._window)
            self.trail = Trail(text, MOST_OCCURRENCES)
        self.trail.follow(text.tokens, len(text), new)


class Histories:
    """Owns the history of each sequence that was looked up and is not yet forgotten."""

    def __init__(self, window_tokens: int = WINDOW_TOKENS) -> None:
        self._window = window_tokens
        self._histories: dict[int, History] = {}

    def __len__(self) -> int:
        return len(self._histories)

    @property
    def bytes(self) -> int:
        """Memory of all texts."""
        return sum(history.text.bytes for history in self._histories.values())

    def of(self, sequence: DraftedSequence) -> History:
        """A sequence's history, up to its last token."""
        history = self._histories.get(sequence.arrival)
        if history is None:
            history = self._histories[sequence.arrival] = History(self._window)
        if history.length != len(sequence.token_ids):
            history.take(sequence)
        return history

    def forget(self, sequence: DraftedSequence) -> None:
        """Drop a sequence's history, if there is one. Forgetting twice is harmless."""
        self._histories.pop(sequence.arrival, None)
