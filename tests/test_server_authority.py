"""Keys and their limits; and what logs and errors say to whom. The rest is in tests/faults."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest
from serving import CHAT, FakeServer, until, with_server

from ridgeline.server import logs
from ridgeline.server.config import ApiKey, ServerConfig, read_keys
from ridgeline.server.errors import http_error_of
from ridgeline.types import ConfigError, RequestError

# -------------------------------------------------------------------------------------------- authority


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
    plain.write_text('{"keys": {"alice": {"key": "sk-a", "class": "batch"}}}')
    (alice,) = read_keys(plain)
    assert alice.service_class == "batch"
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
