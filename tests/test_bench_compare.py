"""Comparing systems side by side: the protocol with drivers that pretend, and what is made of answers."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_peer
import numpy as np
import psutil
import pytest
import vocabularies

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import compare, shapes  # noqa: E402
from bench.peers import cells, figures, report, system  # noqa: E402
from bench.peers.llama import set_field  # noqa: E402
from bench.peers.system import AbsentError, FailedError, Launch, System  # noqa: E402
from ridgeline.config import EngineConfig  # noqa: E402
from ridgeline.resources.ceilings import Ceilings  # noqa: E402
from ridgeline.types import Work  # noqa: E402

CEILINGS = Ceilings(10e9, 500e9, 200e9, 100e9, 2, "portable", "a machine", "now")


@pytest.fixture
def fake(tmp_path: Path) -> str:
    return fake_peer.write(tmp_path)


@pytest.fixture
def start(fake: str) -> Iterator[Callable[..., System]]:
    """Start a pretended llama.cpp with options; all are ended afterwards."""
    started: list[System] = []

    def begin(*options: str, timeout_s: float = 60.0) -> System:
        launch = Launch("llama", "llama", fake, "a model", 2, options=options)
        started.append(System(launch, timeout_s))
        started[-1].start()
        return started[-1]

    yield begin
    system.close_all(started)


# ------------------------------------------------------------------------------------------- cells


def test_cells_have_the_sizes_of_their_names() -> None:
    sizes = {
        "prefill-512": ("prefill", 512, 1, 1, 512),
        "decode-1": ("decode", 128, 1, 120, 120),
        "decode-4096": ("decode", 4096, 1, 32, 32),
        "batch-32": ("decode", 128, 32, 64, 2048),
        "4x256+8": ("decode", 256, 4, 8, 32),
        "cold": ("cold", 0, 1, 1, 1),
    }
    for name, expected in sizes.items():
        cell = cells.parse(name)
        assert (cell.kind, cell.context, cell.batch, cell.tokens, cell.counted_tokens) == expected
    assert {cells.parse(name).name for name in cells.DEFAULT} == set(cells.DEFAULT)
    assert cells.parse("decode-1").longest <= 256


@pytest.mark.parametrize("name", ["prefill", "decode-2", "batch-0", "0x8+1", "1x8", "prefill-512 ", ""])
def test_a_cell_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="accepted"):
        cells.parse(name)


def test_prompts_are_one_systems_and_another_rounds() -> None:
    cell = cells.parse("2x30+4")
    first = cell.prompts(50, 1)
    assert first == cell.prompts(50, 1)
    assert first != cell.prompts(50, 2)
    assert first[0] != first[1]
    assert all(len(prompt) == 30 and min(prompt) >= 16 and max(prompt) < 50 for prompt in first)


# ---------------------------------------------------------------------------------------- protocol


def test_a_driver_answers_whatever_its_libraries_print(start: Callable[..., System]) -> None:
    driver = start()
    assert driver.facts["system"] == "fake"
    assert driver.facts["load_s"] > 0
    for seed in range(2):
        assert driver.measure(cells.parse("3x8+4"), seed) == {"seconds": 1e-6}
    assert driver.measure(cells.parse("prefill-8"), 0) == {"seconds": 1e-6}


def test_options_reach_a_driver_as_values(start: Callable[..., System]) -> None:
    answer = start("seconds=2e-6", "counts=true").measure(cells.parse("1x8+2"), 0)
    assert answer == {"seconds": 2e-6, "work": {"int8_ops": 1000, "read_bytes": 2000}}


def test_a_failed_command_leaves_the_driver_alive(start: Callable[..., System]) -> None:
    driver = start("be=raising")
    for _ in range(2):
        with pytest.raises(FailedError, match=r"^RuntimeError: no room$"):
            driver.measure(cells.parse("1x8+2"), 0)


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        ("missing", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("refusing", "error: no such model"),
    ],
)
def test_a_system_that_does_not_load_is_absent(
    start: Callable[..., System], behaviour: str, why: str
) -> None:
    with pytest.raises(AbsentError, match=why):
        start(f"be={behaviour}")


def test_a_python_that_is_not_there_is_absent() -> None:
    with pytest.raises(AbsentError, match="/nowhere/python: No such file"):
        System(Launch("vllm", "vllm", "/nowhere/python", "m", 1)).start()


def test_a_driver_that_dies_or_hangs_is_absent(start: Callable[..., System]) -> None:
    with pytest.raises(AbsentError, match=r"^out of luck$"):
        start("be=dying").measure(cells.parse("1x8+2"), 0)
    slow = start("be=slow", timeout_s=60.0)
    slow._timeout_s = 0.2
    with pytest.raises(AbsentError, match="no answer within"):
        slow.measure(cells.parse("1x8+2"), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's state")
def test_a_driver_and_what_it_started_stand_still_between_commands(start: Callable[..., System]) -> None:
    driver = start("be=parent")
    child = psutil.Process(int(driver.facts["version"]))
    for _ in range(2):
        for process in (child, child.parent()):
            assert process is not None
            assert settled_status(process) == psutil.STATUS_STOPPED
        driver.measure(cells.parse("1x8+2"), 0)
    driver.close()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def settled_status(process: psutil.Process) -> str:
    """A signal takes a moment to arrive."""
    for _ in range(200):
        if process.status() == psutil.STATUS_STOPPED:
            break
        time.sleep(0.05)
    return process.status()


GOOD = {"seconds": 0.5, "outputs": [[1, 2], [3, 4]]}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (GOOD | {"seconds": 0}, "seconds is 0"),
        (GOOD | {"seconds": float("nan")}, "seconds is nan"),
        (GOOD | {"seconds": "1"}, "seconds is '1'"),
        (GOOD | {"seconds": 2.0}, "2.000 s of a command that took 1.000 s"),
        ({"seconds": 0.5}, "not those of 2"),
        (GOOD | {"outputs": [[1, 2]]}, "not those of 2"),
        (GOOD | {"outputs": [[1, 2], [3]]}, "has 1 tokens; accepted: 2"),
        (GOOD | {"outputs": [[1, 2], None]}, "has no tokens"),
        (GOOD | {"outputs": [[1, 2], [3, 100]]}, "accepted: 0 to 99"),
        (GOOD | {"outputs": [[1, 2], [3, True]]}, "accepted: 0 to 99"),
    ],
)
def test_an_answer_that_cannot_hold_is_refused(answer: dict[str, Any], why: str) -> None:
    cell = cells.parse("2x8+2")
    system.check(GOOD, cell, 100, 1.0)
    with pytest.raises(FailedError, match=why):
        system.check(answer, cell, 100, 1.0)


# ------------------------------------------------------------------------------------------ figures


def test_ratios_are_of_medians_of_pairs_and_of_the_best() -> None:
    assert figures.ratio([10, 30, 20], [10, 10, 5]) == {
        "of_medians": 2.0,
        "of_pairs": {"median": 3.0, "least": 1.0, "most": 4.0},
        "of_best": 3.0,
    }


def measured(*seconds: float, **more: Any) -> figures.Measured:
    return figures.Measured([{"seconds": one, **more} for one in seconds])


def test_a_result_has_rates_ratios_and_shares_of_the_rounds_own_ceilings() -> None:
    probes = [CEILINGS, CEILINGS, Ceilings(20e9, 500e9, 200e9, 100e9, 2, "portable", "a machine", "now")]
    work = {"int8_ops": 0, "read_bytes": 5 * 10**9}
    result = figures.Result(cells.parse("2x8+4"), probes)
    result.systems = {
        "ridgeline": measured(1.0, 0.5, work=work),
        "llama": measured(2.0, 2.0),
        "vllm": figures.Measured(failed="no room"),
    }
    shown = result.to_json()
    ours, llama = shown["systems"]["ridgeline"], shown["systems"]["llama"]
    assert ours["rate"] == {"median": 12.0, "least": 8.0, "most": 16.0}
    assert ours["mbu"] == {"median": 0.5, "least": 0.5, "most": 0.5}
    assert "ridgeline_over_it" not in ours
    assert llama["ridgeline_over_it"]["of_medians"] == 3.0
    assert llama["ridgeline_over_it"]["of_pairs"] == {"median": 3.0, "least": 2.0, "most": 4.0}
    assert "mbu" not in llama
    assert shown["systems"]["vllm"] == {"failed": "no room"}
    assert shown["read_bytes_per_s"] == {"median": 10e9, "least": 10e9, "most": 20e9}
    table = report.lines("2x8+4", shown)
    assert "50% (50% to 50%) of the read bandwidth" in table[2]
    assert "3.00×         3.00 (2.00 to 4.00)" in table[3]
    assert table[4].split(maxsplit=1) == ["vllm", "none: no room"]


def test_a_prompts_share_is_of_the_int8_peak() -> None:
    result = figures.Result(cells.parse("prefill-64"), [CEILINGS] * 2)
    result.systems = {"ridgeline": measured(2.0, work={"int8_ops": 250 * 10**9, "read_bytes": 1})}
    ours = result.to_json()["systems"]["ridgeline"]
    assert ours["int8_share"]["median"] == 0.25
    assert ours["rate"]["median"] == 32
    assert Work(int8_ops=1).ops == 1


# --------------------------------------------------------------------------------------- as a whole


@pytest.fixture
def command(
    fake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """`python -m bench.compare`, where every Python pretends and the machine's ceilings are known."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(compare.probe, "measure", lambda *given, **more: CEILINGS)
    monkeypatch.setattr(compare, "leave_on_sigterm", lambda: None)

    def run(*arguments: str) -> tuple[int, str]:
        given = ["--model", str(tmp_path / "model.gguf"), "--threads", "1", *arguments]
        monkeypatch.setattr(sys, "argv", ["compare", *given])
        code = compare.main()
        return code, capsys.readouterr().out

    return run


