"""What is remembered of steps: it is what they were, bounded, and cheap."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from fake_executor import FakeExecutor, make_engine
from test_engine import run as run_all
from test_speculation import forced

from ridgeline.config import EngineConfig
from ridgeline.engine import Engine
from ridgeline.loading import LoadedModel, load_engine
from ridgeline.model.program import StepLoad
from ridgeline.records import RECENT_STEPS, Recent, StepRecord
from ridgeline.resources import probe
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.energy import PowerModel
from ridgeline.resources.roofline import mbu, mfu
from ridgeline.resources.step_time import Prediction, StepTimeModel
from ridgeline.scheduling.plan import Plan
from ridgeline.steps import StepLog
from ridgeline.types import PoolingParams, Request, SamplingParams, StepResult, StepWork

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
CEILINGS = Ceilings(20e9, 500e9, 300e9, 200e9, 1, "portable", "made up", "2026-01-01T00:00:00+00:00")


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "known_ceilings", lambda *args, **more: CEILINGS)


def results_of(engine: Engine) -> list[StepResult]:
    """Every result that the engine's executor gives from now on."""
    seen: list[StepResult] = []
    run = engine.executor.run

    def watched(handle: object, step: object) -> object:
        future = run(handle, step)  # type: ignore[arg-type]
        seen.append(future.result())
        return future

    engine.executor.run = watched  # type: ignore[method-assign, assignment]
    return seen


def finish(engine: Engine) -> list[StepRecord]:
    first = engine.steps.recent.count
    while engine.has_work:
        engine.step()
    return engine.steps.recent.since(first)


def load(model: Path, **settings: object) -> LoadedModel:
    return load_engine(EngineConfig.from_options({"model": str(model), "threads": 1, **settings}))


# ------------------------------------------------------------------------------------------ what it says


@pytest.mark.usefixtures("known_machine")
def test_records_are_what_the_executor_said(tiny_llama: Path) -> None:
    loaded = load(tiny_llama, max_num_batched_tokens=64)
    engine = loaded.engine
    results = results_of(engine)
    began_s = time.time()
    engine.add(Request("long", tuple(range(3, 103)), GREEDY))
    engine.step()
    engine.add(Request("short", (7, 8, 9), GREEDY))
    finish(engine)
    records = engine.steps.recent.since(0)
    assert [record.number for record in records] == list(range(len(results)))
    for record, result in zip(records, results, strict=True):
        work, elapsed_s = result.work, result.elapsed_s
        assert (record.flops, record.bytes) == (work.total.ops, work.total.bytes)
        assert (record.attention_flops, record.weight_bytes) == (work.attention.ops, work.weight_bytes)
        assert 0 < record.kv_bytes < record.bytes
        assert (record.rows, record.sequences) == (work.rows, work.sequences)
        assert record.elapsed_s == elapsed_s
        assert record.wall_s >= elapsed_s
        assert record.mbu == mbu(work.total, elapsed_s, CEILINGS)
        assert record.mfu == mfu(work.total, elapsed_s, CEILINGS)
        assert record.predicted_s is not None
        assert record.predicted_s > 0
        assert record.bound in ("weights", "KV cache", "activations", "arithmetic", "overhead")
        assert began_s - 1 < record.time_s < time.time() + 1
    totals = engine.stats.prefill, engine.stats.decode
    assert sum(record.rows for record in records) == sum(total.rows for total in totals)
    work = totals[0].work + totals[1].work
    assert sum(record.bytes for record in records) == work.bytes
    assert sum(record.flops for record in records) == work.ops
    assert sum(record.elapsed_s for record in records) == pytest.approx(sum(t.elapsed_s for t in totals))
    assert sum(record.prompt_tokens for record in records) == 103
    assert sum(record.decoded_tokens for record in records) == 12
    assert [record.kind for record in records[:2]] == ["prefill", "prefill"]
    assert records[-1].kind == "decode"
    assert records[0].running == 1
    assert records[1].running == 2
    assert records[0].kv_pages == 4, "64 tokens"
    assert max(record.kv_pages for record in records) == 7 + 1
    assert 0 < records[0].kv_usage < 1
    engine.close()


