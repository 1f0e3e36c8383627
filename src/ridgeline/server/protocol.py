"""HTTP/1.1 connections: uvicorn's protocol, with limits in time on what a client may leave undone, and with
room for health checks in a crowd."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from ridgeline.server import logs
from ridgeline.server.config import ServerConfig
from ridgeline.server.errors import HttpError

LINGER_S = 2.0
ACCEPTS = 16
"""Connections that are accepted in one turn of the loop."""
ENTRIES = 4
"""Connections whose data are handled in one turn: what that leads to runs in the next, and may take long."""
_TURN_S = 0.002
_FIRST_PART_BYTES = 2 << 10
_LEAST_PART_BYTES = 512
_MOST_PART_BYTES = 64 << 10
_PROBES = (b"GET /health", b"GET /live", b"HEAD /health", b"HEAD /live")


def protocol_for(config: ServerConfig) -> type[H11Protocol]:
    """The class of this server's connections."""

    class Connection(BoundedConnection):
        limits = config
        turnstile = Turnstile()

    return Connection


class Turnstile:
    """Lets what connections received in, a few of them in each turn of the loop.

    A thousand clients that come at once, or a body that comes in chunks of a byte, would otherwise make one
    turn of seconds. Who asks for the health does not wait in this line, but a new connection takes five turns
    to its answer: they must be short.
    """

    def __init__(self) -> None:
        self._line: deque[BoundedConnection] = deque()
        self._turning = False

    def enter(self, connection: BoundedConnection) -> None:
        self._line.append(connection)
        if not self._turning:
            self._turning = True
            connection.loop.call_soon(self._turn, connection.loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        end_s, entries = time.monotonic() + _TURN_S, 0
        while self._line and entries < ENTRIES and time.monotonic() < end_s:
            entries += 1
            connection = self._line.popleft()
            try:
                if connection.take_part():
                    self._line.append(connection)
            except Exception as error:  # one connection's, which must not hold up the line
                logs.logger.error("connection failed", exc_info=error)
                connection.transport.abort()
        self._turning = bool(self._line)
        if self._turning:
            loop.call_soon(self._turn, loop)


class BoundedConnection(H11Protocol):
    """Closes a connection whose headers do not come, or whose reader does not read.

    uvicorn has a time-out for the pause between two requests only.
    """

    limits: ServerConfig
    turnstile: Turnstile
    _part_bytes: int = _FIRST_PART_BYTES
    _headers: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting = bytearray()
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
            return
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_headers")
        self._stop("_writing")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._waiting and len(data) <= _FIRST_PART_BYTES and data.startswith(_PROBES):
            self._take(data)
            return
        if not self._waiting:
            self.turnstile.enter(self)
        self._waiting += data
        if len(self._waiting) > self._part_bytes:
            self.flow.pause_reading()

    def take_part(self) -> bool:
        """Handle a part of what was received, as large as can be handled quickly; whether there is more."""
        size = self._part_bytes
        part = bytes(self._waiting[:size])
        del self._waiting[:size]
        if not self._waiting:
            self.flow.resume_reading()
        began_s = time.monotonic()
        self._take(part)
        quick = time.monotonic() - began_s < _TURN_S
        self._part_bytes = min(2 * size, _MOST_PART_BYTES) if quick else max(size // 2, _LEAST_PART_BYTES)
        return bool(self._waiting)

    def _take(self, data: bytes) -> None:
        if self.transport.is_closing():
            self._waiting.clear()
            return
        if self._headers is None and self.conn.their_state is h11.IDLE:
            self._expect_headers()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop("_headers")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop("_writing")
        self._writing = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("_writing")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            # An answer before the end of the body, such as 413: the client gets a moment to read it.
            self.loop.call_later(LINGER_S, self._end_body, self.cycle)
        elif self._headers is None and self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._expect_headers()  # a part of the next request came with this one

    def send_400_response(self, msg: str) -> None:
        body = HttpError(400, "the request is not valid HTTP, or its headers are too large").body()
        headers = [("content-type", "application/json"), ("connection", "close")]
        headers.append(("content-length", str(len(body))))
        try:
            events: list[Any] = [
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ]
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        except h11.LocalProtocolError:
            pass  # an answer is under way already
        self.transport.close()

    def _expect_headers(self) -> None:
        self._headers = self.loop.call_later(self.limits.header_timeout_s, self.transport.close)

    def _end_body(self, answered: RequestResponseCycle) -> None:
        """The connection may be in the midst of its next request by now."""
        if self.cycle is answered and self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def _stop(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
