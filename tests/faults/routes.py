"""The routes that take a body, as the server itself describes them: a fault is tried on every one."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx

from faults.house import House

VALID: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5, 6]},
}
"""A body that each route serves. A new route needs one here, and gets all the tests."""


@dataclass(frozen=True)
class Route:
    """One way to send a body: a path, and where it can be, streamed."""

    path: str
    body: Mapping[str, Any]
    fields: Mapping[str, Any]
    """Schemas of the body's fields."""
    required: frozenset[str]

    def with_(self, **changes: Any) -> dict[str, Any]:
        return {**self.body, **changes}

    def text(self, first: str = "") -> bytes:
        """The body, with `first` before its first field."""
        return b"{" + first.encode() + json.dumps(self.body).encode()[1:]

    def has(self, field: str) -> bool:
        return field in self.fields


def described(house: House) -> dict[str, Any]:
    """OpenAPI's description of the server by itself."""
    return _described(house.url, tuple(house.headers.items()))


@cache
def _described(url: str, headers: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    described: dict[str, Any] = httpx.get(f"{url}/openapi.json", headers=dict(headers)).json()
    return described


def operations(house: House) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of everything that the server does."""
    for path, methods in described(house)["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def routes(house: House) -> list[Route]:
    """Every route that takes a body; where it streams, also as a stream."""
    schemas = described(house)["components"]["schemas"]
    found = {path: operation for method, path, operation in operations(house) if method == "POST"}
    assert set(found) == set(VALID), "a route without a body to try"
    made = []
    for path, operation in found.items():
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        schema = schemas[name]
        assert schema["additionalProperties"] == {"type": "null"}
        bodies = [VALID[path], {**VALID[path], "stream": True}] if "stream" in schema["properties"] else []
        for body in bodies or [VALID[path]]:
            made.append(Route(path, body, schema["properties"], frozenset(schema.get("required", ()))))
    return made


def raw(house: House, *parts: bytes, wait_s: float = 20) -> bytes:
    """Send bytes as they are and read until the server closes; b"" where it reset the connection."""
    host, port = house.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while part := connection.recv(1 << 16):
                answer += part
        except ConnectionError:  # closed on a client that was still sending
            pass
    return answer


def request(
    method: str, target: str, *headers: str, host: str = "localhost", body: bytes = b"", close: bool = True
) -> bytes:
    """A request as it goes over the wire, with `close` the last of its connection."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *["Connection: close"] * close, *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def status_of(answer: bytes) -> int:
    """The status of the first answer; 0 where there is none."""
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0
