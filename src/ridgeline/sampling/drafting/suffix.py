"""Suffix decoding: what followed the longest ends of the text, in itself and in past outputs (Oliaro et al.,
"SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications", 2024).

The nodes of a suffix tree below an ending are its occurrences, sorted by how they went on; so a tree of
counts is grown from the most recent occurrences that an index finds, and none is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ridgeline.sampling.drafting.drafter import DraftedSequence
from ridgeline.sampling.drafting.histories import MOST_OCCURRENCES, Histories, History
from ridgeline.sampling.drafting.index import TokenIndex, Trail
from ridgeline.sampling.drafting.outputs import LEAD_TOKENS, PastOutputs
from ridgeline.sampling.drafting.shape import best_first
from ridgeline.sampling.drafting.tree import NO_DRAFT, DraftTree

_Place = tuple[int, Sequence[list[int]]]
"""A depth, and the continuations that are alike up to it."""


def grow(continuations: Sequence[list[int]], budget: int, least: float) -> DraftTree:
    """The most probable up to `budget` nodes of what followed, of a path probability of at least `least`. A
    node's own is the share of its parent's occurrences that went on with its token."""
    first = continuations[0]
    if len(continuations) == 1 or all(other == first for other in continuations):
        return DraftTree.chain(first[:budget])
    return best_first((0, continuations), _split, budget, budget, least)


def _split(place: _Place) -> Iterable[tuple[int, float, _Place]]:
    depth, members = place
    if len(members) == 1:  # a branch of its own
        only = members[0]
        return ((only[depth], 1.0, (depth + 1, members)),) if depth < len(only) else ()
    groups: dict[int, list[list[int]]] = {}
    for member in members:
        if depth < len(member):
            groups.setdefault(member[depth], []).append(member)
    count = len(members)
    return [(token, len(group) / count, (depth + 1, group)) for token, group in groups.items()]


class _Past:
    """Where a sequence's end stands in its tenant's past outputs."""

    __slots__ = ("_length", "indices", "trails")

    def __init__(self, indices: tuple[TokenIndex, ...]) -> None:
        self.indices = indices
        self.trails = [Trail(index, MOST_OCCURRENCES) for index in indices]
        self._length = 0

    def follow(self, history: History) -> None:
        """Come to the history's end."""
        length = history.length
        new = min(length - self._length, len(history.index))
        for trail in self.trails:
            trail.follow(history.index.tokens, length, new)
        self._length = length


class SuffixDrafter:
    """From each length m of a match of the text's end, in its own past or in the tenant's past outputs, a
    tree of at most `factor` · m + `offset` nodes is grown by counts. Proposed is the one whose probabilities
    have the greatest sum; of equals the longest match's, and its own past's before that of others.

    `histories` and `outputs` may be shared. An output becomes one of the past when its sequence is forgotten.
    """

    name = "suffix"

    def __init__(
        self,
        histories: Histories,
        outputs: PastOutputs,
        factor: float = 2.0,
        offset: float = 0.0,
        least: float = 0.1,
    ) -> None:
        if factor < 0 or 2 * factor + offset < 1 or not 0 < least <= 1:
            raise ValueError(f"factor {factor}, offset {offset}, least probability {least}")
        self._histories, self._outputs = histories, outputs
        self._factor, self._offset, self._least = factor, offset, least
        self._pasts: dict[int, _Past] = {}

    def propose(self, sequences: Sequence[DraftedSequence], budgets: Sequence[int]) -> list[DraftTree]:
        """As `Drafter` says."""
        return [
            self._propose(sequence, budget) if budget > 0 else NO_DRAFT
            for sequence, budget in zip(sequences, budgets, strict=True)
        ]

    def _propose(self, sequence: DraftedSequence, budget: int) -> DraftTree:
        history = self._histories.of(sequence)
        best = self._best(history.trail, len(history.index), budget, NO_DRAFT, 0.0)
        indices = self._outputs.of(sequence.tenant)
        if not indices:
            return best
        past = self._pasts.get(sequence.arrival)
        if past is None or past.indices is not indices:
            past = self._pasts[sequence.arrival] = _Past(indices)
        past.follow(history)
        for trail in past.trails:
            best = self._best(trail, history.length, budget, best, sum(best.probabilities))
        return best

    def _best(self, trail: Trail, length: int, budget: int, best: DraftTree, best_score: float) -> DraftTree:
        """The best tree from the matches of one trail, or the one before."""
        matches = trail.matches(length)
        for match in sorted({match for _, match in matches}, reverse=True):
            cap = min(budget, int(self._factor * match + self._offset))
            if cap < best_score or (cap == best_score and match <= best.match):
                break  # a shorter match has no more nodes, and none is more than certain
            continuations = [
                trail.index.following(position, cap) for position, alike in matches if alike >= match
            ]
            tree = grow(continuations, cap, self._least)
            score = sum(tree.probabilities)
            if score > best_score or (score == best_score and match > best.match and score):
                best_score = score
                best = DraftTree(tree.tokens, tree.parents, tree.probabilities, self.name, match)
        return best

    def accepted(self, sequence: DraftedSequence, tree: DraftTree, nodes: Sequence[int]) -> None:
        """Nothing to note: what was accepted is in the sequence's tokens."""

    def forget(self, sequence: DraftedSequence) -> None:
        """Drop the sequence's index, and keep its output for its tenant."""
        self._histories.forget(sequence)
        self._pasts.pop(sequence.arrival, None)
        if len(sequence.token_ids) > sequence.prompt_length:
            begin = max(sequence.prompt_length - LEAD_TOKENS, 0)
            self._outputs.add(sequence.tenant, sequence.token_ids[begin:])
