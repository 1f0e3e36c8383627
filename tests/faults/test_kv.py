"""Pages: more wanted than there are, by all together and by one; and none lost."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import command_line
from fake_executor import make_engine
from tier_engines import tiered_engine

from faults.asking import COMPLETIONS, Asked
from faults.house import House, error_of
from faults.inside import executor
from ridgeline.engine import Engine
from ridgeline.server.engine_process import EngineWorker
from ridgeline.server.messages import Abort, Add, Message, Pieces
from ridgeline.types import SamplingParams

POOL = "128K"
"""Pages for 336 tokens of the tiny model; the context is cut to 256."""
CONTEXT, POOL_TOKENS = 256, 336


@pytest.fixture(scope="module")
def tight_house(tiny_llama: Path) -> Iterator[House]:
    with House.open(tiny_llama, "--kv-cache-memory", POOL) as house:
        yield house


@pytest.fixture
def tight(tight_house: House) -> Iterator[House]:
    yield tight_house
    tight_house.check()


def test_row_44_demand_over_the_pool_changes_no_token(tight: House) -> None:
    """Four run at once, each of which needs most of the pool before it ends."""
    bodies = [
        {
            "prompt": [first] * 20,
            "max_tokens": CONTEXT - 30,
            "temperature": 0,
            "ignore_eos": True,
            "stream": first % 2 == 0,
        }
        for first in range(10, 18)
    ]
    alone = [Asked(tight, body).ended().text() for body in bodies]
    together = [Asked(tight, body) for body in bodies]
    assert [asked.ended().text() for asked in together] == alone
    assert len(set(alone)) == len(alone)


def test_row_45_a_request_beyond_the_pool_is_refused_and_holds_nobody_up(tight: House) -> None:
    """The context is cut to what the pool can hold, so that everything within it can be served."""
    with tight.web() as web:
        (model,) = web.get("/v1/models").json()["data"]
        assert model["max_model_len"] == CONTEXT <= POOL_TOKENS
        for stream in (False, True):
            body = {"prompt": [5] * (POOL_TOKENS + 1), "max_tokens": 1, "stream": stream}
            error = error_of(web.post(COMPLETIONS, json=body), 400)
            assert error["code"] == "context_length_exceeded"
            assert str(CONTEXT) in error["message"]
            assert str(POOL_TOKENS + 1) in error["message"]
        all_of_it = {"prompt": [5] * 100, "max_tokens": 10_000, "ignore_eos": True, "n": 4, "seed": 1}
        usage = web.post(COMPLETIONS, json=all_of_it).json()["usage"]
        assert usage["completion_tokens"] == 4 * (CONTEXT - 100)


def test_row_45_a_context_that_the_pool_cannot_hold_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    cli = command_line(monkeypatch, capfd, tmp_path)
    outcome = cli("serve", tiny_llama, "--port", 0, "--max-model-len", 512, "--kv-cache-memory", POOL)
    assert outcome.code == 1
    line = outcome.err.splitlines()[-1]
    assert line.startswith("error: one sequence of 512 tokens needs ")
    assert "--max-model-len" in line


def tight_engine(folder: Path | None) -> Engine:
    """With lower tiers that are as small, where there is a folder for them."""
    options = {"max_num_seqs": 6, "max_num_batched_tokens": 32}
    if folder is None:
        return make_engine(executor(pages=8), **options)
    page_bytes = executor(pages=1).host_page_bytes[0]
    lower = {"memory_bytes": 6 * page_bytes, "disk_bytes": 20 * page_bytes}
    return tiered_engine(folder, executor(pages=8), **lower, **options)


@pytest.mark.parametrize("tiers", [False, True], ids=["pool alone", "with tiers"])
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.full)])
def test_row_46_random_finishes_and_aborts_leave_every_page_free(
    count: int, tiers: bool, tmp_path: Path
) -> None:
    """Through the engine process's own worker; the pool is small, so that many are preempted, too. Nor does
    the process grow behind the first quarter."""
    rng = random.Random(count)
    engine = tight_engine(tmp_path if tiers else None)
    process, early_bytes = psutil.Process(), 0
    ended: set[int] = set()

    def hear(message: Message) -> None:
        assert isinstance(message, Pieces)
        for number in message.ended:
            assert number not in ended, "it ended twice"
            ended.add(number)

    worker = EngineWorker(engine, queue.SimpleQueue(), hear)
    aborted: set[int] = set()
    for number in range(count):
        params: dict[str, Any] = {
            "max_tokens": rng.randrange(1, 40),
            "temperature": 0,
            "n": rng.choice((1, 1, 2)),
        }
        prompt = tuple(rng.randrange(90) for _ in range(rng.randrange(1, 60)))
        worker._obey(Add(number, prompt, SamplingParams(**params), stream=rng.random() < 0.5))
        while len(engine.scheduler.waiting) > 8 or (engine.has_work and rng.random() < 0.6):
            worker.step()
        if rng.random() < 0.4:
            victim = rng.randrange(max(0, number - 10), number + 1)
            worker._obey(Abort(victim))
            worker._obey(Abort(victim))
            if victim not in ended:
                aborted.add(victim)
        if number % 50 == 0:
            engine.scheduler.check_integrity()
            engine.executor.steps.clear()  # type: ignore[attr-defined]
        if number == count // 4:
            early_bytes = process.memory_info().rss
    while engine.has_work:
        worker.step()
    assert ended | aborted == set(range(count))
    assert not ended & aborted
    assert len(aborted) > count / 10
    assert engine.scheduler.preemptions > count / 100
    engine.scheduler.check_integrity()
    assert all(pool.free_pages == pool.pages for pool in engine.scheduler.cache.pools)
    assert process.memory_info().rss - early_bytes < 8 << 20
    if tiers:
        assert list(tmp_path.glob("*.kv"))
        engine.scheduler.cache.tiers.ladder.check_integrity()
    engine.close()
