"""Requests that are too large: bounded before anything is made of them."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import select
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import CHAT, FakeServer, code_of, with_server

from faults.house import House, error_of
from faults.routes import raw, request, routes, status_of

MILLION = 10**6


@pytest.mark.parametrize("count", [129, 10**9, 2**63, 2**64 - 1])
def test_row_20_a_billion_answers(house: House, count: int) -> None:
    with house.web() as web:
        for route in routes(house):
            for field in ("n", "best_of"):
                if route.has(field):
                    error_of(web.post(route.path, json=route.with_(**{field: count})), 400)
        many = {"prompt": ["x"] * 1000, "n": 100, "max_tokens": 1}
        assert error_of(web.post("/v1/completions", json=many), 400)["param"] == "n"


@pytest.mark.parametrize("count", [MILLION // 10, pytest.param(MILLION, marks=pytest.mark.full)])
def test_row_21_a_million_of_anything(house: House, count: int) -> None:
    most: dict[str, bytes] = {
        "prompt": b'["",' + b'"",' * count + b'""]',
        "input": b'["",' + b'"",' * count + b'""]',
        "messages": b"[{}," + b"{}," * count + b"{}]",
        "tools": b"[{}," + b"{}," * count + b"{}]",
        "documents": b"[{}," + b"{}," * count + b"{}]",
        "stop": b'["x"' + b',""' * count + b"]",
        "tokens": b"[1" + b",1" * MILLION + b"]",
        "stop_token_ids": b"[1" + b",1" * count + b"]",
        "logit_bias": json.dumps({str(token): 1 for token in range(count // 4)}).encode(),
    }
    with house.web() as web:
        tried = set()
        for route in routes(house):
            if "stream" in route.body:
                continue
            for field, content in most.items():
                if route.has(field) and not (route.path == "/tokenize" and field == "prompt"):
                    rest = {name: value for name, value in route.body.items() if name != field}
                    body = json.dumps({**rest, "model": None}).encode()[:-1]
                    body += b', "' + field.encode() + b'": ' + content + b"}"
                    error = error_of(web.post(route.path, content=body), 400)
                    assert error["param"] == field, (route.path, field, error)
                    tried.add(field)
        assert tried == set(most)


@pytest.mark.parametrize("count", [21, MILLION, 2**64 - 1])
def test_row_22_a_million_log_probabilities(house: House, count: int) -> None:
    with house.web() as web:
        for route in routes(house):
            for field in ("logprobs", "top_logprobs", "prompt_logprobs"):
                if field == "prompt_logprobs" and not route.has("n"):
                    continue
                body = route.with_(**{field: count})
                if field == "top_logprobs" and "messages" in body:
                    body["logprobs"] = True
                error_of(web.post(route.path, json=body), 400)


def test_row_23_prompts_over_the_context(house: House) -> None:
    """Text and tokens; the last length that fits is served."""
    long: dict[str, list[Any]] = {
        "prompt": ["x" * 700, [5] * 700, ["x", "x" * 700], "x" * 100_000],
        "input": ["x" * 700, [5] * 700, ["x", "x" * 700]],
        "messages": [[{"role": "user", "content": "x" * 700}], [{"role": "user", "content": "x"}] * 400],
    }
    with house.web() as web:
        for route in routes(house):
            for field, values in long.items():
                for value in values if field in route.required else ():
                    error = error_of(web.post(route.path, json=route.with_(**{field: value})), 400)
                    assert (error["code"], error["param"]) == ("context_length_exceeded", field)
                    assert "512" in error["message"]
        error = error_of(web.post("/v1/completions", json={"prompt": [5] * 700}), 400)
        assert "700" in error["message"]
        for count, status in ((511, 200), (512, 400)):
            body = {"prompt": [5] * count, "max_tokens": 100, "temperature": 0, "ignore_eos": True}
            answer = web.post("/v1/completions", json=body)
            assert answer.status_code == status
            if status == 200:
                assert answer.json()["usage"]["completion_tokens"] == 1


# ----------------------------------------------------------------------------------------------- bodies


def flood(house: House, path: str, part: bytes, total_bytes: int) -> tuple[bytes, int]:
    """Send a body without an end until the server does not take it; its answer, and the bytes that went."""
    host, port = house.url.removeprefix("http://").split(":")
    sent, answer = 0, b""
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request("POST", path, "Transfer-Encoding: chunked", close=False))
        with contextlib.suppress(ConnectionError):
            while sent < total_bytes and not select.select([connection], [], [], 0)[0]:
                connection.sendall(part)
                sent += len(part)
            while not answer.endswith(b"}}") and (more := connection.recv(1 << 16)):
                answer += more
    return answer, sent


def test_row_24_a_gigabyte_without_a_length(house: House) -> None:
    """Refused as it comes in, and never held."""
    before = psutil.Process(house.server.process.pid).memory_info().rss
    part = b"10000\r\n" + b"x" * (1 << 16) + b"\r\n"
    for route in routes(house):
        answer, sent = flood(house, route.path, part, 1 << 30)
        assert status_of(answer) == 413, (route.path, answer[:200])
        assert b'"body_too_large"' in answer
        assert sent < 64 << 20
    assert psutil.Process(house.server.process.pid).memory_info().rss < before + (64 << 20)


def test_row_24_lengths_that_lie(house: House) -> None:
    path, body = "/v1/completions", b'{"prompt": "x", "max_tokens": 1}'
    for route in routes(house):
        for length in ("1073741824", "4194305", "99999999999999999999"):
            assert status_of(raw(house, request("POST", route.path, f"Content-Length: {length}"))) == 413
    for lie in ("-1", "1e3", "0x10", "", "5, 6", "9" * 1000, "+5", "\u0665"):
        start = request("POST", path, f"Content-Length: {lie}".encode().decode("latin-1"))
        assert status_of(raw(house, start + body)) in (400, 413), lie
    twice = request("POST", path, f"Content-Length: {len(body)}", "Content-Length: 3")
    assert status_of(raw(house, twice + body)) == 400
    short = request("POST", path, f"Content-Length: {len(body) - 1}") + body
    assert status_of(raw(house, short)) == 400
    both = request("POST", path, f"Content-Length: {len(body)}", "Transfer-Encoding: chunked")
    smuggled = raw(house, both + b"0\r\n\r\n" + request("GET", "/v1/models"))
    assert smuggled.count(b"HTTP/1.1") == 1, smuggled
    assert status_of(smuggled) == 400
    for coding in ("gzip, chunked", "identity", "chunked, chunked", "xchunked"):
        start = request("POST", path, f"Transfer-Encoding: {coding}")
        assert status_of(raw(house, start + b"0\r\n\r\n")) in (400, 501), coding
    for chunk in (b"-1\r\n", b"ffffffffffffffffffffffff\r\n", b"zz\r\n", b"1" * 5000, b"5;" + b"x" * 200_000):
        start = request("POST", path, "Transfer-Encoding: chunked")
        assert status_of(raw(house, start + chunk + b"\r\n" * 2)) in (400, 413), chunk[:20]


def test_row_24_bombs(house: House) -> None:
    """What is compressed is not unpacked."""
    bomb = gzip.compress(b'{"prompt": "' + b"x" * (100 << 20) + b'"}', 9)
    assert len(bomb) < 1 << 20
    with house.web() as web:
        for route in routes(house):
            for coding in ("gzip", "deflate", "br", "zstd"):
                answer = web.post(route.path, content=bomb, headers={"content-encoding": coding})
                error_of(answer, 400, 415)


def test_row_24_a_body_in_chunks_of_a_byte(house: House) -> None:
    """Holds nobody up: who comes later is answered before it is read."""
    host, port = house.url.removeprefix("http://").split(":")
    body = b'{"prompt": "' + b"x" * 30_000 + b'"}'
    with socket.create_connection((host, int(port)), timeout=60) as slow, house.web() as web:
        slow.sendall(request("POST", "/tokenize", "Transfer-Encoding: chunked"))
        slow.sendall(b"".join(b"1\r\n" + body[i : i + 1] + b"\r\n" for i in range(len(body))))
        slow.setblocking(False)
        assert web.get("/health").status_code == 200
        with pytest.raises(BlockingIOError):
            slow.recv(1)
        slow.settimeout(60)
        slow.sendall(b"0\r\n\r\n")
        assert status_of(slow.recv(1 << 16)) == 200


def test_row_24_many_bodies_at_once(tiny_llama: Path) -> None:
    """All that is being read is bounded in sum, and given back when it is not read to its end."""

    async def scenario(server: FakeServer) -> None:
        async def begin(size: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(request("POST", "/tokenize", "Content-Length: 4000") + b"x" * size)
            return reader, writer

        slow = [await begin(3000) for _ in range(20)]
        refused = 0
        for reader, _ in slow:
            with contextlib.suppress(TimeoutError):
                answer = await asyncio.wait_for(reader.readuntil(b"}}"), 0.05)
                assert status_of(answer) == 429
                assert b"retry-after" in answer
                refused += 1
        assert refused == 20 - 10_000 // 3000
        async with server.client() as client:
            long = {"messages": [{"role": "user", "content": "x" * 3000}]}
            late = await client.post("/v1/chat/completions", json=long)
            assert (late.status_code, code_of(late)) == (429, "overloaded")
            for _, writer in slow:
                writer.close()
                await writer.wait_closed()
            async with asyncio.timeout(20):
                while (await client.post("/v1/chat/completions", json=long | CHAT)).status_code != 200:
                    await asyncio.sleep(0.05)

    with_server(tiny_llama, scenario, max_body_bytes=4096, max_bodies_bytes=10_000)


# ---------------------------------------------------------------------------------------------- headers


def test_row_25_headers_without_end(house: House) -> None:
    start = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    floods = {
        "ten thousand": b"a: b\r\n" * 10_000,
        "a megabyte": b"a: " + b"b" * MILLION + b"\r\n",
        "a name of a megabyte": b"a" * MILLION + b": b\r\n",
        "two hundred": b"a: b\r\n" * 200,
        "40 kB in all": b"".join(b"a%d: " % i + b"b" * 1000 + b"\r\n" for i in range(40)),
        "no end": b"a: b\r\n" * 100_000,
        "folded": b"a: b\r\n" + b" c\r\n" * 20_000,
    }
    for name, headers in floods.items():
        answer = raw(house, start + headers + (b"" if name == "no end" else b"\r\n"))
        if answer:  # or reset, on a client that was still sending
            assert status_of(answer) in (400, 431), name
            assert b'{"error":{"message":' in answer
    targets = (b"/" + b"x" * 100_000, b"/v1/models?" + b"x" * MILLION)
    for target in targets:
        answer = raw(house, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert not answer or status_of(answer) in (400, 414)
    for rubbish in (
        b"\x16\x03\x01\x00 rubbish\r\n\r\n",
        b"\x00" * 70_000,
        b"GET\r\n\r\n",
    ):
        answer = raw(house, rubbish)
        assert not answer or status_of(answer) == 400
    assert status_of(raw(house, start + b"a: b\r\n" * 90 + b"\r\n")) == 200
