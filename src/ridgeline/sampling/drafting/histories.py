"""The indices of the sequences that are under way, shared by the drafters that look tokens up in them."""

from __future__ import annotations

from ridgeline.sampling.drafting.drafter import DraftedSequence
from ridgeline.sampling.drafting.index import TokenIndex, Trail

WINDOW_TOKENS = 1 << 15
"""The last tokens of a sequence in which its own past is looked up, at least; at most twice as many are
kept, which bounds a sequence's index to some megabytes."""

MOST_OCCURRENCES = 8
"""Of one ending, that are looked at: the most recent ones."""


class History:
    """A sequence's own tokens: where its end stood before, and where its last token did, alone."""

    __slots__ = ("_latest", "_window", "alone", "index", "length", "trail")

    def __init__(self, window_tokens: int) -> None:
        self._window = window_tokens
        self.length = 0  # tokens of the sequence that were taken on
        self._begin(TokenIndex())

    def _begin(self, index: TokenIndex) -> None:
        self.index = index
        self.trail = Trail(index, MOST_OCCURRENCES)
        self._latest: dict[int, int] = {}
        self.alone = -1
        """The position after the last token's previous occurrence, or -1."""

    def _note(self, start: int) -> None:
        """Remember where each token from `start` on stood last."""
        tokens, latest = self.index.tokens, self._latest
        last = len(tokens) - 1
        if last < start:
            return
        latest.update(zip(tokens[start:last], range(start, last), strict=True))
        self.alone = latest.get(tokens[last], -2) + 1
        latest[tokens[last]] = last

    def take(self, sequence: DraftedSequence) -> None:
        """Take on what the sequence has said since."""
        said, index = sequence.token_ids, self.index
        count = len(said)
        new, start = count - self.length, len(index.tokens)
        self.length = count
        if new == 1:
            token = said[-1]
            index.append(token)
            self.alone = self._latest.get(token, -2) + 1
            self._latest[token] = start
        else:
            index.extend(said[count - min(new, 2 * self._window) :])
            self._note(start)
        if start + new > 2 * self._window:
            index.keep_last(self._window)
            self._begin(index)
            self._note(0)
            new = 0
        self.trail.follow(index.tokens, len(index.tokens), new)


class Histories:
    """Owns the history of each sequence that was looked up and is not yet forgotten."""

    def __init__(self, window_tokens: int = WINDOW_TOKENS) -> None:
        self._window = window_tokens
        self._histories: dict[int, History] = {}

    def __len__(self) -> int:
        return len(self._histories)

    @property
    def bytes(self) -> int:
        """Memory of all indices."""
        return sum(history.index.bytes for history in self._histories.values())

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
