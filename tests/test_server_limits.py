"""What the server refuses, bounds and closes: bodies, headers, slow clients, queues, keys, strangers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import FakeServer, fake_server

from ridgeline.server import logs
from ridgeline.server.body import parse_json
from ridgeline.server.config import ApiKey, ServerConfig, keys_of, read_keys
from ridgeline.server.errors import HttpError, http_error_of
from ridgeline.server.messages import Refused
from ridgeline.server.parsers import Delta, ToolCallDelta
from ridgeline.server.text import TextSide
from ridgeline.types import ConfigError, RequestError

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
Scenario = Callable[[FakeServer], Coroutine[Any, Any, None]]


def with_server(model: Path, scenario: Scenario, **settings: Any) -> None:
    """Run a scenario, after which nothing may be left open."""

    async def run() -> None:
        async with fake_server(model, **settings) as server:
            await scenario(server)
            await until(lambda: not server.engine.streams)
            service = server.server.service
            await until(lambda: not service.open_requests)
            assert service.open_sequences == 0

    asyncio.run(asyncio.wait_for(run(), 60))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


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


def code_of(answer: httpx.Response) -> str:
    code: str = answer.json()["error"]["code"]
    return code


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


# -------------------------------------------------------------------------------------------- authority

PATHS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
    ("POST", "/live"),
    ("OPTIONS", "/v1/models"),
    ("HEAD", "/v1/models"),
    ("GET", "//v1/models"),
    ("GET", "/live/"),
    ("GET", "//live"),
    ("GET", "/%6cive"),
    ("GET", "/LIVE"),
    ("GET", "/live%2f..%2fv1/models"),
    ("GET", "/live/../v1/models"),
]


def test_all_but_two_paths_need_a_key(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            for method, path in PATHS:
                url = httpx.URL(server.url).copy_with(raw_path=path.encode())
                for given_ in ({}, *({"authorization": text} for text in WRONG_KEYS)):
                    answer = await client.request(method, url, headers=given_)
                    assert answer.status_code == 401, (method, path)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert method == "HEAD" or code_of(answer) == "invalid_api_key"
                answer = await client.request(method, url, headers={"authorization": "bearer sk-right"})
                assert answer.status_code != 401, (method, path)
            for path in ("/live", "/health"):
                assert (await client.get(path)).status_code == 200
                assert (await client.head(path)).status_code == 200

    with_server(tiny_llama, scenario, api_keys=keys_of(["sk-right,sk-other"]))


WRONG_KEYS = (
    "sk-right",
    "Bearer",
    "Bearer sk-righ",
    "Basic sk-right",
    "Bearer sk-right, Bearer x",
    "Bearer sk-right-",
)


def test_a_key_may_have_so_many_requests_open(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        server.engine.running.clear()
        few, many = ({"authorization": f"Bearer {key}"} for key in ("sk-few", "sk-many"))
        async with server.client() as client:
            first = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=few))
            await until(lambda: len(server.engine.streams) == 1)
            assert (await client.post("/v1/chat/completions", json=CHAT, headers=few)).status_code == 429
            other = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=many))
            await until(lambda: len(server.engine.streams) == 2)
            server.engine.running.set()
            assert [(await first).status_code, (await other).status_code] == [200, 200]
            assert (await client.post("/v1/chat/completions", json=CHAT, headers=few)).status_code == 200

    keys = (ApiKey.of("few", "sk-few", 1), ApiKey.of("many", "sk-many"))
    with_server(tiny_llama, scenario, api_keys=keys)


def test_key_files(tmp_path: Path) -> None:
    toml, plain = tmp_path / "keys.toml", tmp_path / "keys.json"
    toml.write_text('[keys.alice]\nkey = "sk-a"\nmax_requests = 2\n')
    plain.write_text('{"keys": {"alice": {"key": "sk-a", "max_requests": 2}}}')
    assert read_keys(toml) == read_keys(plain) == (ApiKey.of("alice", "sk-a", 2),)
    config = ServerConfig(api_keys=read_keys(toml))
    assert "sk-a" not in repr(config)
    assert config.key_of("sk-a") == config.api_keys[0]
    assert config.key_of("sk-b") is None
    wrong = (
        "{}",
        '{"keys": {}}',
        '{"keys": {"a": "sk"}}',
        '{"keys": {"a": {"key": 5}}}',
        "[",
        '{"keys": []}',
    )
    for content in (*wrong, '{"keys": {"a": {"key": "sk", "more": 1}}}', '{"keys": {"a": {"key": ""}}}'):
        plain.write_text(content)
        with pytest.raises(ConfigError, match="accepted") as caught:
            read_keys(plain)
        assert "sk" not in str(caught.value).replace(str(plain), "")


def test_strangers_names_and_origins(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:

            async def status(**headers: str) -> int:
                return (await client.get("/v1/models", headers=headers)).status_code

            port = server.port
            for host in (
                "localhost",
                f"LOCALHOST:{port}",
                "127.0.0.1:1",
                "[::1]:8000",
                "10.1.2.3",
                "box.lan",
            ):
                assert await status(host=host) == 200, host
            for host in (
                "evil.example",
                "localhost.evil.example",
                "box.lan.",
                "a@localhost",
                "localhost:x",
                "",
            ):
                assert await status(host=host) == 403, host
            assert await status(host="localhost", origin="http://localhost") == 200
            assert await status(origin="https://app.example") == 200
            for origin in ("https://evil.example", "null", "https://app.example.evil", "http://localhost:1"):
                assert await status(origin=origin) == 403, origin
            asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
            allowed = await client.options("/v1/chat/completions", headers=asked)
            assert allowed.status_code == 204
            assert allowed.headers["access-control-allow-origin"] == "https://app.example"
            refused = await client.options("/v1/models", headers={**asked, "origin": "https://evil.example"})
            assert refused.status_code == 403
            assert not any(name.startswith("access-control") for name in refused.headers)

    settings = {"allowed_hosts": ("box.lan",), "allowed_origins": ("https://app.example",)}
    with_server(tiny_llama, scenario, **settings)


def test_cors_is_off(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            headers = {"origin": server.url, "access-control-request-method": "POST"}
            answer = await client.options("/v1/models", headers=headers)
            assert answer.status_code == 405
            assert not any(name.startswith("access-control") for name in answer.headers)

    with_server(tiny_llama, scenario)


# ------------------------------------------------------------------------------------------------ logs


def test_log_lines_cannot_be_forged() -> None:
    import logging

    record = logging.LogRecord("x", logging.INFO, "", 0, "request", (), None)
    record.fields = {"path": "/a\r\nfake \x1b[31m\u2028\ud800", "seconds": 0.25, "name": 'a "b"'}
    for as_json in (True, False):
        line = logs.LineFormatter(as_json).format(record)
        assert line.isprintable()
        assert "fake" in line
    assert json.loads(logs.LineFormatter(True).format(record))["path"] == record.fields["path"]


def test_errors_keep_their_causes_to_themselves() -> None:
    for error in (OSError("/secret/path"), KeyError("0x7f"), ValueError("prompt")):
        told = http_error_of(error)
        assert told.status == 500
        assert str(error) not in told.body().decode()
    assert http_error_of(RequestError("top_k is 5; accepted: less")).param == "top_k"


# --------------------------------------------------------------------------------------------- parsers


class Shouting:
    """Reads capitals as reasoning, and what stands between brackets as a call."""

    needs_special_tokens = True

    def __init__(self) -> None:
        self.called_tools = False

    def feed(self, text: str, token_ids: Any) -> list[Delta]:
        if text == "[":
            self.called_tools = True
            return [Delta(tool_calls=(ToolCallDelta(0, "call_1", "find"),))]
        if self.called_tools:
            return [Delta(tool_calls=(ToolCallDelta(0, arguments=text),))]
        return [Delta(reasoning=text) if text.isupper() else Delta(text)]

    def finish(self) -> list[Delta]:
        return [Delta(tool_calls=(ToolCallDelta(0, arguments="}"),))] if self.called_tools else []


def test_what_a_parser_finds_reaches_the_client(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def parser(self: TextSide, prompt: Any, tools: bool, skip_special_tokens: bool) -> Shouting:
        seen.append((tools, skip_special_tokens))
        return Shouting()

    monkeypatch.setattr(TextSide, "new_parser", parser)

    async def scenario(server: FakeServer) -> None:
        server.engine.script = tuple((text, 3) for text in ("HM", "hi", "[", "{", '"a": 1'))
        server.engine.reason = "stop"
        tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            for stream in (False, True):
                ask: dict[str, Any] = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 5}
                answer: Any = await client.chat.completions.create(**ask, tools=tools, stream=stream)
                if not stream:
                    message = answer.choices[0].message
                    assert (message.reasoning_content, message.content) == ("HM", "hi")
                    (call,) = message.tool_calls
                    assert (call.id, call.function.name) == ("call_1", "find")
                    assert json.loads(call.function.arguments) == {"a": 1}
                    assert answer.choices[0].finish_reason == "tool_calls"
                    continue
                chunks = [chunk async for chunk in answer]
                deltas = [chunk.choices[0].delta for chunk in chunks]
                parts = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
                assert (parts[0].id, parts[0].function.name) == ("call_1", "find")
                assert json.loads("".join(part.function.arguments for part in parts)) == {"a": 1}
                assert [delta.reasoning_content for delta in deltas if "reasoning_content" in delta.to_dict()]
                assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert seen == [(True, True), (True, True)]
        assert not any(add.params.skip_special_tokens for add in server.engine.adds.values())

    with_server(tiny_llama, scenario)


def test_calls_and_reasoning_are_parsed_as_the_template_tells(tiny_llama: Path) -> None:
    template = "{{ messages[0].content }}{% if tools %}<tool_call>{% endif %}{# <think></think> #}"
    call = '{"name": "find", "arguments": {"a": 1}}'
    script = tuple(
        (text, 100) for text in ("<think>", "hm", "</think>", "<tool_", f"call>{call}", "</tool_call>")
    )

    async def scenario(server: FakeServer) -> None:
        server.engine.script, server.engine.reason = script, "stop"
        tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
        async with server.client() as client:
            body = {**CHAT, "max_tokens": len(script)}
            (choice,) = (await client.post("/v1/chat/completions", json={**body, "tools": tools})).json()[
                "choices"
            ]
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["reasoning_content"] == "hm"
            assert choice["message"]["content"] is None
            function = choice["message"]["tool_calls"][0]["function"]
            assert (function["name"], json.loads(function["arguments"])) == ("find", {"a": 1})
            without = {**body, "tools": tools, "tool_choice": "none"}
            (choice,) = (await client.post("/v1/chat/completions", json=without)).json()["choices"]
            assert choice["finish_reason"] == "stop"
            assert call in choice["message"]["content"]
        with_tools, without_tools = server.engine.adds.values()
        assert len(with_tools.tokens) > len(without_tools.tokens)

    with_server(tiny_llama, scenario, chat_template=template)
