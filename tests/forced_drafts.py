"""Drafting for engines under test: trees of any shape, wherever the scheduler lets one be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ridgeline.sampling.drafting.tree import NO_DRAFT, ROOT, DraftTree
from ridgeline.scheduling.plan import Chunk, Drafted
from ridgeline.scheduling.sequence import Sequence as Sequenced
from ridgeline.types import MAX_DRAFT_TOKENS, SpeculationParams

Truth = Callable[[Sequenced], Sequence[int]]
"""All tokens that a sequence will have, as far as they are known."""


class ForcedDrafting:
    """Guesses at random from `vocabulary`, and where `truth` tells what comes, along it with a probability of
    `right` for each token: trees are accepted in part at every depth."""

    def __init__(
        self, seed: int, vocabulary: int, truth: Truth = lambda sequence: (), right: float = 0.8
    ) -> None:
        self._rng = random.Random(seed)
        self._vocabulary = vocabulary
        self._truth = truth
        self._right = right
        self.drafted = self.accepted = self.moved = 0
        self.forgotten: list[int] = []

    def wanted(self, asked: SpeculationParams | bool | None) -> SpeculationParams | None:
        return None if asked is False else SpeculationParams()

    def rests(self, rows: int) -> bool:
        return False

    def handled(self, guesses: int, elapsed_s: float, step_s: float) -> None:
        assert guesses > 0

    def draft(self, decodes: Sequence[Sequenced], chunks: Sequence[Chunk], room: int) -> list[DraftTree]:
        trees = []
        for sequence in decodes:
            most = min(room, sequence.limit - len(sequence.token_ids) - 1, MAX_DRAFT_TOKENS)
            count = self._rng.choice([0, 1, 2, 5, 9, 20, most])
            tree = self._tree(sequence, min(count, most))
            tree.check_integrity()
            room -= len(tree)
            trees.append(tree)
        return trees

    def _tree(self, sequence: Sequenced, count: int) -> DraftTree:
        if count < 1:
            return NO_DRAFT
        coming = self._truth(sequence)[len(sequence.token_ids) :]
        deep = self._rng.random()
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        truth = ROOT  # the node that is the truth so far
        for _ in range(8 * count):
            if len(tokens) == count:
                break
            parent = len(tokens) - 1 if self._rng.random() < deep else self._rng.randrange(-1, len(tokens))
            depth = depths[parent] if parent >= 0 else 0
            token = self._rng.randrange(self._vocabulary)
            if parent == truth and depth < len(coming) and self._rng.random() < self._right:
                token = coming[depth]
            if (parent, token) in zip(parents, tokens, strict=True):
                continue
            if parent == truth and depth < len(coming) and token == coming[depth]:
                truth = len(tokens)
            parents.append(parent)
            tokens.append(token)
            depths.append(depth + 1)
        return DraftTree(tokens, parents, [0.5] * len(tokens), "forced")

    def verified(self, drafted: Drafted, nodes: Sequence[int]) -> None:
        self.drafted += len(drafted.tree)
        self.accepted += len(nodes)
        self.moved += list(nodes) != list(range(len(nodes)))

    def forget(self, sequence: Sequenced) -> None:
        self.forgotten.append(sequence.arrival)
