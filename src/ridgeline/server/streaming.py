"""Server-sent events, with one write for what a step gave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ridgeline.server import logs
from ridgeline.server.body import ClientGoneError
from ridgeline.server.errors import http_error_of
from ridgeline.server.service import while_connected

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends chunks as they come. An error in their midst becomes an event, and the end.

    `first` was made before, so that what goes wrong until then still has a status of its own. `close` is
    called when the last byte is written or the client has gone.
    """

    def __init__(self, first: bytes, chunks: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._first = first
        self._chunks = chunks
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        except ClientGoneError:
            scope.setdefault("ridgeline.record", {})["gone"] = True
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with aclosing(self._chunks) as chunks:
                await send({"type": "http.response.body", "body": self._first, "more_body": True})
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logs.event("stream failed", logging.ERROR, error=type(error).__name__, cause=error)
            event = b"data: " + http_error_of(error).body() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