def test_systems_take_turns_and_an_absent_one_is_named(
    command: Callable[..., tuple[int, str]], fake: str, tmp_path: Path
) -> None:
    log, data, plot = (tmp_path / name for name in ("log", "out.json", "out.png"))
    names = ("ridgeline", "llama", "llama-q4_0")
    told = [setting for name in names for setting in (f"{name}:log={log}", f"{name}:as={name}")]
    code, said = command(
        *("--peers", *[f"{name}={fake}" for name in names], "vllm=/nowhere/python"),
        *("--peer-model", f"llama-q4_0={tmp_path / 'other.gguf'}"),
        *("--peer-option", *told, "ridgeline:counts=true", "llama:seconds=2e-6"),
        *("--work", "prefill-8", "2x8+6", "--rounds", "2"),
        *("--json", str(data), "--plot", str(plot)),
    )
    assert code == 0
    assert "vllm is absent: /nowhere/python: No such file or directory" in said
    assert "2 rounds are too few" in said
    warm_up = [f"{name} 2x8+4" for name in names]
    turns = [f"{name} 2x8+6" for name in names] * 2
    assert log.read_text().splitlines() == [f"{name} 1x8+1" for name in names] * 3 + warm_up + turns
    result = json.loads(data.read_text())
    assert set(result["systems"]) == {*names, "vllm"}
    assert result["systems"]["llama-q4_0"]["model"] == str(tmp_path / "other.gguf")
    assert result["systems"]["vllm"]["absent"].startswith("/nowhere/python")
    assert result["systems"]["llama"]["version"] == "1.2"
    cell = result["cells"]["2x8+6"]
    assert cell["systems"]["llama"]["ridgeline_over_it"]["of_medians"] == 2.0
    assert cell["systems"]["ridgeline"]["mbu"]["median"] == pytest.approx(0.2)
    assert len(cell["probes"]) == 3
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_short_answer_fails_its_system_and_no_other(
    command: Callable[..., tuple[int, str]], fake: str, tmp_path: Path
) -> None:
    data = tmp_path / "out.json"
    peers = ("--peers", *[f"{name}={fake}" for name in ("ridgeline", "llama", "llama-short")])
    options = ("--peer-option", "llama-short:be=short")
    code, said = command(*peers, *options, "--work", "1x8+4", "--rounds", "1", "--json", str(data))
    assert code == 1
    systems = json.loads(data.read_text())["cells"]["1x8+4"]["systems"]
    assert systems["llama-short"] == {"failed": "a sequence has 3 tokens; accepted: 4"}
    assert systems["llama"]["ridgeline_over_it"]["of_best"] == 1.0
    assert "none: a sequence has 3 tokens" in said


