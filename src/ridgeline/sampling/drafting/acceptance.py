"""How often the target says what was guessed, by drafter and length of the match: decayed estimates, which
begin with what is expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ridgeline.sampling.drafting.tree import ROOT, DraftTree
from ridgeline.types import MAX_DRAFT_TOKENS

Kind = tuple[str, int]
"""A drafter, and the length of a match: 0 for none, else 1 + its whole binary logarithm."""

MOST = 0.98
"""The highest estimate: nothing is certain, and of two tokens on a path the first is the more probable."""
_LEAST = 0.01
_PRIOR = (0.7, 0.4, 0.55, 0.7, 0.8, 0.9, 0.95)
"""Expected acceptance by length of match: optimistic, so that it is tried."""
_PRIOR_TRIALS = 3.0
_FADING = 0.3
"""Made-up trials are forgotten more slowly than others, so that bad luck at first is no verdict."""
_COMMON_DECAY = 0.98
_DECAY = 0.94
_SHARES = 100
_POWERS = [[(share / _SHARES) ** depth for depth in range(MAX_DRAFT_TOKENS + 1)] for share in range(_SHARES)]
"""Powers of an estimate in per cent."""


def kind_of(tree: DraftTree) -> Kind:
    """By what a tree's acceptance is estimated."""
    return tree.drafter, tree.match.bit_length()


def trials(tree: DraftTree, nodes: Sequence[int]) -> tuple[float, int]:
    """What following a tree as far as `nodes` has shown: how many of its tokens were expected to be accepted,
    by its own probabilities, at the places that were reached; and how many were."""
    if tree.is_chain:
        expected, above = 0.0, 1.0
        for probability in tree.probabilities[: len(nodes) + 1]:
            expected += probability / above
            above = probability
        return expected, len(nodes)
    places = {ROOT: 1.0, **{node: tree.probabilities[node] for node in nodes}}
    expected = sum(
        probability / places[parent]
        for parent, probability in zip(tree.parents, tree.probabilities, strict=True)
        if parent in places
    )
    return expected, len(nodes)


@dataclass(slots=True)
class _Evidence:
    """Decayed sums over trials, before which so many are made up that went as expected."""

    expected: float = 0.0
    accepted: float = 0.0
    made_up: float = _PRIOR_TRIALS

    def add(self, expected: float, accepted: int, decay: float) -> None:
        kept = decay**expected
        self.expected = kept * self.expected + expected
        self.accepted = kept * self.accepted + accepted
        self.made_up *= kept**_FADING

    def estimate(self, prior: float) -> float:
        share = (self.accepted + self.made_up * prior) / (self.expected + self.made_up)
        return min(max(share, _LEAST), MOST)


class Acceptance:
    """Estimates of one sequence. Where little was seen of it they fall back on the middle of what is expected
    and of those of all sequences, in `common`: that others' guesses fail is no more than a hint."""

    __slots__ = ("_common", "_seen")

    def __init__(self, common: Acceptance | None = None) -> None:
        self._common = common
        self._seen: dict[Kind, _Evidence] = {}

    def of(self, kind: Kind) -> float:
        """The estimated share of the drafter's own probability with which a node is accepted."""
        prior = _PRIOR[min(kind[1], len(_PRIOR) - 1)]
        if self._common is not None:
            prior = (prior + self._common.of(kind)) / 2
        seen = self._seen.get(kind)
        return prior if seen is None else seen.estimate(prior)

    def values(self, tree: DraftTree) -> list[float]:
        """The estimated probability with which each node is accepted: less than its parent's."""
        powers = _POWERS[round(self.of(kind_of(tree)) * _SHARES)]
        depths = powers[1 : len(tree.tokens) + 1] if tree.is_chain else [powers[i] for i in tree.depths()]
        if tree.probabilities[-1] == 1:  # and so are all before it
            return depths
        return [p * power for p, power in zip(tree.probabilities, depths, strict=True)]

    def add(self, kind: Kind, expected: float, accepted: int) -> None:
        """Take trials in."""
        decay = _DECAY
        if self._common is None:
            decay = _COMMON_DECAY
        else:
            self._common.add(kind, expected, accepted)
        self._seen.setdefault(kind, _Evidence()).add(expected, accepted, decay)
