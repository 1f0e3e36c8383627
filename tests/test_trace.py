"""`--trace`: what is in the file, that viewers can read it, and that it survives what goes wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from command_line import Cli, command_line
from fake_executor import FakeExecutor, make_engine
from serving import server_process
from traces import Event, events_of, requests_of

from ridgeline import trace as trace_module
from ridgeline.config import EngineConfig
from ridgeline.engine import Engine
from ridgeline.llm import LLM
from ridgeline.resources import probe
from ridgeline.resources.ceilings import Ceilings
from ridgeline.steps import StepLog
from ridgeline.trace import Trace, check_path
from ridgeline.types import ConfigError, PoolingParams, Request, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
CEILINGS = Ceilings(20e9, 500e9, 300e9, 200e9, 1, "portable", "made up", "2026-01-01T00:00:00+00:00")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.setattr(probe, "measure", lambda *args, **more: CEILINGS)
    monkeypatch.setattr(probe, "known_ceilings", lambda *args, **more: CEILINGS)
    return command_line(monkeypatch, capfd, tmp_path / "cache")


def traced(path: Path) -> Engine:
    engine = make_engine(FakeExecutor(), max_num_seqs=2, max_num_batched_tokens=16)
    engine.steps = StepLog(engine.scheduler, watcher=Trace(str(path)))
    return engine


def of_kind(events: list[Event], phase: str, name: str | None = None) -> list[Event]:
    return [event for event in events if event["ph"] == phase and name in (None, event["name"])]


# ------------------------------------------------------------------------------------- what is in it


def test_steps_requests_and_counters(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "known_ceilings", lambda *args, **more: CEILINGS)
    path = tmp_path / "trace.json"
    path.write_text("what was there before")
    with LLM(str(tiny_llama), threads=1, trace=str(path), max_num_seqs=2, max_num_batched_tokens=64) as llm:
        llm.generate([[5, 6, 7], list(range(3, 90)), [9]], GREEDY)
        llm.embed([[4, 5, 6]])
        records = llm.loaded.engine.steps.recent.since(0)
    events = events_of(path)
    steps = of_kind(events, "X")
    assert [step["args"]["number"] for step in steps] == [record.number for record in records]
    for step, record in zip(steps, records, strict=True):
        assert step["name"] == record.kind
        assert step["dur"] == pytest.approx(record.wall_s * 1e6, abs=0.01)
        for name in ("rows", "flops", "bytes", "elapsed_s", "predicted_s", "bound", "mbu", "kv_pages"):
            assert step["args"][name] == getattr(record, name), name
    rows = of_kind(events, "C", "rows")
    assert [e["args"] for e in rows if sum(e["args"].values())] == [
        {"prompt": r.prompt_tokens, "decoded": r.rows - r.prompt_tokens} for r in records
    ]
    assert [e["args"]["used"] for e in of_kind(events, "C", "KV pages")] == [r.kv_pages for r in records]
    used = [e["args"]["MBU"] for e in of_kind(events, "C", "utilisation") if e["args"]["MBU"]]
    assert used == [record.mbu for record in records]
    (labels,) = of_kind(events, "M", "process_labels")
    assert "device cpu" in labels["args"]["labels"]
    assert "energy " in labels["args"]["labels"]
    requests = requests_of(events)
    assert len(requests) == 4
    for name in ("0", "1", "2"):
        phases = requests[name]
        assert list(phases) == ["whole", "queued", "prefill", "decode"]
        for first, second in (("queued", "prefill"), ("prefill", "decode")):
            assert phases[first][1] == phases[second][0], "one phase begins where another ends"
        assert phases["whole"] == (phases["queued"][0], phases["decode"][1])
    assert requests["2"]["queued"][1] > requests["0"]["decode"][0], "it waited for a seat"
    assert list(requests["3"]) == ["whole", "queued", "prefill"], "a vector is nothing decoded"
    ended = [e["args"] for e in of_kind(events, "e") if "finish_reason" in e["args"]]
    assert sum(end["output_tokens"] for end in ended) == 18


def test_who_leaves_and_who_never_came_to_a_seat(tmp_path: Path) -> None:
    engine = traced(tmp_path / "trace.json")
    for name in "abc":
        engine.add(Request(name, (1, 2, 3), GREEDY))
    engine.add(Request("twins", (1, 2), SamplingParams(n=2, max_tokens=3, ignore_eos=True)))
    engine.step()
    engine.abort("a")
    engine.abort("c")
    engine.add(Request("a", (5, 6), PoolingParams("last")))  # the name is free again
    while engine.has_work:
        engine.step()
    engine.close()
    events = events_of(tmp_path / "trace.json")
    begun = [e["args"]["request"] for e in of_kind(events, "b") if "request" in e["args"]]
    assert begun == ["a", "b", "c", "twins", "a"]
    assert len({e["id"] for e in of_kind(events, "b")}) == 5
    reasons = [e["args"]["finish_reason"] for e in of_kind(events, "e") if "finish_reason" in e["args"]]
    assert sorted(reasons) == ["abort", "abort", "length", "length", "stop"]
    assert list(requests_of(events)["c"]) == ["whole", "queued"]


def test_counters_fall_where_nothing_runs(tmp_path: Path) -> None:
    engine = traced(tmp_path / "trace.json")
    for name in "ab":
        engine.add(Request(name, (1, 2, 3), GREEDY))
        while engine.has_work:
            engine.step()
        time.sleep(0.02)
    engine.close()
    rows = of_kind(events_of(tmp_path / "trace.json"), "C", "rows")
    assert [sum(event["args"].values()) for event in rows].count(0) >= 1
    assert [event["ts"] for event in rows] == sorted(event["ts"] for event in rows)


# ------------------------------------------------------------------------------------ the command line


def test_run_and_bench_leave_a_trace(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    shown = cli("run", "-m", tiny_llama, "-n", 5, "--trace", path, "hello")
    assert shown.code == 0, shown.err
    assert list(requests_of(events_of(path))["0"]) == ["whole", "queued", "prefill", "decode"]
    path = tmp_path / "bench.json"
    shown = cli("bench", "-m", tiny_llama, "-p", 20, "-n", 4, "-b", 2, "-r", 1, "--json", "--trace", path)
    assert shown.code == 0, shown.err
    assert {step["name"] for step in of_kind(events_of(path), "X")} >= {"prefill", "decode"}


@pytest.mark.parametrize("verb", ["run", "bench", "serve"])
def test_a_bad_path_is_refused_before_anything_is_loaded(
    cli: Cli, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ridgeline.cli.progress.fetch", lambda model: pytest.fail("it is fetched"))
    text = ["hello"] if verb == "run" else []
    for path, cause in (
        (tmp_path / "nowhere" / "trace.json", "No such file or directory"),
        (tmp_path, "Is a directory"),
        ("/dev/null", "it is no regular file"),
    ):
        shown = cli(verb, *text, "--trace", path)
        assert shown.code == 1
        assert (
            shown.err == f"error: trace '{path}' cannot be written: {cause}; accepted: a file that can be\n"
        )


def test_looking_whether_a_path_is_good_changes_nothing(tmp_path: Path) -> None:
    there, pipe = tmp_path / "there", tmp_path / "pipe"
    there.write_text("kept")
    os.mkfifo(pipe)
    check_path(str(there))
    check_path(str(tmp_path / "new"))
    with pytest.raises(ConfigError):
        check_path(str(pipe))
    with pytest.raises(ConfigError):
        check_path("a\0b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "there"]
    assert there.read_text() == "kept"
    with pytest.raises(ConfigError, match="trace is ''"):
        EngineConfig(trace="")


# ----------------------------------------------------------------------------------- what goes wrong


def test_what_is_there_of_a_process_that_was_killed_can_be_read(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    code = (
        "from ridgeline.llm import LLM; from ridgeline.types import SamplingParams\n"
        f"llm = LLM({str(tiny_llama)!r}, threads=1, trace={str(path)!r})\n"
        "llm.generate([[1, 2], [3, 4]], SamplingParams(max_tokens=4, ignore_eos=True))\n"
        "print('begun', flush=True)\n"
        "while True: llm.generate([[5, 6, 7]] * 3, SamplingParams(max_tokens=500, ignore_eos=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        size = path.stat().st_size
        while path.stat().st_size <= size + 10_000:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    text = path.read_text()
    assert not text.rstrip().endswith("]")
    events = events_of(path, whole=False)
    assert len(of_kind(events, "X")) > 10
    assert all(phases["whole"][1] for name, phases in requests_of(events).items() if name in "01")


def test_an_interrupt_leaves_a_whole_trace(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    command = [sys.executable, "-m", "ridgeline.cli.main", "run", "-m", str(tiny_llama), "-n", "450"]
    environment = {**os.environ, "RIDGELINE_THREADS": "1", "RIDGELINE_TRACE": str(path)}
    with subprocess.Popen([*command, "hi"], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
    assert of_kind(events_of(path), "X")


def test_a_full_disk_ends_the_trace_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trace.json"
    real, room = os.write, 3000

    def write(file: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(file, data[:room])
        room -= done
        return done

    monkeypatch.setattr(trace_module, "FLUSH_S", 0.01)
    monkeypatch.setattr(trace_module.os, "write", write)
    engine = traced(path)
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)))
    for _ in range(100):
        engine.step()
        time.sleep(0.001)
    assert not engine.has_work
    engine.close()
    assert f"trace {path}: it ends here: No space left on device" in caplog.text
    assert of_kind(events_of(path, whole=False), "X")
    assert path.stat().st_size > 2000


def test_a_trace_is_bounded_in_the_file_and_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_module, "FLUSH_S", 0.01)
    monkeypatch.setattr(trace_module, "MAX_FILE_BYTES", 20_000)
    engine = traced(tmp_path / "file.json")
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)))
    while engine.has_work:
        engine.step()
        time.sleep(0.0005)
    engine.close()
    assert "it ends here, at 0 MiB" in caplog.text
    assert events_of(tmp_path / "file.json", whole=False)
    assert 20_000 < (tmp_path / "file.json").stat().st_size < 200_000
    monkeypatch.setattr(trace_module, "FLUSH_S", 60)
    monkeypatch.setattr(trace_module, "MAX_PENDING_BYTES", 5000)
    engine = traced(tmp_path / "memory.json")
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    engine.close()
    assert "the disk was too slow for" in caplog.text
    assert (tmp_path / "memory.json").stat().st_size < 7000
    assert events_of(tmp_path / "memory.json", whole=False)


def test_closing_twice_and_after_the_end(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "trace.json"))
    trace.close()
    trace.close()
    assert events_of(tmp_path / "trace.json")


# ---------------------------------------------------------------------------------------- the server


def test_a_server_and_the_engine_that_follows_one_that_died(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    body = {"prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True}

    with server_process(tiny_llama, "--trace", path) as server:

        def ask() -> None:
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200

        ask()
        time.sleep(2 * trace_module.FLUSH_S)
        server.engine.kill()
        server.await_log("engine died")
        while httpx.get(f"{server.url}/health").status_code != 200:
            time.sleep(0.05)
        ask()
        ask()
        assert server.end() == 0
    assert len(requests_of(events_of(path, whole=False))) == 1
    assert len(requests_of(events_of(tmp_path / "trace-1.json"))) == 2
