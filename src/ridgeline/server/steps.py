"""The engine's steps, for whoever listens, as server-sent events.

Everybody reads from one ring of recent steps, at a pace of their own. Nothing is kept for a listener: who is
so slow that the ring has gone round loses steps, and is told how many.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import msgspec

from ridgeline.records import RECENT_STEPS, Recent, StepRecord

MAX_LISTENERS = 64
QUIET_S = 15.0
"""Without a step for so long, a listener gets a comment: proxies close what says nothing."""
_AT_ONCE = 64
"""Steps in one write. Who does not take them gets no more meanwhile."""

_ENCODE = msgspec.json.Encoder().encode


class StepFeed:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self.recent: Recent[StepRecord] = Recent(RECENT_STEPS)
        self.listeners = 0
        self._news = asyncio.Event()
        self._closed = False

    def take(self, records: Sequence[StepRecord]) -> None:
        """Steps that the engine has told of."""
        for record in records:
            self.recent.append(record)
        self._wake()

    def close(self) -> None:
        """End every stream. Idempotent."""
        self._closed = True
        self._wake()

    def join(self) -> None:
        """A listener comes, who calls `leave` once."""
        self.listeners += 1

    def leave(self) -> None:
        self.listeners -= 1

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def events(self, recent: int, follow: bool) -> AsyncGenerator[bytes, None]:
        """The last `recent` steps that are over, and then, to `follow`, each one as it ends."""
        place, last = max(self.recent.count - recent, 0), None
        while True:
            news = self._news
            there = self.recent.since(place)
            place = self.recent.count - len(there)
            if there:
                some = there[:_AT_ONCE]
                place += len(some)
                yield b"".join(_events(some, last))
                last = some[-1].number
            elif self._closed or not follow:
                return
            else:
                try:
                    await asyncio.wait_for(news.wait(), QUIET_S)
                except TimeoutError:
                    yield b": no step\n\n"


def _events(records: Sequence[StepRecord], last: int | None) -> list[bytes]:
    """An event for each record, and one where others are missing before it. An engine that was started again
    counts from 0."""
    events = []
    for record in records:
        number = record.number
        if last is not None and number != last + 1:
            lost = number - last - 1 if number > last else number
            if lost:
                events.append(b'event: dropped\ndata: {"dropped":%d}\n\n' % lost)
        events.append(b"data: " + _ENCODE(record) + b"\n\n")
        last = number
    return events
