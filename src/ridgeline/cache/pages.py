"""The pool of page ids of one memory group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from ridgeline.types import CapacityError


def _nobody_keeps(page: int) -> None:
    raise AssertionError(f"page {page} is kept by nobody")


class PagePool:
    """The pages 0 … pages−1: each is in use, evictable or free.

    A page in use has a count of users: whoever allocated it, and whoever shares it; each frees it once. A
    page may besides be `keep`t for its contents: without users it is then evictable, and the one that has
    been so for the longest is taken, behind `evict(page)`, when no page is free. Free pages are handed out
    last freed first, so that warm ones are used again. Using a page that is free, or freeing one that is
    not in use, is a programming error (ValueError). `free_pages` counts all that can be had, evictable ones
    too: `free_pages` + `used_pages` = `pages` at every moment.
    """

    __slots__ = ("_evictable", "_free", "_kept", "_users", "evict", "pages")

    def __init__(self, pages: int) -> None:
        if pages < 0:
            raise ValueError(f"pages is {pages}; accepted: 0 or more")
        self.pages = pages
        self.evict: Callable[[int], None] = _nobody_keeps
        self._free = list(range(pages - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._kept = bytearray(pages)
        self._users = [0] * pages

    @property
    def free_pages(self) -> int:
        return len(self._free) + len(self._evictable)

    @property
    def evictable_pages(self) -> int:
        return len(self._evictable)

    @property
    def used_pages(self) -> int:
        return self.pages - self.free_pages

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, all or none; raises CapacityError when fewer can be had."""
        if count < 0:
            raise ValueError(f"page count is {count}; accepted: 0 or more")
        if count > self.free_pages:
            raise CapacityError(f"{count} pages wanted; {self.free_pages} of {self.pages} are free")
        free = self._free
        while len(free) < count:
            page, _ = self._evictable.popitem(last=False)
            self._kept[page] = 0
            free.append(page)
            self.evict(page)
        taken = free[: -count - 1 : -1]
        del free[len(free) - count :]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Become one more user of pages that are in use or evictable."""
        for page in pages:
            if not 0 <= page < self.pages or not (self._users[page] or self._kept[page]):
                raise ValueError(f"page {page} is free")
        for page in pages:
            if not self._users[page]:
                del self._evictable[page]
            self._users[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Stop using pages. Of those that become evictable, the first are evicted first. Nothing is freed
        when one of them is not in use or is named twice."""
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages {list(pages)} name a page twice")
        for page in pages:
            if not 0 <= page < self.pages or not self._users[page]:
                raise ValueError(f"page {page} is not in use")
        for page in pages:
            self._users[page] -= 1
            if self._users[page]:
                continue
            if self._kept[page]:
                self._evictable[page] = None
            else:
                self._free.append(page)

    def keep(self, page: int) -> None:
        """Keep a page in use for its contents."""
        if not 0 <= page < self.pages or not self._users[page] or self._kept[page]:
            raise ValueError(f"page {page} is not in use, or is kept already")
        self._kept[page] = 1

    def forget(self, page: int) -> None:
        """Keep a page no longer; without users it is free."""
        if not 0 <= page < self.pages or not self._kept[page]:
            raise ValueError(f"page {page} is not kept")
        self._kept[page] = 0
        if not self._users[page]:
            del self._evictable[page]
            self._free.append(page)

    def places(self) -> dict[int, int]:
        """Evictable pages, and as how many-th each goes."""
        return {page: place for place, page in enumerate(self._evictable)}

    def users(self, page: int) -> int:
        return self._users[page]

    def is_kept(self, page: int) -> bool:
        return bool(self._kept[page])

    @property
    def kept_pages(self) -> int:
        return sum(self._kept)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is exactly one of free, evictable and in use."""
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a page is on the free list twice"
        assert len(self._users) == len(self._kept) == self.pages, "a record has another size than the pool"
        assert not free & evictable, "a page is both free and evictable"
        assert all(self._users[page] == 0 for page in free | evictable), "a page is both free and in use"
        assert not any(self._kept[page] for page in free), "a page is both free and kept"
        assert all(self._kept[page] for page in evictable), "a page is evictable and not kept"
        used = sum(users > 0 for users in self._users)
        total = len(free) + len(evictable) + used
        assert total == self.pages, "free + evictable + used differs from the total"
