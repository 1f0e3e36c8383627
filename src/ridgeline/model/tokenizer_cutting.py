"""SentencePiece's merging of pieces by their scores, for vocabularies that a list of merges cannot express.

Pairs of neighbours that are a piece together merge, the best score first and the leftmost of equals
(Kudo and Richardson, 2018, https://arxiv.org/abs/1808.06226). A list of merges says the same when no two
scores are equal, and is much faster; this is for the other files.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import NormalizedString, PreTokenizedString

_Candidate = tuple[float, int, int, int]


class PieceCutter:
    """A pre-tokenizer that cuts text into whole pieces, so that the model behind it has nothing to merge.

    `scores` has the pieces that text may become; the `unused` among them only serve as steps of merging;
    `reserved` has the texts of all other tokens, which no text becomes.
    Takes time n log n in the length of the text, some seconds for a megabyte.
    """

    def __init__(self, scores: Mapping[str, float], unused: frozenset[str], reserved: frozenset[str]) -> None:
        self._scores = scores
        self._unused = unused
        self._reserved = reserved

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(lambda _, part: _parts(part, self.words(str(part))))

    def words(self, text: str) -> list[str]:
        """The pieces of a text. Neighbours that are no piece stay together, as one unknown word."""
        words: list[str] = []
        unknown: list[str] = []
        for piece in self._cut(text):
            if piece not in self._scores:
                unknown.append(piece)
                continue
            words += [*self._joined(unknown), piece]
            unknown = []
        return words + self._joined(unknown)

    def _joined(self, unknown: list[str]) -> list[str]:
        joined = "".join(unknown)
        return unknown if not joined or joined in self._reserved else [joined]

    def _cut(self, text: str) -> list[str]:
        # A symbol is known by where it starts; `end` is 0 where none starts any more.
        end = list(range(1, len(text) + 1))
        before = list(range(-1, len(text) - 1))
        steps: dict[str, int] = {}

        def candidate(left: int, middle: int) -> _Candidate | None:
            piece = text[left : end[middle]]
            score = self._scores.get(piece)
            if score is None:
                return None
            if piece in self._unused:
                steps[piece] = middle - left
            return (-score, left, middle, end[middle])

        pairs = (candidate(start, start + 1) for start in range(len(text) - 1))
        queue = [pair for pair in pairs if pair is not None]
        heapq.heapify(queue)
        while queue:
            _, left, middle, stop = heapq.heappop(queue)
            if end[left] != middle or end[middle] != stop:
                continue
            end[left], end[middle] = stop, 0
            neighbours = []
            if stop < len(text):
                before[stop] = left
                neighbours.append((left, stop))
            if before[left] >= 0:
                neighbours.append((before[left], left))
            for pair in neighbours:
                found = candidate(*pair)
                if found is not None:
                    heapq.heappush(queue, found)
        pieces = [text[start:stop] for start, stop in enumerate(end) if stop]
        return [part for piece in pieces for part in self._used(piece, steps)] if steps else pieces

    def _used(self, piece: str, steps: Mapping[str, int]) -> list[str]:
        """The parts that an unused piece was merged from."""
        parts, left = [], [piece]
        while left:
            part = left.pop()
            if part in steps:
                left += [part[steps[part] :], part[: steps[part]]]
            else:
                parts.append(part)
        return parts


def _parts(text: NormalizedString | None, words: list[str]) -> list[NormalizedString]:
    """`text` sliced into words. By halves, because a slice costs the length of what it is cut from."""
    if text is None or len(words) < 2:
        return [] if text is None else [text]
    half = len(words) // 2
    at = sum(map(len, words[:half]))
    return _parts(text[:at], words[:half]) + _parts(text[at:], words[half:])
