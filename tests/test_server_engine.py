"""The engine process and its client: streams, aborts, deaths, a hang."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from ridgeline import LLM, SamplingParams
from ridgeline.config import EngineConfig
from ridgeline.server.engine_client import EngineClient, Patience
from ridgeline.server.engine_stream import EngineStream, ExpiredError
from ridgeline.server.messages import EVENTS, Hello, Piece, Pulse, Start, frame, receive_frame
from ridgeline.types import CapacityError, EngineDeadError, RequestError

PROMPT = (5, 6, 7, 8)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
QUICK = Patience(pulse_s=1.0, first_backoff_s=0.05)


@asynccontextmanager
async def running(model: Path, patience: Patience = QUICK, limit: int = 4096) -> AsyncIterator[EngineClient]:
    config = EngineConfig(model=str(model), threads=1, max_num_seqs=4, max_num_batched_tokens=64)
    client = EngineClient(config, patience, limit)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def collect(client: EngineClient, params: SamplingParams = GREEDY) -> list[Piece]:
    return [piece async for pieces in client.submit(PROMPT, params) for piece in pieces]


async def drain(stream: EngineStream) -> None:
    async for _ in stream:
        pass


def engine_of(client: EngineClient) -> psutil.Process:
    assert client._process is not None
    return psutil.Process(client._process.pid)


async def until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to that"
        await asyncio.sleep(0.02)


def test_streams_are_what_the_engine_gives(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), threads=1) as llm:
        (expected,) = llm.generate([PROMPT], GREEDY)

    async def run() -> None:
        async with running(tiny_llama) as client:
            assert client.card is not None
            assert client.card.max_num_seqs == 4
            many = await asyncio.gather(*(collect(client) for _ in range(9)))
            two = await collect(client, SamplingParams(temperature=0, max_tokens=5, n=2, logprobs=2))
            engine = engine_of(client)
            assert engine.cmdline()[0].startswith("ridgeline-engine")
            await until(lambda: client.pulse is not None and client.pulse.running == 0)
        for pieces in many:
            assert "".join(piece.text for piece in pieces) == expected.outputs[0].text
            tokens = tuple(token for piece in pieces for token in piece.tokens)
            assert tokens == expected.outputs[0].token_ids
            assert [piece.finish_reason for piece in pieces][-1] == "length"
        assert {piece.choice for piece in two} == {0, 1}
        assert all(len(piece.logprobs or ()) == len(piece.tokens) for piece in two)
        assert not engine.is_running()

    asyncio.run(run())


def test_who_leaves_ends_the_request(tiny_llama: Path) -> None:
    async def run() -> None:
        async with running(tiny_llama) as client:
            endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
            stream = client.submit(PROMPT, endless)
            async for _ in stream:
                break
            stream.abort()
            stream.abort()
            assert client.open_requests == 0
            await until(lambda: client.pulse is not None and client.pulse.kv_used == 0)
            with pytest.raises(RequestError, match="stop_token_ids token"):
                await collect(client, SamplingParams(stop_token_ids=[10**6]))

    asyncio.run(run())


def test_a_slow_reader_is_left_behind(tiny_llama: Path) -> None:
    async def run() -> None:
        async with running(tiny_llama, limit=8) as client:
            stream = client.submit(PROMPT, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
            await until(lambda: client.open_requests == 0)
            with pytest.raises(CapacityError, match="behind"):
                await drain(stream)

    asyncio.run(run())


def test_a_request_that_waits_too_long_is_never_run(tiny_llama: Path) -> None:
    async def run() -> None:
        async with running(tiny_llama) as client:
            long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
            engine_of(client).suspend()  # so that all of them come before its next step
            others = [asyncio.create_task(collect(client, long)) for _ in range(4)]
            await asyncio.sleep(0)
            late = client.submit(PROMPT, GREEDY, deadline_s=time.monotonic())
            engine_of(client).resume()
            with pytest.raises(ExpiredError):
                await drain(late)
            for pieces in await asyncio.gather(*others):
                assert sum(len(piece.tokens) for piece in pieces) == 100

    asyncio.run(run())


def test_a_dead_engine_is_started_again(tiny_llama: Path) -> None:
    async def run() -> None:
        async with running(tiny_llama) as client:
            before = await collect(client)
            first = engine_of(client)
            first.suspend()
            stream = client.submit(PROMPT, GREEDY)
            os.kill(first.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="engine stopped"):
                await drain(stream)
            with pytest.raises(EngineDeadError):
                client.submit(PROMPT, GREEDY)
            await until(lambda: client.state == "ready")
            assert client.restarts == 1
            after = await collect(client)
            assert [p.tokens for p in after if p.tokens] == [p.tokens for p in before if p.tokens]

    asyncio.run(run())


def test_an_engine_that_hangs_shows(tiny_llama: Path) -> None:
    async def run() -> None:
        async with running(tiny_llama, Patience(pulse_s=0.6)) as client:
            process = engine_of(client)
            process.suspend()
            await until(lambda: client.state == "stuck")
            process.resume()
            await until(lambda: client.state == "ready")
            assert await collect(client)

    asyncio.run(run())


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        client = EngineClient(EngineConfig(model=str(tmp_path / "none.gguf")), QUICK)
        with pytest.raises(EngineDeadError, match="does not exist"):
            await client.start()
        await client.close()
        assert client.state == "closed"

    asyncio.run(run())


def test_an_engine_whose_server_is_gone_ends_without_a_word(tiny_llama: Path, tmp_path: Path) -> None:
    """Also where it finds that out by writing."""
    path = str(tmp_path / "engine.sock")
    start = Start(path, "secret", asdict(EngineConfig(model=str(tiny_llama), threads=1)))
    command = (sys.executable, "-m", "ridgeline.server.engine_process")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(60)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdin is not None
            process.stdin.write(frame(start)[4:])
            process.stdin.close()
            connection, _ = listener.accept()
            with connection:
                assert receive_frame(connection, EVENTS) == Hello("secret")
                while not isinstance(receive_frame(connection, EVENTS), Pulse):
                    pass
                connection.shutdown(socket.SHUT_RD)
                assert process.wait(60) == 0
            assert process.stderr is not None
            assert process.stderr.read() == b""
