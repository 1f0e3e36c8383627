"""What one key's requests leave behind is nothing to another's: neither computed prefixes, nor memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from faults.house import House
from ridgeline.cache.kv import KVCache
from ridgeline.cache.radix import Scope

SECRET = "canary-5f3a-" * 12
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "The ridge", **GREEDY, "logprobs": 5}),
    ("/v1/completions", {"prompt": "canary", **GREEDY, "logprobs": 5, "echo": True}),
    ("/v1/completions", {"prompt": ["a", "b" * 200, "c" * 90], **GREEDY, "logprobs": 1}),
    ("/v1/completions", {"prompt": "x", **GREEDY, "temperature": 1, "seed": 7, "n": 3, "logprobs": 2}),
    ("/v1/completions", {"prompt": "canary-5f3a-", **GREEDY, "repetition_penalty": 1.3, "stream": True}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "?"}], **GREEDY, "logprobs": True, "top_logprobs": 5},
    ),
    ("/v1/embeddings", {"input": ["The ridge", "canary"]}),
    ("/tokenize", {"prompt": "canary", "return_token_strs": True}),
]


@pytest.fixture
def tenants(tiny_llama: Path, tmp_path: Path) -> Iterator[House]:
    """A fresh server of two keys, whose few pages are soon used again."""
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": {name: {"key": f"sk-{name}"} for name in ("first", "second")}}))
    options = ("--api-key-file", keys, "--max-model-len", 256, "--kv-cache-memory", "1M")
    with House.open(tiny_llama, *options, authorization="Bearer sk-second") as house:
        yield house
        house.check()


def ask(house: House) -> list[str]:
    """The answers to the second key's questions, without what differs from call to call."""
    answers = []
    with house.web() as web:
        for path, body in QUESTIONS:
            answer = web.post(path, json=body)
            assert answer.status_code == 200, answer.text
            assert SECRET[:12] not in "".join(answer.headers.values())
            text = answer.text
            if body.get("stream"):
                chunks = [
                    line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")
                ]
                text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
            else:
                fields = json.loads(text)
                fields.get("usage", {}).pop("prompt_tokens_details", None)  # the second time, more is found
                text = json.dumps({name: fields[name] for name in fields if name not in ("id", "created")})
            answers.append(text)
    return answers


def leave_traces(house: House) -> None:
    """The first key's requests: in every page and buffer, ended well, in an error, and by leaving."""
    first = {"authorization": "Bearer sk-first"}
    message = {"role": "user", "content": SECRET}
    with house.web(headers=first) as web:
        for length in (12, 60, 140):
            text = SECRET[:length]
            for body in ({"logprobs": 5, "echo": True}, {"n": 4, "temperature": 1}, {"stream": True}):
                answer = web.post("/v1/completions", json={"prompt": [text] * 4, **GREEDY, **body})
                assert answer.status_code == 200, answer.text
            assert web.post("/v1/embeddings", json={"input": [text] * 4}).status_code == 200
        tool = {"type": "function", "function": {"name": SECRET, "parameters": {}}}
        web.post("/v1/chat/completions", json={"messages": [message], "tools": [tool], **GREEDY})
        bias = {"logit_bias": {str(token): 100 for token in SECRET[:6].encode()}, "stop": [SECRET]}
        web.post("/v1/completions", json={"prompt": SECRET, **GREEDY, **bias, "seed": 7})
        web.post("/v1/completions", json={"prompt": SECRET, "temperature": SECRET})
        web.post("/v1/completions", json={"prompt": SECRET * 10, "user": SECRET})
        web.post("/tokenize", json={"prompt": SECRET, "return_token_strs": True})
    for _ in range(6):
        with suppress(httpx.ReadTimeout), house.web(headers=first, timeout=0.02) as web:
            web.post("/v1/completions", json={"prompt": [SECRET] * 6, **GREEDY, "max_tokens": 90})


