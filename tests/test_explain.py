"""Explanations: what bounds each phase, which changes are suggested, and that the suggested commands work."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Cli, command_line
from msgspec import structs
from test_plan import LLAMA_2_7B, TWO_CORES, configured
from tiny_models import TinyModel

from ridgeline.apps.benchmark import Phase, Round, Workload
from ridgeline.apps.explain import answer as answers
from ridgeline.apps.explain import attempt as attempts
from ridgeline.apps.explain.attach import RequestError, kinds_of, parse_step, recent_steps
from ridgeline.apps.explain.attempt import attempt, explained_by_fits
from ridgeline.apps.explain.gains import Gains
from ridgeline.apps.explain.run import Case, findings, run_times
from ridgeline.apps.explain.suggest import MOST, Command, Subject, Suggestion, suggestions
from ridgeline.apps.operations import bench_config, run
from ridgeline.apps.plan.host import host_here
from ridgeline.apps.plan.model import PlannedModel, open_model
from ridgeline.config import EngineConfig
from ridgeline.records import Kind, StepRecord
from ridgeline.resources.presets import presets
from ridgeline.types import ConfigError, Work

Tiny = Callable[[str], TinyModel]
FREE = 64 << 30


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    return configured(tmp_path_factory.mktemp("llama2"), LLAMA_2_7B)


def subject(
    source: PlannedModel, weights: str = "W16A16", kv: str = "KV16", work: Workload | None = None, **more: Any
) -> Subject:
    model = source.in_format(weights, "cpu", kv)

    case = Case(model, host_here(TWO_CORES, FREE), work or Workload(128, 64, 1), 512)
    command = Command("explain", "m", {"weights": weights})
    return Subject(source, case, weights, command, lambda batch: command.but(batch=batch), **more)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured of the machine."""
    monkeypatch.setattr("ridgeline.resources.probe.measure", lambda *_, **__: TWO_CORES)


