"""Clients that are slow, that stop reading, that leave; and those that take another's name."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import CHAT, FakeServer, until, with_server

from faults.house import House, error_of
from faults.house import until as settled
from faults.routes import VALID, request, status_of

PROMPT = "The ridge is the knee of the roofline"
LONG: dict[str, Any] = {"max_tokens": 480, "temperature": 0, "ignore_eos": True}
"""As long as the tiny model's context lets an answer be."""


async def talk(server: FakeServer, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send bytes as they are and read until the connection is closed."""
    reader, writer = await asyncio.open_connection(server.host, server.port)

    async def send() -> None:
        with suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)

    sending = asyncio.create_task(send())
    answer = b""
    with suppress(ConnectionError):
        answer = await asyncio.wait_for(reader.read(), 20)
    sending.cancel()
    writer.close()
    return answer


# ------------------------------------------------------------------------------------------------- slow


def test_row_27_slow_headers_and_bodies(tiny_llama: Path) -> None:
    """Nothing, a beginning, a byte at a time, the second request of a connection."""
    kept = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def headers(server: FakeServer) -> None:
        assert await talk(server) == b""
        assert await talk(server, b"GET /live HTTP/1.1\r\nHo") == b""
        dripped = [bytes([byte]) for byte in b"GET /live HTTP/1.1\r\nA: " + b"b" * 2000]
        assert await talk(server, *dripped, pause_s=0.01) == b""
        assert (await talk(server, kept, b"GET /li", pause_s=0.05)).count(b"HTTP/1.1 200") == 1
        assert (await talk(server, kept + b"GET /li")).count(b"HTTP/1.1 200") == 1

    async def bodies(server: FakeServer) -> None:
        for path in VALID:
            begun = request("POST", path, "Content-Length: 1000")
            dripped = [b" "] * 900
            for parts in ((begun,), (begun, b"{")):
                assert status_of(await talk(server, *parts, pause_s=0.01)) == 408, path
            assert status_of(await talk(server, begun, *dripped, pause_s=0.01)) in (408, 0), path
            chunks = request("POST", path, "Transfer-Encoding: chunked")
            dripped = [b"1\r\n \r\n"] * 900
            answer = await talk(server, chunks, *dripped, pause_s=0.01)
            assert status_of(answer) in (408, 0), path  # or reset, as something was sent after the answer

    with_server(tiny_llama, headers, header_timeout_s=0.2, keep_alive_s=1)
    with_server(tiny_llama, bodies, body_timeout_s=0.15)


def test_row_27_a_crowd_of_slow_clients(tiny_llama: Path) -> None:
    """Others are served while they hold their connections."""

    async def scenario(server: FakeServer) -> None:
        begun = request("POST", "/v1/completions", "Content-Length: 9")
        slow = [asyncio.create_task(talk(server, begun)) for _ in range(100)]
        slow += [asyncio.create_task(talk(server, b"POST / HT")) for _ in range(100)]
        await asyncio.sleep(0.1)
        async with server.client() as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        answers = [status_of(each) for each in await asyncio.gather(*slow)]
        assert answers == [408] * 100 + [0] * 100

    with_server(tiny_llama, scenario, header_timeout_s=1, body_timeout_s=1)


def test_row_28_a_reader_that_stops(tiny_llama: Path) -> None:
    """What waits for it is bounded; then its request is aborted and its connection closed."""

    async def scenario(server: FakeServer) -> None:
        text = "x" * 50_000
        server.engine.script = ((text, 3),)
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "x"})):
            content = json.dumps({**body, "max_tokens": 10_000, "stream": True}).encode()
            reader, writer = await asyncio.open_connection(server.host, server.port, limit=1024)
            writer.write(request("POST", path, body=content))
            await until(lambda: bool(server.engine.streams))
            (stream,) = server.engine.streams.values()
            await until(lambda: not server.engine.streams)
            given = server.engine.given[stream.number]
            assert len(stream._pieces) <= 4097
            assert given < 10_000
            with suppress(ConnectionError):
                while await reader.read(1 << 20):
                    pass
            writer.close()

    with_server(tiny_llama, scenario, write_timeout_s=0.3)


# ------------------------------------------------------------------------------------------------- gone

ASKED: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, "max_tokens": 100_000, "n": 2},
    "/v1/completions": {"prompt": ["x", "y", "z"], "max_tokens": 100_000},
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", list(ASKED))
def test_row_29_who_leaves_is_forgotten(tiny_llama: Path, path: str, stream: bool) -> None:
    """While the request waits, and while it is answered: no step more is made for it than is under way."""

    async def scenario(server: FakeServer) -> None:
        engine = server.engine
        body = json.dumps({**ASKED[path], "stream": stream}).encode()
        for begun in (False, True):
            engine.running.clear()
            _, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(request("POST", path, body=body))
            await until(lambda: bool(engine.streams))
            if begun:
                engine.running.set()
                await until(lambda: max(engine.given.values()) > 5)
                engine.running.clear()
            await asyncio.sleep(0.01)
            given = dict(engine.given)
            writer.close()
            await until(lambda: not engine.streams)
            engine.running.set()
            await asyncio.sleep(0.02)
            assert engine.given == given

    with_server(tiny_llama, scenario)


@pytest.mark.parametrize("when", ["decoding", "queued"])
def test_row_29_streams_that_are_left(house: House, when: str) -> None:
    """Of more than can run at once, most wait; of none the whole answer is made."""
    body = {"prompt": PROMPT, **LONG, "stream": True}
    seen = len(house.server.log)
    crowd = [threading.Thread(target=_ask, args=(house, body, when == "decoding")) for _ in range(12)]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join()
    settled(lambda: len(_records(house, seen)) == 12, "logged")
    made = [_completion_tokens(line) for line in _records(house, seen)]
    assert sum(made) < 12 * 480, made


def _ask(house: House, body: Mapping[str, Any], first: bool) -> None:
    """Ask, and leave when the first token has come, or at once."""
    with (
        suppress(httpx.ReadTimeout),
        house.web(timeout=None if first else 0.05) as web,
        web.stream("POST", "/v1/completions", json=body) as answer,
    ):
        next(answer.iter_raw())


def _records(house: House, seen: int) -> list[str]:
    return [line for line in house.server.log[seen:] if "path=/v1/completions" in line]


def _completion_tokens(line: str) -> int:
    return int(line.split("completion_tokens=")[1].split()[0]) if "completion_tokens=" in line else 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_row_29_answers_that_nobody_waits_for(house: House, path: str) -> None:
    """Long prompts, so that some are left in the midst of them."""
    text = "x" * 400
    field = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}.get(path, "input")
    body = {field: [{"role": "user", "content": text}] if field == "messages" else [text] * 8}
    if field != "input":
        body |= {**LONG, "max_tokens": 100}
    rng = random.Random(29)
    for _ in range(12):
        with suppress(httpx.ReadTimeout), house.web(timeout=rng.uniform(0.003, 0.05)) as web:
            web.post(path, json=body)


# ------------------------------------------------------------------------------------------ at the end


def test_row_31_leaving_as_the_answer_ends(house: House) -> None:
    """Short answers, left at every moment of their lives."""
    rng = random.Random(31)

    async def one(web: httpx.AsyncClient, number: int) -> None:
        body = {"prompt": PROMPT, "max_tokens": 1 + number % 3, "stream": bool(number % 2), "temperature": 0}
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0, 0.06)):
                answer = await web.post("/v1/completions", json=body)
                assert answer.status_code in (200, 429)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=house.url, timeout=30) as web:
            for _ in range(10):
                await asyncio.gather(*(one(web, number) for number in range(12)))

    asyncio.run(run())


def test_row_31_aborts_are_idempotent(tiny_llama: Path) -> None:
    """Twice, after the end, and of what never was."""

    async def scenario(server: FakeServer) -> None:
        engine, service = server.engine, server.server.service
        async with server.client() as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            engine.running.clear()
            open_ = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            await until(lambda: bool(engine.streams))
            (stream,) = engine.streams.values()
            (ticket,) = service._tickets
            stream.abort()
            stream.abort()
            ticket.close()
            ticket.close()
            assert service.open_requests == service.open_sequences == 0
            engine._hear(engine._pieces(stream.number))  # of a step that was under way
            open_.cancel()
            engine.running.set()
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    with_server(tiny_llama, scenario)


# ------------------------------------------------------------------------------------------------ names


def test_row_32_ids_of_others(house: House) -> None:
    """An id that a client chooses is told back and logged; it names nothing of anybody's."""
    body = {"prompt": PROMPT, **LONG, "max_tokens": 200}
    with house.web() as web:
        expected = web.post("/v1/completions", json=body).json()["choices"]
    answers: list[httpx.Response] = []

    def ask(name: str) -> None:
        with house.web() as web:
            answers.append(web.post("/v1/completions", json=body, headers={"x-request-id": name}))

    own = threading.Thread(target=ask, args=("mine-17",))
    own.start()
    others = ("mine-17", "mine-1", "mine", "m", "0", "1", "2", "cmpl-", "mine-17-0", "mine-17:0")
    for name in others:
        with suppress(httpx.ReadTimeout), house.web(timeout=0.02, headers={"x-request-id": name}) as web:
            web.post("/v1/completions", json={**body, "stream": True})
    own.join()
    assert answers[0].status_code == 200
    assert answers[0].headers["x-request-id"] == "mine-17"
    assert answers[0].json()["choices"] == expected
    assert "mine" not in answers[0].json()["id"]


def test_row_32_ids_in_bodies(house: House) -> None:
    with house.web() as web:
        for name in ("request_id", "id"):
            body = {"prompt": PROMPT, "max_tokens": 1, name: "cmpl-1"}
            assert error_of(web.post("/v1/completions", json=body), 400)["param"] == name
