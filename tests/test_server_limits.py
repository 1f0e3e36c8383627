"""What the server refuses, bounds and closes: bodies, headers, slow clients, queues."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import CHAT, FakeServer, code_of, fake_server, until, with_server

from ridgeline.server import protocol
from ridgeline.server.body import parse_json
from ridgeline.server.errors import HttpError
from ridgeline.server.messages import Refused


async def talk(server: FakeServer, *parts: bytes, wait: bool = True) -> bytes:
    """Send bytes as they are and read until the connection is closed."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    answer = await asyncio.wait_for(reader.read(), 20) if wait else b""
    writer.close()
    return answer


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


# ------------------------------------------------------------------------------------------------ JSON


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=20))
def test_json_is_what_the_library_reads(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), 64) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), 64) == value


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 10_000,
        b"[" * 10_000 + b"]" * 10_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b'"' + b'\\"' * 100_000 + b"[" * 100,
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b'{"b": {"a": 1, "\\u0061": 2}}',
        b'{"a": "\\ud800"}',
        b'{"\\udc00x": 1}',
        b'{"a": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"1" * 10_000,
        b'{"a": "\n"}',
    ],
)
def test_what_is_not_strict_json_is_refused(content: bytes) -> None:
    began_s = time.monotonic()
    with pytest.raises(HttpError) as caught:
        parse_json(content, 64)
    assert caught.value.status == 400
    assert time.monotonic() - began_s < 10  # a scan that is not linear would take minutes


def test_brackets_in_strings_do_not_nest() -> None:
    deep = {"a": "[" * 1000 + '\\"' + "{" * 1000, "b": [[1]]}
    assert parse_json(json.dumps(deep).encode(), 3) == deep
    assert parse_json(b'["\\ud83d\\ude00"]', 3) == ["\U0001f600"]


# -------------------------------------------------------------------------------------------- sizes


