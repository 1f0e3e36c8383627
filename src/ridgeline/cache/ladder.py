"""The ladder of lower tiers, and the thread that carries pages up and down: host memory, then disk.

A page that is put is in the queue, then in memory, and goes to the disk when memory is full or there is time.
Without a memory tier it goes to the disk. Nobody who steps an engine waits for any of it: the queue is
bounded, and who finds it full lets go of the page. What is fetched comes before what is put away.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

from ridgeline.cache.disk import DiskTier
from ridgeline.cache.memory import MemoryTier
from ridgeline.cache.names import group_of
from ridgeline.records import TierRecord
from ridgeline.resources.transfers import FetchChoice
from ridgeline.types import ByteArray, HostPage

logger = logging.getLogger("ridgeline.cache")

QUEUE_BYTES = 64 << 20
MEMORY, DISK = "memory", "disk"


class Fetch:
    """Pages on their way up, in the order of their keys. Of one that could not be read, and of all behind it,
    there are none."""

    __slots__ = ("cancelled", "done", "keys", "pages")

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.keys = keys
        self.pages: list[ByteArray] = []
        self.done = False
        self.cancelled = False


class Ladder:
    """Owns the tiers and the thread. `page_bytes[g]` is the size of a page of memory group g.

    `has`, `room`, `put`, `fetch`, `wait` and `drain` belong to the thread that steps the engine.
    """

    def __init__(
        self,
        page_bytes: tuple[int, ...],
        memory: MemoryTier | None,
        disk: DiskTier | None,
        choice: FetchChoice | None = None,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.page_bytes = page_bytes
        self.memory, self.disk = memory, disk
        self.choice = choice or FetchChoice()
        self.spilled = self.dropped = 0  # pages that were taken in, and others
        self._queue_bytes = max(queue_bytes, *page_bytes)
        self._put: OrderedDict[bytes, HostPage] = OrderedDict()  # until they are in a tier
        self._put_bytes = 0
        self._fetches: deque[Fetch] = deque()
        self._fetched: Counter[str] = Counter()  # pages that came up, by link
        self._fetch_s: dict[str, float] = {MEMORY: 0.0, DISK: 0.0}
        self._unsaved: OrderedDict[bytes, None] = OrderedDict()  # in memory and not on disk
        self._changed = threading.Condition()  # guards all of the above
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="ridgeline-kv-tiers", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------- on the engine's thread

    def link(self, key: bytes) -> str | None:
        """Where a page would come from; None where there is none."""
        if key in self._put or (self.memory is not None and self.memory.has(key)):
            return MEMORY
        return DISK if self.disk is not None and self.disk.has(key) else None

    def room(self, nbytes: int) -> bool:
        """Whether the queue takes as many bytes more."""
        return self._put_bytes + nbytes <= self._queue_bytes

    def put(self, key: bytes, page: HostPage) -> None:
        """Take a page, whose transfer is launched, or let go of it."""
        nbytes = self.page_bytes[group_of(key)]
        with self._changed:
            if self._closing or key in self._put or not self.room(nbytes):
                self.dropped += 1
                return
            self.spilled += 1
            self._put[key] = page
            self._put_bytes += nbytes
            self._changed.notify_all()

    def fetch(self, keys: Sequence[bytes]) -> Fetch:
        """Begin to read pages."""
        fetch = Fetch(keys)
        with self._changed:
            self._fetches.append(fetch)
            self._changed.notify_all()
        return fetch

    def wait(self, fetches: Sequence[Fetch], timeout_s: float) -> None:
        """Until one of these is done, or as long."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or any(each.done for each in fetches), timeout_s)

    def drain(self, timeout_s: float, all_saved: bool = False) -> bool:
        """Wait until the queue is empty, and with `all_saved` what is in memory is on the disk too; whether
        it is."""

        def drained() -> bool:
            return not self._put and not (all_saved and self._unsaved)

        with self._changed:
            return self._changed.wait_for(drained, timeout_s)

    def records(self) -> tuple[TierRecord, ...]:
        """What the tiers hold and have given. Safe to call from any thread, as `spilled` and the like are."""
        return tuple(
            TierRecord(name, tier.pages, tier.used_bytes, self._fetched[name], self._fetch_s[name])
            for name, tier in ((MEMORY, self.memory), (DISK, self.disk))
            if tier is not None
        )

    def close(self, timeout_s: float = 5.0) -> None:
        """Save what can be saved in as long, and end the thread. Idempotent."""
        self.drain(timeout_s, all_saved=True)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def check_integrity(self) -> None:
        """Raise AssertionError unless queue and tiers agree with their accounts. Waits for the thread, so
        that nothing is on its way."""
        assert self.drain(10.0, all_saved=True), "the tiers' thread does not get on"
        with self._changed:
            assert self._put_bytes == 0, "bytes in the queue were miscounted"
            for tier in (self.memory, self.disk):
                if tier is not None:
                    tier.check_integrity()

    # ------------------------------------------------------------------------------ on its own thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._fetches or self._put or self._unsaved)
                if self._closing:
                    return
            self._carry()

    def _carry(self) -> bool:
        """Do the next thing there is to do; whether there was one."""
        with self._changed:
            fetch = self._fetches.popleft() if self._fetches else None
            key = next(iter(self._put or self._unsaved), None)
        if fetch is not None:
            self._fetch(fetch)
        elif key is not None:
            self._put_away(key)
        return fetch is not None or key is not None

    def _put_away(self, key: bytes) -> None:
        """One page a rung down."""
        waiting = self._put.get(key)
        try:
            if waiting is None:
                self._save(key)
            elif self.memory is None:
                self._write(key, waiting.take())
            else:
                self._remember(self.memory, key, waiting.take())
        except Exception:  # whatever it was, it costs this page and not the thread
            logger.exception("a page of the KV cache could not be put away")
        with self._changed:
            self._unsaved.pop(key, None) if waiting is None else self._put.pop(key)
            if waiting is not None:
                self._put_bytes -= self.page_bytes[group_of(key)]
            self._changed.notify_all()

    def _remember(self, memory: MemoryTier, key: bytes, page: ByteArray) -> None:
        out = memory.write(key, page)
        if self.disk is None:
            return
        for other, held in out:
            self._write(other, held)
        with self._changed:
            for other, _ in out:
                self._unsaved.pop(other, None)
            if memory.has(key) and not self.disk.has(key):
                self._unsaved[key] = None

    def _save(self, key: bytes) -> None:
        page = self.memory.read(key) if self.memory is not None else None
        if page is not None:
            self._write(key, page)

    def _write(self, key: bytes, page: ByteArray) -> None:
        if self.disk is not None:
            self.disk.write(key, page)

    def _fetch(self, fetch: Fetch) -> None:
        began_s, before, nbytes = time.perf_counter(), None, 0
        for key in fetch.keys:
            if fetch.cancelled:
                break
            try:
                link, page = self._read(key)
            except Exception:
                logger.exception("a page of the KV cache could not be fetched")
                break
            if page is None:
                break
            fetch.pages.append(page)
            self._fetched[link] += 1
            if link != before and before is not None:
                began_s, nbytes = self._measure(before, nbytes, began_s)
            before, nbytes = link, nbytes + page.nbytes
        if before is not None:
            self._measure(before, nbytes, began_s)
        with self._changed:
            fetch.done = True
            self._changed.notify_all()

    def _read(self, key: bytes) -> tuple[str, ByteArray | None]:
        waiting = self._put.get(key)
        if waiting is not None:
            return MEMORY, waiting.take()
        page = self.memory.read(key) if self.memory is not None else None
        if page is not None or self.disk is None:
            return MEMORY, page
        return DISK, self.disk.read(key, self.page_bytes[group_of(key)])

    def _measure(self, link: str, nbytes: int, began_s: float) -> tuple[float, int]:
        now_s = time.perf_counter()
        self.choice.link(link).observe(nbytes, now_s - began_s)
        self._fetch_s[link] += now_s - began_s
        return now_s, 0
