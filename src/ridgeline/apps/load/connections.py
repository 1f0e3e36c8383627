"""HTTP/1.1 over asyncio's transports and h11: what arrives is handed on at once, with its time.

The load generator may share its cores with the server that it measures. This way a chunk of a stream costs
it about 60 µs of CPU, with all that happens to it; over httpx twice that before anybody has looked at it.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import h11

from ridgeline.apps.load.failures import BROKEN, TIMEOUT, UNREACHED, FailureError
from ridgeline.types import ConfigError

Receive = Callable[[int, bytes, float], None]
"""Takes the status, some bytes of the body, and when they came (`time.perf_counter`)."""


class _StaleError(Exception):
    """The server closed a kept connection before it said anything to the request."""


class _Connection(asyncio.Protocol):
    """A connection with one exchange at a time."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.CLIENT)
        self._done: asyncio.Future[int] | None = None
        self._receive: Receive
        self._status = 0
        self._used = False
        self._heard = False
        self._transport: asyncio.Transport

    @property
    def reusable(self) -> bool:
        return self._h11.our_state is h11.IDLE and not self._transport.is_closing()

    async def exchange(self, request: h11.Request, body: bytes, receive: Receive) -> int:
        """Send, and wait until the answer is whole; its status. Raises FailureError, or _StaleError."""
        self._done = asyncio.get_running_loop().create_future()
        self._receive, self._status, self._heard = receive, 0, False
        parts = [request, h11.Data(data=body), h11.EndOfMessage()] if body else [request, h11.EndOfMessage()]
        self._transport.write(b"".join(self._h11.send(part) or b"" for part in parts))
        try:
            status = await self._done
        except BaseException:
            self._transport.abort()
            raise
        finally:
            self._done = None
        self._used = True
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
        else:
            self._transport.close()
        return status

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if self._done is None or self._done.done():
            self._transport.abort()  # nothing was asked
            return
        self._heard = True
        try:
            self._h11.receive_data(data)
            self._take_events(self._done, now_s)
        except FailureError as error:
            self._done.set_exception(error)
        except h11.RemoteProtocolError as error:
            self._done.set_exception(FailureError(BROKEN, str(error)))

    def _take_events(self, done: asyncio.Future[int], now_s: float) -> None:
        while True:
            event = self._h11.next_event()
            if type(event) is h11.Data:
                self._receive(self._status, bytes(event.data), now_s)
            elif type(event) is h11.Response:
                self._status = event.status_code
            elif type(event) is h11.EndOfMessage:
                done.set_result(self._status)
                return
            elif type(event) is not h11.InformationalResponse:
                return  # more bytes are needed, or the connection ended

    def eof_received(self) -> None:
        if self._done is not None and not self._done.done() and self._heard:
            self.data_received(b"")  # h11 knows whether the answer could end here

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            if self._used and not self._heard:
                self._done.set_exception(_StaleError())
            else:
                said = str(error) if error else "the server closed the connection"
                self._done.set_exception(FailureError(BROKEN, said))


class Connections:
    """Connections to one server, kept open and used again. `url` may have a path; a final /v1 is left out."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        url = url.strip()
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        odd = not re.fullmatch(r"[!-~]+", url) or parts.query or parts.fragment or "@" in parts.netloc
        if parts.scheme not in ("http", "https") or not parts.hostname or odd:
            raise ConfigError(f"url is {url!r}; accepted: http://host:port or https://host")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key has characters that a header cannot carry")
        self.url = url
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = [
            ("Host", parts.netloc),
            ("Accept", "text/event-stream, application/json"),
            ("User-Agent", "ridgeline-bench"),
        ]
        if api_key:
            self._headers.append(("Authorization", f"Bearer {api_key}"))
        self._idle: list[_Connection] = []

    async def exchange(self, method: str, path: str, body: bytes, receive: Receive, timeout_s: float) -> int:
        """One request; its status, when the whole answer has been received. Raises FailureError."""
        headers = list(self._headers)
        if body:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        request = h11.Request(method=method, target=self._path + path, headers=headers)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    connection = await self._connection()
                    try:
                        status = await connection.exchange(request, body, receive)
                    except _StaleError:
                        continue
                    if connection.reusable:
                        self._idle.append(connection)
                    return status
        except TimeoutError:
            raise FailureError(TIMEOUT, f"no whole answer within {timeout_s:g} s") from None

    async def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)

    async def _connection(self) -> _Connection:
        while self._idle:
            kept = self._idle.pop()
            if kept.reusable:
                return kept
        loop = asyncio.get_running_loop()
        try:
            _, made = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except UnicodeError:
            raise FailureError(UNREACHED, f"{self._host[:80]!r} is no name of a host") from None
        except OSError as error:
            said = os.strerror(error.errno) if isinstance(error, ConnectionError) and error.errno else None
            raise FailureError(UNREACHED, said or error.strerror or str(error)) from None
        return made
