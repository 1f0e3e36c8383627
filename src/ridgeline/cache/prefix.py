"""The prefix cache: pages of sequences that are there or were, for those that begin alike.

The tree keeps pages without using them: while a sequence uses a page it is locked, afterwards it is evictable
until the pool needs it. A sequence in the tree uses, in every group that attends to everything, all pages
of its path, and gives them back from the end; so a page never becomes evictable after one before it, and the
page that has been so for the longest is the end of a leaf. Of a group with a window, any page may go alone.

A recurrent state is remembered as one more group, with a window of one token: all that a row sees of what is
before it. A page of tokens has its slot where the state at the page's end was left there, and mostly a HOLE.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Protocol

from ridgeline.cache.pages import PagePool
from ridgeline.cache.radix import HOLE, NAME_BYTES, PAGE_BYTES, Node, Path, RadixTree, Scope, common_pages
from ridgeline.cache.table import SequencePages
from ridgeline.config import PAGE_TOKENS, pages_for

Columns = list["array[int]"]
"""Pages of each memory group, side by side."""
Spelled = tuple[SequencePages, Sequence[int]]
"""A sequence's pages, and its tokens."""


def first_visible(window: int | None, position: int) -> int:
    """The first page that rows from slot `position` on see."""
    return 0 if window is None else max(position - window, 0) // PAGE_TOKENS


STATE_WINDOW = 1


class Below(Protocol):
    """Hears what happens to the tree's pages, where there are lower tiers."""

    def root(self, scope: Scope) -> bytes:
        """The name before a scope's first page."""

    def keep(self, group: int, page: int) -> None:
        """The tree keeps a page."""

    def lose(self, group: int, page: int, name: bytes) -> None:
        """A page is evicted that holds the tokens of this name."""


