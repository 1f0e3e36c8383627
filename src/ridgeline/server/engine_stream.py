"""What the engine says of one request, as its reader in the server takes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from ridgeline.server.messages import Cause, Embedded, Piece
from ridgeline.types import CapacityError, RequestError, RidgelineError


class ExpiredError(RequestError):
    """A request waited in the queue past its deadline and was never begun."""


ERRORS: dict[Cause, type[RidgelineError]] = {
    "invalid": RequestError,
    "expired": ExpiredError,
    "capacity": CapacityError,
    "fault": RidgelineError,
}
"""What a refused request raises, by the engine's cause."""


class EngineStream:
    """What the engine says of one request. At most `limit` pieces wait for a slow reader; then the request is
    aborted and the reader gets CapacityError."""

    def __init__(self, forget: Callable[[EngineStream], None], number: int, limit: int, name: str) -> None:
        self.number = number
        self.name = name or str(number)
        self._forget = forget
        self._limit = limit
        self._pieces: list[Piece] = []
        self._ended = False
        self._error: Exception | None = None
        self._arrived = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        """Lists of pieces until the request has ended. Raises RequestError, ExpiredError, EngineDeadError and
        CapacityError; leaving it before its end aborts the request."""
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                pieces, self._pieces = self._pieces, []
                if pieces:
                    yield pieces
                if self._error is not None:
                    raise self._error
                if self._ended and not self._pieces:
                    return
        finally:
            self.abort()

    def abort(self) -> None:
        """End the request within a step, if it has not ended. Idempotent."""
        self._forget(self)

    def take(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._arrived.set()
        if len(self._pieces) > self._limit:
            self.fail(
                CapacityError(f"the reader is {len(self._pieces)} tokens behind; the request was ended")
            )
            self._pieces.clear()
            self.abort()

    def end(self) -> None:
        self._ended = True
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._arrived.set()


class EngineAnswer:
    """The vector that the engine makes of one prompt, once it is there."""

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name or str(number)
        self.embedding: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()

    def fail(self, error: Exception) -> None:
        if not self.embedding.done():
            self.embedding.set_exception(error)
