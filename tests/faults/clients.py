"""The clients of the soak: those who ask and check what they hear, and those who misbehave.

Each client is a coroutine that says what became of it in a word or two; what must not be is an
AssertionError.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from faults.house import error_of

RECOVERY_S = 60.0
"""How long after the engine was killed requests may be told so."""
_BROKEN = {"engine_stopped", "restarting"}
_BUSY = {(429, "rate_limit_exceeded"), (503, "queue_timeout")}
READS = ("/health", "/live", "/version", "/v1/models", "/metrics", "/openapi.json")


@dataclass(frozen=True)
class Question:
    """A request whose answer is always the same: greedy, or sampled from a seed."""

    path: str
    body: dict[str, Any]
    streams: bool = True


def questions(context: int) -> list[Question]:
    """The fixed set. Token ids are small enough for every vocabulary."""

    def text(prompt: object, streams: bool = True, **more: Any) -> Question:
        body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, **more}
        return Question("/v1/completions", body, streams)

    def chat(content: str, **more: Any) -> Question:
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, "max_tokens": 20, "temperature": 0, **more}
        return Question("/v1/chat/completions", body)

    long = [3 + 7 * i % 250 for i in range(context * 3 // 4)]
    return [
        text("The ridge"),
        text("Water flows", max_tokens=60, ignore_eos=True, logprobs=0),
        text(["One", "Two", "Three"], logprobs=2, ignore_eos=True),
        text("Seeds", temperature=1, seed=7, n=3, ignore_eos=True, max_tokens=24),
        text(long, logprobs=1),
        text(long[: context // 3], max_tokens=40, ignore_eos=True),
        text("Echoes of a valley", False, echo=True, logprobs=1, max_tokens=4),
        text("Again and again", frequency_penalty=1, logit_bias={"40": 5}, max_tokens=30),
        chat("Why is the sky blue?"),
        chat("Count to ten.", logprobs=True, top_logprobs=2, max_tokens=32),
        chat("Say something.", temperature=0.8, top_p=0.9, seed=11, n=2),
        Question("/v1/embeddings", {"input": ["a hill", "a ridge"]}, False),
        Question("/v1/embeddings", {"input": long[:100], "pooling": "last"}, False),
        Question("/tokenize", {"prompt": "one ridge, two ridges", "return_token_strs": True}, False),
        Question("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}, False),
        Question("/detokenize", {"tokens": long[:40]}, False),
    ]


def mistakes(context: int) -> list[tuple[str, bytes, int, str | None]]:
    """Path, body, and the status and field of the refusal."""

    def json_of(path: str, status: int, param: str | None, **body: Any) -> tuple[str, bytes, int, str | None]:
        return path, json.dumps(body).encode(), status, param

    text, chat = "/v1/completions", "/v1/chat/completions"
    said = [{"role": "user", "content": "x"}]
    return [
        (text, b"{", 400, None),
        (text, b"[]", 400, None),
        (chat, b"[" * 10_000, 400, None),
        (text, b'{"prompt": NaN}', 400, None),
        (text, b'{"prompt": "x", "prompt": "y"}', 400, "prompt"),
        json_of(text, 400, "prompt"),
        json_of(text, 400, "prompt", prompt=[-1]),
        json_of(text, 400, "prompt", prompt=[10**9]),
        json_of(text, 400, "prompt", prompt=[5] * (context + 1)),
        json_of(text, 400, "temperature", prompt="x", temperature=-1),
        json_of(text, 400, "n", prompt="x", n=10**9),
        json_of(text, 400, "suffix", prompt="x", suffix="y"),
        json_of(text, 404, "model", prompt="x", model="another"),
        json_of(chat, 400, "messages", messages=[]),
        json_of(chat, 400, "top_p", messages=said, top_p=2),
        json_of(chat, 400, "response_format", messages=said, response_format={"type": "xml"}),
        json_of(chat, 400, "messages", messages=[{"role": "user", "content": {"a": 1}}]),
        json_of("/v1/embeddings", 400, "dimensions", input="x", dimensions=3),
        json_of("/tokenize", 400, "prompt"),
        json_of("/detokenize", 400, "tokens", tokens=[10**9]),
    ]


@dataclass
class World:
    """What the clients share. `http` is renewed whenever the house is at rest."""

    url: str
    context: int
    sloth_s: float
    http: httpx.AsyncClient
    answers: dict[int, object] = field(default_factory=dict)
    engine_gone_s: float = -1e9

    def __post_init__(self) -> None:
        self.questions = questions(self.context)
        self.mistakes = mistakes(self.context)

    def may_refuse(self, status: int, code: str | None) -> bool:
        """Whether a sound request may get this: the house is full, or the engine was killed a moment ago."""
        lately = time.monotonic() - self.engine_gone_s < RECOVERY_S
        return (status, code) in _BUSY or (lately and status == 503 and code in _BROKEN)

    def refusal(self, answer: httpx.Response) -> str:
        """The code of an answer that is an error, which this one may be."""
        code: str = error_of(answer, answer.status_code)["code"]
        assert self.may_refuse(answer.status_code, code), (answer.status_code, answer.text[:300])
        assert answer.headers["retry-after"]
        return f"{answer.status_code} {code}"

    def connect(self, receive_bytes: int | None = None) -> Awaitable[Raw]:
        url = httpx.URL(self.url)
        mine = socket.socket()
        if receive_bytes is not None:
            mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        mine.setblocking(False)

        async def opened() -> Raw:
            try:
                await asyncio.get_running_loop().sock_connect(mine, (url.host, url.port))
                return await asyncio.open_connection(sock=mine, limit=4096)
            except BaseException:
                mine.close()
                raise

        return opened()


Raw = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Client = Callable[[World, Random], Awaitable[str]]

# ----------------------------------------------------------------------------------------- who behave


async def asker(world: World, random: Random) -> str:
    """Asks one of the questions, and knows the answer."""
    number = random.randrange(len(world.questions))
    question = world.questions[number]
    if question.streams and random.random() < 0.5:
        outcome, said = await _streamed(world, question)
    else:
        answer = await world.http.post(question.path, json=question.body)
        if answer.status_code != 200:
            return world.refusal(answer)
        outcome, said = "200", said_in([answer.json()], question)
    if outcome == "200":
        expected = world.answers.setdefault(number, said)
        assert said == expected, f"{question.path} {str(question.body)[:80]}: {said} was {expected}"
    return outcome


async def _streamed(world: World, question: Question) -> tuple[str, object]:
    body = {**question.body, "stream": True, "stream_options": {"include_usage": True}}
    chunks: list[dict[str, Any]] = []
    async with world.http.stream("POST", question.path, json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return world.refusal(answer), None
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                assert chunks[-1]["usage"], chunks[-1]
                return "200", said_in(chunks, question)
            if line:
                chunks.append(json.loads(line.removeprefix("data: ")))
    error = chunks[-1]["error"]  # nothing else ends a stream without [DONE]
    assert set(error) == {"message", "type", "param", "code"}
    assert world.may_refuse(503, error["code"]), error
    return f"event {error['code']}", None


def said_in(parts: list[dict[str, Any]], question: Question) -> object:
    """What is the same in an answer however it came: texts, reasons, log-probabilities, vectors, tokens."""
    if question.path == "/v1/embeddings":
        return [each["embedding"] for each in parts[0]["data"]]
    if not question.path.endswith("completions"):
        return parts[0]
    said: dict[int, list[Any]] = {}
    for choice in (choice for part in parts for choice in part["choices"]):
        text, reason, logprobs = said.setdefault(choice["index"], ["", None, []])
        content = choice.get("message") or choice.get("delta") or {}
        text += choice.get("text") or content.get("content") or ""
        given = choice.get("logprobs") or {}
        logprobs += [each["logprob"] for each in given.get("content") or ()]
        logprobs += given.get("token_logprobs") or ()
        said[choice["index"]] = [text, choice["finish_reason"] or reason, logprobs]
    return said


async def reader(world: World, random: Random) -> str:
    """Reads what needs no engine."""
    path = random.choice(READS)
    answer = await world.http.get(path)
    if path == "/health" and answer.status_code == 503:
        return f"503 {error_of(answer, 503)['code']}"
    assert answer.status_code == 200, (path, answer.status_code, answer.text[:300])
    return "200"


async def crowd(world: World, random: Random) -> str:
    """Fifty at once: more than there is room for."""
    asked = (asker(world, Random(random.random())) for _ in range(50))
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    turned_away = sum(outcome == "429 rate_limit_exceeded" for outcome in outcomes)
    return "some turned away" if turned_away else "all served"


# -------------------------------------------------------------------------------------- who do not


async def mistaken(world: World, random: Random) -> str:
    """Asks for what cannot be."""
    path, body, status, param = random.choice(world.mistakes)
    answer = await world.http.post(path, content=body, headers={"content-type": "application/json"})
    if answer.status_code in (429, 503):
        return world.refusal(answer)
    error = error_of(answer, status)
    assert error["param"] == param, (path, body[:80], error)
    return str(status)


async def bore(world: World, random: Random) -> str:
    """Sends a text that is far too long, and long to parse."""
    text = "ridge " * 12_000
    asked = {"prompt": text}, {"input": text}, {"messages": [{"role": "user", "content": text}]}
    paths = "/v1/completions", "/v1/embeddings", "/v1/chat/completions"
    path, body = random.choice(list(zip(paths, asked, strict=True)))
    answer = await world.http.post(path, json=body)
    if answer.status_code in (429, 503):
        return world.refusal(answer)
    assert error_of(answer, 400)["code"] == "context_length_exceeded"
    return "400"


def long_request(world: World, random: Random) -> bytes:
    """As much of an answer as there can be, mostly streamed."""
    prompt = [3 + random.randrange(250) for _ in range(random.choice((4, world.context // 2)))]
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": world.context - len(prompt) - 1,
        "ignore_eos": True,
        "n": random.choice((1, 1, 2)),
        "logprobs": 20,
        "stream": random.random() < 0.7,
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def quitter(world: World, random: Random) -> str:
    """Goes away: before its request is whole, while it waits, in its prompt, in mid-stream."""
    _, writer = await world.connect()
    try:
        request = long_request(world, random)
        cut = random.random() < 0.15
        writer.write(request[: random.randrange(len(request))] if cut else request)
        await writer.drain()
        await asyncio.sleep(random.choice((0.0, 0.02, 0.2, 1.0, 3.0)) * random.random())
    finally:
        _leave(writer, random)
    return "left early" if cut else "left"


async def sloth(world: World, random: Random) -> str:
    """Reads a long stream slowly, or stops; leaves, or is put out."""
    pause_s = random.choice((0.05, 0.5, 50.0))
    arriving, writer = await world.connect(receive_bytes=4096)
    try:
        writer.write(long_request(world, random))
        async with asyncio.timeout(random.uniform(1, world.sloth_s)):
            while await arriving.read(512):
                await asyncio.sleep(pause_s)
        return "put out"
    except TimeoutError:
        pass
    except ConnectionError:
        return "put out"
    finally:
        _leave(writer, random)
    return "left"


async def babbler(world: World, random: Random) -> str:
    """Sends what is no HTTP, or not enough of it."""
    garbage = random.choice(
        (
            random.randbytes(2000),
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
            b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\nxx",
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        )
    )
    arriving, writer = await world.connect()
    try:
        writer.write(garbage)
        await writer.drain()
        async with asyncio.timeout(20):  # headers have 10 s
            answer = await arriving.read(4096)
    except ConnectionError:
        return "put out"
    finally:
        _leave(writer, random)
    assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 503")), answer[:200]
    return "refused" if answer else "put out"


def _leave(writer: asyncio.StreamWriter, random: Random) -> None:
    """With a FIN, or as a process that was killed: with a reset where something is unread."""
    if random.random() < 0.5:
        writer.close()
    else:
        writer.transport.abort()


CLIENTS: dict[Client, float] = {
    asker: 50,
    reader: 10,
    mistaken: 15,
    bore: 1,
    quitter: 14,
    sloth: 3,
    babbler: 6,
    crowd: 1,
}
"""Which clients come, and how often."""
RUDE = (quitter, sloth, babbler)
"""Those that may be killed at any moment."""
