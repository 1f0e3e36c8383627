"""The radix tree of cached prefixes: from tokens to pages.

An edge-compressed tree over whole pages of tokens, after Zheng et al., "SGLang: Efficient Execution of
Structured Language Model Programs" (2024). It deals in keys and page ids; who uses the pages, and when they
are evicted, is `cache.prefix`'s business.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ridgeline.config import PAGE_TOKENS

HOLE = -1
"""Stands for the page of a memory group that has let go of it."""
_TOKEN = "i"
PAGE_BYTES = PAGE_TOKENS * array(_TOKEN).itemsize
NAME_BYTES = 32
"""Of a page's name in lower tiers, where there are any: `cache.names`."""


@dataclass(frozen=True, slots=True)
class Scope:
    """All that keys and values depend on beside the tokens before them, and who may share them: prefixes are
    shared within one scope only. Scopes are equal when every field is; nothing is hashed for identity.

    `preceding` writes out the segments before the one that is cached, whole.
    """

    salt: str = ""
    adapter: str = ""
    first_position: int = 0
    preceding: tuple[bytes, ...] = ()


def key_of(tokens: Sequence[int]) -> bytes:
    """Tokens as they stand in keys."""
    return array(_TOKEN, tokens).tobytes()


class Node:
    """An edge and the point where it ends. `key` has the edge's tokens, `columns[g]` a page of memory group
    g, or a HOLE, for each page of them; `names` their names, or nothing. `users` counts the sequences that
    stand at the end. A root has a scope, no parent and no edge."""

    __slots__ = ("children", "columns", "key", "names", "parent", "scope", "users")

    def __init__(self, parent: Node | None, key: bytearray, columns: tuple[array[int], ...]) -> None:
        self.parent = parent
        self.key = key
        self.columns = columns
        self.names = bytearray()
        self.children: dict[bytes, Node] = {}
        self.scope: Scope | None = None
        self.users = 0

    @property
    def pages(self) -> int:
        """Length of the edge."""
        return len(self.key) // PAGE_BYTES

    @property
    def first_page(self) -> bytes:
        """The tokens by which the parent knows this node."""
        return bytes(self.key[:PAGE_BYTES])


Path = list[tuple[Node, int]]
"""Edges one behind the other, and how many pages of each; of all but the last, the whole edge."""


