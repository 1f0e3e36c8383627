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
ACCEPTS = 128
"""Connections that are accepted in one turn of the loop."""
_TURN_S = 0.002
_PROBES = (b"GET /health", b"GET /live", b"HEAD /health", b"HEAD /live")


def protocol_for(config: ServerConfig) -> type[H11Protocol]:
    """The class of this server's connections."""

    class Connection(BoundedConnection):
        limits = config
        turnstile = Turnstile()

    return Connection


class Turnstile:
    """Lets what connections received in, for some milliseconds in each turn of the loop.

    A thousand clients that come at once would otherwise make one turn of a second; who asks for the health
    does not wait in this line.
    """

    def __init__(self) -> None:
        self._line: deque[tuple[BoundedConnection, bytes]] = deque()
        self._turning = False

    def enter(self, connection: BoundedConnection, data: bytes) -> None:
        self._line.append((connection, data))
        if not self._turning:
            self._turning = True
            connection.loop.call_soon(self._turn, connection.loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        end_s = time.monotonic() + _TURN_S
        while self._line and time.monotonic() < end_s:
            connection, data = self._line.popleft()
            try:
                connection.take(data)
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
    _in_line: int = 0
    _headers: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
            return
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_headers")
        self._stop("_writing")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._in_line and data.startswith(_PROBES):
            self.take(data)
            return
        self._in_line += 1
        self.turnstile.enter(self, data)

    def take(self, data: bytes) -> None:
        """Handle what was received, in its turn."""
        self._in_line = max(self._in_line - 1, 0)
        if self.transport.is_closing():
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
