"""More than can be served: queues, deadlines, long prompts, health, and the same tokens in any company."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import FakeServer, with_server
from serving import until as until_async

from faults.asking import COMPLETIONS, LONG, Asked, full
from faults.house import House, error_of, until

SEATS, QUEUE = 4, 16
ROUTES = (COMPLETIONS, "/v1/chat/completions", "/v1/embeddings")


@contextmanager
def standing_still(house: House) -> Iterator[None]:
    """While the engine is stopped, nobody leaves the queue."""
    house.server.engine.suspend()
    try:
        yield
    finally:
        house.server.engine.resume()


def tokens_seen(house: House) -> tuple[float, float]:
    return house.gauge("prompt_tokens_total"), house.gauge("generation_tokens_total")


def test_row_33_a_full_queue_is_refused_before_anything_is_looked_at(house: House) -> None:
    """What would be a 400 is a 429 too: nobody has parsed it, let alone tokenized it."""
    hopeless = (b"{", b'{"prompt": 3, "bogus": 1}', b'{"prompt": [999999]}', b"[" * 500, b"{}")
    with standing_still(house):
        waiting = Asked(house, {**LONG, "n": SEATS + QUEUE, "max_tokens": 2})
        until(lambda: full(house), "full")
        with house.web() as web:
            for path in ROUTES:
                for body in hopeless:
                    answer = web.post(path, content=body)
                    assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
                    assert int(answer.headers["retry-after"]) >= 1
            assert web.get("/v1/models").status_code == 200
    assert len(waiting.ended().answer.json()["choices"]) == SEATS + QUEUE  # type: ignore[union-attr]
    with house.web() as web:
        for body in hopeless[:-1]:
            error_of(web.post(COMPLETIONS, content=body), 400)


def test_row_34_who_waits_past_the_deadline_is_never_run(tiny_llama: Path) -> None:
    timeout_s = 2.0
    with House.open(tiny_llama, "--queue-timeout", timeout_s) as house:
        before = tokens_seen(house)
        with standing_still(house):
            late = [Asked(house, {**LONG, "stream": stream}) for stream in (True, False)]
            late.append(Asked(house, {"input": "x"}, "/v1/embeddings"))
            time.sleep(timeout_s + 0.5)
        for asked in late:
            assert asked.ended().status == 503
            assert asked.error_code() == "queue_timeout"
            assert asked.answer is not None
            assert int(asked.answer.headers["retry-after"]) >= 1
        assert tokens_seen(house) == before
        house.check()


def steps_of(house: House) -> float:
    """Steps that the engine has run, once it rests: it tells them only several times a second."""
    seen = [house.gauge("engine_steps_total")]
    while len(seen) < 6 or len(set(seen[-6:])) > 1:
        time.sleep(0.1)
        seen.append(house.gauge("engine_steps_total"))
    return seen[-1]


def test_row_35_a_flood_of_long_prompts_holds_a_canary_up_for_a_bounded_number_of_steps(
    tiny_llama: Path,
) -> None:
    """Requests are served in the order of their arrival, so what is before the canary bounds its wait: the
    prompts in the seats, and those that may wait (see the next test)."""
    per_step, long, before_it = 64, 200, SEATS + 2
    limits = ("--max-num-batched-tokens", per_step, "--max-queue", 3, "--max-queue-tokens", 650)
    with House.open(tiny_llama, *limits) as house:
        before = steps_of(house)
        flood = {"prompt": [5] * long, "max_tokens": 1, "temperature": 0}
        with standing_still(house):
            asked = [Asked(house, flood) for _ in range(before_it)]
            canary = Asked(house, {"prompt": [7] * 40, "max_tokens": 1, "stream": True})
            until(lambda: full(house), "all there")
            assert Asked(house, flood).ended().status == 429
        assert canary.ended().last == "[DONE]"
        assert {one.ended().status for one in asked} == {200}
        # A step has room left only where a sequence begins or ends, once for each.
        bound = before_it * long / per_step + 2 * (before_it + 1)
        assert steps_of(house) - before <= bound
        house.check()


def test_row_35_more_prompt_tokens_than_may_wait_are_refused(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        server.engine.running.clear()
        async with server.client() as client:
            body = {"prompt": [5] * 40, "max_tokens": 2}
            waiting = [asyncio.create_task(client.post(COMPLETIONS, json=body)) for _ in range(5)]
            await until_async(lambda: len(server.engine.streams) == 5)  # four of them run
            assert server.server.service.waiting_tokens() == 40
            answer = await client.post(COMPLETIONS, json=body)
            assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
            assert int(answer.headers["retry-after"]) >= 1
            server.engine.running.set()
            assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}
            assert (await client.post(COMPLETIONS, json=body)).status_code == 200

    with_server(tiny_llama, scenario, max_queue_tokens=50)


def test_row_36_health_is_answered_under_saturation(house: House) -> None:
    """How soon, is measured by bench/overload.py."""
    over = threading.Event()

    def crowd() -> set[int]:
        statuses = set()
        with house.web() as web:
            while not over.is_set():
                statuses.add(web.post(COMPLETIONS, json={**LONG, "n": SEATS, "max_tokens": 50}).status_code)
        return statuses

    with ThreadPoolExecutor(8) as pool, house.web() as kept:
        clients = [pool.submit(crowd) for _ in range(8)]
        try:
            until(lambda: full(house), "full")
            for _ in range(6):
                assert kept.get("/health").status_code == 200
                assert httpx.get(f"{house.url}/health").status_code == 200
                assert httpx.head(f"{house.url}/live").status_code == 200
        finally:
            over.set()
        statuses = set().union(*(client.result() for client in clients))
    assert statuses == {200, 429}


def mixed(count: int) -> list[dict[str, Any]]:
    """Greedy requests of all lengths, every third one sampled, some streamed."""
    rng = random.Random(37)
    return [
        {
            "prompt": [rng.randrange(2, 280) for _ in range(rng.choice((1, 7, 40, 150)))],
            "max_tokens": rng.choice((1, 8, 30)),
            "ignore_eos": True,
            "temperature": 1 if number % 3 == 2 else 0,
            "seed": number,
            "logprobs": 0,
            "stream": False,
        }
        for number in range(count)
    ]


async def answers(house: House, bodies: list[dict[str, Any]], at_once: int) -> list[Any]:
    """The choices, by as many clients as are to ask at one time."""
    places = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=None)

    async def ask(web: httpx.AsyncClient, body: dict[str, Any]) -> Any:
        async with places:
            answer = await web.post(COMPLETIONS, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    async with httpx.AsyncClient(base_url=house.url, timeout=240, limits=limits) as web:
        return await asyncio.gather(*(ask(web, body) for body in bodies))


@pytest.mark.parametrize(
    "most", [48, pytest.param(512, marks=pytest.mark.full)], ids=lambda most: f"up_to_{most}"
)
def test_row_37_tokens_are_the_same_in_any_company(tiny_llama: Path, most: int) -> None:
    """To the last bit of their log-probabilities; with more sequences than seats, too."""
    limits = ("--max-num-seqs", most // 2, "--max-queue", most, "--kv-cache-memory", "64M")
    bodies = mixed(most)
    with House.open(tiny_llama, *limits) as house:
        alone = asyncio.run(answers(house, bodies, 1))
        for at_once in (8, most):
            assert asyncio.run(answers(house, bodies, at_once)) == alone
        house.check()
