"""Which nodes a tree should have: the greatest products of probabilities along their paths.

Where the probability of a child does not depend on how the tree goes on, the n greatest path products are the
tree of n nodes from which most tokens are expected: what the dynamic programme of Chen et al., "Sequoia:
Scalable, Robust, and Hardware-aware Speculative Decoding" (2024), finds for acceptance by rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ridgeline.sampling.drafting.tree import ROOT, DraftTree

P = TypeVar("P")

Children = Callable[[P], Iterable[tuple[int, float, P]]]
"""Of a place: the token, the probability given the place, and the place of each of its children."""


def best_first(root: P, children: Children[P], budget: int, depth: int, least: float = 0.0) -> DraftTree:
    """The tree of the up to `budget` most probable nodes, best first, at most `depth` tokens deep and none of
    a path probability under `least`; of equals the shallower come first, then those met first."""
    tokens: list[int] = []
    parents: list[int] = []
    probabilities: list[float] = []
    heap: list[tuple[float, int, int, int, int, P]] = []
    met = 0
    place, node, probability, level = root, ROOT, 1.0, 0
    while len(tokens) < budget:
        if level < depth:
            for token, share, child in children(place):
                if probability * share >= least:
                    heapq.heappush(heap, (-probability * share, level + 1, met, node, token, child))
                    met += 1  # also keeps places from being compared
        if not heap:
            break
        negated, level, _, parent, token, place = heapq.heappop(heap)
        probability, node = -negated, len(tokens)
        tokens.append(token)
        parents.append(parent)
        probabilities.append(probability)
    return DraftTree(tokens, parents, probabilities)


def ranked_tree(acceptance: Sequence[float], budget: int, depth: int) -> DraftTree:
    """The shape for a drafter that ranks its guesses, where the one of rank b is accepted with probability
    `acceptance[b]`, non-increasing, whatever came before it. Its tokens are the ranks."""
    ranks = [(rank, probability, None) for rank, probability in enumerate(acceptance) if probability > 0]
    return best_first(None, lambda _: ranks, budget, depth)
