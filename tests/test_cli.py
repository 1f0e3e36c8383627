"""The command line: what verbs print, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import typer
from command_line import Cli, Outcome, command_line, piped

from ridgeline.cli.app import app
from ridgeline.cli.errors import user_message
from ridgeline.cli.run import read_prompt
from ridgeline.config import EngineConfig
from ridgeline.llm import LLM
from ridgeline.types import (
    CompletionOutput,
    RequestError,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    Transcript,
)

if TYPE_CHECKING:
    from tiny_models import TinyModel

VERBS = (
    "run",
    "chat",
    "pull",
    "list",
    "show",
    "rm",
    "perplexity",
    "probe",
    "bench",
    "serve",
    "simulate",
    "budget",
    "doctor",
)


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes a second that tests of other things need not spend."""
    from ridgeline.resources import probe
    from ridgeline.resources.ceilings import Ceilings

    made_up = Ceilings(1e9, 1e9, 0.0, 1e9, 1, "portable", "a machine", "2026-01-01T00:00:00+00:00")
    monkeypatch.setattr(probe, "measure", lambda *args, **more: made_up)


# ----------------------------------------------------------------------------------- around the verbs


def test_help_lists_every_verb_and_starts_without_numpy() -> None:
    heavy = "{'numpy', 'rich', 'torch'}"
    code = f"import sys; from ridgeline.cli import app; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_help(ridgeline: Cli) -> None:
    shown = ridgeline("--help")
    assert shown.code == 0
    for verb in VERBS:
        assert re.search(rf"^  {verb} ", shown.out, re.MULTILINE), verb
    assert ridgeline() == shown
    assert EngineConfig().model in ridgeline("run", "--help").out


def test_version(ridgeline: Cli) -> None:
    shown = ridgeline("--version")
    assert shown.code == 0
    assert re.fullmatch(r"ridgeline( \d+\.\d+\.\d+\S*|, from a source tree .*)\n", shown.out)


def test_every_flag_has_an_environment_twin() -> None:
    group = typer.main.get_command(app)
    flags = [
        p for command in group.commands.values() for p in command.params if p.param_type_name == "option"
    ]
    assert len(flags) > 40
    for flag in flags:
        if flag.name != "help":
            (name,) = [opt for opt in flag.opts if opt.startswith("--")]
            assert flag.envvar == "RIDGELINE_" + name.removeprefix("--").upper().replace("-", "_")


