"""Suffix decoding: what followed the longest ends of the text, in itself and in past outputs (Oliaro et al.,
"SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications", 2024).

The nodes of a suffix tree below an ending are its occurrences, sorted by how they went on; so a tree of
counts is grown from the most recent occurrences that an index finds, and none is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from ridgeline.sampling.drafting.drafter import DraftedSequence
from ridgeline.sampling.drafting.histories import MOST_OCCURRENCES, Histories, History
from ridgeline.sampling.drafting.index import Text, Trail
from ridgeline.sampling.drafting.outputs import LEAD_TOKENS, PastOutputs
from ridgeline.sampling.drafting.tree import NO_DRAFT, ROOT, DraftTree


def grow(
    continuations: Sequence[list[int]], budget: int, least: float, drafter: str = "", match: int = 0
) -> DraftTree:
    """The most probable up to `budget` nodes of what followed, of a path probability of at least `least`; of
    equals the shallower. A node's own probability is the share of its parent's occurrences that went on with
    its token."""
    if min(continuations) == max(continuations):  # all are the same
        return DraftTree.chain(continuations[0][:budget], 1.0, drafter, match)
    tokens: list[int] = []
    parents: list[int] = []
    probabilities: list[float] = []
    # Of a group of continuations that are alike up to a depth: that, the node there, and its probability.
    groups = [(-1.0, 0, 0, ROOT, continuations)]
    met = 1
    while groups:
        negated, depth, _, node, members = heappop(groups)
        run = members[0][depth : _alike(members, depth)][: budget - len(tokens)]
        if groups and groups[0][0] == negated:
            del run[1:]  # others that are as probable have their turn
        if run:
            first = len(tokens)
            tokens += run
            parents += [node, *range(first, first + len(run) - 1)]
            probabilities += [-negated] * len(run)
            depth, node = depth + len(run), len(tokens) - 1
        if len(tokens) == budget:
            break
        for group in _split(members, depth):
            probability = -negated * len(group) / len(members)
            if probability >= least:
                heappush(groups, (-probability, depth, met, node, group))
                met += 1  # also keeps groups from being compared
    return DraftTree(tokens, parents, probabilities, drafter, match)


def _alike(members: Sequence[list[int]], depth: int) -> int:
    """The depth up to which continuations that are alike up to `depth` go on alike."""
    if len(members) == 1:
        return len(members[0])
    first, last = min(members), max(members)  # what these two have in common, all between them have
    most = min(len(first), len(last))
    while depth < most and first[depth] == last[depth]:
        depth += 1
    return depth


def _split(members: Sequence[list[int]], depth: int) -> Iterable[list[list[int]]]:
    """The members that go on beyond a depth, by their token there."""
    groups: dict[int, list[list[int]]] = {}
    for member in members:
        if depth < len(member):
            groups.setdefault(member[depth], []).append(member)
    return groups.values()


class _Past:
    """Where a sequence's end stands in its tenant's past outputs."""

    __slots__ = ("_lengths", "_trails", "indices")

    def __init__(self, indices: tuple[Text, ...]) -> None:
        self.indices = indices
        self._trails = [Trail(index, MOST_OCCURRENCES) for index in indices]
        self._lengths = [0] * len(indices)  # of the sequence, when each was asked last

    def find(self, history: History) -> tuple[Text, list[tuple[int, int]]] | None:
        """The newest index in which the history's end stands, and where."""
        length = history.length
        for i, trail in enumerate(self._trails):
            new = min(length - self._lengths[i], len(history.text.tokens))
            trail.follow(history.text.tokens, length, new)
            self._lengths[i] = length
            found = trail.matches(length)
            if found:
                return trail.index, found
        return None


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
        found = history.trail.matches(len(history.text.tokens))
        best, score = self._best(history.text, found, budget, NO_DRAFT, 0.0) if found else (NO_DRAFT, 0.0)
        indices = self._outputs.of(sequence.tenant)
        if not indices:
            self._pasts.pop(sequence.arrival, None)  # outputs that were dropped take no memory any longer
            return best
        if score >= budget:
            return best  # no other tree has more nodes, and none is more than certain
        past = self._pasts.get(sequence.arrival)
        if past is None or past.indices is not indices:
            past = self._pasts[sequence.arrival] = _Past(indices)
        elsewhere = past.find(history)
        return best if elsewhere is None else self._best(*elsewhere, budget, best, score)[0]

    def _best(
        self, text: Text, found: list[tuple[int, int]], budget: int, best: DraftTree, score: float
    ) -> tuple[DraftTree, float]:
        """The best tree from matches in one text, or the best one before, and its summed probability."""
        for match in (
            sorted({match for _, match in found}, reverse=True) if len(found) > 1 else (found[0][1],)
        ):
            cap = min(budget, int(self._factor * match + self._offset))
            if cap < score or (cap == score and match <= best.match):
                break  # a shorter match has no more nodes
            continuations = [text.following(at, cap) for at, alike in found if alike >= match]
            tree = grow(continuations, cap, self._least, self.name, match)
            total = sum(tree.probabilities)
            if total > score or (total == score > 0 and match > best.match):
                best, score = tree, total
        return best, score

    def accepted(self, sequence: DraftedSequence, tree: DraftTree, nodes: Sequence[int]) -> None:
        """Nothing to note: what was accepted is in the sequence's tokens."""

    def forget(self, sequence: DraftedSequence) -> None:
        """Drop the sequence's text, and keep its output for its tenant."""
        self._histories.forget(sequence)
        self._pasts.pop(sequence.arrival, None)
        if len(sequence.token_ids) > sequence.prompt_length:
            begin = max(sequence.prompt_length - LEAD_TOKENS, 0)
            self._outputs.add(sequence.tenant, sequence.token_ids[begin:])
