"""Scores of a prompt's tokens: those that the same tokens have when they are generated, and those of
perplexity, whatever happens to the request meanwhile."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from running import PAGES, load

from ridgeline import LLM, SamplingParams
from ridgeline.apps.perplexity import Scorer
from ridgeline.config import MAX_OUTPUT_ROWS
from ridgeline.engine import MAX_PROMPT_SCORES, Engine
from ridgeline.outcome import Choice
from ridgeline.types import Float32Array, Request, RequestError, RequestOutput, TokenLogprobs


@pytest.fixture(autouse=True, params=["at once", "one step late"])
def results(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on an executor that finishes a step before the next and on one that does not."""
    monkeypatch.setattr(FakeExecutor, "asynchronous", request.param == "one step late")


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(1, 97, count).tolist())


def scoring(max_tokens: int = 5, **more: Any) -> SamplingParams:
    settings_ = {"temperature": 0.0, "max_tokens": max_tokens, "prompt_logprobs": 2, **more}
    return SamplingParams(**settings_)


def run(engine: Engine, *requests: Request, stream: bool = False) -> dict[str, RequestOutput]:
    for request in requests:
        engine.add(request, stream=stream)
    results = {}
    while engine.has_work:
        for output in engine.step():
            results[output.request_id] = output
        engine.scheduler.check_integrity()
    assert all(pool.used_pages == 0 for pool in engine.scheduler.cache.pools)
    return results


def scores_of(prompt: tuple[int, ...], executor: FakeExecutor | None = None) -> Any:
    engine = make_engine(executor or FakeExecutor(), max_num_batched_tokens=512)
    return run(engine, Request("a", prompt, scoring(0)))["a"].prompt_logprobs


# ----------------------------------------------------------------------------- what the numbers are


def test_scores_are_those_of_the_same_tokens_when_they_are_generated() -> None:
    prompt = tokens(9)
    params = SamplingParams(temperature=1, seed=3, max_tokens=40, logprobs=2)
    (generated,) = run(make_engine(FakeExecutor()), Request("a", prompt, params))["a"].outputs
    whole = (*prompt, *generated.token_ids)
    scores = scores_of(whole)
    assert len(scores) == len(whole)
    assert scores[0] is None
    assert [score.token_id for score in scores[1:]] == list(whole[1:])
    assert scores[len(prompt) :] == generated.logprobs
    assert all(len(score.top) == 2 for score in scores[1:])


@pytest.mark.parametrize("weights", ["auto", "W32A32"])
def test_scores_are_those_of_perplexity(tiny_llama: Path, weights: str) -> None:
    prompt = tokens(60, 4)
    loaded = load(tiny_llama, "portable", weights)
    expected = Scorer(loaded.executor, loaded.handle, (PAGES,), 192).negative_log_likelihood(prompt, 0)
    loaded.executor.close()
    outputs = []
    for budget in (4, 23, 512):
        options: dict[str, Any] = {"weights": weights, "kv_format": "KV16", "max_num_seqs": 4}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RIDGELINE_ISA", "portable")
            with LLM(str(tiny_llama), threads=1, max_num_batched_tokens=budget, **options) as llm:
                plain = scoring(prompt_logprobs=None, ignore_eos=True)
                mixed = [scoring(ignore_eos=True), plain, scoring(0)]
                outputs.append(llm.generate([list(prompt)] * 3, mixed))
    for scored, unscored, none_generated in outputs:
        assert scored.outputs[0].token_ids == unscored.outputs[0].token_ids
        assert none_generated.outputs[0].token_ids == ()
        assert unscored.prompt_logprobs is None
        assert scored.prompt_logprobs == none_generated.prompt_logprobs == outputs[0][0].prompt_logprobs
    seen = [score.logprob for score in outputs[0][0].prompt_logprobs or () if score is not None]
    np.testing.assert_allclose(seen, -expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- nothing is lost or told twice


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)), min_size=1, max_size=6),
    pages=st.sampled_from([6, 7, 200]),
    budget=st.integers(1, 70),
    window=st.sampled_from([None, 20]),
)
def test_scores_do_not_depend_on_company_chunks_or_memory(
    lengths: list[tuple[int, int]], pages: int, budget: int, window: int | None
) -> None:
    def executor(pages: int) -> FakeExecutor:
        return FakeExecutor((window,), (pages,))

    prompts = [tokens(length, seed) for seed, (length, _) in enumerate(lengths)]
    batch = [
        Request(f"{i}", p, scoring(more))
        for i, (p, (_, more)) in enumerate(zip(prompts, lengths, strict=True))
    ]
    engine = make_engine(executor(pages), max_num_seqs=min(8, budget), max_num_batched_tokens=budget)
    outputs = run(engine, *batch)
    for request, prompt in zip(batch, prompts, strict=True):
        assert outputs[request.id].prompt_logprobs == scores_of(prompt, executor(200))
        more = request.params.max_tokens  # type: ignore[union-attr]
        assert outputs[request.id].outputs[0].finish_reason == "length"
        if more:
            plain = Request("plain", prompt, scoring(more, prompt_logprobs=None))
            (expected,) = run(make_engine(executor(200)), plain)["plain"].outputs
            assert outputs[request.id].outputs[0] == expected
        else:
            assert outputs[request.id].outputs[0].token_ids == ()