MISTAKES = [
    (["frob"], "frob"),
    (["run", "--frob", "hi"], "--frob"),
    (["run", "-m", "/nowhere/model.gguf", "hi"], "/nowhere/model.gguf does not exist"),
    (["run", "-m", "EMPTY", "hi"], "has no model in it"),
    (["run", "-m", "nobody", "hi"], "'nobody' is not a known model"),
    (["run", "hi"], "smollm2 is not in the cache and cannot be fetched"),
    (["run", "-m", "TINY", "--max-tokens", "abc", "hi"], "--max-tokens"),
    (["run", "-m", "TINY", "--max-tokens", "0", "hi"], "max_tokens is 0; accepted: a positive number"),
    (["run", "-m", "TINY", "--temperature", "-1", "hi"], "temperature is -1.0; accepted: 0 to 100"),
    (["run", "-m", "TINY", "--weights", "W9", "hi"], "weights is 'W9'; accepted: auto, W4A8-g32"),
    (
        ["run", "-m", "TINY", "--weights", "W4A16-g32", "--device", "cpu", "hi"],
        "weights is 'W4A16-g32'; accepted on cpu: auto, W4A8-g32",
    ),
    (
        ["run", "-m", "TINY", "--kv-format", "KV4", "hi"],
        "kv_format is 'KV4'; accepted: auto, KV8, KV16, KV32",
    ),
    (["run", "-m", "TINY", "--device", "tpu", "hi"], "device is 'tpu'; accepted: auto, cpu"),
    (["run", "-m", "TINY", "--threads", "0", "hi"], "threads is 0"),
    (["run", "-m", "TINY", "--max-model-len", "99999", "hi"], "max_model_len is 99999; accepted: up to 512"),
    (
        ["run", "-m", "TINY", "--max-model-len", "16", "a prompt that is longer"],
        "tokens; this model's context",
    ),
    (["run", "-m", "TINY"], "prompt is empty"),
    (["run", "-m", "TINY", ""], "prompt is empty"),
    (["chat", "-m", "PLAIN"], "model has no chat template"),
    (["show", "smollm2"], "ridgeline pull smollm2"),
    (["show", "-m"], "-m"),
    (["pull", "nobody"], "'nobody' is not a known model"),
    (["rm", "smollm2"], "'smollm2' is not in the cache"),
    (["perplexity", "-m", "TINY"], "--file"),
    (["perplexity", "-m", "TINY", "--file", "/nowhere.txt"], "/nowhere.txt: No such file or directory"),
    (["perplexity", "-m", "TINY", "--file", "BINARY"], "is not UTF-8 at byte 1"),
    (
        ["perplexity", "-m", "TINY", "--file", "TEXT"],
        "the text has 24 tokens; accepted: at least one chunk of 512",
    ),
    (["perplexity", "-m", "TINY", "--file", "TEXT", "--ctx", "9999"], "max_model_len is 9999"),
    (["perplexity", "-m", "TINY", "--file", "TEXT", "--chunks", "0"], "chunks is 0; accepted: at least 1"),
    (["bench", "-m", "TINY", "--output-tokens", "1"], "output_tokens is 1; accepted: at least 2"),
    (["bench", "-m", "TINY", "--batch", "0"], "batch is 0"),
    (["bench", "-m", "TINY", "--prompt-tokens", "600"], "accepted: at most 512"),
    (["probe", "--threads", "-2"], "threads is -2"),
    (["probe", "--plot", "roof.svg"], "plot is 'roof.svg'; accepted: a file whose name ends in .png"),
    (["bench", "-m", "TINY", "--plot", "roof.png"], "plot is 'roof.png' without a sweep; accepted: with"),
    (["bench", "-m", "TINY", "--sweep", "4,2"], "sweep is '4,2'; accepted: at most 64 numbers"),
    (["bench", "-m", "TINY", "--sweep", "1,2", "--batch", "8"], "--batch is given beside --sweep"),
    (["bench", "-m", "TINY", "--sweep", "1,2", "--ops"], "--ops is given beside --sweep"),
    (["bench", "-m", "TINY", "--sweep", "1", "-p", "500", "-n", "20"], "accepted: at most 512"),
    (["doctor", "--threads", "-2"], "threads is -2"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
@pytest.mark.usefixtures("known_machine")
def test_mistakes_are_one_line_and_exit_code_1(
    ridgeline: Cli, arguments: list[str], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("twenty-four bytes of it.\n", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"a\xff")
    places = {"TINY": tiny_llama, "EMPTY": tmp_path / "empty"}
    places |= {"TEXT": tmp_path / "text", "BINARY": tmp_path / "binary"}
    if "PLAIN" in arguments:
        places["PLAIN"] = without_template(tiny_llama, tmp_path / "plain")
    outcome = ridgeline(*[places.get(a, a) for a in arguments])
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: ")
    assert said in outcome.err


def without_template(folder: Path, copy: Path) -> Path:
    copy.mkdir()
    for file in folder.iterdir():
        if file.name not in ("tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(file, copy)
    return copy


def test_only_users_mistakes_are_made_one_line() -> None:
    assert (
        user_message(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"
    )
    assert user_message(MemoryError()) == "out of memory"
    assert user_message(RequestError("two\nlines")) == "two lines"
    assert user_message(ZeroDivisionError("ours")) is None


def test_interrupt_ends_with_130(ridgeline: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argument: str | None) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("ridgeline.cli.run.read_prompt", interrupted)
    outcome = ridgeline("run", "hi")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err


def test_a_reader_that_leaves_is_no_error(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ridgeline.cli.main", "run", "-m", str(tiny_llama), "--seed", "1", "hi"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RIDGELINE_CACHE": str(tmp_path)},
        )
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


# ------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("argument", "stdin", "prompt"),
    [
        ("why?", "", "why?"),
        ("-", "from a pipe\n", "from a pipe"),
        (None, "from a pipe\n", "from a pipe"),
        ("explain", "a pipe that may stay open\n", "explain"),
        ("\udcff text", "", "\ufffd text"),
        ("-", "naïve ☃\n\n", "naïve ☃"),
    ],
)
def test_where_a_prompt_comes_from(
    argument: str | None, stdin: str, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", piped(stdin))
    assert read_prompt(argument) == prompt


@pytest.mark.parametrize("argument", [None, "-", ""])
def test_no_prompt(argument: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", piped(""))
    with pytest.raises(RequestError, match="prompt is empty"):
        read_prompt(argument)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RequestError, match="prompt is empty"):
        read_prompt(argument)


# ---------------------------------------------------------------------------------------------- verbs


@pytest.mark.usefixtures("known_machine")
def test_run_prints_the_answer_and_nothing_else(ridgeline: Cli, tiny_llama: Path) -> None:
    outcome = ridgeline(
        "run", "-m", tiny_llama, "--temperature", 0, "--max-tokens", 12, "--system", "be", "hi"
    )
    with LLM(str(tiny_llama), threads=1) as llm:
        messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
        (expected,) = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=12))
    assert outcome.code == 0
    assert outcome.out == expected.outputs[0].text + "\n"
    prompt, output = len(expected.prompt_token_ids), len(expected.outputs[0].token_ids)
    figures = (
        rf"{prompt} prompt \+ {output} output tokens · first token \d+\.\d\d s · \d+\.\d tokens/s · \d+% of"
    )
    assert re.match(figures, outcome.err)
    assert outcome.err.count("\n") == 1
    assert "\x1b" not in outcome.out + outcome.err


@pytest.mark.usefixtures("known_machine")
def test_run_continues_the_prompt_where_there_is_no_template(
    ridgeline: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = without_template(tiny_llama, tmp_path / "plain")
    outcome = ridgeline("run", "-m", folder, "--temperature", 0, "--max-tokens", 5, "Once upon")
    with LLM(str(folder), threads=1) as llm:
        (expected,) = llm.generate("Once upon", SamplingParams(temperature=0.0, max_tokens=5))
    assert outcome.out == expected.outputs[0].text + "\n"
    assert ridgeline("run", "-m", folder, "--system", "be", "hi").err.startswith("error: model has no chat")


@pytest.mark.usefixtures("known_machine")
def test_seeds_repeat_and_flags_win_over_the_environment(
    ridgeline: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("run", "-m", tiny_llama, "--temperature", 1, "--max-tokens", 16)
    first, again, other = (ridgeline(*base, "--seed", seed, "hi").out for seed in (1, 1, 2))
    assert first == again != other
    monkeypatch.setenv("RIDGELINE_MODEL", str(tiny_llama))
    monkeypatch.setenv("RIDGELINE_MAX_TOKENS", "3")
    monkeypatch.setenv("RIDGELINE_SEED", "5")
    assert " + 3 output tokens" in ridgeline("run", "--temperature", 1, "hi").err
    assert " + 2 output tokens" in ridgeline("run", "--max-tokens", 2, "--temperature", 1, "hi").err


def test_an_answer_that_breaks_off_is_an_error(
    ridgeline: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: LLM, messages: object, params: object) -> Generator[RequestOutput, None, None]:
        transcript = Transcript([1, 5], 1)
        transcript.write("half")
        choice = CompletionOutput(0, transcript, 1, 4, "error", "logits are not finite")
        yield RequestOutput("0", None, (1,), (choice,), True, RequestMetrics(0.0, 1.0, 2.0))

    monkeypatch.setattr(LLM, "stream_chat", broken)
    expected = "error: the answer broke off: logits are not finite\n"
    assert ridgeline("run", "-m", tiny_llama, "hi") == Outcome(1, "half\n", expected)


def test_show_describes_a_model(ridgeline: Cli, tiny_llama: Path) -> None:
    found = json.loads(ridgeline("show", tiny_llama, "--json").out)
    config = json.loads((tiny_llama / "config.json").read_text(encoding="utf-8"))
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    assert found["path"] == str(tiny_llama)
    assert found["family"] == "llama"
    assert found["layers"] == config["num_hidden_layers"]
    assert found["context"] == config["max_position_embeddings"]
    assert found["kv_bytes_per_token"] == 2 * 2 * config["num_key_value_heads"] * head_dim * found["layers"]
    assert found["formats"] == {"F32": 2 + 9 * found["layers"]}
    assert found["chat_template"] is True
    assert found["size_bytes"] > 4 * found["parameters"]
    shown = ridgeline("show", tiny_llama).out
    assert str(tiny_llama) in shown
    assert "\x1b" not in shown


def test_list_and_rm(ridgeline: Cli, tmp_path: Path) -> None:
    empty = ridgeline("list")
    assert (empty.code, empty.out) == (0, "")
    assert json.loads(ridgeline("list", "--json").out) == []
    from ridgeline.model.catalog import CATALOG

    entry = CATALOG["smollm2"]
    file = tmp_path / "cache" / "models" / entry.name / entry.file
    file.parent.mkdir(parents=True)
    with file.open("wb") as sparse:
        sparse.truncate(entry.size_bytes)
    (found,) = json.loads(ridgeline("list", "--json").out)
    assert (found["name"], found["path"], found["size_bytes"]) == ("smollm2", str(file), entry.size_bytes)
    table = ridgeline("list").out
    assert re.search(r"smollm2 +98\.4 MB", table)
    assert str(file) in table
    assert ridgeline("rm", "smollm2") == Outcome(0, "removed smollm2\n", "")
    assert not file.exists()


def test_perplexity_agrees_with_transformers(
    ridgeline: Cli, tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    text = "A plain text, long enough for two chunks of forty tokens of one byte each, and a bit.\n"
    file = tmp_path / "text"
    file.write_text(text, encoding="utf-8")
    model = tiny("llama")
    outcome = ridgeline(
        *("perplexity", "-m", model.folder, "--file", file, "--ctx", 40, "--weights", "W32A32", "--json")
    )
    found = json.loads(outcome.out)
    with LLM(str(model.folder), threads=1) as llm:
        tokens = llm.tokenizer.encode(text.removesuffix("\n"), add_special=True)
    scores: list[float] = []
    for start in (0, 40):
        chunk = tokens[start : start + 40]
        logits = model.logits(chunk).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        scores += [-logs[i, chunk[i + 1]] for i in range(20, 39)]
    assert (found["chunks"], found["tokens_scored"]) == (2, 38)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(scores)), rel=2e-4)
    human = ridgeline("perplexity", "-m", model.folder, "--file", file, "--ctx", 40, "--chunks", 1)
    assert re.match(r"perplexity \d+\.\d{4} ± \d+\.\d{4}\n1 chunks of 40, 19 tokens scored", human.out)
    assert human.err == ""


@pytest.mark.usefixtures("known_machine")
def test_bench_ends_with_one_json_line(ridgeline: Cli, tiny_llama: Path) -> None:
    sizes = ("--prompt-tokens", 20, "--output-tokens", 5, "--batch", 3, "--repeats", 2)
    outcome = ridgeline("bench", "-m", tiny_llama, *sizes, "--json")
    found = json.loads(outcome.out.splitlines()[-1])
    assert (found["prompt_tokens"], found["output_tokens"], found["batch"], found["repeats"]) == (20, 5, 3, 2)
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "mbu", "mfu"):
        assert found[name] > 0, name
    low, high = found["decode_spread"]
    assert low <= found["decode_tokens_per_s"] <= high
    assert found["ceilings"]["read_bytes_per_s"] == 1e9
    assert re.search(r"^decode +\d", ridgeline("bench", "-m", tiny_llama, *sizes).out, re.MULTILINE)


@pytest.mark.usefixtures("known_machine")
def test_bench_sweeps_batches_and_draws_them(ridgeline: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    png = tmp_path / "roofline.png"
    sizes = ("--sweep", "1,2,...,8", "--prompt-tokens", 20, "--output-tokens", 4, "--repeats", 1)
    outcome = ridgeline("bench", "-m", tiny_llama, *sizes, "--plot", png, "--json")
    found = json.loads(outcome.out.splitlines()[-1])
    rows = found["sweep"]
    assert [row["batch"] for row in rows] == [1, 2, 4, 8]
    intensities = [row["ops_per_byte"] for row in rows]
    assert intensities == sorted(intensities)  # more sequences share the reading of the weights
    assert 0 < intensities[0] < intensities[-1]
    for row in rows:
        assert row["ops_per_s"] / row["ops_per_byte"] == pytest.approx(
            row["mbu"] * found["ceilings"]["read_bytes_per_s"]
        )
        assert row["tokens_per_s"] * row["step_s"] == pytest.approx(row["batch"])
        assert row["spread"][0] <= row["tokens_per_s"] <= row["spread"][1]
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    shown = ridgeline("bench", "-m", tiny_llama, *sizes).out
    assert re.search(r"^ +8 +\d", shown, re.MULTILINE)
    assert re.search(r"1 batch 1 +2 batch 2 +3 batch 4 +4 batch 8", shown)
