"""A server whose engine is the real one, in this process and on an executor without a model, to be broken."""

from __future__ import annotations

import asyncio
import queue
from typing import Any

import httpx
from fake_executor import FakeExecutor, make_engine
from serving import FakeEngine

from ridgeline.server.engine_process import EngineWorker
from ridgeline.server.messages import Abort, Add, Command, Embed, Message

VOCABULARY = 288
"""As the tiny model's tokenizer has."""
SEATS = 4


class InsideEngine(FakeEngine):
    """Steps in the server's event loop. `executor` and `engine` are a test's to break."""

    def __init__(self, executor: FakeExecutor, **card: Any) -> None:
        super().__init__(max_num_seqs=SEATS, vocabulary_size=VOCABULARY, **card)
        self.executor = executor
        self.engine = make_engine(executor, max_num_seqs=SEATS)
        self.worker = EngineWorker(self.engine, queue.SimpleQueue(), self._hear)
        self._commands: list[Command] = []

    def _send(self, message: Message) -> None:
        assert isinstance(message, Add | Embed | Abort)
        self._commands.append(message)

    async def _step(self) -> None:
        while True:
            await asyncio.sleep(0 if self.engine.has_work else 0.002)
            await self.running.wait()
            commands, self._commands = self._commands, []
            for command in commands:
                self.worker._obey(command)
            if self.engine.has_work:
                self.worker.step()

    def check(self) -> None:
        """Nothing is left of any request."""
        assert not self.engine.has_work
        self.engine.scheduler.check_integrity()
        assert all(pool.free_pages == pool.pages for pool in self.engine.scheduler.cache.pools)


def executor(pages: int = 64, **settings: Any) -> FakeExecutor:
    return FakeExecutor(pages=(pages,), vocabulary=VOCABULARY, **settings)


async def completion(client: httpx.AsyncClient, prompt: list[int], **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    return await client.post("/v1/completions", json=body)
