"""Page tables of sequences over the pools of all memory groups.

Slot s of a sequence lies in page `table[s // PAGE_TOKENS]` at offset `s % PAGE_TOKENS`, after Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023).
"""

from __future__ import annotations

import operator
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from ridgeline.cache.pages import PagePool
from ridgeline.cache.prefix import Columns, PrefixCache, first_visible
from ridgeline.cache.radix import HOLE, Path, Scope
from ridgeline.cache.states import StateSlots
from ridgeline.cache.table import SequencePages
from ridgeline.cache.tiers import Tiers
from ridgeline.config import PAGE_TOKENS, pages_for
from ridgeline.types import Move, PageCopy, PageFill, PageSpill, SlotCopy


class KVCache:
    """The pools of all memory groups, and the rules by which a sequence begins, grows, trims and leaves.

    `windows[g]` is group g's attention window in tokens (None: it attends to everything), `pages[g]` the
    number of pages in its pool. With `prefix_caching`, what sequences have computed is kept until its pages
    are needed, and those that begin alike share it.

    `state_slots` is the number of slots of recurrent state, 0 for a model that has none, whose `states` are
    None. A state cannot be wound back: rows that a step has run are run for good.

    A page that several sequences would write to is copied for each of them. With `tiers`, pages that are
    evicted are spilled to them, and what they have of a sequence is filled in. All these `moves` are to be
    made, in their order, before the next step runs; the sources of copies stay in use until `moved`.
    """

    def __init__(
        self,
        windows: tuple[int | None, ...],
        pages: tuple[int, ...],
        prefix_caching: bool = False,
        tiers: Tiers | None = None,
        state_slots: int = 0,
    ) -> None:
        if len(windows) != len(pages):
            raise ValueError(f"{len(windows)} windows for {len(pages)} pools")
        if any(window is not None and window < 1 for window in windows):
            raise ValueError(f"windows are {windows}; accepted: at least 1 token, or none")
        self.windows = windows
        self.pools = tuple(PagePool(count) for count in pages)
        self._moves: list[Move] = []
        self._windowed = tuple((g, window) for g, window in enumerate(windows) if window is not None)
        # Without memory there is nothing to be spared: a model of no groups has no rows that see others.
        self.tiers = tiers if prefix_caching and (pages or state_slots) else None
        self.states = StateSlots(state_slots, prefix_caching) if state_slots else None
        self.prefixes: PrefixCache | None = None
        if prefix_caching and (pages or state_slots):
            slots = None if self.states is None else self.states.pool
            self.prefixes = PrefixCache(self.pools, windows, self.tiers, slots)
        if self.tiers is not None:
            self.tiers.on_spill = self._spill

    @property
    def moves(self) -> tuple[Move, ...]:
        return tuple(self._moves)

    def new_sequence(self, scope: Scope | None = None) -> SequencePages:
        return SequencePages(len(self.pools), scope or Scope())

    @property
    def has_windows(self) -> bool:
        """Whether `trim` has anything to do."""
        return bool(self._windowed)

    @property
    def max_sequences(self) -> int | None:
        """How many may run at once; None when nothing bounds it."""
        return None if self.states is None else self.states.max_sequences

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
        """Share of the fullest pool that is in use, 0 to 1; what is kept for nobody in particular is not."""
        return max([pool.used_pages / pool.pages for pool in self.pools if pool.pages], default=0.0)

    def filled(self, sequences: Iterable[tuple[SequencePages, int]]) -> float:
        """Share of the slots of pages in use that hold a token or wait for one that is known, 0 to 1: 1 but
        for the ends of last pages, which nobody shares, and pages taken for guesses. `sequences` are all that
        have pages, each with the length of what is known of it."""
        slots = PAGE_TOKENS * sum(pool.used_pages for pool in self.pools)
        empty = len(self.pools) * sum(max(pages.slots - length, 0) for pages, length in sequences)
        return 1 - min(empty / slots, 1.0) if slots else 1.0

    # ------------------------------------------------------------------------------------- beginning

    def restore(
        self,
        pages: SequencePages,
        token_ids: Sequence[int],
        computed: int,
        limit: int,
        sibling: SequencePages | None = None,
    ) -> int:
        """Let a sequence that has `computed` tokens in its pages take on what others have computed of its
        next ones; returns how many, `limit` at most, are in its pages then.

        `sibling` are the pages of a sequence in which the first `limit` tokens are the same, and computed.
        """
        if limit <= computed:
            return computed
        if pages.fetch is not None:
            if not pages.fetch.fetch.done:
                return computed
            computed = max(computed, self._take_in(pages, token_ids))
        held = None if sibling is None or self.states is not None else self._held(sibling, limit)
        if self.prefixes is None:
            return computed if held is None or computed else self._begin(pages, held, [], limit)
        if computed // PAGE_TOKENS != pages.shared:
            return computed
        tail = [table[-1] for table in held] if held is not None and limit % PAGE_TOKENS else None
        tokens, columns, path = self.prefixes.find(pages, token_ids, limit, tail)
        if self.states is not None:
            common = (pages.shared + len(columns[-1])) * PAGE_TOKENS
            pages.parting = common if common > tokens else 0
        return self._begin(pages, columns, path, tokens) if tokens > computed else computed

    def _held(self, pages: SequencePages, tokens: int) -> Columns | None:
        """A sequence's pages with its first tokens, if it still has all that a row behind them sees."""
        visible = [first_visible(window, tokens) for window in self.windows]
        if pages.slots < tokens or any(map(operator.gt, pages.first_live, visible)):
            return None
        return [table[: pages_for(tokens)] for table in pages.tables]

    def _begin(self, pages: SequencePages, columns: Columns, path: Path, tokens: int) -> int:
        """Share the pages in `columns` behind those that are shared already, in place of what is there. Of a
        last page that is wanted in part, a copy is taken; without room for one, the page is left out."""
        begin, whole = pages.shared, tokens // PAGE_TOKENS
        self._cut(pages, begin)
        self.trim(pages, tokens)
        for group, (pool, table) in enumerate(zip(self.pools, pages.tables, strict=True)):
            taken = columns[group][: whole - begin]
            passed = min(max(first_visible(self.windows[group], tokens) - begin, 0), len(taken))
            if passed:
                pages.first_live[group] = begin + passed
            pool.share(taken[passed:])
            table.extend(array("i", [0]) * passed)
            table.extend(taken[passed:])
        pages.length = whole
        if self.prefixes is not None:
            self.prefixes.enter(pages, path, whole)
        if self.states is not None:
            self.states.restore(pages, tokens, columns[-1][whole - begin - 1])
        if tokens % PAGE_TOKENS and not self._copy(pages, [column[whole - begin] for column in columns]):
            return whole * PAGE_TOKENS
        return tokens

    def _copy(self, pages: SequencePages, sources: Sequence[int]) -> bool:
        """Append a copy of a page, by group, or change nothing and return False."""
        for pool, source in zip(self.pools, sources, strict=True):
            pool.share([source])
        if not self.grow(pages, pages.slots + 1):
            for pool, source in zip(self.pools, sources, strict=True):
                pool.free([source])
            return False
        self._moves += (
            PageCopy(group, source, table[-1])
            for group, (source, table) in enumerate(zip(sources, pages.tables, strict=True))
        )
        return True

    def compact(self, pages: SequencePages, begin: int, kept: Sequence[int]) -> None:
        """Of the slots from `begin` on, keep those that are `begin + kept[i]`, ascending, and let them lie
        side by side. Planning the same again before it is made is harmless."""
        targets = [begin + place for place, slot in enumerate(kept) if slot != place]
        sources = [begin + slot for place, slot in enumerate(kept) if slot != place]
        if not targets:
            return
        for group, table in enumerate(pages.tables):
            numbers = (
                [table[slot // PAGE_TOKENS] * PAGE_TOKENS + slot % PAGE_TOKENS for slot in slots]
                for slots in (sources, targets)
            )
            move = SlotCopy(group, *numbers)
            if move not in self._moves:
                self._moves.append(move)

    def drop_compactions(self) -> None:
        """What was to be compacted and is not needed any more."""
        self._moves = [move for move in self._moves if not isinstance(move, SlotCopy)]

    def _cancel(self, group: int, pages: Sequence[int]) -> None:
        """Copies to these pages, which are given back, are not made. Their sources are let go of first: they
        may be in the tree, where nothing is evictable before what is behind it."""
        given = set(pages)
        for move in list(self._moves):
            if isinstance(move, PageCopy) and move.group == group and move.target in given:
                self._moves.remove(move)
                self.pools[group].free([move.source])

    def moved(self) -> None:
        """The moves are launched."""
        for move in self._moves:
            if isinstance(move, PageCopy):
                self.pools[move.group].free([move.source])
        self._moves.clear()
        if self.tiers is not None:
            self.tiers.moved()

    def store(self, pages: SequencePages, token_ids: Sequence[int], computed: int) -> None:
        """Let others share the pages that are full of known tokens, of which the first `computed` are in the
        pages, or will be when a later step reads them."""
        full = min(computed, len(token_ids)) // PAGE_TOKENS
        if self.prefixes is not None and full > pages.shared:
            self.prefixes.store(pages, token_ids, full, pages.states.get(full * PAGE_TOKENS, HOLE))

    # ------------------------------------------------------------------------------- recurrent state

    def chunk_end(self, pages: SequencePages, computed: int, end: int, length: int) -> int:
        """Where rows from `computed` on had better end, `end` at most, so that the state of a sequence of
        `length` tokens is left where it is of use: where it parts from another that the tree has; behind the
        last page that others with these tokens can begin behind; else, but for the last chunk, behind a page.

        The first is after Pan et al., "Marconi: Prefix Caching for the Era of Hybrid LLMs" (MLSys 2025).
        """
        if self.prefixes is None:
            return end
        last = (length - 1) // PAGE_TOKENS * PAGE_TOKENS
        stops = [stop for stop in (pages.parting, last) if computed < stop < end]
        whole = end // PAGE_TOKENS * PAGE_TOKENS
        if not stops and computed < whole and end < length:
            return whole
        return min(stops, default=end)

    def launched(self, pages: SequencePages, token_ids: Sequence[int], before: int, computed: int) -> None:
        """A step is launched that moves a sequence's state on: as `store`, which leaves the state where the
        tokens before it are whole pages. Of those that are left page by page while tokens are generated, the
        last stays, so that they are not in the way of others."""
        assert self.states is not None
        self.states.launch(pages, before, computed)
        shared = pages.shared
        self.store(pages, token_ids, computed)
        if self.prefixes is not None and computed == before + 1 and pages.shared > shared:
            if shared and pages.trail == shared:
                self.prefixes.thin(pages, shared - 1)
            pages.trail = pages.shared
        self.states.settle(pages, computed)

    # ----------------------------------------------------------------------------------- lower tiers

    def fetches(self, pages: SequencePages, token_ids: Sequence[int], computed: int, limit: int) -> bool:
        """Whether a sequence that has `computed` tokens in its pages waits for its next ones, `limit` in all
        at most, to come up from a lower tier; begins to fetch them where that pays."""
        if self.tiers is None or self.prefixes is None:
            return False
        if pages.fetch is not None:
            return True
        if pages.fetched_in_vain or computed // PAGE_TOKENS != pages.shared:
            return False
        room = [pool.free_pages for pool in self.pools]
        return self.tiers.begin(pages, token_ids, limit // PAGE_TOKENS, self.prefixes, room)

    def _take_in(self, pages: SequencePages, token_ids: Sequence[int]) -> int:
        """Fill what a fetch brought into pages of the sequence, as far as all groups can be restored and
        there is room; returns how many tokens are in its pages then, or 0 where nothing came of it."""
        assert self.tiers is not None
        assert self.prefixes is not None
        fetching = self.tiers.end(pages)
        assert fetching is not None
        columns, contents = fetching.columns(len(self.pools) + (self.states is not None))
        pages.fetched_in_vain = not contents
        begin, end = pages.shared, fetching.end
        if begin != fetching.begin:
            return 0
        room = min((pool.free_pages for pool in self.pools), default=end)
        tokens = self.prefixes.restorable(columns, begin, min(end, begin + room) * PAGE_TOKENS)
        whole = tokens // PAGE_TOKENS
        if whole <= begin:
            return 0
        self.tiers.fetched_tokens += tokens - begin * PAGE_TOKENS
        self._cut(pages, begin)
        self.trim(pages, tokens)
        for group, (pool, table) in enumerate(zip(self.pools, pages.tables, strict=True)):
            first = max(first_visible(self.windows[group], tokens), begin)
            if first > begin:
                pages.first_live[group] = first
            taken = pool.allocate(whole - first)
            table.extend(array("i", [0]) * (first - begin))
            table.extend(taken)
            self._moves += (
                PageFill(group, contents[place, group], page) for place, page in enumerate(taken, start=first)
            )
        pages.length = whole
        state = HOLE
        if self.states is not None:
            group, state = len(self.pools), self.states.take_in(pages, tokens)
            self._moves.append(PageFill(group, contents[whole - 1, group], state))
        self.prefixes.store(pages, token_ids, whole, state)
        return tokens

    def _spill(self, spill: PageSpill) -> None:
        self._moves.append(spill)

    def save(self) -> bool:
        """Plan moves that save pages to lower tiers before they are evicted, for moments without work;
        whether there are more."""
        if self.tiers is None or self.prefixes is None:
            return False
        self.tiers.save(self.prefixes)
        return self.tiers.unsaved

    def wait(self, timeout_s: float) -> None:
        """Where sequences wait for lower tiers, until there is something for one of them."""
        if self.tiers is not None:
            self.tiers.wait(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Give lower tiers time to put away what was spilled."""
        if self.tiers is not None:
            self.tiers.ladder.close(timeout_s)

    # --------------------------------------------------------------------------------------- growing

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
        for pool in self.pools:  # every page of every sequence comes by here: no generator
            if pool.free_pages < missing:
                return False
        for pool, table in zip(self.pools, pages.tables, strict=True):
            table.extend(pool.allocate(missing))
        pages.length += missing
        return True

    def shrink(self, pages: SequencePages, slots: int) -> None:
        """Give back the pages behind `slots` slots, which hold nothing: a plan that was dropped took them."""
        self._cut(pages, pages_for(slots))

    def trim(self, pages: SequencePages, next_position: int) -> None:
        """Give back the pages that no row from slot `next_position` on can see through its window."""
        for group, window in self._windowed:
            first = min(first_visible(window, next_position), pages.length)
            live = pages.first_live[group]
            if first > live:
                self.pools[group].free(pages.tables[group][live:first])
                pages.first_live[group] = first

    def release(self, pages: SequencePages) -> None:
        """Give back everything; the tables are empty afterwards. Releasing twice is harmless."""
        if self.tiers is not None:
            self.tiers.end(pages)
            pages.fetched_in_vain = False
        if self.states is not None:
            self.states.drop(pages)
            pages.parting = pages.trail = 0
        self._cut(pages, 0)
        if self.prefixes is not None:
            self.prefixes.leave(pages)

    def _cut(self, pages: SequencePages, length: int) -> None:
        """Give back the pages from `length` on, the last one first: it is the one to be evicted first."""
        if length >= pages.length:
            return
        for group, (pool, table) in enumerate(zip(self.pools, pages.tables, strict=True)):
            live = max(pages.first_live[group], length)
            if self._moves:
                self._cancel(group, table[live:])
            pool.free(table[live:][::-1])
            del table[length:]
            pages.first_live[group] = min(pages.first_live[group], length)
        pages.length = length

    def pages_wanted(self, pages: SequencePages, tokens: int) -> tuple[int, ...]:
        """Pages, per group, that the sequence lacks to hold `tokens` tokens, passed windows given back."""
        wanted = []
        for group, window in enumerate(self.windows):
            whole = pages_for(tokens)
            held = whole if window is None else min(whole, pages_for(window) + 1)
            wanted.append(max(0, held - (pages.length - pages.first_live[group])))
        return tuple(wanted)

    def check_integrity(self, sequences: Iterable[SequencePages]) -> None:
        """Raise AssertionError unless every page counts exactly its users among `sequences` and copies, and
        is free, evictable or locked."""
        everyone = list(sequences)
        users: list[Counter[int]] = [Counter() for _ in self.pools]
        for move in self._moves:
            if isinstance(move, PageCopy):
                users[move.group][move.source] += 1
        for pages in everyone:
            for group, table in enumerate(pages.tables):
                assert len(table) == pages.length, "tables of one sequence differ in length"
                assert 0 <= pages.first_live[group] <= pages.length, "more pages were given back than taken"
                live = table[pages.first_live[group] :]
                assert len(set(live)) == len(live), f"a table of group {group} has a page twice"
                users[group].update(live)
        for group, pool in enumerate(self.pools):
            pool.check_integrity()
            for page, count in users[group].items():
                seen = pool.users(page)
                assert seen == count, f"a page of group {group} has {count} users and counts {seen}"
            assert len(users[group]) == pool.used_pages, f"group {group} has used pages that nobody owns"
            assert pool.free_pages + len(users[group]) == pool.pages, f"group {group} lost a page"
        if self.states is not None:
            self.states.check_integrity(everyone)
        if self.prefixes is not None:
            self.prefixes.check_integrity(everyone)
        if self.tiers is not None:
            self.tiers.check_integrity(everyone)
