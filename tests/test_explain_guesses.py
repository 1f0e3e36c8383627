"""What explanations say of guessed tokens: where they are on, what they gave; where they are off, what they
would give to texts that were answered."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from msgspec import structs
from test_explain import DECODE, TWO_CORES, a_server, llama2, ridgeline, subject, told, two_cores  # noqa: F401
from tiny_models import TinyModel

from ridgeline.apps.benchmark import Workload
from ridgeline.apps.explain import attempt as attempts
from ridgeline.apps.explain.gains import Gains
from ridgeline.apps.explain.guesses import Guessing, guesses_in, guessing_of
from ridgeline.apps.explain.suggest import suggestions
from ridgeline.apps.explain.texts import LEAST_TEXTS, Answered, Texts, answer_texts, prompt_of
from ridgeline.apps.load.dataset import Sample
from ridgeline.apps.operations import bench_config
from ridgeline.apps.plan.model import PlannedModel
from ridgeline.config import EngineConfig
from ridgeline.loading import LoadedModel, load_engine
from ridgeline.resources import probe
from ridgeline.sampling.drafting.replay import Guesses, KnownText
from ridgeline.types import ConfigError, RequestError

Tiny = Callable[[str], TinyModel]
PHRASE = tuple(range(5, 25))
GUESSED = structs.replace(
    DECODE, drafted_tokens=4, accepted_tokens=2, decoded_tokens=4, elapsed_s=0.015, unguessed_s=0.01
)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "known_ceilings", lambda *_, **__: TWO_CORES)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}: abcabcabc"}) + "\n" for i in range(3)))
    return path


def loaded(tiny: Tiny, **settings: Any) -> LoadedModel:
    return load_engine(EngineConfig(model=str(tiny("llama").folder), threads=1, **settings))


def answered(**changes: Any) -> Answered:
    prefill = structs.replace(DECODE, kind="prefill", wall_s=1.0)
    decode = structs.replace(DECODE, wall_s=3.0)
    text = KnownText(PHRASE, PHRASE * 6)
    return replace(Answered([text], 1, [prefill, decode], on=False, setting="auto"), **changes)


# ------------------------------------------------------------------------------------- what they gave


def test_guesses_of_steps_are_put_beside_the_prediction_without() -> None:
    """Two sequences: 4 tokens in 15 ms, of which 2 in 10 ms would have been the step's alone."""
    plain = structs.replace(DECODE, elapsed_s=0.01)
    mixed = structs.replace(GUESSED, kind="mixed", prompt_tokens=9)
    found = guesses_in([GUESSED, plain, mixed])
    assert found is not None
    assert (found.passes, found.drafted, found.accepted) == (2, 4, 2)
    assert found.tokens_per_pass == 1.5
    assert found.slowdown == pytest.approx(25 / 20)
    assert found.gain == pytest.approx((2 * 10 + 10) / 25)
    assert guesses_in([plain, mixed]) is None
    assert guesses_in([]) is None


def test_a_server_that_guesses(ridgeline: Cli) -> None:  # noqa: F811
    guessed = {"drafted_tokens": 4, "accepted_tokens": 2, "decoded_tokens": 4}
    steps = [told(**guessed, elapsed_s=0.015, unguessed_s=0.01), told()]
    with a_server(steps, {"id": "somebody's"}) as url:
        shown = ridgeline("explain", "--url", url, "--recent", 2)
        assert shown.code == 0, shown.err
        assert "Speculation is on: 50% of 4 guesses were right; a pass gives 1.50 tokens" in shown.out
        found = json.loads(ridgeline("explain", "--url", url, "--recent", 2, "--json").out)["speculation"]
    assert found["on"] is True
    assert (found["guesses"]["share"], found["guesses"]["tokens_per_pass"]) == (0.5, 1.5)


# ---------------------------------------------------------------------------------- what they would give


def test_guesses_are_predicted_for_answered_texts(llama2: PlannedModel) -> None:  # noqa: F811
    """A whole run gains what its decoding does, by its share of the time."""
    case = subject(llama2, "W4A8-g32").case
    found = guessing_of(answered(), case)
    assert found is not None
    assert found.setting == "auto"
    assert found.guesses.share > 0.8
    assert 2 < found.guesses.gain < found.guesses.tokens_per_pass
    assert found.gains == Gains(pytest.approx(4 / (1 + 3 / found.guesses.gain)), 1.0, found.guesses.gain)
    assert guessing_of(answered(setting=None), case) is None
    assert guessing_of(answered(texts=[]), case) is None
    full = replace(case, step_tokens=1)
    assert guessing_of(answered(), full) is None, "there is no room for guesses"


def test_guesses_are_suggested_where_they_are_off(llama2: PlannedModel) -> None:  # noqa: F811
    guesses = Guesses(100, 100, 62, 2.1, 1.1, 1.9)
    known = Guessing(guesses, Gains(1.7, 1.0, 1.9), "auto")
    found = suggestions(subject(llama2, "W4A8-g32", guessing=known))
    first = found[0]
    assert (first.kind, first.gains, first.changes) == ("speculation", known.gains, {"speculation": "auto"})
    assert first.text == "speculation at the measured 62% acceptance gives 2.10 tokens a pass"
    assert first.command == "ridgeline explain m --weights W4A8-g32 --speculation auto"
    little = replace(known, gains=Gains(1.04, 1.0, 1.05))
    for guessing in (None, little):
        assert "speculation" not in {
            one.kind for one in suggestions(subject(llama2, "W4A8-g32", guessing=guessing))
        }


