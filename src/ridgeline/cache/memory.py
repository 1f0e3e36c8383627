"""The tier in host memory: pages as they were spilled, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict

from ridgeline.types import ByteArray


class MemoryTier:
    """At most `bound_bytes` of pages. `has`, `pages` and `used_bytes` may be asked from any thread, all else
    belongs to one."""

    def __init__(self, bound_bytes: int) -> None:
        self.bound_bytes = bound_bytes
        self._pages: OrderedDict[bytes, ByteArray] = OrderedDict()
        self._used_bytes = 0

    def has(self, key: bytes) -> bool:
        return key in self._pages

    @property
    def pages(self) -> int:
        return len(self._pages)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def read(self, key: bytes) -> ByteArray | None:
        page = self._pages.get(key)
        if page is not None:
            self._pages.move_to_end(key)
        return page

    def write(self, key: bytes, page: ByteArray) -> list[tuple[bytes, ByteArray]]:
        """Keep a page; returns what has to go down for it, which may be that page itself."""
        if key in self._pages:
            self._pages.move_to_end(key)
            return []
        if page.nbytes > self.bound_bytes:
            return [(key, page)]
        out = []
        while self._used_bytes + page.nbytes > self.bound_bytes:
            out.append(self._pages.popitem(last=False))
            self._used_bytes -= out[-1][1].nbytes
        self._pages[key] = page
        self._used_bytes += page.nbytes
        return out

    def check_integrity(self) -> None:
        """Raise AssertionError unless the account of the pages adds up, within the bound."""
        assert self._used_bytes == sum(page.nbytes for page in self._pages.values()), "bytes were miscounted"
        assert self._used_bytes <= self.bound_bytes, "the memory tier exceeds its bound"