def test_a_preempted_prompt_is_scored_once() -> None:
    executor = FakeExecutor(pages=(7,))
    engine = make_engine(executor, max_num_seqs=2, max_num_batched_tokens=3)
    growing = Request("growing", tokens(20), scoring(60, prompt_logprobs=None))
    scored = Request("scored", tokens(62, 1), scoring(10))
    outputs = run(engine, growing, scored)
    assert engine.scheduler.preemptions > 0
    assert outputs["scored"].prompt_logprobs == scores_of(tokens(62, 1))
    assert sum(step.rows for step in executor.steps) > 20 + 60 + 62 + 10 + 20, "most of it was run twice"
    # Of the rows that ran again, only those of a step that was under way were asked for again.
    assert sum(step.outputs for step in executor.steps) <= 60 + 61 + 10 + 3 * engine.scheduler.preemptions + 2


def test_choices_share_the_scores_of_the_first() -> None:
    executor = FakeExecutor()
    prompt = tokens(30)
    output = run(make_engine(executor), Request("a", prompt, scoring(6, n=3, temperature=1.0, seed=1)))["a"]
    assert output.prompt_logprobs == scores_of(prompt)
    asked = sum(step.outputs for step in executor.steps)
    late = 3 * FakeExecutor.asynchronous
    assert 29 + 3 * 6 <= asked <= 29 + 3 * 6 + late
    plain = scoring(6, n=3, temperature=1.0, seed=1, prompt_logprobs=None)
    assert output.outputs == run(make_engine(FakeExecutor()), Request("a", prompt, plain))["a"].outputs


def test_an_interrupt_neither_loses_nor_doubles_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokens(40)
    expected = scores_of(prompt)
    note, calls = Choice._note_scores, itertools.count()

    def interrupted(choice: Choice) -> None:
        if next(calls) % 23 == 9:
            raise KeyboardInterrupt
        note(choice)

    monkeypatch.setattr(Choice, "_note_scores", interrupted)
    engine = make_engine(FakeExecutor(), max_num_batched_tokens=16)
    engine.add(Request("a", prompt, scoring(3)))
    for _ in range(100):
        with contextlib.suppress(KeyboardInterrupt):
            for output in engine.step():
                last = output
        if not engine.has_work:
            break
    assert last.finished
    assert last.prompt_logprobs == expected


# -------------------------------------------------------------------------------- steps stay bounded


def test_a_step_has_few_rows_of_logits_and_nobody_starves() -> None:
    executor = FakeExecutor(pages=(400,))
    engine = make_engine(executor, max_num_seqs=8, max_num_batched_tokens=300, max_model_len=2000)
    long = [Request(f"long {i}", tokens(500, i), scoring(0)) for i in range(2)]
    short = [Request(f"short {i}", tokens(200, 9 + i), scoring(4, prompt_logprobs=None)) for i in range(2)]
    for request in (*long, *short):
        engine.add(request, stream=False)
    order = []
    while engine.has_work:
        order += [output.request_id for output in engine.step() if output.finished]
    assert max(step.outputs for step in executor.steps) <= MAX_OUTPUT_ROWS + len(short)
    assert max(step.rows for step in executor.steps) > MAX_OUTPUT_ROWS, "others use what is left of a step"
    assert order[-1] == "long 1", "those behind it are not held up while it waits for outputs"
    assert len(order) == 4


