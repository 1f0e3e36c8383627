"""What the server refuses, bounds and closes: bodies, headers, slow clients, queues."""

from __future__ import annotations

import asyncio
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
from ridgeline.server.messages import Refused

# ------------------------------------------------------------------------------------------------ JSON


INTEGERS = st.integers(-(2**63), 2**64 - 1)


@given(st.recursive(st.none() | st.booleans() | INTEGERS | st.text(), st.lists, max_leaves=20))
def test_json_is_what_the_library_reads(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), 64) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), 64) == value


def test_brackets_in_strings_do_not_nest() -> None:
    deep = {"a": "[" * 1000 + '\\"' + "{" * 1000, "b": [[1]]}
    assert parse_json(json.dumps(deep).encode(), 3) == deep
    assert parse_json(b'["\\ud83d\\ude00"]', 3) == ["\U0001f600"]


# -------------------------------------------------------------------------------------------- connections


def test_an_answer_before_the_body_does_not_cut_off_the_next_request(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients send headers and body apart, and the answer to the headers, such as a 429, may come between."""
    monkeypatch.setattr(protocol, "LINGER_S", 0.3)

    async def scenario(server: FakeServer) -> None:
        body = json.dumps({"messages": CHAT["messages"], "max_tokens": 3}).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        headers = "\r\n".join([*lines, "", ""]).encode()

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


# ---------------------------------------------------------------------------------------------- queues


def test_deadlines_and_refusals_have_a_status(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            for stream in (True, False):
                body = {**CHAT, "stream": stream}
                server.engine.refuse = lambda add: Refused(add.id, "waited", "expired")
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
