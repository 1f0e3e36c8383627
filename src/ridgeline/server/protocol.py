"""HTTP/1.1 connections: uvicorn's protocol, with limits in time on what a client may leave undone."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ridgeline.server.config import ServerConfig
from ridgeline.server.errors import HttpError

LINGER_S = 2.0


def protocol_for(config: ServerConfig) -> type[H11Protocol]:
    """The class of this server's connections."""

    class Connection(BoundedConnection):
        limits = config

    return Connection


class BoundedConnection(H11Protocol):
    """Closes a connection whose headers do not come, or whose reader does not read.

    uvicorn has a time-out for the pause between two requests only.
    """

    limits: ServerConfig
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
            self.loop.call_later(LINGER_S, self._end_body)
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

    def _end_body(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def _stop(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
