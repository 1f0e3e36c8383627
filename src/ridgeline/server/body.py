"""The one way in for what clients send: every route's body is read, bounded and checked here.

Size and time are limited while the bytes come in, nesting before they are parsed; then duplicate keys,
numbers that JSON does not have and text that is not Unicode are refused, and a pydantic model checks the
rest.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from ridgeline.server.config import ServerConfig
from ridgeline.server.errors import RETRY_AFTER, HttpError, bad_request
from ridgeline.server.logs import escaped
from ridgeline.server.wire.base import Body

T = TypeVar("T", bound=Body)

_INLINE_BYTES = 64 << 10
"""A body up to this size is parsed on the event loop: a thread would cost more."""


class ClientGoneError(Exception):
    """The client closed the connection; nobody waits for an answer."""


class BodyReader:
    """Reads the bodies of all routes; what is being read at one time is bounded in sum."""

    def __init__(self, config: ServerConfig, threads: Executor) -> None:
        self._config = config
        self._threads = threads  # for large ones
        self._held_bytes = 0

    async def read(self, request: Request, kind: type[T]) -> T:
        """A request's body as `kind`. Raises HttpError and ClientGoneError."""
        held = _Held(self)
        try:
            try:
                async with asyncio.timeout(self._config.body_timeout_s):
                    await self._receive(request, held)
            except TimeoutError:
                message = f"the body took longer than {self._config.body_timeout_s:g} s"
                raise HttpError(408, message, "timeout", headers={"connection": "close"}) from None
            content = bytes(held.content)
            if len(content) <= _INLINE_BYTES:
                return parsed(content, kind, self._config.max_nesting)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, parsed, content, kind, self._config.max_nesting)
        finally:
            self._held_bytes -= len(held.content)

    async def _receive(self, request: Request, held: _Held) -> None:
        announced = request.headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self._config.max_body_bytes:
            raise self._too_large()
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            held.add(message.get("body", b""))
            if len(held.content) > self._config.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return

    def _too_large(self) -> HttpError:
        limit = self._config.max_body_bytes
        return HttpError(413, f"the body is too large; accepted: up to {limit} bytes", "body_too_large")

    def hold(self, count: int) -> None:
        self._held_bytes += count
        if self._held_bytes > self._config.max_bodies_bytes:
            raise HttpError(429, "too much is being sent at once", "overloaded", headers=RETRY_AFTER)


class _Held:
    def __init__(self, reader: BodyReader) -> None:
        self.content = bytearray()
        self._reader = reader

    def add(self, part: bytes) -> None:
        self.content += part
        self._reader.hold(len(part))


def parsed(content: bytes, kind: type[T], max_nesting: int) -> T:
    """The bytes of a body as `kind`. Raises HttpError 400 for all that is not."""
    value = parse_json(content, max_nesting)
    if not isinstance(value, dict):
        raise bad_request(f"the body is {_kind(value)}; accepted: an object")
    kind.refuse_unsupported(value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _invalid(error) from None


# ---------------------------------------------------------------------------------------------- JSON

# Strings first, so that what is inside them does not count; one that does not end takes all the rest.
_NESTING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_LONG = re.compile(rb"[0-9]{19}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(content: bytes, max_nesting: int) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinity, no integer beyond 64 bits, no lone
    surrogates, bounded nesting."""
    _check_nesting(content, max_nesting)
    try:
        text = content.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_integer if _LONG.search(content) else None,  # a call for each would be slow
        )
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise bad_request("the body has a lone surrogate; accepted: text that is valid Unicode") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON at character {error.pos}: {error.msg}") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None


def _check_nesting(content: bytes, limit: int) -> None:
    if content.count(b"[") + content.count(b"{") <= limit:
        return
    depth = 0
    for found in _NESTING.finditer(content):
        mark = content[found.start()]
        if mark in b"[{":
            depth += 1
            if depth > limit:
                raise bad_request(f"the body is nested too deeply; accepted: up to {limit} levels")
        elif mark in b"]}":
            depth -= 1


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise bad_request(f"the body has the key {twice[:64]!r} twice", twice[:64])
    return made


def _constant(name: str) -> NoReturn:
    raise bad_request(f"the body has the number {name}, which JSON does not have")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise bad_request(f"the body has the number {text[:32]}, which is too large")
    return value


def _integer(text: str) -> int:
    """What the engine's messages can carry."""
    value = int(text) if len(text) <= 20 else None
    if value is None or not -(2**63) <= value < 2**64:
        raise bad_request(f"the body has the number {text[:32]}, which is too large; accepted: 64 bits")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a truth value", str: "a string", list: "an array"}
    return names.get(type(value), "a number")


# ------------------------------------------------------------------------------------------ validation


def _invalid(error: ValidationError) -> HttpError:
    """The first mistake that pydantic found, without what was sent."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = [str(part)[:64] for part in first["loc"]]
    field = where[0] if where else None
    path = escaped(".".join(where))
    if first["type"] == "extra_forbidden":
        return bad_request(f"field {path!r} is not supported", field, "unsupported_parameter")
    if first["type"] == "missing":
        return bad_request(f"field {path!r} is missing", field, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{path}: {message[:1].lower()}{message[1:]}", field)