def test_large_bodies_are_refused_as_they_come(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            announced = await client.post("/v1/completions", content=b"x" * 5000)
            assert (announced.status_code, code_of(announced)) == (413, "body_too_large")

        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        answered = asyncio.create_task(reader.readuntil(b"}}"))
        with contextlib.suppress(ConnectionError):  # closed on a client that goes on sending
            while True:
                writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        assert b" 413 " in await answered
        writer.close()
        async with server.client() as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    with_server(tiny_llama, scenario, max_body_bytes=4096)


def test_an_answer_before_the_body_does_not_cut_off_the_next_request(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients send headers and body apart, and the answer to the headers, such as a 429, may come between."""
    monkeypatch.setattr(protocol, "LINGER_S", 0.3)

    async def scenario(server: FakeServer) -> None:
        body = json.dumps({"messages": CHAT["messages"], "max_tokens": 3}).encode()
        request = post("/v1/chat/completions", body)
        headers = request[: -len(body)]

        async def answer() -> bytes:
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
            await reader.readexactly(int(length))
            return head[9:12]

        reader, writer = await asyncio.open_connection(server.host, server.port)
        server.engine.state = "restarting"
        writer.write(headers)
        assert await answer() == b"503"
        server.engine.state = "ready"
        writer.write(body + headers)
        await asyncio.sleep(0.6)
        writer.write(body)
        assert await answer() == b"200"

        server.engine.state = "restarting"  # and who never sends the body is put out
        writer.write(headers)
        assert await answer() == b"503"
        assert await reader.read() == b""
        writer.close()
        server.engine.state = "ready"

    with_server(tiny_llama, scenario)


def test_bodies_that_are_no_objects(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            for content in (b"[]", b"null", b'"x"', b"3", b"", b"{]", b"\xff", b'{"messages": NaN}'):
                for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
                    answer = await client.post(path, content=content)
                    assert answer.status_code == 400, (path, content)
                    assert answer.json()["error"]["type"] == "invalid_request_error"

    with_server(tiny_llama, scenario)


def test_headers_are_bounded(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        start = b"GET /live HTTP/1.1\r\nHost: localhost\r\n"
        for headers in (b"a: b\r\n" * 10_000, b"a: " + b"b" * 1_000_000 + b"\r\n", b"a: b\r\n" * 200):
            try:
                answer = await talk(server, start + headers + b"Connection: close\r\n\r\n")
            except ConnectionError:  # closed while we went on sending
                continue
            assert answer[9:12] in (b"431", b"400")
            assert b'"error"' in answer
        assert (await talk(server, b"\x16\x03\x01\x00 rubbish\r\n\r\n"))[9:12] == b"400"
        async with server.client() as client:
            assert (await client.get("/live")).status_code == 200

    with_server(tiny_llama, scenario)


# -------------------------------------------------------------------------------------------- slowness


def test_slow_headers_and_bodies_are_closed(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        assert await talk(server) == b""
        assert await talk(server, b"GET /live HTTP/1.1\r\nHo") == b""
        begun = post("/v1/completions", b"{}")[:-1]
        assert (await talk(server, begun))[9:12] == b"408"
        kept = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert (await talk(server, kept, b"GET /li")).count(b"HTTP/1.1 200") == 1

    with_server(tiny_llama, scenario, header_timeout_s=0.2, body_timeout_s=0.2)


def test_a_reader_that_stops_is_dropped(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        server.engine.script = (("x" * 50_000, 3),)
        body = json.dumps({**CHAT, "max_tokens": 10_000, "stream": True}).encode()
        reader, writer = await asyncio.open_connection(server.host, server.port, limit=1024)
        writer.write(post("/v1/chat/completions", body))
        await until(lambda: bool(server.engine.streams))
        await until(lambda: not server.engine.streams)
        writer.close()
        del reader

    with_server(tiny_llama, scenario, write_timeout_s=0.3)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_forgotten(tiny_llama: Path, stream: bool) -> None:
    """While the request waits, and while it is answered."""

    async def scenario(server: FakeServer) -> None:
        body = json.dumps({**CHAT, "max_tokens": 100_000, "n": 2, "stream": stream}).encode()
        for begun in (False, True):
            server.engine.running.clear()
            _, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(post("/v1/chat/completions", body))
            await until(lambda: bool(server.engine.streams))
            if begun:
                server.engine.running.set()
                await until(lambda: max(server.engine.given.values()) > 5)
            writer.close()
            await until(lambda: not server.engine.streams)

    with_server(tiny_llama, scenario)


# ---------------------------------------------------------------------------------------------- queues


def test_a_full_queue_is_refused_before_tokenizing(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        server.engine.running.clear()
        async with server.client() as client:
            waiting = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)) for _ in range(6)]
            await until(lambda: len(server.engine.streams) == 6)
            late = await client.post("/v1/completions", json={"prompt": "x", "bogus": "not even read"})
            assert (late.status_code, code_of(late)) == (429, "rate_limit_exceeded")
            assert int(late.headers["retry-after"]) >= 1
            assert (await client.get("/health")).status_code == 200
            server.engine.running.set()
            assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    with_server(tiny_llama, scenario, max_queue=2)


def test_too_many_waiting_tokens_are_refused(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        server.engine.running.clear()
        async with server.client() as client:
            body = {"prompt": [5] * 40, "max_tokens": 2}
            waiting = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(5)]
            await until(lambda: len(server.engine.streams) == 5)  # four of them run
            assert server.server.service.waiting_tokens == 40
            assert (await client.post("/v1/completions", json=body)).status_code == 429
            server.engine.running.set()
            assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}
            assert (await client.post("/v1/completions", json=body)).status_code == 200

    with_server(tiny_llama, scenario, max_queue_tokens=50)


def test_deadlines_and_refusals_have_a_status(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            for stream in (True, False):
                body = {**CHAT, "stream": stream}
                server.engine.refuse = lambda add: Refused(add.id, "waited", expired=True)
                late = await client.post("/v1/chat/completions", json=body)
                assert (late.status_code, code_of(late)) == (503, "queue_timeout")
                server.engine.refuse = lambda add: Refused(add.id, "the KV cache holds at most 7")
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 400
                server.engine.refuse = lambda add: None
        adds = server.engine.adds.values()
        assert all(add.deadline_s is not None and add.deadline_s > time.monotonic() for add in adds)

    with_server(tiny_llama, scenario)


def test_an_engine_that_dies_in_mid_stream_is_an_event(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            body = {**CHAT, "max_tokens": 100_000, "stream": True}
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = []
                async for line in answer.aiter_lines():
                    lines.append(line)
                    if len(lines) == 20:
                        server.engine.die()
            events = [line for line in lines if line]
            assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_stopped"
            assert not any("[DONE]" in line for line in lines)
            for path in ("/health", "/v1/chat/completions"):
                answer = await (client.get(path) if path == "/health" else client.post(path, json=CHAT))
                assert (answer.status_code, code_of(answer)) == (503, "restarting")
            assert (await client.get("/live")).status_code == 200
            server.engine.state = "stuck"
            assert code_of(await client.get("/health")) == "stuck"
            server.engine.state = "ready"
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    with_server(tiny_llama, scenario)


def test_draining_lets_open_requests_end(tiny_llama: Path) -> None:
    async def run() -> None:
        async with fake_server(tiny_llama) as server, server.client() as client:
            server.engine.running.clear()
            open_ = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            await until(lambda: bool(server.engine.streams))
            server.server.stop()
            late = await client.post("/v1/chat/completions", json=CHAT)
            assert (late.status_code, code_of(late)) == (503, "draining")
            assert (await client.get("/health")).status_code == 503
            server.engine.running.set()
            assert (await open_).status_code == 200

    asyncio.run(run())