def test_scores_advance_beside_more_decodes_than_there_are_rows_of_logits() -> None:
    count = MAX_OUTPUT_ROWS + 10
    executor = FakeExecutor(pages=(800,))
    engine = make_engine(executor, max_num_seqs=count + 1, max_num_batched_tokens=512)
    for i in range(count):
        engine.add(Request(str(i), tokens(2, i), scoring(40, prompt_logprobs=None)), stream=False)
    for _ in range(3):
        engine.step()
    engine.add(Request("scored", tokens(100), scoring(0)), stream=False)
    finished = []
    for _ in range(12):
        finished += [output.request_id for output in engine.step()]
    assert finished == ["scored"]


# -------------------------------------------------------------------------------- without any output


def test_without_tokens_to_generate_the_last_row_is_not_run() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor, max_model_len=50)
    output = run(engine, Request("a", tokens(50), scoring(0)))["a"]
    assert (output.outputs[0].finish_reason, output.outputs[0].text) == ("length", "")
    assert sum(step.rows for step in executor.steps) == 49
    assert output.metrics.first_token_s is None
    with pytest.raises(RequestError, match="51 tokens; this model's context of 50 takes at most 50"):
        engine.add(Request("b", tokens(51), scoring(0)))
    with pytest.raises(RequestError, match="takes at most 49"):
        engine.add(Request("b", tokens(50), scoring(1)))


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_prompt_of_one_token_has_no_score(max_tokens: int) -> None:
    both = [Request("a", (5,), scoring(max_tokens)), Request("b", (6, 7), scoring(9))]
    outputs = run(make_engine(FakeExecutor()), *both)
    assert outputs["a"].prompt_logprobs == (None,)
    assert len(outputs["a"].outputs[0].token_ids) == max_tokens


def test_streams_are_told_nothing_before_the_first_token() -> None:
    engine = make_engine(FakeExecutor(), max_num_batched_tokens=8)
    engine.add(Request("a", tokens(30), scoring(4)))
    seen = []
    while engine.has_work:
        seen += engine.step()
    assert [len(output.outputs[0].token_ids) for output in seen] == [1, 2, 3, 4]
    assert all(output.prompt_logprobs == scores_of(tokens(30)) for output in seen)


def test_logits_that_are_no_numbers_fail_their_own_request() -> None:
    def edit(logits: Float32Array, seen: list[int]) -> None:
        if len(seen) == 5 and seen[0] == 66:
            logits[3] = np.nan

    pair = [Request(str(t), (t, *tokens(20)), scoring(2)) for t in (65, 66)]
    outputs = run(make_engine(FakeExecutor(edit=edit)), *pair)
    failed = outputs["66"].outputs[0]
    assert (failed.finish_reason, failed.token_ids) == ("error", ())
    assert failed.stop_reason == "the largest logit of a prompt token is not a finite number"
    assert outputs["66"].prompt_logprobs is None
    assert outputs["65"].outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21; accepted: 0 to 20 or none"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"max_tokens": 0}, "max_tokens is 0; accepted: a positive number or none; 0 with prompt_logprobs"),
        ({"max_tokens": 0, "prompt_logprobs": 0, "n": 2}, "n is 2; accepted: 1 with max_tokens 0"),
        ({"max_tokens": 0, "prompt_logprobs": 0, "min_tokens": 1}, "min_tokens is 1"),
    ],
)
def test_values_that_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        SamplingParams(**wrong)


def test_more_scores_than_are_kept_are_refused() -> None:
    engine = make_engine(FakeExecutor(), max_model_len=2**21)
    length = MAX_PROMPT_SCORES // 3 + 1
    with pytest.raises(RequestError, match=f"accepted: up to {MAX_PROMPT_SCORES} log-probabilities"):
        engine.add(Request("a", (1,) * length, scoring(0)))
    assert not engine.has_work


def test_no_candidates_are_wanted_with_zero() -> None:
    output = run(make_engine(FakeExecutor()), Request("a", tokens(4), scoring(1, prompt_logprobs=0)))["a"]
    assert output.prompt_logprobs is not None
    first, *rest = output.prompt_logprobs
    assert first is None
    assert all(isinstance(score, TokenLogprobs) and score.top == () for score in rest)
