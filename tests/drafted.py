"""A sequence as drafters see it, and batches of them that grow along texts that are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ridgeline.sampling.drafting.tree import ROOT, Descent, DraftTree
from ridgeline.types import SpeculationParams


@dataclass
class Drafted:
    """A sequence, with what its request says."""

    arrival: int
    token_ids: list[int]
    prompt_length: int = 0
    limit: int = 1 << 30
    tenant: str = ""
    speculation: SpeculationParams | None = field(default_factory=SpeculationParams)
    forced: Sequence[int] | None = None


def root_paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """The tokens from the root to each node."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(() if parent == ROOT else paths[parent]), token))
    return paths


def follow_text(tree: DraftTree, says: Callable[[int], int]) -> list[int]:
    """The nodes that a target goes along which says `says(i)` as the i-th token from the root, whatever the
    path."""
    descent = Descent(tree)
    while descent.go(says(len(descent.nodes))) is not None:
        pass
    return descent.nodes


def tree_of(paths: Sequence[Sequence[int]]) -> DraftTree:
    """The tree of some root paths; each token of depth is half as probable."""
    tokens: list[int] = []
    parents: list[int] = []
    probabilities: list[float] = []
    places: dict[tuple[int, ...], int] = {(): ROOT}
    for path in paths:
        for end in range(1, len(path) + 1):
            prefix = tuple(path[:end])
            if prefix not in places:
                parents.append(places[prefix[:-1]])
                places[prefix] = len(tokens)
                tokens.append(prefix[-1])
                probabilities.append(0.5**end)
    return DraftTree(tokens, parents, probabilities)
