"""The pool of page ids of one memory group."""

from __future__ import annotations

from collections.abc import Sequence

from ridgeline.types import CapacityError


class PagePool:
    """Hands out the ids 0 … pages−1, last freed first, so that warm pages are used again.

    The pool owns every free page. A page that was allocated belongs to its one caller until that caller
    frees it; freeing a page that is free, or that never existed, is a programming error (ValueError).
    `free_pages` + `used_pages` = `pages` at every moment.
    """

    __slots__ = ("_free", "_used", "pages")

    def __init__(self, pages: int) -> None:
        if pages < 0:
            raise ValueError(f"pages is {pages}; accepted: 0 or more")
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._used = bytearray(pages)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def used_pages(self) -> int:
        return self.pages - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, all or none; raises CapacityError when fewer are free."""
        if count < 0:
            raise ValueError(f"page count is {count}; accepted: 0 or more")
        if count > len(self._free):
            raise CapacityError(f"{count} pages wanted; {len(self._free)} of {self.pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._used[page] = 1
        return taken

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back. Nothing is freed when one of them is not in use or is named twice."""
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages {list(pages)} name a page twice")
        for page in pages:
            if not 0 <= page < self.pages or not self._used[page]:
                raise ValueError(f"page {page} is not in use")
        for page in pages:
            self._used[page] = 0
        self._free.extend(pages)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is exactly one of free and used."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is on the free list twice"
        assert len(self._used) == self.pages, "the record of used pages has another size than the pool"
        assert all(self._used[page] == 0 for page in free), "a page is both free and used"
        assert len(free) + sum(self._used) == self.pages, "free + used differs from the total"
