"""`/v1/steps`: the engine's steps as they end, for who keeps up and for who does not."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_executor import FakeExecutor, make_engine
from serving import FakeServer, ServerProcess, code_of, fake_server, server_process, until, with_server

from ridgeline.records import RECENT_STEPS, StepRecord
from ridgeline.server import steps as steps_module
from ridgeline.server.config import keys_of
from ridgeline.server.engine_process import EngineWorker
from ridgeline.server.messages import EVENTS, Add, Message, Steps, frame
from ridgeline.server.steps import MAX_LISTENERS, StepFeed
from ridgeline.server.wire.responses import Step
from ridgeline.types import SamplingParams

BODY = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def record(number: int, **more: Any) -> StepRecord:
    known: dict[str, Any] = {
        "time_s": 1.8e9 + number,
        "kind": "decode",
        "rows": 2,
        "sequences": 2,
        "prompt_tokens": 0,
        "decoded_tokens": 2,
        "running": 2,
        "waiting": 0,
        "kv_pages": 4,
        "kv_usage": 0.5,
        "flops": 1000,
        "attention_flops": 10,
        "bytes": 3000,
        "weight_bytes": 2000,
        "kv_bytes": 500,
        "launches": 7,
        "elapsed_s": 0.01,
        "wall_s": 0.011,
    }
    return StepRecord(number, **{**known, **more})


def told(first: int, count: int) -> Steps:
    return Steps(tuple(record(number) for number in range(first, first + count)))


class Listener:
    """Reads server-sent events, each as its name and its data."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self._lines = answer.aiter_lines()
        self.comments = 0

    async def event(self) -> tuple[str, dict[str, Any]]:
        name, data = "message", ""
        async for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            elif line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
            elif data:
                return name, json.loads(data)
        raise EOFError

    async def numbers(self, count: int) -> list[int]:
        found = []
        for _ in range(count):
            name, data = await asyncio.wait_for(self.event(), 10)
            assert name == "message"
            Step.model_validate(data)
            found.append(data["number"])
        return found


@asynccontextmanager
async def listening(server: FakeServer, path: str = "/v1/steps", **headers: str) -> AsyncIterator[Listener]:
    async with server.client() as client, client.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Listener(answer)


# ---------------------------------------------------------------------------------------- who listens


