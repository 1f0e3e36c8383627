"""The page tables of one sequence."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ridgeline.cache.names import name_on
from ridgeline.cache.radix import NAME_BYTES, PAGE_BYTES, Node, Scope, key_of
from ridgeline.config import PAGE_TOKENS

if TYPE_CHECKING:
    from ridgeline.cache.tiers import Fetching


class SequencePages:
    """The tables of one sequence, one per memory group, all of the same length.

    Entries from `first_live[g]` on are pages that the sequence uses; earlier ones were given back when the
    group's window had passed them, or never taken, and are there only so that slots keep their place. Only
    the cache changes a table, and never while a step that reads it is being launched.

    The first `shared` pages stand in the prefix tree, whose `node` ends there; None is outside of the tree.
    `fetch` is under way while pages behind those are read from a lower tier.

    Of a recurrent model, `states` and `planned` are the sequence's slots of state (`cache.states`). `parting`
    is the end of the pages of tokens that the tree was seen to have in common with the sequence, where that
    is behind the state that could be restored, else 0; `trail` the last page, counted from 1, behind which a
    state was left while tokens were generated.
    """

    __slots__ = (
        "fetch",
        "fetched_in_vain",
        "first_live",
        "key",
        "length",
        "names",
        "node",
        "parting",
        "planned",
        "scope",
        "shared",
        "states",
        "tables",
        "trail",
    )

    def __init__(self, groups: int, scope: Scope) -> None:
        self.tables: tuple[array[int], ...] = tuple(array("i") for _ in range(groups))
        self.first_live = [0] * groups
        self.length = 0  # pages in each table
        self.scope = scope
        self.node: Node | None = None
        self.shared = 0
        self.key = bytearray()  # of as many of the sequence's pages of tokens as were asked for
        self.names = bytearray()  # likewise, behind the name of what is before the first page
        self.fetch: Fetching | None = None
        self.fetched_in_vain = False
        self.states: dict[int, int] = {}
        self.planned: tuple[int, int] | None = None
        self.parting = self.trail = 0

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

    def name(self, token_ids: Sequence[int], begin: int, end: int, root: Callable[[Scope], bytes]) -> bytes:
        """The names of some pages of tokens; `root` names what is before a scope's first page."""
        if not self.names:
            self.names += root(self.scope)
        named = len(self.names) // NAME_BYTES - 1
        if named < end:
            key = self.spell(token_ids, end)[named * PAGE_BYTES : end * PAGE_BYTES]
            self.names += name_on(bytes(self.names[-NAME_BYTES:]), key)
        return bytes(self.names[(begin + 1) * NAME_BYTES : (end + 1) * NAME_BYTES])
