"""Prompt lookup: what followed the last n tokens when the sequence had them before (Saxena, "Prompt Lookup
Decoding", 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from ridgeline.sampling.drafting.drafter import DraftedSequence
from ridgeline.sampling.drafting.histories import MOST_OCCURRENCES, Histories, History
from ridgeline.sampling.drafting.index import LEAST_MATCH, LONGEST_MATCH, Text
from ridgeline.sampling.drafting.tree import NO_DRAFT, DraftTree, cut, merge

_DISCOUNT = 0.8
"""What the next token of a branch counts, beside the first one of an equally frequent branch."""
_LEAST_REPEATED = 3
"""So often the tokens in front of one that varies have to have occurred."""


class NgramDrafter:
    """Looks up the longest n-gram, of `max_tokens` to `min_tokens`, that stood in the sequence before. Of its
    most recent occurrences, the last one's continuation is a branch, and so are the most frequent others that
    begin with another token, `branches` in all; the probability of each is the share of the occurrences that
    go on with its first token.

    Where the last two tokens did not stand before, the last one may be what varies in text that is written to
    a template: the number of an item, a name. Where the tokens in front of it have occurred three times, and
    most of these times went on alike behind the token that came then, that is proposed, as far as it is the
    same; else what followed the last occurrence of the last token alone.
    """

    name = "ngram"

    def __init__(
        self, histories: Histories, max_tokens: int = 4, min_tokens: int = 1, branches: int = 3
    ) -> None:
        if not 1 <= min_tokens <= max_tokens <= LONGEST_MATCH or branches < 1:
            raise ValueError(f"n-grams of {min_tokens} to {max_tokens} tokens, {branches} branches")
        self._longest, self._shortest = max_tokens, min_tokens
        self._branches = branches
        self._histories = histories

    def propose(self, sequences: Sequence[DraftedSequence], budgets: Sequence[int]) -> list[DraftTree]:
        """As `Drafter` says."""
        return [
            self._propose(self._histories.of(sequence), budget) if budget > 0 else NO_DRAFT
            for sequence, budget in zip(sequences, budgets, strict=True)
        ]

    def _propose(self, history: History, budget: int) -> DraftTree:
        text = history.text
        found = history.trail.matches(len(text))
        longest = min(max([length for _, length in found], default=1), self._longest)
        if longest < max(self._shortest, LEAST_MATCH):
            return self._by_template(history, budget) or self._by_last(history, budget)
        return self._branched(text, [at for at, length in found if length >= longest], longest, budget)

    def _by_template(self, history: History, budget: int) -> DraftTree:
        found = [one for one in history.varied(MOST_OCCURRENCES) if one[1] >= self._shortest]
        if len(found) < _LEAST_REPEATED:
            return NO_DRAFT
        behind = [history.text.following(at, budget) for at, _ in found]
        alike = [tokens for tokens in behind if tokens[0] == behind[0][0]]
        if 2 * len(alike) <= len(behind):
            return NO_DRAFT
        same = takewhile(lambda pair: pair[0] == pair[1], zip(*alike[:2], strict=False))
        match = min(found[0][1], self._longest)
        return DraftTree.chain([token for token, _ in same], 1.0, self.name, match)

    def _by_last(self, history: History, budget: int) -> DraftTree:
        alone = -1 if self._shortest > 1 else history.alone
        if alone < 0:
            return NO_DRAFT
        return DraftTree.chain(history.text.following(alone, budget), 1.0, self.name, 1)

    def _branched(self, text: Text, found: list[int], match: int, budget: int) -> DraftTree:
        if len(found) == 1:
            return DraftTree.chain(text.following(found[0], budget), 1.0, self.name, match)
        counts: dict[int, int] = {}
        positions: dict[int, int] = {}
        for position in found:
            token = text.tokens[position]
            counts[token] = counts.get(token, 0) + 1
            positions.setdefault(token, position)
        first, *others = positions
        others.sort(key=counts.__getitem__, reverse=True)
        branches = [
            DraftTree.chain(
                text.following(positions[token], budget), counts[token] / len(found), self.name, match
            )
            for token in (first, *others[: self._branches - 1])
        ]
        return branches[0] if len(branches) == 1 else cut(merge(branches), budget, _DISCOUNT)

    def accepted(self, sequence: DraftedSequence, tree: DraftTree, nodes: Sequence[int]) -> None:
        """Nothing to note: what was accepted is in the sequence's tokens."""

    def forget(self, sequence: DraftedSequence) -> None:
        """Drop the sequence's text."""
        self._histories.forget(sequence)