def test_one_that_dies_is_left_out_and_ours_must_be_there(
    command: Callable[..., tuple[int, str]], fake: str
) -> None:
    peers = ("--peers", f"ridgeline={fake}", f"llama={fake}")
    code, said = command(*peers, "--peer-option", "llama:be=dying", "--work", "1x8+4", "1x8+5")
    assert code == 0
    assert said.count("llama is absent: out of luck") == 1
    assert "1x8+5" in said
    code, said = command("--peers", "ridgeline=/nowhere/python", "--work", "1x8+4", "--rounds", "1")
    assert code == 1


def test_a_cold_start_is_a_process_of_its_own(
    command: Callable[..., tuple[int, str]], fake: str, tmp_path: Path
) -> None:
    data = tmp_path / "out.json"
    cold = {
        "ridgeline": "echo {model} {threads}",
        "llama-cli": "echo '{prompt}'",
        "llama-silent": "true",
        "llama-broken": "sh -c 'echo a; echo no memory >&2; exit 2'",
    }
    code, said = command(
        *("--peers", *[f"{name}={fake}" for name in (*cold, "llama", "vllm")]),
        *("--cold", *[f"{name}={line}" for name, line in cold.items()]),
        *("--peer-option", "vllm:be=missing", "--work", "cold", "--rounds", "1", "--json", str(data)),
    )
    assert code == 1
    assert "vllm is absent: ModuleNotFoundError" in said
    shown = json.loads(data.read_text())["cells"]["cold"]
    assert shown["unit"] == "starts/s"
    systems = shown["systems"]
    assert systems["llama-silent"] == {"failed": "exit status 0: nothing was shown"}
    assert systems["llama-broken"] == {"failed": "exit status 2: no memory"}
    for name in ("llama-cli", "llama"):
        seconds = systems[name]["seconds"]
        assert systems[name]["rate"]["median"] == pytest.approx(1 / seconds[0])
        assert systems[name]["ridgeline_over_it"]["of_best"] > 0