# ------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize(("prompt", "batch"), [(40, 3), (600, 2), (512, 1), (20, 40)])
@pytest.mark.usefixtures("two_cores")
def test_predicted_steps_are_those_that_the_engine_runs(tiny: Tiny, prompt: int, batch: int) -> None:
    """Their number, rows and arithmetic; bytes of packed weights are padded in models this small."""
    path = tiny("llama").folder
    budget = 64 if prompt < 100 else 512
    work = Workload(prompt if prompt < 400 else prompt // 2, 4, batch)
    config = replace(bench_config(batch, model=str(path), threads=1), max_num_seqs=64)
    config = replace(config, max_num_batched_tokens=budget)
    done = run(config, work, 1)
    with open_model(path) as source:
        model = source.in_format("auto", "cpu", "KV16")
    times = run_times(Case(model, host_here(done.ceilings, FREE), work, budget))
    prefill, decode = done.rounds[0].prefill, done.rounds[0].decode
    assert prefill.steps == len(times.prefill)
    assert sum(step.work.rows for step in times.prefill) == prefill.tokens
    assert Work.total(step.work.total for step in times.prefill).ops == prefill.work.ops
    assert times.decode_steps == decode.steps
    assert times.decode.work.rows == batch
    assert times.decode.work.total.ops * decode.steps == pytest.approx(decode.work.ops, rel=0.05)


@pytest.mark.usefixtures("two_cores")
def test_a_batch_is_benchmarked_whatever_its_targets_are(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where streams leave prompts little time, the whole batch still decodes before its first ones end."""
    slow = replace(TWO_CORES, int8_ops_per_s=1e6, bf16_flops_per_s=1e6, fp32_flops_per_s=1e6)
    monkeypatch.setattr("ridgeline.loading.device_ceilings", lambda *_, **__: slow)
    late = {"interactive": (1e-3, 1e-9)}
    config = bench_config(16, model=str(tiny("llama").folder), threads=1, class_targets=late)
    assert run(config, Workload(96, 4, 16), 1).rounds[0].decode.steps == 3


def test_what_bounds_a_widened_model(default_model_path: Path) -> None:
    """Weight bytes at batch 1, arithmetic where a long prompt is read; fewer bits come first."""
    with open_model(default_model_path) as source:
        asked = subject(source, work=Workload(2048, 128, 1))
        times = run_times(asked.case)
        found = suggestions(asked)
    assert times.decode.bound == "weights"
    assert {step.bound for step in times.prefill} == {"arithmetic"}
    assert (found[0].kind, found[0].gains.run > 1.3) == ("weights", True)
    assert "--weights W4A8-g32" in found[0].command


def test_findings_add_up(llama2: PlannedModel) -> None:
    case = subject(llama2).case
    work = run_times(case).decode.work.total
    one = Round(Phase(128, 1, 4.0, 3.5, work), Phase(63, 63, 63.0, 50.0, work))
    two = replace(one, decode=replace(one.decode, elapsed_s=126.0))
    found = findings(case, [one, one, two])
    decode = found["decode"]
    assert (decode.measured_s, decode.steps, decode.tokens_per_s) == (1.0, 63, 1.0)
    assert decode.error == pytest.approx(1 / decode.expected_s - 1)
    assert decode.host_s == pytest.approx(13 / 63)
    memory = sum(decode.parts_s[kind] for kind in ("weights", "KV cache", "activations"))
    assert decode.least_s == pytest.approx(max(memory, decode.parts_s["arithmetic"]))
    assert memory == pytest.approx(decode.bytes / TWO_CORES.read_bytes_per_s)


# -------------------------------------------------------------------------------------- suggestions


def test_gains_are_the_predictions_own(llama2: PlannedModel) -> None:
    asked = subject(llama2)
    first = suggestions(asked)[0]
    narrow = llama2.in_format("W4A8-g32", "cpu", "KV16")
    now, then = (run_times(case) for case in (asked.case, replace(asked.case, model=narrow)))
    assert first.gains.run == pytest.approx(now.total_s / then.total_s)
    assert first.gains.prefill == pytest.approx(now.prefill_s / then.prefill_s)
    assert first.gains.decode == pytest.approx(now.decode.expected_s / then.decode.expected_s)
    assert 1 < first.gains.prefill < first.gains.decode < 16 / 4.5
    assert "13,477 MB" in first.text


def test_keys_and_values_where_they_are_most_of_the_bytes(llama2: PlannedModel) -> None:
    long = suggestions(subject(llama2, "W4A8-g32", work=Workload(3500, 500, 8)))
    assert long[0].kind == "KV cache"
    assert long[0].gains.decode > 1.3
    assert "4,000 tokens" in long[0].text
    assert "--kv-format KV8" in long[0].command
    for asked in (subject(llama2, "W4A8-g32"), subject(llama2, "W4A8-g32", "KV8", Workload(3500, 500, 8))):
        assert "KV cache" not in {one.kind for one in suggestions(asked)}


def test_cores_that_are_not_used(llama2: PlannedModel) -> None:
    rates = ("read_bytes_per_s", "int8_ops_per_s", "bf16_flops_per_s", "fp32_flops_per_s")
    twice = replace(TWO_CORES, **{name: 2 * getattr(TWO_CORES, name) for name in rates})
    asked = subject(llama2, wider=(2, host_here(twice, FREE)))
    asked = replace(asked, command=Command("explain", "m", {"threads": 2, "weights": "W16A16"}))
    (found,) = [one for one in suggestions(asked) if one.kind == "threads"]
    assert found.gains.run == pytest.approx(2, rel=0.01)  # all but what goes by in every step
    assert found.command == "ridgeline explain m --weights W16A16"
    assert "2 more cores" in found.text


def test_more_at_once(llama2: PlannedModel) -> None:
    asked = subject(llama2)
    (found,) = [one for one in suggestions(asked) if one.kind == "batch"]
    assert found.of == "all tokens/s"
    batch = int(shlex.split(found.command)[shlex.split(found.command).index("--batch") + 1])
    now, then = (
        run_times(replace(asked.case, workload=Workload(128, 64, n))).decode.expected_s for n in (1, batch)
    )
    assert then <= 2 * now
    assert found.gains.decode == pytest.approx(batch * now / then)
    assert suggestions(asked)[-1] == found  # it makes nobody's faster
    tight = suggestions(replace(asked, itl_s=1.01 * now))
    assert "batch" not in {one.kind for one in tight}
    small = replace(asked.case.host, memory_bytes=20 << 30)  # for two answers of 4,000 tokens
    full = replace(asked, case=replace(asked.case, host=small, workload=Workload(3500, 500, 2)))
    assert "batch" not in {one.kind for one in suggestions(full)}


def test_a_machine_that_meets_the_targets(llama2: PlannedModel) -> None:
    asked = subject(llama2, "auto", itl_s=0.02, ttft_s=0.5, missed=True)
    (found,) = [one for one in suggestions(asked) if one.kind == "machine"]
    name = shlex.split(found.command)[-1]
    assert name in presets()
    assert "--itl 20" in found.command
    assert "--ttft 500" in found.command
    assert found.caveat
    assert "machine" not in {one.kind for one in suggestions(replace(asked, missed=False))}
    assert "machine" not in {one.kind for one in suggestions(replace(asked, itl_s=1e-7))}
    assert len(suggestions(asked)) <= MOST


def test_a_command_is_quoted() -> None:
    command = Command("explain", "my model.gguf", {"batch": 1, "no-packed-cache": True, "itl": 20.0})
    assert command.but(weights="W4A8-g32", itl=None, kv_format="KV8") == (
        "ridgeline explain 'my model.gguf' --batch 1 --no-packed-cache --weights W4A8-g32 --kv-format KV8"
    )


# --------------------------------------------------------------------------------------- the command


@pytest.mark.usefixtures("two_cores")
def test_every_suggested_command_works(ridgeline: Cli, tiny: Tiny) -> None:
    """And changes what it says; a machine is planned for."""
    shape = ("-p", 24, "-n", 4, "-r", 1, "--threads", 1)
    outcome = ridgeline(
        "explain", tiny("llama").folder, "--weights", "W32A32", *shape, "--itl", 0.01, "--json"
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert set(found["phases"]) == {"prefill", "decode"}
    assert found["targets"] == {"ttft_s": None, "itl_s": 1e-5}
    assert [row["operation"] for row in found["operations"]["decode"]][-1] == "wait for the team"
    assert found["suggestions"]
    for one in found["suggestions"]:
        assert set(one["predicted"]) == {"prefill_tokens_per_s", "decode_tokens_per_s"}
        words = shlex.split(one["command"])
        assert words[0] == "ridgeline"
        tried = ridgeline(*words[1:], "--json")
        assert tried.code == 0, tried.err
        if words[1] == "explain":
            assert set(json.loads(tried.out)["phases"]) == {"prefill", "decode"}


# ---------------------------------------------------------------------------------------- a suggestion


def a_round(prefill_s: float, decode_s: float) -> Round:
    return Round(Phase(24, 1, prefill_s, prefill_s, Work()), Phase(3, 3, decode_s, decode_s, Work()))


def test_measured_gains_are_those_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both settings take turns; more sequences at once count by what all of them gain."""
    loaded, closed = [], []

    def load(config: EngineConfig) -> Any:
        engine = SimpleNamespace(close=lambda: closed.append(config))
        loaded.append(config)
        return SimpleNamespace(config=config, engine=engine)

    times = iter([(2.0, 6.0), (1.0, 1.0), (2.0, 4.0), (1.0, 1.0), (2.0, 2.0), (1.0, 1.0)] * 2)
    works: list[Workload] = []

    def measure(engine: Any, workload: Workload, limit: int, repeats: int) -> list[Round]:
        works.append(workload)
        return [a_round(*next(times))]

    monkeypatch.setattr(attempts, "load_engine", load)
    monkeypatch.setattr(attempts, "measure", measure)
    config, work = bench_config(1, model="m", weights="W16A16"), Workload(24, 4, 1)
    narrow = Suggestion(
        "weights", "t", "each request", Gains(2.4, 2, 2), "c", changes={"weights": "W8A8-g32"}
    )
    tried = attempt(narrow, config, work, 3)
    assert [one.weights for one in loaded] == ["W16A16", "W8A8-g32"]
    assert (tried.measured, tried.between) == (Gains(3.0, 2.0, 4.0), (2.0, 4.0))
    assert tried.error == pytest.approx(2.4 / 3 - 1)
    assert closed == loaded[::-1]
    many = replace(narrow, kind="batch", changes={"batch": 100})
    assert attempt(many, config, work, 3).measured == Gains(300.0, 200.0, 400.0)
    assert [one.batch for one in works[6:]] == [1, 100] * 3
    assert loaded[-1].max_num_seqs >= 100
    with pytest.raises(ConfigError, match="cannot be tried here"):
        attempt(replace(narrow, changes={}), config, work, 3)


def test_formats_that_are_compared_are_fitted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that come to the front by what was fitted."""
    known: set[str] = set()
    monkeypatch.setattr(attempts, "load_costs", lambda ceilings, name: name in known or None)
    monkeypatch.setattr(attempts, "fitted_costs", lambda config, name, now: known.add(name))

    def explain() -> Any:
        first = "W8A8-g32" if "W4A8-g32" in known else "W4A8-g32"
        model = SimpleNamespace(main_format="W16A16")
        return SimpleNamespace(model=model, suggestions=[SimpleNamespace(changes={"weights": first})])

    done = SimpleNamespace(config=bench_config(1, device="cpu"), ceilings=TWO_CORES)
    found = explained_by_fits(done, explain)  # type: ignore[arg-type]
    assert found.suggestions[0].changes == {"weights": "W8A8-g32"}
    assert known == {"W16A16", "W4A8-g32", "W8A8-g32"}


@pytest.mark.usefixtures("two_cores")
def test_the_first_suggestion_is_tried(ridgeline: Cli, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "load_costs", lambda *_: True)
    shape = ("--weights", "W32A32", "-p", 24, "-n", 4, "-r", 2, "--threads", 1, "--try")
    outcome = ridgeline("explain", tiny("llama").folder, *shape, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    tried = found["tried"]
    assert tried["command"] == found["suggestions"][0]["command"]
    assert tried["rounds"] == 2
    assert tried["between"][0] <= tried["measured"]["run"] <= tried["between"][1]
    assert tried["error"] == pytest.approx(tried["predicted"]["run"] / tried["measured"]["run"] - 1)
    shown = ridgeline("explain", tiny("llama").folder, *shape)
    assert "The first one tried, in turns with the settings as they are: " in shown.out
    assert " was predicted, " in shown.out


@pytest.mark.usefixtures("two_cores")
def test_what_people_read(ridgeline: Cli, tiny: Tiny) -> None:
    outcome = ridgeline("explain", tiny("llama").folder, "--weights", "W32A32", "-p", 24, "-n", 4, "-r", 1)
    assert outcome.code == 0, outcome.err
    for words in (
        "prefill at batch 1 is bound by",
        "decode at batch 1 is bound by",
        "that are expected; at the ceilings",
        "most is to be won in",
        "a step, at the ceilings",
        "What to change, by its predicted effect:",
        "   ridgeline explain ",
    ):
        assert words in outcome.out, words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt-tokens", 0), "prompt_tokens is 0"),
        (("--output-tokens", 1), "output_tokens is 1"),
        (("--itl", 0), "itl is 0 ms"),
        (("--ttft", "nan"), "ttft is nan ms"),
        (("--url", "ftp://x"), "accepted: http://"),
        (("--url", "http://127.0.0.1:9", "--recent", 0), "recent is 0"),
        (("--url", "http://127.0.0.1:9"), "no connection"),
        (("--url", "http://127.0.0.1:9", "--try"), "--try is given beside --url"),
        (("--url", "http://127.0.0.1:9", "--dataset", "f"), "--dataset is given beside --url"),
        (("--dataset", "nowhere.jsonl"), "nowhere.jsonl: No such file"),
        (("--speculation", "wild"), "speculation is 'wild'"),
        (("--device", "reference"), "accepted: auto, cpu, cuda"),
    ],
)
def test_mistakes_are_one_line(ridgeline: Cli, tiny: Tiny, arguments: tuple[object, ...], words: str) -> None:
    outcome = ridgeline("explain", tiny("llama").gguf, *arguments)
    assert outcome.code == 1
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


# ----------------------------------------------------------------------------------------- a server


DECODE = StepRecord(
    number=1,
    time_s=0.0,
    kind="decode",
    rows=2,
    sequences=2,
    prompt_tokens=0,
    decoded_tokens=2,
    running=2,
    waiting=0,
    kv_pages=14,
    kv_usage=0.1,
    flops=9,
    attention_flops=1,
    bytes=900,
    weight_bytes=800,
    kv_bytes=2 * 100 * 384,
    launches=10,
    elapsed_s=0.01,
    wall_s=0.012,
    predicted_s=0.008,
    bound="weights",
    mbu=0.5,
)


def told(kind: Kind = "decode", **changes: Any) -> dict[str, Any]:
    return structs.asdict(structs.replace(DECODE, kind=kind)) | changes


@contextmanager
def a_server(steps: list[Any], model: Any, status: int = 200) -> Iterator[str]:
    """Answers as ours: the steps, and then the stream stays open."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                body = json.dumps({"data": [model]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            self.send_response(status)
            self.send_header("Connection", "close")
            self.end_headers()
            if status != 200:
                return
            for step in steps:
                self.wfile.write(b"data: " + json.dumps(step).encode() + b"\n\n")
            self.wfile.flush()
            closing.wait(20)

    closing = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def test_recent_steps_of_a_server(ridgeline: Cli, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridgeline.resources.probe.quick_ceilings", lambda device: TWO_CORES)
    path = tiny("llama").gguf
    with open_model(path) as source:
        fmt = source.in_format("W32A32", "cpu", "KV16").formats
    formats = {"W32A32": len(fmt)}
    prompt = {"rows": 100, "sequences": 1, "prompt_tokens": 100, "decoded_tokens": 0}
    steps = [told("prefill", **prompt, elapsed_s=0.03, bound="arithmetic"), *[told()] * 7]
    with a_server(steps, {"id": "tiny", "device": "cpu", "formats": formats}) as url:
        seen = ridgeline("explain", path, "--url", url, "--recent", 8, "--json")
        assert seen.code == 0, seen.err
        found = json.loads(seen.out)
        assert [(one["kind"], one["steps"], one["bound"]) for one in found["kinds"]] == [
            ("decode", 7, "weights"),
            ("prefill", 1, "arithmetic"),
        ]
        assert found["kinds"][0]["share"] == pytest.approx(0.7)
        assert found["kinds"][0]["error"] == pytest.approx(0.25)
        assert found["suggestions"][0]["command"].startswith("ridgeline serve ")
        assert "--weights W4A8-g32" in found["suggestions"][0]["command"]
        assert f"ridgeline bench serve --url {url} " in found["suggestions"][-1]["command"]
        shown = ridgeline("explain", "--url", url, "--recent", 100)
        assert shown.code == 0, shown.err
        assert "decode: 70% of the time, bound by weight bytes" in shown.out
        assert "1 step of 100 rows for 1 sequence: 30 ms each" in shown.out
        assert "Speculation" not in shown.out
        assert found["speculation"] is None
        assert "nothing is suggested" in shown.out
    with a_server(steps, {"id": "tiny", "device": "cpu", "formats": {"W8A8-g32": 1}}) as url:
        other = ridgeline("explain", path, "--url", url)
        assert other.code == 1
        assert "accepted: the model that it serves" in other.err


def test_the_mix_of_a_servers_steps(llama2: PlannedModel) -> None:
    """100 tokens of context at once for each of two, and as many rows of prompts as of answers."""
    model = llama2.in_format("W16A16", "cpu", "KV16")
    held = 2 * 100 * sum(model.kv_bytes_per_token)
    decode = structs.replace(DECODE, kv_bytes=held)
    prompt = structs.replace(decode, kind="prefill", rows=10, prompt_tokens=10, decoded_tokens=0)
    served = answers.Served("m", "cpu", {}, (prompt, *[decode] * 5))
    assert answers.mix_of(served, model) == Workload(67, 67, 2)
    with pytest.raises(ConfigError, match="no decode step"):
        answers.mix_of(replace(served, steps=(prompt,)), model)


@pytest.mark.parametrize(
    ("steps", "model", "words"),
    [
        ([], {"id": "m"}, "has run no step yet"),
        ([{"kind": "decode"}], {"id": "m"}, "accepted: those of ridgeline's"),
        ([told(rows=-1)], {"id": "m"}, "accepted: those of ridgeline's"),
        ([told(drafted_tokens=1, accepted_tokens=2)], {"id": "m"}, "accepted: those of ridgeline's"),
        ([told(elapsed_s="x")], {"id": "m"}, "accepted: those of ridgeline's"),
        ([[]], {"id": "m"}, "accepted: those of ridgeline's"),
        ([], 7, "accepted: a server with a model"),
    ],
)
def test_servers_that_are_none_of_ours(
    monkeypatch: pytest.MonkeyPatch, steps: list[Any], model: Any, words: str
) -> None:
    monkeypatch.setattr("ridgeline.apps.explain.attach._WAIT_S", 0.3)
    with a_server(steps, model) as url, pytest.raises(RequestError, match=words):
        recent_steps(url, 5)


def test_a_server_without_steps() -> None:
    with a_server([], {"id": "m"}, status=404) as url, pytest.raises(RequestError, match="404"):
        recent_steps(url, 5)


def test_kinds_of_steps() -> None:
    seen = [parse_step(json.dumps(told(elapsed_s=s, predicted_s=None)).encode()) for s in (0.1, 0.2, 0.6)]
    (one,) = kinds_of(seen)
    assert (one.measured_s, one.error, one.share, one.mfu) == (0.2, None, 1.0, None)
