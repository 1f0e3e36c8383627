"""Who may use the server: keys, hosts, origins; and what logs and errors say to whom."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import httpx
import pytest
from serving import CHAT, FakeServer, code_of, until, with_server

from ridgeline.server import logs
from ridgeline.server.config import ApiKey, ServerConfig, keys_of, read_keys
from ridgeline.server.errors import http_error_of
from ridgeline.types import ConfigError, RequestError

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
