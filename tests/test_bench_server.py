"""The benchmarks of the server outside the package: what they choose, what they say when nothing starts."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import compare_server  # noqa: E402
import live_load  # noqa: E402
import scheduler_cost  # noqa: E402
import server_runs  # noqa: E402
import service  # noqa: E402
import service_memory  # noqa: E402

from ridgeline.apps.load.client import Answer  # noqa: E402


def round_of(*values: float) -> dict[str, Any]:
    return dict(zip(compare_server.FIGURES, values, strict=True))


def test_ratios_are_to_the_best_of_the_others_figure_by_figure() -> None:
    ours = compare_server.Side("ridgeline", [], [round_of(300, 10, 20, 3, 4), round_of(200, 10, 30, 3, 4)])
    quick = compare_server.Side("quick", [], [round_of(100, 90, 90, 9, 9), round_of(50, 90, 90, 9, 9)])
    prompt = compare_server.Side("prompt", [], [round_of(60, 40, 80, 9, 9), round_of(60, 50, 40, 9, 9)])
    found = compare_server.ratios(ours, [quick, prompt])
    speed = found["output_tokens_per_s"]
    assert (speed["to"], speed["of_medians"], speed["least"], speed["most"]) == ("quick", 250 / 75, 3, 4)
    assert (found["ttft_p99_ms"]["to"], found["ttft_p99_ms"]["of_medians"]) == ("prompt", 25 / 60)
    assert ours.medians()["ttft_p99_ms"] == [25, 20, 30]


def test_sides_take_turns_and_the_first_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def measured(side: compare_server.Side, settings: Any, seed: int) -> dict[str, Any]:
        order.append((side.name, seed))
        return round_of(*([len(side.name)] * 5))

    monkeypatch.setattr(compare_server, "measure", measured)
    sides = [compare_server.Side(name, []) for name in ("a", "bb", "ccc")]
    kept, swept = compare_server.screen(sides, None, keep=2)  # type: ignore[arg-type]
    assert [side.name for side in kept] == ["ccc", "bb"]
    assert set(swept) == {"a", "bb", "ccc"}
    order.clear()
    compare_server.alternate(sides[:2], None, rounds=2)  # type: ignore[arg-type]
    assert order == [("a", 1), ("bb", 1), ("bb", 2), ("a", 2)]


def test_a_server_that_does_not_start_is_named_with_its_last_words() -> None:
    command = [sys.executable, "-c", "print('one'); raise SystemExit('no such model')"]
    with (
        pytest.raises(SystemExit, match=r"error: \S+ does not start: no such model"),
        server_runs.running(command),
    ):
        pass


def test_gaps_and_tokens_are_of_a_time() -> None:
    answers = [Answer(9, 0.0, text_s=[1.0, 2.0, 4.0, 7.0]), Answer(9, 0.0, text_s=[3.0]), Answer(9, 0.0)]
    assert live_load.gaps_s(answers, 1.5, 4.0) == [1.0, 2.0]
    assert live_load.tokens_between(answers, 1.5, 4.0) == 3
    assert live_load.ttft_s(Answer(9, 0.5, text_s=[2.0])) == 1.5


def test_figures_say_whether_they_keep_their_limit() -> None:
    shown = [
        live_load.Figure("share", 0.96, 0.95, least=True),
        live_load.Figure("gap", 1.7, 1.6),
        live_load.Figure("gap", 1.6, 1.6),
        live_load.Figure("speed", 3.0, unit="ms"),
    ]
    assert [each.passes for each in shown] == [True, False, True, True]
    assert [str(each).split()[-1] for each in shown] == ["pass", "FAIL", "pass", "ms"]


def test_sizes_of_scenarios_are_set_by_name() -> None:
    changed = service.changed(service.SIZES, ["streams.window_s=3", "keys.light=4"])
    assert (changed["streams"].window_s, changed["keys"].light) == (3.0, 4)
    assert changed["unbounded"] == service.SIZES["unbounded"]
    for wrong in ("streams=3", "streams.colour=3", "nobody.light=4"):
        with pytest.raises(SystemExit, match="sets nothing"):
            service.changed(service.SIZES, [wrong])


def test_the_mix_has_the_lengths_that_it_names() -> None:
    samples = list(itertools.islice(service_memory.sharegpt_like(1), 4000))
    prompts = [len((each.prompt or "").split()) for each in samples]
    outputs = [each.output_tokens or 0 for each in samples]
    # What is beyond the limits is left out, the longest of all.
    assert 0.85 * service_memory.MEAN_PROMPT < sum(prompts) / 4000 < service_memory.MEAN_PROMPT
    assert 0.85 * service_memory.MEAN_OUTPUT < sum(outputs) / 4000 < service_memory.MEAN_OUTPUT
    assert min(*prompts, *outputs) > 0


def run(script: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


SIZES = ("--threads", 1, "--clients", 3, "--requests", 6, "--prompt-tokens", 9, "--output-tokens", 5)


@pytest.mark.full
def test_ridgeline_alone_is_measured_where_llama_server_is_absent(default_model_path: Path) -> None:
    found = run(
        "compare_server.py", "--model", default_model_path, *SIZES, "--rounds", 1, "--llama-server", "/no"
    )
    assert found["absent"] == "/no is not a file"
    assert (found["ratios"], list(found["sides"])) == ({}, ["ridgeline"])
    assert found["sides"]["ridgeline"]["output_tokens_per_s"][0] > 0


@pytest.mark.full
def test_the_cost_of_the_server(default_model_path: Path) -> None:
    found = run("server_cost.py", "--model", default_model_path, *SIZES, "--rounds", 2, "--streams", 20)
    assert found["tokens_of_a_round"] == 6 * 5 + 3 * 5
    assert found["cpu_us_per_token"] > 0
    assert {"waiting_streams_bytes", "begun_streams_bytes"} < set(found)


@pytest.mark.full
def test_a_live_server_is_measured_by_every_scenario(default_model_path: Path) -> None:
    sizes = {
        "document": {"tokens": 64, "documents": 1},
        "streams": {"streams": 2, "stream_prompt": 17, "stream_output": 8, "prompts": 1, "prompt_tokens": 40,
                    "rounds": 1, "before_s": 0.3, "window_s": 2},
        "keystroke": {"keystrokes": 1, "prompt_tokens": 20, "load": 2, "batch_prompt": 8, "batch_output": 40,
                      "settle_s": 0.1},
        "keys": {"light": 2, "times": 2, "prompt_tokens": 8, "output_tokens": 8, "window_s": 1},
        "ends": {"requests": 40, "clients": 4, "prompt_tokens": 20},
    }  # fmt: skip
    settings = [f"{name}.{part}={value}" for name, parts in sizes.items() for part, value in parts.items()]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    found = run("service.py", *sizes, "--model", default_model_path, "--threads", 1, *flags)
    assert list(found) == list(sizes)
    assert all(each["figures"] for each in found.values())
    assert found["ends"]["whole"] + found["ends"]["aborted"] == 40
    assert found["ends"]["figures"]["share of pages in use afterwards"]["passes"]
    assert found["keys"]["light_tokens"] > 0


def test_the_cost_of_a_step_is_measured_by_part() -> None:
    measured = scheduler_cost.cost(4, 3, streams=True)
    assert measured.sequences == 4
    assert measured.schedule_ms + measured.advance_ms + measured.commit_ms > 0
    assert measured.step_ms > 0