# ------------------------------------------------------------------------------------- texts


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("setting", "on", "would"), [("auto", True, None), ("off", False, "auto")])
def test_texts_are_answered_alike(tiny: Tiny, setting: str, on: bool, would: str | None) -> None:
    """With guesses and without, some at once; and all steps are kept."""
    model = loaded(tiny, speculation=setting)
    samples = [Sample(f"tell {i} abcabcabc") for i in range(5)]
    done = answer_texts(model, samples, 2, 40)
    again = answer_texts(model, samples, 1, 40, "other")
    model.engine.close()
    assert (done.on, done.setting, done.batch) == (on, would, 2)
    assert {tuple(text.prompt): text.answer for text in done.texts} == {
        tuple(text.prompt): text.answer for text in again.texts
    }
    assert len(done.texts) == 5
    assert all(0 < len(text.answer) <= 40 for text in done.texts)
    assert max(step.running for step in done.steps) == 2
    # The first token of an answer comes with its prompt's last row.
    assert sum(step.decoded_tokens for step in done.steps) == done.tokens
    assert done.prefill_s > 0
    assert done.decode_s > 0
    assert on or guesses_in(again.steps) is None


def test_a_machine_that_nobody_has_measured_guesses_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "known_ceilings", lambda *_, **__: None)
    model = loaded(tiny)
    done = answer_texts(model, [Sample("abc")], 1, 4)
    model.engine.close()
    assert (done.on, done.setting) == (False, None)


@pytest.mark.usefixtures("known")
def test_prompts_are_asked_as_a_server_is_asked(tiny: Tiny) -> None:
    model = loaded(tiny)
    said = [{"role": "user", "content": "abc"}]
    for sample in (Sample("abc"), Sample(messages=said)):
        assert prompt_of(model, sample) == model.chat_tokens(said)
    plain = replace(model, chat_template=None)
    assert prompt_of(plain, Sample("abc")) == tuple(model.tokenizer.encode("abc"))
    with pytest.raises(RequestError, match="no chat template"):
        prompt_of(plain, Sample(messages=said))
    with pytest.raises(RequestError, match="context"):
        answer_texts(model, [Sample("abc"), Sample("a b " * 4000)], 2, 4)
    assert not model.engine.has_work, "what was asked before is given up"
    model.engine.close()


def test_texts_of_a_file(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[bool] = []
    monkeypatch.setattr(
        "ridgeline.apps.explain.texts.device_ceilings", lambda config, measure: measured.append(measure)
    )
    config = bench_config(1)
    few = Texts.of_file(asked, Workload(9, 9, 1))
    assert len(few.samples) == 3
    assert (few.configured(config, None).speculation, few.configured(config, "off").speculation) == (
        "auto",
        "off",
    )
    assert measured == [True, True]
    none = Texts.of_file(None, Workload(9, 9, 1))
    assert (none.samples, none.configured(config, None).speculation) == ([], "auto")
    assert len(measured) == 2
    asked.write_text('{"prompt": "a"}\n' * 20)
    assert len(Texts.of_file(asked, Workload(9, 9, 2)).samples) == LEAST_TEXTS
    assert len(Texts.of_file(asked, Workload(9, 9, 12)).samples) == 12
    asked.write_text("no json\n")
    with pytest.raises(ConfigError, match="line 1"):
        Texts.of_file(asked, Workload(9, 9, 1))


# ---------------------------------------------------------------------------------------- the command


@pytest.mark.usefixtures("two_cores", "known")
def test_what_people_read_of_guesses(
    ridgeline: Cli,  # noqa: F811
    tiny: Tiny,
    asked: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Off, with what they would bring and the command; that command's own words; and both tried."""
    monkeypatch.setattr("ridgeline.apps.explain.suggest._formats", lambda *_: ())
    monkeypatch.setattr(attempts, "load_costs", lambda *_: True)
    monkeypatch.setattr("ridgeline.apps.explain.answer.guessing_of", generous)
    shape = ("-p", 24, "-n", 40, "-r", 1, "--threads", 1, "--dataset", asked)
    off = ridgeline("explain", tiny("llama").folder, *shape, "--speculation", "off", "--try", "--json")
    assert off.code == 0, off.err
    found = json.loads(off.out)
    assert (found["speculation"]["on"], found["speculation"]["texts"]) == (False, 3)
    assert found["speculation"]["guesses"]["drafted"] == 100
    first = found["suggestions"][0]
    assert first["kind"] == "speculation"
    assert found["tried"]["command"] == first["command"]
    assert found["tried"]["predicted"]["decode"] == 9.0
    assert found["tried"]["measured"]["decode"] > 0
    words = shlex.split(first["command"])
    assert words[-2:] == ["--speculation", "auto"]
    on = ridgeline(*words[1:], "-r", 1)
    assert on.code == 0, on.err
    said = ("Speculation is on: in 3 answers, ", "Speculation is on, and in 3 answers, ")
    assert any(words in on.out for words in said), "whether any guess pays depends on the time of steps"
    shown = ridgeline("explain", tiny("llama").folder, *shape, "--speculation", "off")
    assert "Speculation is off: replayed over 3 answers, " in shown.out
    assert "1. speculation at the measured 62% acceptance gives 2.10 tokens a pass: 8.00x each" in shown.out


def generous(done: Answered, case: object) -> Guessing | None:
    """On a tiny model nothing pays."""
    guesses = Guesses(100, 100, 62, 2.1, 1.1, 9.0)
    return None if done.setting is None else Guessing(guesses, Gains(8.0, 1.0, 9.0), done.setting)
