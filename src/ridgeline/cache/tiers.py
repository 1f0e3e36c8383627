"""What the KV cache knows of the tiers below it: which pages go down, and which are worth bringing up.

Everything here belongs to the thread that steps the engine and waits for nothing; the ladder does the rest.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ridgeline.cache.ladder import Fetch, Ladder
from ridgeline.cache.names import key_of, root_name
from ridgeline.cache.prefix import STATE_WINDOW, Columns, PrefixCache, first_visible
from ridgeline.cache.radix import HOLE, NAME_BYTES, Scope
from ridgeline.cache.table import SequencePages
from ridgeline.config import PAGE_TOKENS
from ridgeline.records import TiersRecord
from ridgeline.types import ByteArray, HostPage, PageSpill

FETCH_BYTES = 32 << 20
"""About as much is fetched at once: what comes up is copied into the pools before one step."""
SAVE_BYTES = 8 << 20
"""So much is copied out of the pools in a moment without work."""

Places = list[tuple[int, int]]
"""Page of tokens and memory group of each page that is fetched."""


@dataclass(slots=True)
class Fetching:
    """A sequence's pages on their way: those at `places`, for pages of tokens `begin` to `end`."""

    fetch: Fetch
    name: bytes
    begin: int
    end: int
    places: Places

    def columns(self, groups: int) -> tuple[Columns, dict[tuple[int, int], ByteArray]]:
        """0 for each page that has arrived, by group, and a HOLE for others; and those pages."""
        columns: Columns = [array("i", [HOLE]) * (self.end - self.begin) for _ in range(groups)]
        pages = dict(zip(self.places, self.fetch.pages, strict=False))
        for place, group in pages:
            columns[group][place - self.begin] = 0
        return columns, pages


