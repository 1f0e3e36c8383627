"""Times of single operations: they are those of the step, and taking them changes no token."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli, command_line

from ridgeline.apps.benchmark import Workload
from ridgeline.apps.operations import by_phase, measure_operations
from ridgeline.config import EngineConfig
from ridgeline.loading import load_engine
from ridgeline.resources.ceilings import Ceilings
from ridgeline.types import Request, RequestError, SamplingParams, Work

CEILINGS = Ceilings(1e9, 1e9, 1e9, 1e9, 1, "portable", "test", "2026-01-01T00:00:00Z")


def test_operations_add_up_to_the_steps(tiny_llama: Path) -> None:
    loaded = load_engine(EngineConfig(model=str(tiny_llama), threads=1))
    engine, executor = loaded.engine, loaded.engine.executor
    ask = Request("a", (5, 6, 7), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))

    def tokens() -> tuple[int, ...]:
        engine.add(ask, stream=False)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        return outputs[-1].outputs[0].token_ids

    before = tokens()
    rounds, profiling = measure_operations(engine, Workload(40, 5, 2), 512, 2)
    assert engine.executor is executor
    assert tokens() == before
    assert len(rounds) == 2
    for profile in (profiling.decode, profiling.prefill):
        labels = list(profile.parts)
        assert labels[:3] == ["inputs", "embed", "attention_norm"]
        assert labels[-3:] == ["head", "drawn", "wait for the team"]
        assert profile.parts["attention"].launches == 3 * profile.steps
        assert sum(part.elapsed_s for part in profile.parts.values()) == pytest.approx(profile.elapsed_s)
    # What the profiler counts launch by launch is what the engine counts for whole steps.
    engine.stats.decode.work = engine.stats.prefill.work = Work()
    _, again = measure_operations(engine, Workload(40, 5, 2), 512, 1)
    for profile, totals in ((again.decode, engine.stats.decode), (again.prefill, engine.stats.prefill)):
        assert Work.total(part.work for part in profile.parts.values()) == totals.work
    shown = by_phase(profiling, CEILINGS)
    assert sum(row["share"] for row in shown["decode"]) == pytest.approx(1)
    assert {row["bound"] for row in shown["prefill"]} == {None, "memory", "arithmetic"}
    engine.executor = object()  # type: ignore[assignment]
    with pytest.raises(RequestError, match="--ops"):
        measure_operations(engine, Workload(40, 5, 2), 512, 1)
    executor.close()


def test_the_command_shows_them(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    cli: Cli = command_line(monkeypatch, capfd, tmp_path)
    asked = ("bench", "--model", tiny_llama, "-p", 16, "-n", 3, "-r", 1, "--ops")
    shown = cli(*asked)
    assert shown.code == 0, shown.err
    assert "gate + up" in shown.out
    assert "wait for the team" in shown.out
    assert '"operation": "q + k + v"' in cli(*asked, "--json").out
