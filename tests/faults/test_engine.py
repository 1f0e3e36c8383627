"""The engine dies, stops, fails on a request, or lacks memory; the server dies; neither can start."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import fake_executor
import httpx
import psutil
import pytest
from command_line import command_line
from fake_executor import FakeDetokenizer, FakeExecutor
from serving import FakeServer, fake_server
from serving import until as until_async

from faults.asking import COMPLETIONS, LONG, Asked, full
from faults.house import House, error_of, until
from faults.inside import SEATS, InsideEngine, completion, executor
from ridgeline.engine import Engine
from ridgeline.types import Request, StepFuture

# ----------------------------------------------------------------------------------------- processes


def test_row_38_a_killed_engine_is_an_error_to_its_clients_and_comes_back(tiny_llama: Path) -> None:
    with House.open(tiny_llama, "--max-queue", 2) as house:
        for restart, backoff_s in ((1, "0.5"), (2, "1.0")):
            running = Asked(house, {**LONG, "n": SEATS, "stream": True}).begun()
            engine = house.server.engine
            engine.suspend()  # so that nothing ends before the kill
            waiting = [Asked(house, {**LONG, "stream": stream}) for stream in (True, False)]
            until(lambda: full(house), "full")
            engine.kill()
            for asked in (running, *waiting):
                assert asked.ended().error_code() == "engine_stopped"
                assert not asked.broken
                assert "[DONE]" not in asked.events
            assert [running.status, *(asked.status for asked in waiting)] == [200, 503, 503]
            with house.web() as web:
                assert web.get("/live").status_code == 200
                assert error_of(web.get("/health"), 503)["code"] == "restarting"
                assert error_of(web.post(COMPLETIONS, json=LONG), 503)["code"] == "restarting"
            house.server.await_log("engine died", f"in {backoff_s} s")
            house.check()
            assert house.gauge("engine_restarts_total") == restart


def test_row_39_a_stopped_engine_shows_in_the_health_and_in_the_log(house: House) -> None:
    asked = Asked(house, {**LONG, "n": 4, "stream": True}, **{"X-Request-ID": "in-the-step"}).begun()
    engine = house.server.engine
    engine.suspend()
    try:
        with house.web() as web:
            until(lambda: web.get("/health").status_code == 503, "unhealthy")
            assert error_of(web.get("/health"), 503)["code"] == "stuck"
            assert web.get("/live").status_code == 200
        line = house.server.await_log("engine makes no progress")
        assert "in-the-step" in line
    finally:
        engine.resume()
    assert asked.ended().last == "[DONE]"
    until(house.is_ready, "ready again")


def test_row_41_the_engine_ends_with_a_server_that_is_killed(tiny_llama: Path) -> None:
    """In the midst of a step, and while it is stopped: then as soon as it goes on."""
    with House.open(tiny_llama) as house:
        engine = house.server.engine
        asked = Asked(house, {**LONG, "n": 4, "stream": True}).begun()
        engine.suspend()
        house.server.process.kill()
        house.server.process.wait(30)
        assert asked.ended().broken
        assert engine.is_running()
        engine.resume()
        _, alive = psutil.wait_procs([engine], timeout=30)
        assert not alive


# ------------------------------------------------------------------------------------------- starting


def test_row_42_what_keeps_a_server_from_starting_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    cli = command_line(monkeypatch, capfd, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = cli("serve", tiny_llama, "--port", port)
        assert outcome.code == 1
        assert outcome.err.splitlines()[-1].startswith(f"error: cannot listen on 127.0.0.1:{port}: ")
    for model in (tmp_path / "none.gguf", tmp_path / "no-folder"):
        outcome = cli("serve", model, "--port", 0)
        assert outcome.code == 1
        (line,) = outcome.err.splitlines()
        assert line.startswith("error: ")
        assert model.name in line
    # What only the engine finds out, once it loads the model, is the last line of the log.
    outcome = cli("serve", tiny_llama, "--port", 0, "--max-model-len", 100_000)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert "max_model_len is 100000" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


# -------------------------------------------------------------------------------- faults of one request

BAD = 66
"""The token whose request the engine fails on."""
Break = Callable[[pytest.MonkeyPatch, InsideEngine], None]


def no_numbers(monkeypatch: pytest.MonkeyPatch, engine: InsideEngine) -> None:
    def edit(logits: Any, seen: list[int]) -> None:
        if seen[0] == BAD and len(seen) == 6:
            logits[40] = float("nan")

    engine.executor.edit = edit


def no_text(monkeypatch: pytest.MonkeyPatch, engine: InsideEngine) -> None:
    class Choking(FakeDetokenizer):
        def push(self, token_id: int) -> str:
            if token_id == 200:
                raise ValueError("choked")
            return super().push(token_id)

    def edit(logits: Any, seen: list[int]) -> None:
        logits[200] = 50 if seen[0] == BAD and len(seen) == 6 else -50

    monkeypatch.setattr(fake_executor, "FakeDetokenizer", Choking)
    engine.engine.detokenizer = Choking
    engine.executor.edit = edit


def no_beginning(monkeypatch: pytest.MonkeyPatch, engine: InsideEngine) -> None:
    add = Engine.add

    def adding(self: Engine, request: Request, *arguments: Any, **options: Any) -> None:
        if request.prompt_token_ids[0] == BAD:
            raise ZeroDivisionError("/a/secret/path")
        add(self, request, *arguments, **options)

    monkeypatch.setattr(Engine, "add", adding)


Scenario = Callable[[FakeServer, InsideEngine], Coroutine[Any, Any, None]]


def inside(model: Path, scenario: Scenario, made: FakeExecutor | None = None, **settings: Any) -> None:
    async def run() -> None:
        engine = InsideEngine(made or executor())
        async with fake_server(model, engine, **settings) as server:
            await scenario(server, engine)
            await until_async(lambda: not server.server.service.open_requests)
            engine.check()

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("fault", [no_numbers, no_text, no_beginning])
def test_row_40_an_exception_of_one_request_fails_that_one_alone(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, fault: Break
) -> None:
    async def scenario(server: FakeServer, engine: InsideEngine) -> None:
        async with server.client() as client:
            fault(monkeypatch, engine)
            firsts = (BAD - 1, BAD + 1)
            alone = [(await completion(client, [first, 2, 3])).json()["choices"] for first in firsts]
            for stream in (False, True):
                engine.running.clear()  # all of them are in the same steps
                asked = [asyncio.create_task(completion(client, [first, 2, 3])) for first in firsts]
                bad = asyncio.create_task(completion(client, [BAD, 2, 3], stream=stream))
                await until_async(lambda: len(server.engine.streams) == len(firsts) + 1)
                engine.running.set()
                assert [(await one).json()["choices"] for one in asked] == alone
                if stream and fault is not no_beginning:
                    end = (await bad).text.strip().splitlines()[-1]
                    error = json.loads(end.removeprefix("data: "))["error"]
                else:
                    error = error_of(await bad, 500)
                assert error["code"] in ("generation_failed", "internal_error")
                assert "secret" not in error["message"]

    inside(tiny_llama, scenario)


# ------------------------------------------------------------------------------------------- memory


def test_row_43_where_memory_runs_out_the_last_request_is_given_up(tiny_llama: Path) -> None:
    """And the others' tokens are what they would have been."""
    made = executor()
    run, room = made.run, 2

    def short_of_memory(handle: Any, step: Any) -> StepFuture:
        if len(step.sequences) > room:
            raise MemoryError
        return run(handle, step)

    made.run = short_of_memory  # type: ignore[method-assign, assignment]

    async def scenario(server: FakeServer, engine: InsideEngine) -> None:
        nonlocal room
        async with server.client() as client:
            prompts = [[first, 2, 3] for first in (10, 11, 12, 13)]
            alone = [(await completion(client, prompt)).json()["choices"] for prompt in prompts]
            engine.running.clear()
            asked = []
            for prompt in prompts:
                asked.append(asyncio.create_task(completion(client, prompt)))
                await until_async(lambda: len(server.engine.streams) == len(asked))
            engine.running.set()
            first, second, *others = await asyncio.gather(*asked)
            assert [first.json()["choices"], second.json()["choices"]] == alone[:2]
            for answer in others:
                assert error_of(answer, 503)["code"] == "capacity"
            room = 0
            error_of(await completion(client, prompts[0]), 503)
            room = 2
            assert (await completion(client, prompts[0])).json()["choices"] == alone[0]

    inside(tiny_llama, scenario, made)


def test_row_43_an_engine_without_any_more_memory_does_not_end_the_server(house: House) -> None:
    """The system gives it none: what it cannot do without, costs requests, or the engine and a restart."""
    engine = house.server.engine
    before = engine.rlimit(resource.RLIMIT_AS)
    engine.rlimit(resource.RLIMIT_AS, (1, before[1]))
    body = {"prompt": [5] * 400, "max_tokens": 60, "ignore_eos": True, "logprobs": 5, "n": 4}
    asked = [Asked(house, {**body, "echo": True, "seed": seed}) for seed in range(4)]
    for one in asked:
        assert one.ended().status in (200, 500, 503)
        assert not one.broken
    with house.web() as web:
        assert web.get("/live").status_code == 200
    if engine.is_running():
        engine.rlimit(resource.RLIMIT_AS, before)
    until(house.is_ready, "ready again")
    assert httpx.get(f"{house.url}/health").status_code == 200