def test_steps_come_as_they_end(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        server.engine._hear(told(0, 5))
        async with listening(server) as live, listening(server, "/v1/steps?recent=3") as recent:
            assert await recent.numbers(3) == [2, 3, 4]
            server.engine._hear(told(5, 2))
            server.engine._hear(told(7, 1))
            assert await live.numbers(3) == await recent.numbers(3) == [5, 6, 7]
            assert server.server.service.steps.listeners == 2
        await until(lambda: server.server.service.steps.listeners == 0)

    with_server(tiny_llama, scenario)


def test_the_recent_steps_alone(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            for count in (0, 5):
                server.engine._hear(told(0, count))
                answer = await client.get("/v1/steps?recent=1024&follow=false")
                data = [line for line in answer.text.splitlines() if line.startswith("data: ")]
                assert [json.loads(line[6:])["number"] for line in data] == list(range(count))
            step = json.loads(data[0].removeprefix("data: "))
            assert step["kind"] == "decode"
            assert step["energy_j"] is None
            assert step.keys() == Step.model_fields.keys()
            for wrong in ("recent=-1", "recent=1025", "recent=x", "follow=perhaps"):
                assert (await client.get(f"/v1/steps?{wrong}")).status_code == 422
            assert (await client.post("/v1/steps")).status_code == 405

    with_server(tiny_llama, scenario)


def test_a_key_is_needed_where_there_are_keys(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            refused = await client.get("/v1/steps?follow=false")
            assert (refused.status_code, code_of(refused)) == (401, "invalid_api_key")
        server.engine._hear(told(0, 1))
        async with listening(server, "/v1/steps?recent=1", authorization="Bearer sk-1") as listener:
            assert await listener.numbers(1) == [0]

    with_server(tiny_llama, scenario, api_keys=keys_of(["sk-1"]))


def test_it_is_described(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            described = (await client.get("/openapi.json")).json()
        endpoint = described["paths"]["/v1/steps"]["get"]
        assert {each["name"] for each in endpoint["parameters"]} == {"recent", "follow"}
        schema = endpoint["responses"]["200"]["content"]["text/event-stream"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Step"}
        step = described["components"]["schemas"]["Step"]
        assert set(step["required"]) == set(StepRecord.__struct_fields__)
        assert "`number` counts" in step["description"]

    with_server(tiny_llama, scenario)


def test_listeners_are_bounded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridgeline.server.routes.steps.MAX_LISTENERS", 1)
    assert MAX_LISTENERS > 1

    async def scenario(server: FakeServer) -> None:
        async with listening(server), server.client() as client:
            refused = await client.get("/v1/steps")
            assert (refused.status_code, code_of(refused)) == (429, "rate_limit_exceeded")
            assert refused.headers["retry-after"]
        await until(lambda: server.server.service.steps.listeners == 0)
        async with listening(server):
            pass

    with_server(tiny_llama, scenario)


def test_who_hears_nothing_hears_that(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "QUIET_S", 0.05)

    async def scenario(server: FakeServer) -> None:
        async with listening(server) as listener:
            waiting = asyncio.create_task(listener.event())
            await until(lambda: listener.comments > 3)
            server.engine._hear(told(0, 1))
            assert (await waiting)[1]["number"] == 0

    with_server(tiny_llama, scenario)


def test_a_server_that_drains_ends_the_stream(tiny_llama: Path) -> None:
    async def run() -> None:
        async with fake_server(tiny_llama) as server, listening(server, "/v1/steps?recent=9") as listener:
            server.engine._hear(told(0, 2))
            assert await listener.numbers(2) == [0, 1]
            asking = asyncio.create_task(server.client().post("/v1/completions", json=BODY))
            server.engine.running.clear()
            await until(lambda: bool(server.engine.streams))
            server.server.stop()
            with pytest.raises(EOFError):
                await asyncio.wait_for(listener.event(), 5)
            assert server.engine.streams, "that request may still end"
            async with server.client() as client:
                refused = await client.get("/v1/steps")
                assert (refused.status_code, code_of(refused)) == (503, "draining")
            server.engine.running.set()
            assert (await asking).status_code == 200

    asyncio.run(asyncio.wait_for(run(), 60))


# ------------------------------------------------------------------------------- who does not keep up


def test_who_reads_slowly_loses_steps_and_is_told_how_many(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        feed = server.server.service.steps
        slow = socket.create_connection((server.host, server.port))
        slow.sendall(b"GET /v1/steps HTTP/1.1\r\nHost: localhost\r\n\r\n")
        slow.setblocking(False)
        await until(lambda: feed.listeners == 1)
        count = 0
        while count < 20 * RECENT_STEPS:
            server.engine._hear(told(count, 64))
            count += 64
            await asyncio.sleep(0.001)
        async with listening(server, "/v1/steps?recent=2") as quick:
            assert await quick.numbers(2) == [count - 2, count - 1], "nobody waits for the slow"
        loop, heard = asyncio.get_running_loop(), bytearray()
        async with asyncio.timeout(40):
            while f'"number":{count - 1},'.encode() not in heard[-(1 << 16) :]:
                heard += await loop.sock_recv(slow, 1 << 15)
        slow.close()
        data = [
            json.loads(line.removeprefix(b"data: "))
            for line in heard.replace(b"\r\n", b"\n").split(b"\n")
            if line.startswith(b"data: ") and line.endswith(b"}")
        ]
        lost = sum(event.get("dropped", 0) for event in data)
        numbers = [event["number"] for event in data if "number" in event]
        assert lost > RECENT_STEPS
        assert numbers == sorted(numbers)
        # A line may have been cut by the border of a chunk of HTTP's.
        assert count - lost - len(numbers) in range(-2, 20)
        assert heard.count(b"event: dropped\ndata: ") >= 1
        await until(lambda: feed.listeners == 0)

    with_server(tiny_llama, scenario)


def test_gaps_and_engines_that_begin_again() -> None:
    async def run() -> list[bytes]:
        feed = StepFeed()
        events = feed.events(0, follow=True)
        first = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        feed.take([record(4), record(5)])  # nothing was asked of those before
        heard = [await first]
        feed.take([record(9), record(0), record(2)])
        heard.append(await anext(events))
        feed.take([record(1)] * 2000)
        feed.close()
        heard += [chunk async for chunk in events]
        assert len(heard) == 2 + RECENT_STEPS // 64
        return heard

    first, second, *_ = asyncio.run(run())
    assert b"dropped" not in first
    assert second.count(b"event: dropped") == 2
    assert second.index(b'{"dropped":3}') < second.index(b'"number":9')
    assert second.index(b'"number":0') < second.index(b'{"dropped":1}') < second.index(b'"number":2')


# ------------------------------------------------------------------------------------- the engine's side


def test_records_travel_in_messages_of_bounded_size() -> None:
    sent: list[Message] = []
    worker = EngineWorker(make_engine(FakeExecutor()), queue.SimpleQueue(), sent.append)
    assert list(worker.new_steps()) == []
    worker._obey(Add(1, (1, 2, 3), SamplingParams(max_tokens=150, ignore_eos=True), False))
    for _ in range(149):
        worker.step()
    messages = list(worker.new_steps())
    assert [len(message.records) for message in messages] == [64, 64, 21]
    assert all(len(frame(message)) < 64 << 10 for message in messages)
    assert [EVENTS.decode(frame(message)[4:]) for message in messages] == messages
    assert list(worker.new_steps()) == []
    worker.step()
    (last,) = worker.new_steps()
    assert [each.number for each in last.records] == [149]


def test_the_pulse_says_what_a_step_was_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = EngineWorker(make_engine(FakeExecutor()), queue.SimpleQueue(), lambda message: None)
    worker._recent.extend([0.5, 2.0])
    assert worker.pulse().expected_step_s == 2.0
    monkeypatch.setattr(worker._engine, "expected_step_s", lambda: 0.25)
    assert worker.pulse().expected_step_s == 2.0, "no step is under way"
    worker._step_began_s = 0.0
    assert worker.pulse().expected_step_s == 0.25
    monkeypatch.setattr(worker._engine, "expected_step_s", lambda: None)
    assert worker.pulse().expected_step_s == 2.0


def test_a_real_server_tells_of_its_steps(tiny_llama: Path) -> None:
    with server_process(tiny_llama, "--max-num-seqs", 2) as server:

        def steps(server: ServerProcess) -> list[dict[str, Any]]:
            text = httpx.get(f"{server.url}/v1/steps?recent=1024&follow=false", timeout=20).text
            found = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
            for step in found:
                Step.model_validate(step)
            return found

        def ask(prompts: list[list[int]]) -> None:
            # So many, and one by one, that the first is not over when the second comes.
            body = {**BODY, "prompt": prompts, "max_tokens": 100, "speculation": False}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200

        with httpx.stream("GET", f"{server.url}/v1/steps", timeout=20) as live:
            ask([[5, 6, 7], [8, 9], [3]])
            asyncio.run(until(lambda: sum(step["decoded_tokens"] for step in steps(server)) == 300))
            found = steps(server)
            lines = live.iter_lines()
            heard = [json.loads(next(line for line in lines if line.startswith("data: "))[6:]) for _ in found]
        assert heard == found
        assert [step["number"] for step in found] == list(range(len(found)))
        assert sum(step["prompt_tokens"] for step in found) == 6
        assert max(step["running"] for step in found) == 2
        assert all(step["predicted_s"] > 0 and step["mbu"] > 0 for step in found), "it measures at its start"
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'ridgeline_step_time_seconds_count{kind="decode"}' in metrics
        assert server.end() == 0