class PrefixCache:
    """Keeps pages of `pools` by the tokens in them, and slots of `states` by those before them. Sequences
    enter it by `find`, add to it by `store` and leave it by `leave`."""

    def __init__(
        self,
        pools: tuple[PagePool, ...],
        windows: tuple[int | None, ...],
        below: Below | None = None,
        states: PagePool | None = None,
    ) -> None:
        self._below = below
        self._states = states
        self._pools = pools if states is None else (*pools, states)
        self._windows = windows if states is None else (*windows, STATE_WINDOW)
        self._tree = RadixTree(len(self._pools))
        for group, pool in enumerate(self._pools):
            pool.evict = partial(self._evict, group)

    # ---------------------------------------------------------------------------------------- hits

    def find(
        self, pages: SequencePages, token_ids: Sequence[int], limit: int, tail: Sequence[int] | None
    ) -> tuple[int, Columns, Path]:
        """How many tokens, `limit` at most, every group can restore for this sequence; the pages behind its
        shared ones that hold them, a HOLE where a window has passed one, likewise slots of states; and the
        path to those.

        The last page may be wanted in part. `tail` has the pages, by group, that another sequence of the same
        prompt holds at the page in which the limit lies.
        """
        self._enter(pages)
        assert pages.node is not None
        begin, end = pages.shared, min(len(token_ids) // PAGE_TOKENS, pages_for(limit))
        path: Path = []
        if begin < end:
            path = self._tree.walk(pages.node, pages.spell(token_ids, end), begin, end)
        columns: Columns = [array("i") for _ in self._pools]
        for node, taken in path:
            for column, more in zip(columns, node.columns, strict=True):
                column.extend(more[:taken])
        reached = begin + len(columns[0])
        if tail is not None and reached == limit // PAGE_TOKENS:
            reached += 1
            for column, page in zip(columns, tail, strict=True):
                column.append(page)
        tokens = self.restorable(columns, begin, min(reached * PAGE_TOKENS, limit))
        return tokens, columns, path

    def restorable(self, columns: Columns, begin: int, tokens: int) -> int:
        """The longest start, of these tokens, whose visible pages are there in every group; `columns` are of
        the pages from `begin` on. A state is there only behind whole pages."""
        if self._states is not None:
            tokens -= tokens % PAGE_TOKENS
        settled = False
        while not settled:
            settled = True
            for column, window in zip(columns, self._windows, strict=True):
                first = max(first_visible(window, tokens) - begin, 0)
                seen = column[first : max(pages_for(tokens) - begin, 0)]
                if HOLE in seen:
                    last = len(seen) - 1 - seen[::-1].index(HOLE)
                    tokens, settled = (begin + first + last) * PAGE_TOKENS, False
        return tokens

    def enter(self, pages: SequencePages, path: Path, shared: int) -> None:
        """Let a sequence stand on the way along `path`, where `shared` of its pages are behind it."""
        passed = pages.shared
        for node, taken in path:
            if passed >= shared:
                return
            taken = min(taken, shared - passed)
            self._stand(pages, self._tree.split(node, taken))
            passed += taken
            pages.shared = passed

    # ------------------------------------------------------------------------------------ contents

    def store(self, pages: SequencePages, token_ids: Sequence[int], full: int, state: int = HOLE) -> None:
        """Keep a sequence's first `full` pages, which hold these tokens, and the slot with the state behind
        them, if there is one. Where the tree has such pages already, the sequence's table is led to them, and
        its own are given back."""
        self._enter(pages)
        assert pages.node is not None
        key = pages.spell(token_ids, full)
        if pages.node.children:
            for node, taken in self._tree.walk(pages.node, key, pages.shared, full):
                node = self._tree.split(node, taken)
                for index in range(taken):
                    self._merge(pages, node, index)
                self._stand(pages, node)
                pages.shared += taken
        if pages.shared < full:
            new = key[pages.shared * PAGE_BYTES : full * PAGE_BYTES]
            below = self._below
            names = b"" if below is None else pages.name(token_ids, pages.shared, full, below.root)
            self._stand(pages, self._tree.append(pages.node, new, self._own(pages, full), names))
            pages.shared = full
        if state != HOLE:
            self._leave_state(pages.node, state)

    def _leave_state(self, node: Node, slot: int) -> None:
        """Keep the state behind the last page of an edge, unless there is one."""
        if node.columns[-1][-1] == HOLE:
            group = len(self._pools) - 1
            self._keep(group, slot)
            self._tree.fill(node, node.pages - 1, group, slot)

    def thin(self, pages: SequencePages, place: int) -> None:
        """Let go of the state behind one of a sequence's shared pages, unless somebody uses it or the tree
        branches there."""
        assert self._states is not None
        node, end = pages.node, pages.shared
        assert node is not None
        while end - node.pages > place:
            end -= node.pages
            assert node.parent is not None
            node = node.parent
        slot = node.columns[-1][place - end]
        within = place + 1 < end or (len(node.children) == 1 and not node.users)
        if within and slot != HOLE and not self._states.users(slot):
            self._states.forget(slot)
            self._tree.drop(len(self._pools) - 1, slot)

    def _own(self, pages: SequencePages, full: int) -> tuple[array[int], ...]:
        """The pages behind the shared ones, kept from now on."""
        columns = []
        for group, (table, live) in enumerate(zip(pages.tables, pages.first_live, strict=True)):
            column = table[pages.shared : full]
            for index, page in enumerate(column, start=pages.shared):
                if index < live:
                    column[index - pages.shared] = HOLE
                else:
                    self._keep(group, page)
            columns.append(column)
        if self._states is not None:
            columns.append(array("i", [HOLE]) * (full - pages.shared))
        return tuple(columns)

    def _keep(self, group: int, page: int) -> None:
        self._pools[group].keep(page)
        if self._below is not None:
            self._below.keep(group, page)

    def _merge(self, pages: SequencePages, node: Node, index: int) -> None:
        """One page of tokens that both have: `index` pages into the edge, behind the shared ones."""
        place = pages.shared + index
        # Without the states: those are kept where they are, the one of a page that came first.
        for group, (pool, table) in enumerate(zip(self._pools, pages.tables, strict=False)):
            if place < pages.first_live[group]:
                continue
            own, there = table[place], node.columns[group][index]
            if there == HOLE:
                self._keep(group, own)
                self._tree.fill(node, index, group, own)
            elif there != own:
                pool.share([there])
                table[place] = there  # before its own may be handed out again
                pool.free([own])

    def leave(self, pages: SequencePages) -> None:
        """A sequence that has given its pages back stands nowhere any more."""
        node, pages.node, pages.shared = pages.node, None, 0
        if node is not None:
            node.users -= 1
            self._tree.prune(node)

    def name(self, group: int, page: int) -> bytes | None:
        """The name of the tokens in a page; None where the tree does not keep it."""
        return self._tree.name(group, page) if self._tree.holds(group, page) else None

    def _enter(self, pages: SequencePages) -> None:
        if pages.node is None:
            self._stand(pages, self._tree.root(pages.scope))

    def _stand(self, pages: SequencePages, node: Node) -> None:
        """Stand at another node, behind the one before, which is on the way and need not be pruned."""
        if pages.node is not None:
            pages.node.users -= 1
        node.users += 1
        pages.node = node

    def _evict(self, group: int, page: int) -> None:
        """A pool takes a page that nobody uses: the one place where contents are lost."""
        node = self._tree.owner(group, page)
        if self._windows[group] is not None:
            if self._below is not None:
                self._below.lose(group, page, self._tree.name(group, page))
            self._tree.prune(self._tree.drop(group, page))
            return
        assert node.columns[group][-1] == page, "a page is evicted before those behind it"
        name = bytes(node.names[-NAME_BYTES:])
        for other, held in self._tree.cut_end(node):
            if self._below is not None:
                self._below.lose(other, held, name)
            if other != group:
                self._pools[other].forget(held)
        if not node.key and node.parent is not None:
            self._tree.prune(node.parent)

    # ---------------------------------------------------------------------------- what others compute

    def next_page(self, pages: SequencePages, token_ids: Sequence[int]) -> Hashable:
        """Names the page of tokens behind the shared ones; None where tokens are too few."""
        place = pages.shared
        if pages.node is None or (place + 1) * PAGE_TOKENS > len(token_ids):
            return None
        key = pages.spell(token_ids, place + 1)
        return id(pages.node), bytes(key[place * PAGE_BYTES : (place + 1) * PAGE_BYTES])

    @staticmethod
    def alike(one: Spelled, two: Spelled, end: int) -> int:
        """Up to which token, `end` at most, two sequences at one node have the same whole pages."""
        begin = one[0].shared
        most = min(len(one[1]), len(two[1]), end) // PAGE_TOKENS
        keys = [pages.spell(token_ids, most) for pages, token_ids in (one, two)]
        return (begin + common_pages(keys[0], begin, keys[1], begin, most - begin)) * PAGE_TOKENS

    def check_integrity(self, sequences: Iterable[SequencePages]) -> None:
        """Raise AssertionError unless tree, pools and `sequences` agree."""
        self._tree.check_integrity()
        standing: dict[int, int] = {}
        for pages in sequences:
            if pages.node is not None:
                standing[id(pages.node)] = standing.get(id(pages.node), 0) + 1
                self._check_path(pages)
        held = [0] * len(self._pools)
        places = [pool.places() for pool in self._pools]
        for node in self._tree.nodes():
            assert node.users == standing.pop(id(node), 0), "a node counts other users than it has"
            for group, (pool, column) in enumerate(zip(self._pools, node.columns, strict=True)):
                kept = [page for page in column if page != HOLE]
                held[group] += len(kept)
                assert all(pool.is_kept(page) for page in kept), "a page in the tree is not kept"
                before = node.parent.columns[group][-1:] if node.parent is not None else column[:0]
                self._check_order(group, before + column, places[group])
        assert not standing, "a sequence stands outside of the tree"
        assert held == [pool.kept_pages for pool in self._pools], "a page is kept outside of the tree"

    def _check_order(self, group: int, column: array[int], places: dict[int, int]) -> None:
        """Where everything is attended to there are no holes, nothing is in use behind what is not, and what
        is behind goes first. `places` is the order in which evictable pages go."""
        if self._windows[group] is None:
            assert HOLE not in column, "a page is missing in the midst of a prefix"
            order = [places.get(page, len(places)) for page in column]
            assert order == sorted(order, reverse=True), "a page is locked, or stays longer, behind another"

    def _check_path(self, pages: SequencePages) -> None:
        """A sequence's shared pages are those on its path."""
        key, columns = bytearray(), [array("i") for _ in self._pools]
        node = pages.node
        while node is not None and node.parent is not None:
            key = node.key + key
            columns = [more + column for more, column in zip(node.columns, columns, strict=True)]
            node = node.parent
        assert node is not None
        assert node.scope == pages.scope, "a sequence stands in another scope"
        assert key == pages.key[: pages.shared * PAGE_BYTES], "a sequence stands behind other tokens"
        for table, column, live in zip(pages.tables, columns, pages.first_live, strict=False):
            assert table[live : pages.shared] == column[live:], "a sequence's shared pages are not the tree's"
