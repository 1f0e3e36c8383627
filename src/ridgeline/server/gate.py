"""What every request passes first: host, origin, key, limits; and where every answer is logged.

Closed by default: of the paths, exactly /live and /health are open, and what comes in any other spelling
needs a key like everything else. No error leaves here in another shape than OpenAI's.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ridgeline.server import logs
from ridgeline.server.config import ServerConfig
from ridgeline.server.errors import HttpError, http_error_of

OPEN_PATHS = (b"/live", b"/health")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_QUIET = ("/live", "/health", "/metrics")


class Gate:
    """ASGI in front of the application."""

    def __init__(
        self, app: ASGIApp, config: ServerConfig, on_answer: Callable[[str, int, float], None] | None = None
    ) -> None:
        self._app = app
        self._config = config
        self._on_answer = on_answer
        self._hosts = {"localhost", "127.0.0.1", "::1", config.host.lower(), socket.gethostname().lower()}
        self._hosts |= {host.lower().strip("[]") for host in config.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        headers = _first_headers(scope)
        passage = _Passage(send, _request_id(headers), self._cors(headers))
        scope["ridgeline.id"] = passage.request_id
        record: dict[str, Any] = scope.setdefault("ridgeline.record", {})
        try:
            self._check(scope, headers)
            if _is_preflight(scope, headers) and passage.cors:
                await passage.preflight()
            else:
                await self._app(scope, receive, passage.send)
        except Exception as error:
            if not isinstance(error, HttpError):
                logs.logger.error(
                    "request failed", exc_info=error, extra={"fields": {"id": passage.request_id}}
                )
            if not passage.status:
                await passage.fail(http_error_of(error))
            elif not passage.complete:
                raise ConnectionError("the answer broke off") from None
        finally:
            self._log(scope, passage, record, time.perf_counter() - began_s)

    # ---------------------------------------------------------------------------------------- checks

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        config = self._config
        sizes = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > config.max_headers or sizes > config.max_header_bytes:
            raise HttpError(431, "the headers are too many or too large", "headers_too_large")
        self._check_host(headers)
        self._check_origin(headers)
        if _is_preflight(scope, headers) and self._cors(headers):
            return  # it carries no key, and is not passed on
        path = scope.get("raw_path") or scope["path"].encode()
        if not config.api_keys or (path in OPEN_PATHS and scope["method"] in ("GET", "HEAD")):
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        key = config.key_of(given.strip().decode("latin-1")) if kind.lower() == b"bearer" else None
        if key is None:
            message = "no valid API key; accepted: `Authorization: Bearer KEY` with a key of this server"
            raise HttpError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
        scope["ridgeline.key"] = key
        scope["ridgeline.record"]["key"] = key.name

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """A page of a stranger whose name resolves to this machine still sends its own name."""
        given = headers.get(b"host", b"").decode("latin-1")
        found = _HOST.fullmatch(given)
        if "*" in self._hosts or (found is not None and self._is_known(found[1].strip("[]").lower())):
            return
        message = "the Host header names no host of this server; `--allowed-hosts` adds names"
        raise HttpError(403, message, "host_not_allowed")

    def _is_known(self, host: str) -> bool:
        if host in self._hosts:
            return True
        try:
            ipaddress.ip_address(host)  # an address cannot be made to resolve to another one
        except ValueError:
            return False
        return True

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """Browsers send some requests without asking first, so a page that may not call is refused here."""
        origin = headers.get(b"origin")
        if origin is None or self._cors(headers):
            return
        same = (
            urlsplit(origin.decode("latin-1")).netloc.lower()
            == headers.get(b"host", b"").decode("latin-1").lower()
        )
        if not same:
            message = "pages of this origin may not call this server; `--allowed-origins` adds origins"
            raise HttpError(403, message, "origin_not_allowed")

    def _cors(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """The headers that let an allowed page read the answer; none for everybody else."""
        origin = headers.get(b"origin")
        allowed = self._config.allowed_origins
        if origin is None or not allowed:
            return []
        if "*" not in allowed and origin.decode("latin-1") not in allowed:
            return []
        return [
            (b"access-control-allow-origin", b"*" if "*" in allowed else origin),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
            (b"vary", b"origin"),
        ]

    # ------------------------------------------------------------------------------------------- log

    def _log(self, scope: Scope, passage: _Passage, record: dict[str, Any], elapsed_s: float) -> None:
        path = scope["path"]
        usage = record.pop("usage", None)
        if self._on_answer is not None:
            self._on_answer(path, passage.status, elapsed_s)
        if path in _QUIET and passage.status == 200:
            return
        logs.event(
            "request",
            logging.INFO if passage.status < 500 else logging.WARNING,
            id=passage.request_id,
            method=scope["method"],
            path=path[:256],
            status=passage.status or None,
            seconds=elapsed_s,
            prompt_tokens=usage and usage.prompt_tokens,
            completion_tokens=usage and usage.completion_tokens,
            **record,
        )


class _Passage:
    """One answer on its way out."""

    def __init__(self, send: Send, request_id: str, cors: list[tuple[bytes, bytes]]) -> None:
        self.status = 0
        self.complete = False
        self.request_id = request_id
        self.cors = cors
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.request_id.encode()), *self.cors]
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        else:
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def preflight(self) -> None:
        headers = [
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", b"authorization, content-type, x-request-id, *"),
            (b"access-control-max-age", b"600"),
            (b"content-length", b"0"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})

    async def fail(self, error: HttpError) -> None:
        body = error.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _first_headers(scope: Scope) -> dict[bytes, bytes]:
    """Each header once; of one that comes twice, all values together, which then match nothing."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        found[name] = found[name] + b"," + value if name in found else value
    return found


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own, if it can be one. It is only told back and logged."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _is_preflight(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    return scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
