"""The page tables of one sequence."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ridgeline.cache.radix import PAGE_BYTES, Node, Scope, key_of
from ridgeline.config import PAGE_TOKENS


class SequencePages:
    """The tables of one sequence, one per memory group, all of the same length.

    Entries from `first_live[g]` on are pages that the sequence uses; earlier ones were given back when the
    group's window had passed them, or never taken, and are there only so that slots keep their place. Only
    the cache changes a table, and never while a step that reads it is being launched.

    The first `shared` pages stand in the prefix tree, whose `node` ends there; None is outside of the tree.
    """

    __slots__ = ("first_live", "key", "length", "node", "scope", "shared", "tables")

    def __init__(self, groups: int, scope: Scope) -> None:
        self.tables: tuple[array[int], ...] = tuple(array("i") for _ in range(groups))
        self.first_live = [0] * groups
        self.length = 0  # pages in each table
        self.scope = scope
        self.node: Node | None = None
        self.shared = 0
        self.key = bytearray()  # of as many of the sequence's pages of tokens as were asked for

    @property
    def slots(self) -> int:
        """Slots that the tables cover."""
        return self.length * PAGE_TOKENS

    def spell(self, token_ids: Sequence[int], pages: int) -> bytearray:
        """The key, spelled out for `pages` pages of tokens at least."""
        spelled = len(self.key) // PAGE_BYTES
        if spelled < pages:
            self.key += key_of(token_ids[spelled * PAGE_TOKENS : pages * PAGE_TOKENS])
        return self.key
