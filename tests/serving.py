"""Servers for tests: the real one in a process of its own, and one whose engine is made up."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai_schemas import checked_async

from ridgeline.config import EngineConfig
from ridgeline.server.config import ServerConfig
from ridgeline.server.engine_client import EngineClient
from ridgeline.server.engine_stream import EngineStream
from ridgeline.server.messages import Add, Message, ModelCard, Piece, Pieces, Refused
from ridgeline.server.run import Server, listen
from ridgeline.server.text import TextSide
from ridgeline.types import SamplingParams

# ------------------------------------------------------------------------------------ a real process


@dataclass
class ServerProcess:
    """`ridgeline serve`, listening. `log` grows as it logs, some time after what is logged happened."""

    process: subprocess.Popen[str]
    url: str
    log: list[str]

    @property
    def engine(self) -> psutil.Process:
        """The engine process, the server's only child."""
        (engine,) = psutil.Process(self.process.pid).children()
        return engine

    def await_log(self, *parts: str, limit_s: float = 30) -> str:
        """The first line of the log that has all these parts, once it is there."""
        end_s = time.monotonic() + limit_s
        while True:
            found = [line for line in self.log if all(part in line for part in parts)]
            if found:
                return found[0]
            assert time.monotonic() < end_s, f"{parts} is not in the log: {self.log[-20:]}"
            time.sleep(0.01)

    def end(self, number: signal.Signals = signal.SIGTERM, limit_s: float = 30) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(limit_s)


@contextmanager
def server_process(*arguments: object, ready: bool = True, **environment: str) -> Iterator[ServerProcess]:
    """Start `ridgeline serve` on a free port and wait until it is ready, or listens."""
    command = [sys.executable, "-m", "ridgeline.cli.main", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RIDGELINE_THREADS": "1", **environment},
    )
    assert process.stderr is not None
    log: list[str] = []
    url, seen = "", threading.Event()

    def read() -> None:
        nonlocal url
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line.rstrip("\n"))
            if " listening " in line:
                url = "http://127.0.0.1:" + line.split("port=")[1].split()[0]
            if " ready " in line or (url and not ready):
                seen.set()
        seen.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert seen.wait(60), log
        assert url, log
        yield ServerProcess(process, url, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


# ------------------------------------------------------------------------------------ a made-up engine


class FakeEngine(EngineClient):
    """An engine in this process. Each choice gets the tokens of `script` in turn, one a step, while `running`
    is set; a request runs to its `max_tokens`. What it was asked is in `adds`."""

    script: Sequence[tuple[str, int]] = (("a", 3), ("b", 4), ("c", 5))
    reason = "length"

    def __init__(self, **card: Any) -> None:
        super().__init__(EngineConfig())
        known = {"max_model_len": 512, "max_num_seqs": 4, "vocabulary_size": 288, **card}
        self._card = ModelCard("fake", "cpu", {}, sampling_defaults=SamplingParams(), **known)
        self.adds: dict[int, Add] = {}
        self.given: dict[int, int] = {}
        self.running = asyncio.Event()
        self.running.set()
        self.refuse: Callable[[Add], Refused | None] = lambda add: None

    async def start(self) -> ModelCard:
        self.card, self.state = self._card, "ready"
        self._task = asyncio.create_task(self._step())
        return self._card

    def _send(self, message: Message) -> None:
        if isinstance(message, Add):
            self.adds[message.id] = message
            self.given[message.id] = 0

    @property
    def streams(self) -> dict[int, EngineStream]:
        return self._streams

    def die(self) -> None:
        """As a process that was killed."""
        self.state = "restarting"
        self._end_streams("killed")

    async def _step(self) -> None:
        while True:
            await asyncio.sleep(0.002)
            await self.running.wait()
            for number in list(self._streams):
                refused = self.refuse(self.adds[number])
                self._hear(refused if refused is not None else self._pieces(number))

    def _pieces(self, number: int) -> Pieces:
        params = self.adds[number].params
        text, token = self.script[self.given[number] % len(self.script)]
        self.given[number] += 1
        limit = 400 if params.max_tokens is None else params.max_tokens
        ended = self.given[number] >= limit
        reason = self.reason if ended else None
        pieces = [Piece(number, i, text, (token,), None, reason) for i in range(params.n)]
        return Pieces(tuple(pieces), (number,) if ended else ())


@dataclass
class FakeServer:
    """A server in this event loop, with `engine` behind it."""

    server: Server
    engine: FakeEngine
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def client(self, **options: Any) -> httpx.AsyncClient:
        """Its answers, but for streams, are checked against OpenAI's description."""
        hooks = {"response": [checked_async]}
        return httpx.AsyncClient(base_url=self.url, timeout=20, event_hooks=hooks, **options)


@asynccontextmanager
async def fake_server(
    model: Path, engine: FakeEngine | None = None, **settings: Any
) -> AsyncIterator[FakeServer]:
    """A server whose tokenizer and template are those of `model`; `settings` are ServerConfig's."""
    config = ServerConfig(**{"port": 0, "drain_timeout_s": 5, "served_model_names": ("tiny",), **settings})
    engine = engine or FakeEngine()
    with closing(listen(config)) as listener:
        server = Server(engine, config, TextSide.load(str(model), config), listener)
        running = asyncio.create_task(server.run())
        while engine.state == "loading":
            await asyncio.sleep(0.01)
        try:
            yield FakeServer(server, engine, *listener.getsockname()[:2])
        finally:
            server.stop()
            await running


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


def code_of(answer: httpx.Response) -> str:
    code: str = answer.json()["error"]["code"]
    return code
