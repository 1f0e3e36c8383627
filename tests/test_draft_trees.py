"""Draft trees: merged, cut, shaped and followed, against what is found by trying everything."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest
from drafted import root_paths, tree_of
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.sampling.drafting.shape import best_first, ranked_tree
from ridgeline.sampling.drafting.tree import NO_DRAFT, ROOT, Descent, DraftTree, cut, merge

PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=5)
RATIOS = st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0])


@st.composite
def trees(draw: st.DrawFn, most: int = 9) -> DraftTree:
    """Any tree of up to `most` nodes."""
    tokens: list[int] = []
    parents: list[int] = []
    probabilities: list[float] = []
    edges: set[tuple[int, int]] = set()
    for _ in range(draw(st.integers(1, most))):
        parent = draw(st.integers(ROOT, len(tokens) - 1))
        token = draw(st.integers(0, 3))
        if (parent, token) not in edges:
            edges.add((parent, token))
            above = 1.0 if parent == ROOT else probabilities[parent]
            tokens.append(token)
            parents.append(parent)
            probabilities.append(above * draw(RATIOS))
    return DraftTree(tokens, parents, probabilities)


@given(st.lists(trees(), min_size=1, max_size=4))
def test_merging_keeps_the_root_paths_of_all(several: list[DraftTree]) -> None:
    merged = merge(several)
    merged.check_integrity()
    paths = root_paths(merged)
    assert len(paths) == len(set(paths))
    assert set(paths) == {path for tree in several for path in root_paths(tree)}
    for path, probability in zip(paths, merged.probabilities, strict=True):
        given = [
            p
            for tree in several
            for other, p in zip(root_paths(tree), tree.probabilities, strict=True)
            if other == path
        ]
        assert probability == max(given)


def test_merging_takes_chains_and_skips_what_is_empty() -> None:
    chain = DraftTree.chain([1, 2, 3], 0.5, "ngram", 4)
    merged = merge([NO_DRAFT, chain, DraftTree.chain([1, 5], 0.25)])
    assert (list(merged.tokens), list(merged.parents)) == ([1, 2, 3, 5], [-1, 0, 1, 0])
    assert list(merged.probabilities) == [0.5, 0.5, 0.5, 0.25]
    assert (merged.drafter, merged.match) == ("ngram", 4)


def is_closed(tree: DraftTree, nodes: tuple[int, ...]) -> bool:
    return all(tree.parents[node] in (ROOT, *nodes) for node in nodes)


@given(trees(), st.integers(0, 9))
def test_cutting_leaves_the_best_tree_of_that_size(tree: DraftTree, budget: int) -> None:
    smaller = cut(tree, budget)
    smaller.check_integrity()
    assert len(smaller) == min(budget, len(tree))
    assert set(root_paths(smaller)) <= set(root_paths(tree))
    closed = [nodes for nodes in combinations(range(len(tree)), len(smaller)) if is_closed(tree, nodes)]
    best = max(sum(tree.probabilities[node] for node in nodes) for nodes in closed)
    assert sum(smaller.probabilities) == pytest.approx(best)


def test_a_discount_cuts_equal_branches_to_equal_lengths() -> None:
    both = merge([DraftTree.chain([1] * 6, 0.5), DraftTree.chain([2] * 6, 0.5)])
    assert sorted(root_paths(cut(both, 6)))[-1] == (1,) * 6
    even = cut(both, 6, discount=0.9)
    assert sorted(map(len, root_paths(even))) == [1, 1, 2, 2, 3, 3]


def test_parts_of_chains_are_chains() -> None:
    chain = DraftTree.chain([4, 5, 6], 1.0, "suffix", 9)
    assert chain.is_chain
    assert chain.head(2) == chain.subtree([0, 1]) == DraftTree.chain([4, 5], 1.0, "suffix", 9)
    assert chain.head(3) is chain
    assert chain.depths() == [1, 2, 3]


@given(trees(), st.lists(st.integers(0, 3), min_size=10, max_size=10))
def test_following_is_a_naive_walk(tree: DraftTree, noise: list[int]) -> None:
    paths = root_paths(tree)

    def target(path: tuple[int, ...]) -> int:
        return (noise[len(path)] + sum(path)) % 4

    descent, said = Descent(tree), ()
    while (node := descent.go(target(said))) is not None:
        said = paths[node]
    walked: tuple[int, ...] = ()
    while (*walked, target(walked)) in paths:
        walked = (*walked, target(walked))
    assert [paths[node] for node in descent.nodes] == [walked[:i] for i in range(1, len(walked) + 1)]


def test_no_draft_leads_nowhere() -> None:
    assert Descent(NO_DRAFT).go(7) is None


def test_broken_trees_are_noticed() -> None:
    for broken in (
        DraftTree([1], [0], [1.0]),
        DraftTree([1, 1], [-1, -1], [0.5, 0.5]),
        DraftTree([1, 2], [-1, 0], [0.2, 0.3]),
        DraftTree([1, 2], [-1], [1.0]),
    ):
        with pytest.raises(AssertionError):
            broken.check_integrity()
    tree_of([[1, 2], [1, 3], [4]]).check_integrity()


# -------------------------------------------------------------------------------------------- shapes


def most_tokens(acceptance: tuple[float, ...], nodes: int, depth: int) -> float:
    """Sequoia's dynamic programme: of the trees of `nodes` nodes, the root among them, and at most `depth`
    levels, the most tokens that any gives."""

    @cache
    def best(m: int, levels: int, children: int) -> float:
        """With so many children of the root, of the ranks 0 to children − 1; −inf where there is no tree."""
        if m < 1 or levels < 1 or (children == 0 and m > 1):
            return float("-inf")
        if children == 0:
            return 1.0
        chances = [
            best(m - below, levels, children - 1) + acceptance[children - 1] * whole(below, levels - 1)
            for below in range(1, m)
        ]
        return max(chances, default=float("-inf"))

    @cache
    def whole(m: int, levels: int) -> float:
        return max(best(m, levels, children) for children in range(len(acceptance) + 1))

    return whole(nodes, depth)


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=4).map(lambda ps: sorted(ps, reverse=True)),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_the_heap_finds_what_the_dynamic_programme_finds(ps: list[float], budget: int, depth: int) -> None:
    total = sum(ps)
    acceptance = tuple(p / max(total, 1) for p in ps)
    tree = ranked_tree(acceptance, budget, depth)
    tree.check_integrity()
    assert len(tree) <= budget
    assert max(tree.depths()) <= depth
    fits = sum(len(acceptance) ** level for level in range(1, depth + 1))
    expected = most_tokens(acceptance, min(budget, fits) + 1, depth + 1)
    assert 1 + sum(tree.probabilities) == pytest.approx(expected)


def test_a_shape_goes_deep_where_acceptance_is_high_and_wide_where_it_is_not() -> None:
    assert ranked_tree((0.9, 0.05), 4, 8).depths() == [1, 2, 3, 4]
    assert sorted(ranked_tree((0.3, 0.25, 0.2), 4, 8).depths()) == [1, 1, 1, 2]
    assert len(ranked_tree((0.5, 0.0), 9, 3)) == 3  # what is never accepted has no node


def test_best_first_stops_at_the_least_probability_and_takes_the_shallower_of_equals() -> None:
    def children(place: str) -> list[tuple[int, float, str]]:
        return [(0, 0.5, place + "a"), (1, 0.5, place + "b")]

    tree = best_first("", children, 100, 10, least=0.25)
    assert tree.depths() == [1, 1, 2, 2, 2, 2]
    assert min(tree.probabilities) == 0.25
    assert best_first("", children, 3, 10).depths() == [1, 1, 2]
    assert len(best_first("", children, 0, 10)) == 0
