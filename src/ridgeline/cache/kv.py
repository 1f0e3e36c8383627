"""Page tables of sequences over the pools of all memory groups.

Slot s of a sequence lies in page `table[s // PAGE_TOKENS]` at offset `s % PAGE_TOKENS`, after Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from ridgeline.cache.pages import PagePool
from ridgeline.config import PAGE_TOKENS, pages_for


class SequencePages:
    """The tables of one sequence, one per memory group, all of the same length.

    Entries from `first_live[g]` on are pages that the sequence owns; earlier ones were given back when
    the group's window had passed them, and are kept only so that slots keep their place. Only KVCache
    changes a table, and never while a step that reads it is running.
    """

    __slots__ = ("first_live", "length", "tables")

    def __init__(self, groups: int) -> None:
        self.tables: tuple[array[int], ...] = tuple(array("i") for _ in range(groups))
        self.first_live = [0] * groups
        self.length = 0  # pages in each table

    @property
    def slots(self) -> int:
        """Slots that the tables cover."""
        return self.length * PAGE_TOKENS


class KVCache:
    """The pools of all memory groups, and the rule by which a sequence grows, trims and leaves.

    `windows[g]` is group g's attention window in tokens (None: it attends to everything), `pages[g]` the
    number of pages in its pool. Each pool's pages are either free or in the live part of one table.
    """

    __slots__ = ("_windowed", "pools", "windows")

    def __init__(self, windows: tuple[int | None, ...], pages: tuple[int, ...]) -> None:
        if len(windows) != len(pages):
            raise ValueError(f"{len(windows)} windows for {len(pages)} pools")
        if any(window is not None and window < 1 for window in windows):
            raise ValueError(f"windows are {windows}; accepted: at least 1 token, or none")
        self.windows = windows
        self.pools = tuple(PagePool(count) for count in pages)
        self._windowed = tuple((g, window) for g, window in enumerate(windows) if window is not None)

    def new_sequence(self) -> SequencePages:
        return SequencePages(len(self.pools))

    @property
    def max_sequence_tokens(self) -> int | None:
        """The longest sequence that fits when it is alone; None when nothing bounds it."""
        limits = [
            pool.pages * PAGE_TOKENS
            for pool, window in zip(self.pools, self.windows, strict=True)
            if window is None or pool.pages <= pages_for(window)
        ]
        return min(limits, default=None)

    @property
    def usage(self) -> float:
        """Share of the fullest pool that is in use, 0 to 1."""
        return max((pool.used_pages / pool.pages for pool in self.pools if pool.pages), default=0.0)

    def reachable_slots(self, pages: SequencePages) -> int | None:
        """Slots that the tables could cover with what is free now; None when nothing bounds them."""
        if not self.pools:
            return None
        return (pages.length + min(pool.free_pages for pool in self.pools)) * PAGE_TOKENS

    def grow(self, pages: SequencePages, slots: int) -> bool:
        """Make the tables cover `slots` slots in every group, or change nothing and return False."""
        missing = pages_for(slots) - pages.length
        if missing <= 0:
            return True
        if not all(pool.free_pages >= missing for pool in self.pools):
            return False
        for pool, table in zip(self.pools, pages.tables, strict=True):
            table.extend(pool.allocate(missing))
        pages.length += missing
        return True

    def trim(self, pages: SequencePages, next_position: int) -> None:
        """Give back the pages that no row from slot `next_position` on can see through its window."""
        for group, window in self._windowed:
            first = min(max((next_position - window) // PAGE_TOKENS, 0), pages.length)
            live = pages.first_live[group]
            if first > live:
                self.pools[group].free(pages.tables[group][live:first])
                pages.first_live[group] = first

    def release(self, pages: SequencePages) -> None:
        """Give back everything; the tables are empty afterwards. Releasing twice is harmless."""
        for group, (pool, table) in enumerate(zip(self.pools, pages.tables, strict=True)):
            pool.free(table[pages.first_live[group] :])
            del table[:]
            pages.first_live[group] = 0
        pages.length = 0

    def pages_wanted(self, pages: SequencePages, tokens: int) -> tuple[int, ...]:
        """Pages, per group, that the sequence lacks to hold `tokens` tokens, passed windows given back."""
        wanted = []
        for group, window in enumerate(self.windows):
            whole = pages_for(tokens)
            held = whole if window is None else min(whole, pages_for(window) + 1)
            wanted.append(max(0, held - (pages.length - pages.first_live[group])))
        return tuple(wanted)

    def check_integrity(self, sequences: Iterable[SequencePages]) -> None:
        """Raise AssertionError unless the live pages of `sequences` are exactly the used ones, each once."""
        everyone = list(sequences)
        for group, pool in enumerate(self.pools):
            pool.check_integrity()
            live: list[int] = []
            for pages in everyone:
                assert len(pages.tables[group]) == pages.length, "tables of one sequence differ in length"
                assert 0 <= pages.first_live[group] <= pages.length, "more pages were given back than taken"
                live.extend(pages.tables[group][pages.first_live[group] :])
            assert len(set(live)) == len(live), f"a page of group {group} has two owners"
            assert len(live) == pool.used_pages, f"group {group} has used pages that nobody owns"
