"""Traces: read, written, refused by line, and made up with the statistics that they promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli, command_line
from simulated import LLAMA

from ridgeline.apps.simulate.generate import (
    DOCUMENT,
    KINDS,
    SUMMARY,
    TURNS,
    Lengths,
    Workload,
    generate,
)
from ridgeline.apps.simulate.trace import TraceRequest, read_trace, tokens_of, write_trace
from ridgeline.types import ConfigError

VOCABULARY = 50_000

# -------------------------------------------------------------------------------------------- tokens


def test_tokens_depend_on_names_and_places_alone() -> None:
    one, other = tokens_of([("a", 100), ("b", 50)], VOCABULARY), tokens_of([("a", 40)], VOCABULARY)
    assert one[:40] == other
    assert one[100:] == tokens_of([("b", 50)], VOCABULARY)
    assert one[:50] != one[100:]
    assert all(0 <= token < 7 for token in tokens_of([("a", 1000)], 7))
    drawn = np.bincount(tokens_of([("even", 70_000)], 7))
    assert abs(drawn / 10_000 - 1).max() < 0.05
    assert len(set(tokens_of([("few repeat", 1000)], 1 << 30))) == 1000


# --------------------------------------------------------------------------------------------- files


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_a_line_may_say_little_or_much(tmp_path: Path) -> None:
    path = written(
        tmp_path / "trace.jsonl",
        {"arrival_s": 1.5, "prompt": 300, "output_tokens": 120},
        "",
        {
            "id": "a",
            "arrival_s": 2,
            "prompt": [["system", 512], [7, 40]],
            "output_tokens": 80,
            "output": "told",
            "class": "batch",
            "tenant": "acme",
        },
        {"id": "b", "after": "a", "prompt": [["told", 80]], "output_tokens": 1},
    )
    assert read_trace(path) == [
        TraceRequest("line 1", (("line 1/prompt", 300),), 120, 1.5),
        TraceRequest("a", (("system", 512), ("7", 40)), 80, 2.0, None, 0.0, "told", "batch", "acme"),
        TraceRequest("b", (("told", 80),), 1, None, "a"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path: Path, kind: str) -> None:
    made = generate(Workload(kind, 2.0, 120, seed=3, classes={"interactive": 2, "batch": 1}))
    made[0] = replace(made[0], tenant="acme")
    write_trace(tmp_path / "trace.jsonl", made)
    assert read_trace(tmp_path / "trace.jsonl") == made


def test_mooncake(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mooncake.jsonl",
        {"timestamp": 0, "input_length": 1300, "output_length": 52, "hash_ids": [46, 47, 48]},
        {"timestamp": 27482, "input_length": 1024, "output_length": 0, "hash_ids": [46, 47], "type": "x"},
        {"timestamp": 30000, "input_length": 1600, "output_length": 3, "hash_ids": [46, 47, 90, 91]},
    )
    first, second, third = read_trace(path)
    assert first.prompt == (("46", 512), ("47", 512), ("48", 276))
    assert [each.arrival_s for each in (first, second, third)] == [0.0, 27.482, 30.0]
    assert [each.output_tokens for each in (first, second, third)] == [52, 1, 3]
    tokens = [tokens_of(each.prompt, VOCABULARY) for each in (first, second, third)]
    assert [len(each) for each in tokens] == [1300, 1024, 1600]
    assert tokens[0][:1024] == tokens[1] == tokens[2][:1024]
    assert tokens[0][1024:1030] != tokens[2][1024:1030]


GOOD = {"arrival_s": 1, "prompt": 3, "output_tokens": 2}
MOONCAKE = {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}
BAD_LINES = [
    ("not json", "line 2: JSON is malformed"),
    (b"\xff", "line 2: "),
    ("[]", "line 2: Expected `object`, got `array`"),
    ({"prompt": 3, "output_tokens": 2}, "line 2 has neither of arrival_s and after; accepted: one of them"),
    (GOOD | {"after": "line 1"}, "line 2 has both of arrival_s and after"),
    (GOOD | {"delay_s": 1}, "line 2: delay_s is 1 without after"),
    (GOOD | {"promt": 3}, "line 2: Object contains unknown field `promt`"),
    (GOOD | {"prompt": "hello"}, "line 2: Expected `int | array`, got `str`"),
    (GOOD | {"prompt": 0}, "line 2: prompt is 0 tokens in 1 parts; accepted: 1 to 4194304 in all"),
    (GOOD | {"prompt": []}, "line 2: prompt is 0 tokens in 0 parts"),
    (GOOD | {"prompt": [["a", 5], ["b", -5]]}, "line 2: prompt is 0 tokens in 2 parts"),
    (GOOD | {"prompt": 1 << 40}, "accepted: 1 to 4194304 in all"),
    (GOOD | {"output_tokens": 0}, "line 2: output_tokens is 0; accepted: 1 to 4194304"),
    (GOOD | {"arrival_s": -1}, "line 2: arrival_s is -1; accepted: seconds, 0 to 1e+08"),
    ('{"arrival_s": 1e400, "prompt": 3, "output_tokens": 2}', "line 2: "),
    (GOOD | {"class": "vip"}, "line 2: class is 'vip'; accepted: keystroke, interactive, batch"),
    (GOOD | {"id": "line 1"}, "line 2: id is 'line 1' a second time"),
    (
        {"after": "line 3", "prompt": 3, "output_tokens": 2},
        "line 2: after is 'line 3'; accepted: the id of a line before",
    ),
    (MOONCAKE, "line 2: "),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=str)
def test_a_bad_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    path = tmp_path / "trace.jsonl"
    text = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + text + b"\n")
    with pytest.raises(ConfigError) as raised:
        read_trace(path)
    assert said in str(raised.value)
    assert "accepted: " in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (MOONCAKE | {"hash_ids": [1]}, "line 2: 1 hash_ids for an input_length of 600; accepted: 2"),
        (MOONCAKE | {"input_length": 0}, "line 2: input_length is 0; accepted: 1 to 4194304"),
        (MOONCAKE | {"timestamp": -1}, "line 2: timestamp is -1; accepted: milliseconds, 0 or more"),
        (MOONCAKE | {"output_length": -1}, "line 2: output_tokens is -1; accepted"),
        (GOOD, "line 2: Object missing required field `timestamp`"),
    ],
    ids=str,
)
def test_a_bad_line_of_mooncakes_is_named(tmp_path: Path, line: object, said: str) -> None:
    path = written(tmp_path / "trace.jsonl", MOONCAKE, line)
    with pytest.raises(ConfigError, match="accepted: ") as raised:
        read_trace(path)
    assert said in str(raised.value)


def test_an_empty_file_has_no_requests(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no requests; accepted"):
        read_trace(written(tmp_path / "trace.jsonl", "", ""))


# ------------------------------------------------------------------------------------------- made up


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_the_same_again(kind: str) -> None:
    work = Workload(kind, 2.0, 200, seed=5)
    assert generate(work) == generate(work)
    assert generate(work) != generate(replace(work, seed=6))
    assert len({request.id for request in generate(work)}) == 200


@pytest.mark.parametrize(("kind", "deviation"), [("poisson", 1.0), ("bursty", 2.0)])
def test_arrivals(kind: str, deviation: float) -> None:
    arrivals = [request.arrival_s or 0.0 for request in generate(Workload(kind, 5.0, 20_000))]
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    assert gaps.mean() == pytest.approx(1 / 5.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(deviation, rel=0.05)


def test_lengths_are_sharegpts() -> None:
    made = generate(Workload("poisson", 1.0, 20_000))
    for lengths, tokens, mean in (
        (TURNS[0], [request.prompt_tokens for request in made], 230),
        (TURNS[1], [request.output_tokens for request in made], 203),
    ):
        assert np.mean(tokens) == pytest.approx(mean, rel=0.03)
        assert np.median(tokens) == pytest.approx(lengths.median, rel=0.03)
        assert np.std(np.log(tokens)) == pytest.approx(lengths.sigma, rel=0.03)
        assert max(tokens) <= lengths.most
    others = generate(Workload("poisson", 1.0, 5000, prompt_tokens=40, output_tokens=10))
    assert np.median([request.prompt_tokens for request in others]) == pytest.approx(40, rel=0.05)
    assert np.median([request.output_tokens for request in others]) == pytest.approx(10, abs=0.5)


def test_a_median_and_a_ninetieth_percentile_make_a_lognormal() -> None:
    chance = np.random.default_rng(0)
    drawn = [Lengths.of_quantiles(100, 300, 1 << 20).draw(chance) for _ in range(20_000)]
    assert np.percentile(drawn, [50, 90]) == pytest.approx([100, 300], rel=0.03)


def test_shared_prompts_are_asked_for_by_rank() -> None:
    made = generate(Workload("shared-prompts", 1.0, 6000, system_prompts=3, shared_tokens=100))
    names = [request.prompt[0][0] for request in made]
    assert {request.prompt[0][1] for request in made} == {100}
    shares = [names.count(f"system-{place}") / 6000 for place in range(3)]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.02)


def test_every_turn_of_a_chat_repeats_what_was_said() -> None:
    made = generate(Workload("chats", 3.0, 4000, turns=5, think_s=7))
    by_id = {request.id: request for request in made}
    later = [request for request in made if request.after is not None]
    for request in later:
        before = by_id[request.after or ""]
        assert request.prompt[:-1] == (*before.prompt, (before.output, before.output_tokens))
        assert request.prompt_tokens <= TURNS[0].most
    chats = len(made) - len(later)
    assert 4000 / chats == pytest.approx(5, rel=0.1)
    assert np.mean([request.delay_s for request in later]) == pytest.approx(7, rel=0.1)
    starts = [request.arrival_s for request in made if request.arrival_s is not None]
    assert len(made) / max(starts) == pytest.approx(3.0, rel=0.15)


def test_questions_about_a_document() -> None:
    made = generate(Workload("documents", 1.0, 3000, turns=3))
    firsts = [request for request in made if request.after is None]
    documents = [request.prompt[0] for request in firsts]
    assert len({name for name, _ in documents}) == len(documents)
    assert np.median([tokens for _, tokens in documents]) == pytest.approx(DOCUMENT.median, rel=0.08)
    assert np.median([request.output_tokens for request in made]) == pytest.approx(SUMMARY.median, rel=0.08)
    by_id = {request.id: request for request in made}
    for request in made:
        assert len(request.prompt) == 2
        if request.after is not None:
            assert request.prompt[0] == by_id[request.after].prompt[0]


def test_classes_by_their_shares() -> None:
    made = generate(Workload("poisson", 1.0, 4000, classes={"interactive": 3, "batch": 1}))
    batch = sum(request.service_class == "batch" for request in made)
    assert batch / 4000 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"kind": "steady"}, "generate is 'steady'; accepted: poisson, bursty"),
        ({"rate_per_s": 0.0}, "request_rate is 0"),
        ({"burstiness": -1.0}, "burstiness is -1"),
        ({"burstiness": 0.0}, "burstiness is 0"),
        ({"count": 0}, "count is 0; accepted: 1 to"),
        ({"turns": 0.5}, "turns is 0.5; accepted: 1 to 1000"),
        ({"think_s": float("nan")}, "think is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0; accepted: 1 to"),
        ({"system_prompts": 0}, "system_prompts is 0"),
        ({"classes": {"vip": 1}}, "classes are {'vip': 1}; accepted: shares of keystroke"),
        ({"classes": {"batch": 0}}, "accepted: shares of"),
    ],
    ids=str,
)
def test_what_cannot_be_made_up(more: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        generate(Workload(**({"kind": "poisson", "count": 5} | more)))  # type: ignore[arg-type]
    assert said in str(raised.value)


# --------------------------------------------------------------------------------------- the command


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return written(tmp_path / "config.json", LLAMA)


def test_the_command_makes_up_writes_and_replays(ridgeline: Cli, model: Path, tmp_path: Path) -> None:
    where, trace = ["simulate", "-m", model, "--machine", "H200x2"], tmp_path / "trace.jsonl"
    made = ["--generate", "shared-prompts", "--rate", 50, "--count", 40, "--seed", 2]
    lengths = ["-p", 60, "-n", 40, "--shared-tokens", 64, "--classes", "interactive=3,batch=1"]
    shown = ridgeline(*where, *made, *lengths, "--write-trace", trace, "--json")
    assert (shown.code, shown.err) == (0, "")
    told = json.loads(shown.out)
    assert (told["machine"], told["devices"]) == ("H200", 2)
    assert told["requests"] + told["refused"] == 40
    assert told["cache_hit_rate"] > 0.2
    assert set(told["classes"]) == {"interactive", "batch"}
    assert set(told["classes"]["batch"]["ttft_ms"]) == {"mean", "p50", "p95", "p99", "max"}
    again = ridgeline(*where, "--trace", trace, "--json")
    assert json.loads(again.out) == told
    settings = ["--max-num-seqs", 1, "--max-num-batched-tokens", 32, "--kv-cache-memory", "1M"]
    narrow = ridgeline(*where, "--trace", trace, *settings, "--class-targets", "interactive=2/0.5", "--json")
    assert json.loads(narrow.out)["usage"]["steps"] > told["usage"]["steps"]
    goodput = json.loads(narrow.out)["classes"]["interactive"]["goodput"]
    assert goodput["targets_ms"] == {"ttft": 2000.0, "itl": 500.0}


def test_the_command_shows_tables(ridgeline: Cli, model: Path) -> None:
    shown = ridgeline(
        "simulate", "-m", model, "--machine", "EPYC-7742", "--generate", "bursty", "--count", 20
    )
    assert shown.code == 0
    for word in ("interactive", "TTFT", "p95", "goodput", "cache hits", "preemptions", "EPYC 7742"):
        assert word in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "neither is given of --trace and --generate"),
        (["--trace", "TRACE", "--generate", "chats"], "both are given of --trace and --generate"),
        (["--trace", "TRACE", "--rate", "2", "--think", "3"], "--rate, --think given beside --trace"),
        (["--trace", "/nowhere.jsonl"], "/nowhere.jsonl: No such file or directory"),
        (["--trace", "TRACE"], "line 2: "),
        (["--generate", "steady"], "generate is 'steady'; accepted: poisson"),
        (
            ["--generate", "poisson", "--classes", "batch"],
            "classes are 'batch'; accepted: classes with a share",
        ),
        (["--generate", "poisson", "--class-targets", "x"], "class_targets is 'x'"),
        (["--generate", "poisson", "--count", "3", "--weights", "W9"], "weights is 'W9'; accepted: auto"),
        (["--generate", "poisson", "--count", "3", "--kv-cache-memory", "900G"], "kv_cache_memory_bytes is"),
        (["--generate", "poisson", "--count", "3", "--threads", "2"], "threads is 2 and machine is 'H200'"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    ridgeline: Cli, model: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    trace = written(tmp_path / "bad.jsonl", GOOD, "{}")
    given = [trace if argument == "TRACE" else argument for argument in arguments]
    outcome = ridgeline("simulate", "-m", model, "--machine", "H200", *given)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1
    assert said in outcome.err