@pytest.mark.usefixtures("known_machine")
def test_each_step_is_predicted_before_it_is_observed(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[float] = []
    real = StepTimeModel.observe

    def noted(model: StepTimeModel, work: StepWork, elapsed_s: float) -> Prediction:
        expected.append(model.predict(work).seconds)
        return real(model, work, elapsed_s)

    monkeypatch.setattr(StepTimeModel, "observe", noted)
    engine = load(tiny_llama).engine
    engine.add(Request("a", (3, 4, 5), GREEDY))
    assert [record.predicted_s for record in finish(engine)] == expected
    engine.close()


@pytest.mark.usefixtures("known_machine")
def test_a_step_with_guesses_is_predicted_without_them_too(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a decode of each sequence at its context, by a model that has not seen the step."""
    monkeypatch.setattr(StepTimeModel, "_learn", lambda *_: None)
    requests = [Request(name, tokens, GREEDY) for name, tokens in (("a", (3, 4, 5)), ("b", (9,) * 20))]
    engine = load(tiny_llama, speculation="off").engine
    answers = run_all(engine, requests)
    drafted: list[tuple[StepRecord, Plan]] = []

    class Watching:
        def arrived(self, state: object) -> None: ...
        def ended(self, state: object) -> None: ...
        def close(self) -> None: ...

        def step(self, record: StepRecord, plan: Plan, began_s: float, ended_s: float) -> None:
            if plan.drafted:
                drafted.append((record, plan))
            else:
                assert (record.unguessed_s, record.drafted_tokens) == (None, 0)

    engine.steps._watcher = Watching()
    forced(engine, 3, answers, 1.0)
    run_all(engine, requests)
    assert drafted
    for record, plan in drafted:
        contexts = [rows.start + 1 for rows in plan.step.sequences]
        decodes = StepLoad(len(contexts), len(contexts), (sum(contexts),), (sum(contexts),), len(contexts))
        assert engine.steps.model is not None
        alone = engine.steps.model.predict(engine.handle.work.parts(decodes)).seconds
        assert record.unguessed_s == pytest.approx(alone)
        assert record.predicted_s is not None
        assert record.unguessed_s < record.predicted_s
    engine.close()


def test_a_machine_that_nobody_has_measured(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "known_ceilings", lambda *args, **more: None)
    engine = load(tiny_llama).engine
    engine.add(Request("a", (3, 4, 5), GREEDY))
    for record in finish(engine):
        assert (record.predicted_s, record.bound, record.mbu, record.mfu) == (None,) * 4
        assert record.bytes > 0
    assert engine.expected_step_s() is None or engine.expected_step_s() == 0
    engine.close()


def test_chunks_mixtures_and_preemption_are_told_apart() -> None:
    engine = make_engine(FakeExecutor(), max_num_batched_tokens=16)
    engine.add(Request("a", (1, 2, 3), GREEDY))
    engine.step()
    engine.add(Request("b", tuple(range(40)), GREEDY))
    finish(engine)
    records = engine.steps.recent.since(0)
    assert [record.kind for record in records[:4]] == ["prefill", "mixed", "mixed", "mixed"]
    assert [(r.prompt_tokens, r.decoded_tokens) for r in records[:4]] == [(3, 1), (15, 1), (15, 1), (10, 2)]
    assert all(record.kind == "decode" for record in records[4:])
    assert sum(record.decoded_tokens for record in records) == 12


def test_prompts_that_are_pooled_give_no_tokens() -> None:
    engine = make_engine(FakeExecutor(), max_num_batched_tokens=16)
    engine.add(Request("a", tuple(range(20)), PoolingParams("mean")))
    records = finish(engine)
    assert {record.kind for record in records} == {"embed"}
    assert sum(record.prompt_tokens for record in records) == 20
    assert sum(record.decoded_tokens for record in records) == 0


def test_energy_is_that_of_the_meter() -> None:
    engine = make_engine(FakeExecutor())
    engine.steps = StepLog(engine.scheduler, meter=PowerModel(100.0, "made up"))
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)))
    while engine.has_work:
        engine.step()
        time.sleep(0.001)
    records = engine.steps.recent.since(0)
    charged = [record for record in records if record.energy_j is not None]
    assert charged, "a while without a pause is seldom longer than twenty steps"
    for record in charged:
        assert record.energy_j == pytest.approx(100 * record.wall_s, rel=0.2)


# ------------------------------------------------------------------------------------------ how much


def test_only_recent_steps_are_kept() -> None:
    engine = make_engine(FakeExecutor(pages=(256,)), max_model_len=4096)
    engine.add(Request("a", (1,), SamplingParams(temperature=0, max_tokens=1100, ignore_eos=True)), "", False)
    finish(engine)
    recent = engine.steps.recent
    assert recent.count == 1100
    assert [record.number for record in recent.since(0)] == list(range(1100 - RECENT_STEPS, 1100))
    assert [record.number for record in recent.since(1098)] == [1098, 1099]
    assert recent.since(1100) == recent.since(5000) == []


def test_a_reader_in_another_thread_sees_no_disorder() -> None:
    recent: Recent[int] = Recent(64)
    seen: list[list[int]] = []

    def read() -> None:
        at = 0
        while at < 20_000:
            found = recent.since(at)
            seen.append(found)
            at = found[-1] + 1 if found else at

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20_000):
        recent.append(number)
        if number % 50 == 0:
            time.sleep(0)
    reader.join()
    flat = [number for found in seen for number in found]
    assert flat == sorted(set(flat))
    assert flat[-1] == 19_999
    assert max(map(len, seen)) <= 64


def test_a_plan_is_recorded_once_whatever_interrupts() -> None:
    engine = make_engine(FakeExecutor())
    finishing, interrupted = engine._tell, []

    def tell(states: object) -> object:
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return finishing(states)  # type: ignore[arg-type]

    engine._tell = tell  # type: ignore[method-assign, assignment]
    engine.add(Request("a", (1, 2, 3), GREEDY))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    finish(engine)
    records = engine.steps.recent.since(0)
    assert [record.number for record in records] == list(range(6))
    assert sum(record.decoded_tokens for record in records) == 6


# ----------------------------------------------------------------------------------- while a step runs


@pytest.mark.usefixtures("known_machine")
def test_a_step_under_way_has_its_expectation(tiny_llama: Path) -> None:
    engine = load(tiny_llama).engine
    inside: list[float | None] = []
    run = engine.executor.run

    def watched(handle: object, step: object) -> object:
        inside.append(engine.expected_step_s())
        return run(handle, step)  # type: ignore[arg-type]

    engine.executor.run = watched  # type: ignore[method-assign, assignment]
    engine.add(Request("a", tuple(range(3, 67)), GREEDY))
    engine.add(Request("b", (5, 6), PoolingParams("last")))
    finish(engine)
    predicted = [record.predicted_s for record in engine.steps.recent.since(0)]
    assert inside == predicted
    assert None not in inside
    assert engine.expected_step_s() == 0, "nothing runs"
    engine.close()