class RadixTree:
    """Owns the nodes. `owner(g, page)` is the node that holds a page of group g."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._roots: dict[Scope, Node] = {}
        self._owners: tuple[dict[int, Node], ...] = tuple({} for _ in range(groups))

    def root(self, scope: Scope) -> Node:
        """Where the prefixes of a scope begin; made when it is first asked for, dropped by `prune`."""
        root = self._roots.get(scope)
        if root is None:
            root = self._roots[scope] = Node(None, bytearray(), self._empty())
            root.scope = scope
        return root

    def owner(self, group: int, page: int) -> Node:
        return self._owners[group][page]

    def walk(self, node: Node, key: bytearray, begin: int, end: int) -> Path:
        """The longest path from the end of `node` along pages `begin` to `end` of a key."""
        path: Path = []
        while begin < end:
            child = node.children.get(bytes(key[begin * PAGE_BYTES : (begin + 1) * PAGE_BYTES]))
            if child is None:
                break
            pages = common_pages(child.key, 0, key, begin, min(child.pages, end - begin))
            path.append((child, pages))
            if pages < child.pages:
                break
            node, begin = child, begin + pages
        return path

    def split(self, node: Node, pages: int) -> Node:
        """Cut the edge to `node` after `pages` pages; returns the new node there. Whoever stood at the end of
        `node` stands there still."""
        if pages == node.pages:
            return node
        assert node.parent is not None
        assert 0 < pages < node.pages
        size = pages * PAGE_BYTES
        upper = Node(node.parent, node.key[:size], tuple(column[:pages] for column in node.columns))
        node.parent.children[node.first_page] = upper
        upper.names = node.names[: pages * NAME_BYTES]
        del node.key[:size]
        del node.names[: pages * NAME_BYTES]
        for column in node.columns:
            del column[:pages]
        node.parent = upper
        upper.children[node.first_page] = node
        self._own(upper, upper.columns)
        return upper

    def append(
        self, node: Node, key: bytearray, columns: tuple[array[int], ...], names: bytes | bytearray = b""
    ) -> Node:
        """Put an edge behind `node`, where its only user stands; returns the node at the edge's end, which is
        the same one where nothing else needs its place."""
        if node.parent is not None and not node.children and node.users == 1:
            node.key += key
            for column, more in zip(node.columns, columns, strict=True):
                column.extend(more)
        else:
            parent, node = node, Node(node, key, columns)
            parent.children[node.first_page] = node
        node.names += names
        self._own(node, columns)
        return node

    def name(self, group: int, page: int) -> bytes:
        """The name of the tokens in a page that the tree holds."""
        node = self._owners[group][page]
        place = node.columns[group].index(page) * NAME_BYTES
        return bytes(node.names[place : place + NAME_BYTES])

    def holds(self, group: int, page: int) -> bool:
        return page in self._owners[group]

    def fill(self, node: Node, index: int, group: int, page: int) -> None:
        """Put a page where there is a hole."""
        assert node.columns[group][index] == HOLE
        node.columns[group][index] = page
        self._owners[group][page] = node

    def drop(self, group: int, page: int) -> Node:
        """Make a hole of a page; returns the node."""
        node = self._owners[group].pop(page)
        node.columns[group][node.columns[group].index(page)] = HOLE
        return node

    def cut_end(self, node: Node) -> list[tuple[int, int]]:
        """Take the last page of tokens off a leaf; returns the pages, with their groups, that it had."""
        assert not node.children
        assert not node.users
        held = [(group, column.pop()) for group, column in enumerate(node.columns)]
        held = [(group, page) for group, page in held if page != HOLE]
        for group, page in held:
            del self._owners[group][page]
        first = node.first_page
        del node.key[-PAGE_BYTES:]
        del node.names[-NAME_BYTES:]
        if not node.key:
            assert node.parent is not None
            del node.parent.children[first]
        return held

    def prune(self, node: Node) -> None:
        """Drop what nobody stands at and no page is held for, from the end of `node` towards its root."""
        while not node.children and not node.users:
            while node.key and all(column[-1] == HOLE for column in node.columns):
                self.cut_end(node)
            if node.key:
                return
            if node.parent is None:
                assert node.scope is not None
                self._roots.pop(node.scope, None)
                return
            node = node.parent

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents first."""
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def check_integrity(self) -> None:
        """Raise AssertionError unless the tree is well formed and holds each page once."""
        held: list[set[int]] = [set() for _ in range(self._groups)]
        for node in self.nodes():
            root = node.parent is None
            assert root == (node.scope is not None) == (not node.key), "only roots have a scope and no edge"
            assert len(node.key) % PAGE_BYTES == 0, "an edge ends inside a page"
            assert node.children or node.users or not root, "a root is kept for nobody"
            for first, child in node.children.items():
                assert child.parent is node, "a child has another parent"
                assert child.first_page == first, "a child is known by other tokens than it has"
            named = len(node.names)
            assert named in (0, node.pages * NAME_BYTES), "an edge has not a name for each page of tokens"
            for group, column in enumerate(node.columns):
                assert len(column) == node.pages, "an edge has not a page for each page of tokens"
                pages = [page for page in column if page != HOLE]
                assert held[group].isdisjoint(pages), "a page is in the tree twice"
                held[group].update(pages)
                assert len(set(pages)) == len(pages), "a page is in the tree twice"
                assert all(self._owners[group].get(page) is node for page in pages), "a page's owner differs"
            useless = not root and not node.children and not node.users
            assert not useless or any(column[-1] != HOLE for column in node.columns), "a leaf holds no page"
        assert [len(pages) for pages in held] == [len(owners) for owners in self._owners], "a page was lost"

    def _own(self, node: Node, columns: tuple[array[int], ...]) -> None:
        for owners, column in zip(self._owners, columns, strict=True):
            for page in column:
                if page != HOLE:
                    owners[page] = node

    def _empty(self) -> tuple[array[int], ...]:
        return tuple(array("i") for _ in range(self._groups))


def common_pages(one: bytearray, at_one: int, other: bytearray, at_other: int, most: int) -> int:
    """How many pages two keys have in common, `most` at most, from these pages on: by halving, so that each
    token is compared about twice, and all of them at memcmp's speed."""

    def same(begin: int, end: int) -> bool:
        mine = one[(at_one + begin) * PAGE_BYTES : (at_one + end) * PAGE_BYTES]
        return mine == other[(at_other + begin) * PAGE_BYTES : (at_other + end) * PAGE_BYTES]

    if same(0, most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if same(low, middle):
            low = middle
        else:
            high = middle
    return low
