"""A draft: guessed continuations of one sequence, as a tree of tokens, and how the target follows it.

Every node's next token is sampled from the target with the noise of its own position, exactly as it would be
without a draft, and the draft is followed while it says the same. So a draft changes no token of any text.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

ROOT = -1
"""Stands for the sequence's last known token, from which a tree grows."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Guessed tokens; node i holds `tokens[i]` and follows node `parents[i]`, or ROOT.

    Parents come before their children, and no two children of one node hold the same token.
    `probabilities[i]` is the drafter's estimate that the text goes along the path from the root to node i, at
    most that of its parent. `drafter` names who proposed it, and `match` says from how long a match, in
    tokens: acceptance is measured by both.
    """

    tokens: Sequence[int]
    parents: Sequence[int]
    probabilities: Sequence[float]
    drafter: str = ""
    match: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(
        cls, tokens: Sequence[int], probability: float = 1.0, drafter: str = "", match: int = 0
    ) -> DraftTree:
        """A tree of one branch, every node of which has the same probability."""
        count = len(tokens)
        return cls(tokens, range(-1, count - 1), (probability,) * count, drafter, match)

    @property
    def is_chain(self) -> bool:
        """Whether it is known to be one branch."""
        return type(self.parents) is range

    def depths(self) -> list[int]:
        """How many tokens after the root's each node stands, from 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def head(self, count: int) -> DraftTree:
        """The tree of the first `count` nodes."""
        if count >= len(self.tokens):
            return self
        columns = self.tokens[:count], self.parents[:count], self.probabilities[:count]
        return DraftTree(*columns, self.drafter, self.match)

    def subtree(self, nodes: Sequence[int]) -> DraftTree:
        """The tree of some nodes, ascending, whose parents are all among them."""
        if nodes and nodes[-1] == len(nodes) - 1:
            return self.head(len(nodes))
        places = {node: place for place, node in enumerate(nodes)}
        places[ROOT] = ROOT
        return replace(
            self,
            tokens=[self.tokens[i] for i in nodes],
            parents=[places[self.parents[i]] for i in nodes],
            probabilities=[self.probabilities[i] for i in nodes],
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless all that is said of a tree holds."""
        assert len(self.tokens) == len(self.parents) == len(self.probabilities), "columns of unequal length"
        edges = set(zip(self.parents, self.tokens, strict=True))
        assert len(edges) == len(self.tokens), "a node has two children with one token"
        for node, (parent, probability) in enumerate(zip(self.parents, self.probabilities, strict=True)):
            assert ROOT <= parent < node, "a child comes before its parent"
            above = 1.0 if parent < 0 else self.probabilities[parent]
            assert 0 < probability <= above + 1e-9, "a child is more probable than its parent"


NO_DRAFT = DraftTree((), (), ())


def merge(trees: Iterable[DraftTree]) -> DraftTree:
    """One tree with the root paths of several, each once; a node that several have is as probable as the one
    that gives it most. Drafter and match are the first tree's."""
    first, *others = (tree for tree in trees if len(tree))
    tokens, parents = list(first.tokens), list(first.parents)
    probabilities = list(first.probabilities)
    nodes = {edge: node for node, edge in enumerate(zip(parents, tokens, strict=True))}
    for tree in others:
        places: list[int] = []
        for token, parent, probability in zip(tree.tokens, tree.parents, tree.probabilities, strict=True):
            edge = (ROOT if parent < 0 else places[parent], token)
            node = nodes.setdefault(edge, len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(edge[0])
                probabilities.append(probability)
            elif probability > probabilities[node]:
                probabilities[node] = probability
            places.append(node)
    return DraftTree(tokens, parents, probabilities, first.drafter, first.match)


def cut(tree: DraftTree, budget: int, discount: float = 1.0) -> DraftTree:
    """The `budget` nodes of the greatest path products, in the tree's order; each token of depth counts for
    `discount` (up to 1) more, so that equally probable branches are cut to equal lengths."""
    if len(tree) <= budget:
        return tree
    weights = tree.probabilities
    if discount != 1.0:
        weights = [p * discount**depth for p, depth in zip(weights, tree.depths(), strict=True)]
    # Among equals the earlier: a parent, never less probable than its child, is taken before it.
    best = heapq.nsmallest(budget, range(len(tree)), key=lambda node: (-weights[node], node))
    return tree.subtree(sorted(best))


class Descent:
    """How far the target has gone down a tree: `nodes` are those that it said the same as, from the root."""

    __slots__ = ("_children", "nodes")

    def __init__(self, tree: DraftTree) -> None:
        edges = zip(tree.parents, tree.tokens, strict=True)
        self._children = {(max(parent, ROOT), token): node for node, (parent, token) in enumerate(edges)}
        self.nodes: list[int] = []

    def go(self, token: int) -> int | None:
        """The node that the target's next token leads to; None where no draft says it."""
        node = self._children.get((self.nodes[-1] if self.nodes else ROOT, token))
        if node is not None:
            self.nodes.append(node)
        return node