class Tiers:
    """Owns the ladder. `identity` stands for all that makes pages of one engine useless to another.

    `compute_s(begin, end)` predicts how long it takes to compute these tokens of a sequence. Without it, as
    on a machine that nobody has measured, what is there is fetched. With `states`, slots of recurrent state
    are the pages of one more group.
    """

    def __init__(
        self,
        ladder: Ladder,
        identity: bytes,
        windows: tuple[int | None, ...],
        compute_s: Callable[[int, int], float] | None = None,
        states: bool = False,
    ) -> None:
        self.ladder = ladder
        self.on_spill: Callable[[PageSpill], None] = _nobody_spills
        self._identity = identity
        self._windows = (*windows, STATE_WINDOW) if states else windows
        self._compute_s = compute_s
        self._spilled: dict[bytes, HostPage] = {}  # by moves that are not launched yet
        self._spilled_bytes = 0
        self._unsaved: dict[tuple[int, int], None] = {}  # pages that may not be below
        self._fetching: dict[bytes, Fetching] = {}  # by the name of the first page
        self.fetched_tokens = self._misses = self._declined = 0

    def root(self, scope: Scope) -> bytes:
        """The name before a scope's first page."""
        return root_name(self._identity, scope)

    # ------------------------------------------------------------------------------------ downwards

    def keep(self, group: int, page: int) -> None:
        """A page is full, and in the tree from now on."""
        self._unsaved[group, page] = None

    def lose(self, group: int, page: int, name: bytes) -> None:
        """A page is taken for other contents."""
        self._unsaved.pop((group, page), None)
        self._spill(group, page, name)

    def _spill(self, group: int, page: int, name: bytes) -> None:
        """Save a page, unless it is below or there is no room for it."""
        key, nbytes = key_of(name, group), self.ladder.page_bytes[group]
        if key in self._spilled or self.ladder.link(key):
            return
        if not self.ladder.room(self._spilled_bytes + nbytes):
            self.ladder.dropped += 1
            return
        self._spilled[key] = host = HostPage()
        self._spilled_bytes += nbytes
        self.on_spill(PageSpill(group, page, host))

    def save(self, prefixes: PrefixCache) -> None:
        """Save some of the pages that are in the tree only, the oldest first."""
        begun_bytes = self._spilled_bytes
        while self._unsaved and self._spilled_bytes - begun_bytes < SAVE_BYTES:
            group, page = next(iter(self._unsaved))
            if not self.ladder.room(self._spilled_bytes + self.ladder.page_bytes[group]):
                break
            name = prefixes.name(group, page)
            del self._unsaved[group, page]
            if name is not None:
                self._spill(group, page, name)

    @property
    def unsaved(self) -> bool:
        """Whether pages are in the tree that may not be below."""
        return bool(self._unsaved)

    def moved(self) -> None:
        """The spills were launched."""
        for key, host in self._spilled.items():
            self.ladder.put(key, host)
        self._spilled.clear()
        self._spilled_bytes = 0

    # -------------------------------------------------------------------------------------- upwards

    def begin(
        self,
        pages: SequencePages,
        token_ids: Sequence[int],
        end: int,
        prefixes: PrefixCache,
        room: Sequence[int],
    ) -> bool:
        """Whether a sequence waits for its next pages of tokens, up to `end` at most, to come up; begins to
        fetch them where there are some, in these free pages of each group, and it pays."""
        begin = pages.shared
        end = min(end, begin + min(room, default=end))
        if end <= begin:
            return False
        name = pages.name(token_ids, begin, begin + 1, self.root)
        other = self._fetching.get(name)
        if other is not None and not other.fetch.done:
            return True  # what another's fetch brings is found in the tree
        places: Places = []
        if self._full is None or self.ladder.link(key_of(name, self._full)) is not None:
            names = pages.name(token_ids, begin, end, self.root)
            end, places = self._reach(names, begin, end, prefixes)
        if not places:
            self._misses += 1
            return False
        if not self._pays(names, begin, end, places):
            self._declined += 1
            return False
        keys = [key_of(_nth(names, place - begin), group) for place, group in places]
        pages.fetch = self._fetching[name] = Fetching(self.ladder.fetch(keys), name, begin, end, places)
        return True

    def end(self, pages: SequencePages) -> Fetching | None:
        """A sequence's fetch is over, done or not."""
        fetching, pages.fetch = pages.fetch, None
        if fetching is not None:
            fetching.fetch.cancelled = True
            if self._fetching.get(fetching.name) is fetching:
                del self._fetching[fetching.name]
        return fetching

    def wait(self, timeout_s: float) -> None:
        """Until something that was fetched is there, if anything is fetched."""
        if self._fetching:
            self.ladder.wait([fetching.fetch for fetching in self._fetching.values()], timeout_s)

    def record(self) -> TiersRecord:
        """What is there and what was done. Safe to call from any thread."""
        ladder = self.ladder
        damaged = 0 if ladder.disk is None else ladder.disk.damaged
        return TiersRecord(
            ladder.records(),
            fetched_tokens=self.fetched_tokens,
            misses=self._misses,
            declined=self._declined,
            spilled_pages=ladder.spilled,
            dropped_pages=ladder.dropped,
            damaged_pages=damaged,
        )

    @property
    def _full(self) -> int | None:
        """A group of which every page of a prefix is needed, if there is one: the first to ask about."""
        return next((g for g, window in enumerate(self._windows) if window is None), None)

    def _reach(self, names: bytes, begin: int, end: int, prefixes: PrefixCache) -> tuple[int, Places]:
        """Up to which page of tokens all groups can be restored with what is below, about FETCH_BYTES at
        once; and which pages that takes."""
        link = self.ladder.link
        columns: Columns = [array("i") for _ in self._windows]
        for index in range(end - begin):
            name = _nth(names, index)
            held = [link(key_of(name, group)) is not None for group in range(len(columns))]
            if not all(there for there, window in zip(held, self._windows, strict=True) if window is None):
                break
            for column, there in zip(columns, held, strict=True):
                column.append(0 if there else HOLE)
        most = len(columns[0])
        some = min(most, max(1, FETCH_BYTES // sum(self.ladder.page_bytes)))
        for pages in (some, most):
            cut = [column[:pages] for column in columns]
            tokens = prefixes.restorable(cut, begin, (begin + pages) * PAGE_TOKENS)
            if tokens > begin * PAGE_TOKENS:
                reached = tokens // PAGE_TOKENS
                return reached, self._places(begin, reached)
        return begin, []

    def _places(self, begin: int, end: int) -> Places:
        first = [max(first_visible(window, end * PAGE_TOKENS), begin) for window in self._windows]
        return [
            (place, group)
            for place in range(begin, end)
            for group, visible in enumerate(first)
            if place >= visible
        ]

    def _pays(self, names: bytes, begin: int, end: int, places: Places) -> bool:
        nbytes: dict[str, int] = {}
        for place, group in places:
            link = self.ladder.link(key_of(_nth(names, place - begin), group))
            if link is not None:
                nbytes[link] = nbytes.get(link, 0) + self.ladder.page_bytes[group]
        compute_s = None
        if self._compute_s is not None:
            compute_s = self._compute_s(begin * PAGE_TOKENS, end * PAGE_TOKENS)
        return self.ladder.choice.pays(nbytes, compute_s)

    def check_integrity(self, sequences: Sequence[SequencePages]) -> None:
        """Raise AssertionError unless the fetches are those of `sequences`."""
        fetching = [pages.fetch for pages in sequences if pages.fetch is not None]
        open_ = {id(each) for each in fetching if self._fetching.get(each.name) is each}
        assert len(open_) == len(self._fetching), "a fetch is nobody's, or two have the same"
        assert all(each.fetch.done for each in fetching if id(each) not in open_), "a fetch was forgotten"
        spilled = sum(self.ladder.page_bytes[key[NAME_BYTES]] for key in self._spilled)
        assert spilled == self._spilled_bytes, "spilled bytes were miscounted"


def _nobody_spills(spill: PageSpill) -> None:
    raise AssertionError("a page is spilled for nobody")


def _nth(names: bytes, index: int) -> bytes:
    return names[index * NAME_BYTES : (index + 1) * NAME_BYTES]