LONG = "Where the ridge ends, the valley begins, and the river has always known it. " * 2
FIRST, SECOND = ({"authorization": f"Bearer sk-{name}"} for name in ("first", "second"))


def cached_tokens(house: House, headers: dict[str, str], prompt: object = LONG, **fields: Any) -> int:
    """How many tokens of a prompt were found."""
    body = {"prompt": prompt, **GREEDY, "max_tokens": 2, **fields}
    with house.web(headers=headers) as web:
        answer = web.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    found: int = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= found < usage["prompt_tokens"]
    return found


def test_row_68_a_prefix_is_found_under_its_own_key_only(tenants: House) -> None:
    assert cached_tokens(tenants, FIRST) == 0
    assert cached_tokens(tenants, SECOND) == 0
    found = cached_tokens(tenants, FIRST)
    assert found >= 64
    assert cached_tokens(tenants, SECOND) == found
    # A salt of their own divides the requests of one key, and joins nobody to another's.
    for headers in (FIRST, SECOND):
        assert cached_tokens(tenants, headers, cache_salt="ours") == 0
    for headers in (FIRST, SECOND):
        assert cached_tokens(tenants, headers, cache_salt="ours") == found
        assert cached_tokens(tenants, headers, cache_salt="ours ") == 0
    # What could be mistaken for another key's salt is none.
    for salt in (f"{sha256(b'sk-first').hexdigest()}:", sha256(b"sk-first").hexdigest(), "sk-first", ":"):
        assert cached_tokens(tenants, SECOND, cache_salt=salt) == 0


def test_row_68_chats_and_embeddings_are_divided_too(tenants: House) -> None:
    chat = {"messages": [{"role": "user", "content": LONG}], **GREEDY, "max_tokens": 2}
    embedding = {"input": LONG, "pooling": "last"}
    for path, body in (("/v1/chat/completions", chat), ("/v1/embeddings", embedding)):
        found = []
        for headers in (FIRST, SECOND, FIRST):
            with tenants.web(headers=headers) as web:
                usage = web.post(path, json=body).json()["usage"]
            found.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert found[:2] == [0, 0]
        assert found[2] >= 64


def test_row_70_a_prefix_is_known_by_every_one_of_its_tokens(tenants: House) -> None:
    tokens = [100 + index % 90 for index in range(96)]
    assert cached_tokens(tenants, FIRST, tokens) == 0
    assert cached_tokens(tenants, FIRST, tokens) == 95
    for place in (0, 1, 15, 16, 40, 79, 80):
        other = [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]]
        assert cached_tokens(tenants, FIRST, other) == place // 16 * 16
    assert cached_tokens(tenants, FIRST, tokens[16:]) == 0, "the same tokens at another place"


def test_row_70_equal_hashes_are_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """With scopes that all have one hash, nothing is mistaken for anything else."""
    monkeypatch.setattr(Scope, "__hash__", lambda scope: 7)
    tokens = tuple(range(64))
    tree = KVCache((None,), (64,), prefix_caching=True)
    scopes = [Scope(), Scope("a"), Scope("a", "b"), Scope("ab"), Scope("", "a"), Scope("a", "", 16)]
    scopes.append(Scope("a", "", 0, (b"before",)))
    for scope in scopes:
        pages = tree.new_sequence(scope)
        assert tree.restore(pages, tokens, 0, 64) == 0
        assert tree.grow(pages, 64)
        tree.store(pages, tokens, 64)
        tree.release(pages)
    for scope in scopes:
        pages = tree.new_sequence(scope)
        assert tree.restore(pages, tokens, 0, 64) == 64
        tree.release(pages)
    tree.check_integrity([])


def test_row_71_recycled_memory(tenants: House) -> None:
    """The second key's answers, to the last bit of a log-probability, are those of a fresh server."""
    fresh = ask(tenants)
    for _ in range(2):
        leave_traces(tenants)
        assert ask(tenants) == fresh
    assert not any(SECRET[:12] in line for line in tenants.server.log)
    assert not any("canary-5f3a-canary" in answer for answer in fresh)