def test_our_own_cold_start_is_the_command_line() -> None:
    launch = Launch("ridgeline", "ridgeline", "python", "m.gguf", 2, options=("weights=W16A16",))
    line = launch.cold_command()
    assert line[1:5] == ["-m", "ridgeline.cli.main", "run", "--model=m.gguf"]
    assert {"--threads=2", "--max-tokens=1", "--weights=W16A16"} <= set(line)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--work", "prefill"], "work is 'prefill'"),
        (["--peers", "sglang=python"], "peer is 'sglang'; accepted: ridgeline, llama"),
        (["--peers", "llama"], "--peers has 'llama'; accepted: NAME=VALUE"),
        (["--peers", "llama=a", "llama=b"], "each name once"),
        (["--peer-model", "llama=x"], "'llama' is none of the systems; accepted: ridgeline"),
        (["--peer-option", "ridgeline=x"], "accepted: NAME:KEY=VALUE"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--json", "/nowhere/out.json"], "/nowhere is not a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(
    command: Callable[..., tuple[int, str]], arguments: list[str], why: str
) -> None:
    with pytest.raises(SystemExit, match=why):
        command(*arguments)


def test_other_pythons_do_not_see_our_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    assert system.environment_of("ridgeline")["PYTHONPATH"] == "/ours"
    assert "PYTHONPATH" not in system.environment_of("llama")
    assert os.environ["PYTHONPATH"] == "/ours"


def test_a_field_that_a_structure_lacks_is_refused() -> None:
    import ctypes

    class Parameters(ctypes.Structure):
        _fields_ = [("n_ctx", ctypes.c_int)]

    parameters = Parameters()
    set_field(parameters, "n_ctx", 5)
    assert parameters.n_ctx == 5
    with pytest.raises(SystemExit, match="has no 'n_ctxt'; accepted: n_ctx"):
        set_field(parameters, "n_ctxt", 5)


def test_our_driver_keeps_the_protocol(tiny: Callable[[str], Any]) -> None:
    from bench.peers.protocol import Options
    from bench.peers.ridgeline import RidgelineDriver

    model = str(tiny("llama").folder)
    driver = RidgelineDriver(Options(model, 1, 64, 3, {"weights": "W32A32"}))
    for name in ("prefill-20", "3x10+5", "1x10+1"):
        cell = cells.parse(name)
        prompts = cell.prompts(driver.vocabulary, 1)
        answer = driver.prefill(prompts) if cell.kind == "prefill" else driver.decode(prompts, cell.tokens)
        system.check(answer.to_json(), cell, driver.vocabulary, 1e6)
        assert answer.more["work"]["read_bytes"] > 0
    assert EngineConfig(max_num_seqs=3).max_num_batched_tokens > 3


# ------------------------------------------------------------------------------------------- shapes

TINY = {
    "llama": shapes.Shape("llama", 2, 256, 512, 4, 2, 64, 1e4, 128, True, ("Q4_K_M",)),
    "qwen3": shapes.Shape("qwen3", 1, 128, 256, 2, 1, 128, 1e6, 128, False, ("Q4_K_M",)),
}


@pytest.mark.parametrize("name", TINY)
def test_a_shapes_file_runs_and_is_the_same_again(name: str, tmp_path: Path) -> None:
    from ridgeline.llm import LLM
    from ridgeline.types import SamplingParams

    tokenizer = vocabularies.write_gguf(tmp_path / "words.gguf", vocabularies.vocabulary_keys())
    files = [tmp_path / f"{number}.gguf" for number in range(2)]
    for file in files:
        shapes.write_floats(TINY[name], name, tokenizer, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    with LLM(model=str(files[0]), threads=1, weights="W32A32") as llm:
        (output,) = llm.generate("hello there", SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 4


def test_random_weights_keep_values_near_one() -> None:
    drawn = shapes.random_tensor("blk.0.ffn_up.weight", (64, 400), 2, [0, 1])
    assert drawn.dtype == np.float16
    assert float(drawn.astype(np.float32).std()) == pytest.approx(1 / 20, rel=0.05)
    residual = shapes.random_tensor("blk.0.ffn_down.weight", (64, 400), 2, [0, 1])
    assert float(residual.astype(np.float32).std()) == pytest.approx(1 / 40, rel=0.05)
    norm = shapes.random_tensor("output_norm.weight", (400,), 2, [0, 1])
    assert norm.dtype == np.float32
    assert float(norm.mean()) == pytest.approx(1, abs=0.05)


def test_the_shapes_have_the_originals_layers() -> None:
    """Parameters of layers and norms, as the originals' tensors add up to."""
    layers = {"llama-1b": 973_146_112, "qwen3-0.6b": 440_467_456, "llama-8b": 6_979_588_096}
    for name, expected in layers.items():
        tensors = dict(shapes.SHAPES[name].tensors(10))
        counted = sum(int(np.prod(size)) for tensor, size in tensors.items())
        assert counted - sum(int(np.prod(tensors.get(t, (0,)))) for t in HEADS) == expected
        assert ("output.weight" in tensors) == (name == "llama-8b")


HEADS = ("token_embd.weight", "output.weight")


def test_files_that_are_there_are_kept_and_a_full_disk_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.gguf").write_bytes(b"")
    (tmp_path / "llama-1b-Q8_0.gguf").write_bytes(b"kept")
    given = ["shapes", "--folder", str(tmp_path), "--llama-python", "python"]
    given += ["--tokenizer", str(tmp_path / "words.gguf")]
    monkeypatch.setattr(sys, "argv", [*given, "--types", "Q8_0"])
    shapes.main()
    assert "all files are there" in capsys.readouterr().out
    usage = type("Usage", (), {"free": 1 << 30})
    monkeypatch.setattr(shapes.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(sys, "argv", [*given, "--types", "Q6_K"])
    with pytest.raises(SystemExit, match=r"1 GiB are free in .*; accepted: 5 GiB"):
        shapes.main()


def test_a_quantiser_that_fails_leaves_nothing(tmp_path: Path, fake: str) -> None:
    target = tmp_path / "out.gguf"
    with pytest.raises(SystemExit, match=r"out\.gguf was not quantised"):
        shapes.quantise(tmp_path / "no.gguf", target, "Q4_0", sys.executable, 1)
    assert not target.exists()
