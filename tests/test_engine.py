"""The engine on an executor without a model: tokens never depend on company, and nothing is left behind."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeDetokenizer, FakeExecutor, letter, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.config import PAGE_TOKENS, pages_for
from ridgeline.engine import Engine
from ridgeline.outcome import Choice
from ridgeline.types import (
    CompletionOutput,
    Float32Array,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    Transcript,
)


@pytest.fixture(autouse=True, params=["at once", "one step late"])
def results(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on an executor that finishes a step before the next and on one that does not."""
    monkeypatch.setattr(FakeExecutor, "asynchronous", request.param == "one step late")


END = 90
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, RequestOutput]:
    """Run requests to their ends; every page must be free afterwards."""
    for request in requests:
        engine.add(request, stream=False)
    results = {}
    while engine.has_work:
        for output in engine.step():
            results[output.request_id] = output
        engine.scheduler.check_integrity()
    assert all(pool.used_pages == 0 for pool in engine.scheduler.cache.pools)
    return results


def one(request: Request, executor: FakeExecutor | None = None, **settings_: Any) -> CompletionOutput:
    engine = make_engine(executor or FakeExecutor(), **settings_)
    return run(engine, [request])[request.id].outputs[0]


def preferring(token: int, when: Callable[[list[int]], bool] = lambda seen: True) -> FakeExecutor:
    """An executor that all but insists on `token` while `when(tokens so far)` holds."""

    def edit(logits: Float32Array, seen: list[int]) -> None:
        if when(seen):
            logits[token] = 50

    return FakeExecutor(edit=edit)


# ------------------------------------------------------- the same tokens, whatever else there is

PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.8},
    {"temperature": 1.4, "top_k": 9, "min_p": 0.02, "n": 2},
    {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 2},
    {"temperature": 0.0, "frequency_penalty": 1.5, "min_tokens": 5, "n": 2},
    {"temperature": 0.7, "prompt_logprobs": 2, "n": 2},
]

requests = st.builds(
    lambda prompt, params, seed, tokens: (tuple(prompt), {**params, "seed": seed, "max_tokens": tokens}),
    st.lists(st.integers(0, 96), min_size=1, max_size=50),
    st.sampled_from(PARAMS),
    st.integers(0, 2**64 - 1),
    st.integers(5, 40),
)


def build(drawn: Sequence[tuple[tuple[int, ...], dict[str, Any]]]) -> list[Request]:
    return [Request(str(i), prompt, SamplingParams(**params)) for i, (prompt, params) in enumerate(drawn)]


def contents(output: RequestOutput) -> list[tuple[Any, ...]]:
    each = [(o.token_ids, o.text, o.finish_reason, o.logprobs) for o in output.outputs]
    return [*each, (output.prompt_logprobs,)]


def executor_for(window: int | None, pages: int) -> FakeExecutor:
    if window is None:
        return FakeExecutor((None,), (pages,))
    return FakeExecutor((None, window), (pages, min(pages, pages_for(window) + 3)))


def run_mixed(
    engine: Engine, requests: list[Request], aborted: set[int], data: st.DataObject
) -> dict[str, RequestOutput]:
    """Requests that come at drawn steps, some of which are aborted at others; their last outputs."""
    arriving = list(requests)
    aborts = {str(i): data.draw(st.integers(0, 30)) for i in aborted}
    results: dict[str, RequestOutput] = {}
    steps = 0
    while arriving or engine.has_work:
        if arriving and (not engine.has_work or data.draw(st.booleans())):
            engine.add(arriving.pop(0))
        for request_id, when in aborts.items():
            if when == steps:
                engine.abort(request_id)
        for output in engine.step():
            results[output.request_id] = output
        engine.scheduler.check_integrity()
        steps += 1
    return results


@settings(max_examples=60, deadline=None)
@given(
    drawn=st.lists(requests, min_size=1, max_size=7),
    window=st.sampled_from([None, 5, 24]),
    pages=st.sampled_from([6, 7, 9, 200]),
    budget=st.integers(1, 70),
    places=st.integers(1, 8),
    aborted=st.sets(st.integers(0, 6), max_size=2),
    data=st.data(),
)
def test_tokens_do_not_depend_on_company_chunks_memory_or_aborts(
    drawn: list[tuple[tuple[int, ...], dict[str, Any]]],
    window: int | None,
    pages: int,
    budget: int,
    places: int,
    aborted: set[int],
    data: st.DataObject,
) -> None:
    together = build(drawn)
    alone = {}
    for request in together:
        engine = make_engine(executor_for(window, 200), end_token_ids=frozenset([END]))
        alone[request.id] = contents(run(engine, [request])[request.id])
    engine = make_engine(
        executor_for(window, pages),
        max_num_seqs=min(places, budget),
        max_num_batched_tokens=budget,
        end_token_ids=frozenset([END]),
    )
    results = run_mixed(engine, together, aborted, data)
    for request_id, expected in alone.items():
        if int(request_id) not in aborted:
            assert contents(results[request_id]) == expected
    assert all(pool.used_pages == 0 for pool in engine.scheduler.cache.pools)


def test_a_tiny_pool_forces_preemption_and_changes_nothing() -> None:
    many = [
        Request(str(i), tuple(range(i, i + 20)), SamplingParams(temperature=i % 2, seed=i, max_tokens=60))
        for i in range(6)
    ]
    roomy = make_engine(FakeExecutor(pages=(200,)))
    tight = make_engine(FakeExecutor(pages=(7,)), max_num_batched_tokens=17)
    expected, got = run(roomy, many), run(tight, many)
    assert roomy.scheduler.preemptions == 0
    assert tight.scheduler.preemptions > 3
    assert {k: contents(v) for k, v in got.items()} == {k: contents(v) for k, v in expected.items()}


def test_ten_thousand_random_operations_leave_nothing_behind() -> None:
    rng = random.Random(10_000)
    executor = FakeExecutor((None, 20), (14, 10))
    engine = make_engine(executor, max_num_seqs=6, max_num_batched_tokens=24, end_token_ids=frozenset([END]))
    names: list[str] = []
    finished = added = 0
    for operation in range(10_000):
        kind = rng.random()
        if kind < 0.12:
            added += 1
            params = SamplingParams(
                max_tokens=rng.randrange(1, 40),
                temperature=rng.choice([0, 1]),
                seed=added,
                n=rng.choice([1, 1, 2]),
            )
            prompt = tuple(rng.randrange(97) for _ in range(rng.randrange(1, 100)))
            names.append(str(added))
            engine.add(Request(names[-1], prompt, params))
        elif kind < 0.2 and names:
            engine.abort(rng.choice(names[-12:]))
        else:
            finished += sum(output.finished for output in engine.step())
            executor.steps.clear()
        if operation % 20 == 0:
            engine.scheduler.check_integrity()
        if len(engine.scheduler.waiting) > 20:
            for sequence in list(engine.scheduler.waiting)[::2]:
                engine.abort(
                    next(n for n in names if any(c.sequence is sequence for c in _choices(engine, n)))
                )
    while engine.has_work:
        finished += sum(output.finished for output in engine.step())
    engine.scheduler.check_integrity()
    assert finished > 200
    assert engine.scheduler.preemptions > 15
    assert [pool.free_pages for pool in engine.scheduler.cache.pools] == [14, 10]
    assert not engine._requests


def _choices(engine: Engine, name: str) -> list[Any]:
    return engine._requests[name].choices if name in engine._requests else []


@pytest.mark.parametrize("where", ["run", "advance", "take"])
def test_an_interrupted_step_is_run_again(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    requests = [
        Request(name, tuple(range(first, 40)), SamplingParams(seed=4, max_tokens=20))
        for name, first in (("a", 0), ("b", 9))
    ]
    expected = {request.id: one(request, max_num_batched_tokens=16) for request in requests}
    executor = FakeExecutor()
    engine = make_engine(executor, max_num_batched_tokens=16)
    owner: Any = {"run": executor, "advance": engine.scheduler, "take": Choice}[where]
    method, calls = getattr(owner, where), itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(calls) % 3 == 1:
            raise KeyboardInterrupt
        return method(*arguments)

    monkeypatch.setattr(owner, where, interrupted)
    for request in requests:
        engine.add(request)
    results: dict[str, CompletionOutput] = {}
    for _ in range(200):
        with contextlib.suppress(KeyboardInterrupt):
            results |= {output.request_id: output.outputs[0] for output in engine.step()}
        if not engine.has_work:
            break
    assert results == expected


# --------------------------------------------------------------------------------------- seeds, n


def test_choices_differ_and_each_is_addressed_by_its_index() -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=10)
    engine = make_engine(FakeExecutor())
    output = run(engine, [Request("a", (1, 2, 3), params)])["a"]
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert len({o.token_ids for o in output.outputs}) == 3
    fewer = run(
        make_engine(FakeExecutor()), [Request("a", (1, 2, 3), SamplingParams(seed=7, max_tokens=10))]
    )["a"]
    assert fewer.outputs[0] == output.outputs[0]


def test_requests_without_a_seed_repeat_only_when_the_engine_has_one() -> None:
    pair = [Request(name, (5, 6), SamplingParams(max_tokens=12)) for name in ("a", "b")]

    def tokens(seed: int | None) -> list[tuple[int, ...]]:
        results = run(make_engine(FakeExecutor(), seed=seed), pair)
        return [results[name].outputs[0].token_ids for name in ("a", "b")]

    first = tokens(3)
    assert first == tokens(3)
    assert first[0] != first[1]
    assert tokens(4) != first
    assert tokens(None) != tokens(None)


# -------------------------------------------------------------------------------------- how it ends


def test_end_token_ends_without_text_and_stop_ids_say_which() -> None:
    executor = preferring(END, when=lambda seen: len(seen) >= 5)
    output = one(Request("a", (1, 2), GREEDY), executor, end_token_ids=frozenset([END]))
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert output.token_ids[-1] == END
    assert len(output.token_ids) == 4
    assert letter(END) not in output.text
    named = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[END])
    output = one(Request("a", (1, 2), named), executor)
    assert (output.finish_reason, output.stop_reason) == ("stop", END)
    shown = SamplingParams(
        temperature=0, max_tokens=12, stop_token_ids=[END], include_stop_str_in_output=True
    )
    assert one(Request("a", (1, 2), shown), executor).text == output.text + letter(END)


def test_ignore_eos_runs_to_the_length() -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    output = one(Request("a", (1,), params), preferring(END), end_token_ids=frozenset([END]))
    assert (output.finish_reason, output.token_ids) == ("length", (END,) * 12)
    named = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[END])
    output = one(Request("a", (1,), named), preferring(END), end_token_ids=frozenset([END]))
    assert (output.finish_reason, output.stop_reason) == ("stop", END)


def test_min_tokens_bans_every_ending_until_then() -> None:
    params = SamplingParams(temperature=0, max_tokens=12, min_tokens=6, stop_token_ids=[13])
    for preferred in (END, 13):
        output = one(Request("a", (1,), params), preferring(preferred), end_token_ids=frozenset([END]))
        assert output.finish_reason == "stop"
        assert len(output.token_ids) == 7
        assert not {END, 13} & set(output.token_ids[:6])


def test_min_tokens_holds_for_stop_strings_too() -> None:
    params = SamplingParams(temperature=0, max_tokens=12, min_tokens=3, stop=letter(5))
    output = one(Request("a", (1,), params), preferring(5))
    assert (len(output.token_ids), output.text, output.stop_reason) == (4, letter(5) * 3, letter(5))


def test_stop_string_across_tokens_is_cut_off_and_never_streamed() -> None:
    full = one(Request("a", (3, 4), GREEDY)).text
    stop = full[5:8]
    params = SamplingParams(temperature=0, max_tokens=12, stop=[stop, "never"])
    engine = make_engine(FakeExecutor())
    engine.add(Request("a", (3, 4), params))
    texts = []
    while engine.has_work:
        texts += [output.outputs[0] for output in engine.step()]
    assert (texts[-1].text, texts[-1].finish_reason, texts[-1].stop_reason) == (full[:5], "stop", stop)
    assert all(full[:5].startswith(state.text) for state in texts)
    kept = SamplingParams(temperature=0, max_tokens=12, stop=stop, include_stop_str_in_output=True)
    assert one(Request("a", (3, 4), kept)).text == full[:8]


def test_text_held_back_is_released_at_the_end() -> None:
    half_stop = SamplingParams(temperature=0, max_tokens=3, stop=letter(7) * 4)
    assert one(Request("a", (1,), half_stop), preferring(7)).text == letter(7) * 3
    held_by_detokenizer = SamplingParams(temperature=0, max_tokens=3)
    assert one(Request("a", (1,), held_by_detokenizer), preferring(0)).text == letter(0) * 3
    # What the detokenizer releases last may still complete a stop string.
    both = SamplingParams(temperature=0, max_tokens=3, stop=letter(0) * 3)
    output = one(Request("a", (1,), both), preferring(0))
    assert (output.text, output.finish_reason, output.stop_reason) == ("", "stop", letter(0) * 3)


def test_length_is_bounded_by_max_tokens_and_by_the_context() -> None:
    assert len(one(Request("a", (1, 2), GREEDY)).token_ids) == 12
    endless = SamplingParams(temperature=0, max_tokens=None)
    output = one(Request("a", (1, 2), endless), max_model_len=30)
    assert (len(output.token_ids), output.finish_reason) == (28, "length")


def test_the_last_token_needs_no_slot() -> None:
    request = Request("a", tuple(range(16)), SamplingParams(temperature=0, max_tokens=17))
    assert len(one(request, FakeExecutor(pages=(2,))).token_ids) == 17


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "prompt has 0 tokens; accepted: at least 1"),
        ((1,) * 64, {}, "prompt has 64 tokens; this model's context of 64 takes at most 63"),
        ((1, 97), {}, "prompt token is 97; accepted: 0 to 96"),
        ((-1,), {}, "prompt token is -1; accepted: 0 to 96"),
        ((True,), {}, "prompt token is True; accepted: 0 to 96"),
        ((1,), {"stop_token_ids": [97]}, "stop_token_ids token is 97; accepted: 0 to 96"),
        ((1,), {"logit_bias": {1000: 1.0}}, "logit_bias token is 1000; accepted: 0 to 96"),
        (
            (1,) * 20,
            {"max_tokens": 30},
            "prompt and output may reach 50 tokens; the KV cache holds at most 49",
        ),
    ],
)
def test_requests_that_cannot_be_served_are_refused_and_forgotten(
    prompt: tuple[int, ...], params: dict[str, Any], message: str
) -> None:
    engine = make_engine(FakeExecutor(pages=(3,)), max_model_len=64)
    with pytest.raises(RequestError) as caught:
        engine.add(Request("a", prompt, SamplingParams(**params)))
    assert str(caught.value) == message
    assert not engine.has_work
    assert not engine.scheduler.waiting


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    engine = make_engine(FakeExecutor())
    engine.add(Request("a", (1,), GREEDY))
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        engine.add(Request("a", (2,), GREEDY))
    assert run(engine, [])["a"].finished
    assert run(engine, [Request("a", (1,), GREEDY)])["a"].finished


def test_an_empty_prompt_begins_with_the_begin_token() -> None:
    engine = make_engine(FakeExecutor(), begin_token_id=3)
    output = run(engine, [Request("a", (), GREEDY)])["a"]
    assert output.prompt_token_ids == (3,)
    assert output.outputs[0] == one(Request("a", (3,), GREEDY))


# ------------------------------------------------------------------------------------ errors, aborts


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_fail_their_own_request(bad: float) -> None:
    def edit(logits: Float32Array, seen: list[int]) -> None:
        if seen[0] == 66 and len(seen) == 9:
            logits[40] = bad

    trio = [Request(str(t), (t, 2, 3), GREEDY) for t in (65, 66, 67)]
    results = run(make_engine(FakeExecutor(edit=edit)), trio)
    expected = run(make_engine(FakeExecutor()), trio)
    assert results["65"].outputs == expected["65"].outputs
    assert results["67"].outputs == expected["67"].outputs
    failed = results["66"].outputs[0]
    assert (failed.finish_reason, failed.stop_reason) == (
        "error",
        "the largest logit, over the temperature, is not a finite number",
    )
    assert failed.token_ids == expected["66"].outputs[0].token_ids[:6]


class ChokingDetokenizer(FakeDetokenizer):
    """Fails at token 80, and at the end of a text that holds something back."""

    def push(self, token_id: int) -> str:
        if token_id == 80:
            raise ValueError("choked")
        return super().push(token_id)

    def finish(self) -> str:
        if self._held:
            raise ValueError("choked")
        return ""


def test_an_exception_in_one_requests_text_ends_only_that_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_executor.FakeDetokenizer", ChokingDetokenizer)

    def edit(logits: Float32Array, seen: list[int]) -> None:
        logits[[0, 80]] = -50
        if seen[0] == 66:
            logits[80] = 50 if len(seen) == 6 else -50
        if seen[0] == 67:
            logits[0] = 50

    trio = [Request(str(t), (t, 2, 3), SamplingParams(temperature=0, max_tokens=5)) for t in (65, 66, 67)]
    engine = make_engine(FakeExecutor(edit=edit))
    results = run(engine, trio)
    assert results["65"].outputs[0].finish_reason == "length"
    for name in ("66", "67"):
        output = results[name].outputs[0]
        assert (output.finish_reason, output.stop_reason) == ("error", "text failed: ValueError: choked")
    engine.add(Request("67", (67,), GREEDY))
    for _ in range(1 + FakeExecutor.asynchronous):
        engine.step()
    aborted = engine.abort("67")
    assert aborted is not None
    assert aborted.outputs[0].finish_reason == "error"
    assert engine.scheduler.cache.usage == 0


def test_abort_is_idempotent_in_every_state() -> None:
    engine = make_engine(FakeExecutor(pages=(8,)), max_num_seqs=2, max_num_batched_tokens=8)
    for name in ("running", "prefilling", "waiting"):
        engine.add(Request(name, tuple(range(20)), SamplingParams(temperature=0, max_tokens=30, n=1)))
    for _ in range(4):
        engine.step()
    assert engine.scheduler.waiting
    for name in ("waiting", "prefilling", "running"):
        output = engine.abort(name)
        assert output is not None
        assert output.finished
        assert [o.finish_reason for o in output.outputs] == ["abort"]
        assert engine.abort(name) is None
        engine.scheduler.check_integrity()
    assert engine.abort("never seen") is None
    assert not engine.has_work
    assert engine.step() == []
    assert engine.scheduler.cache.usage == 0


def test_abort_keeps_choices_that_had_ended() -> None:
    def edit(logits: Float32Array, seen: list[int]) -> None:
        if len(seen) == 4:
            logits[[END, 5]] = 40

    engine = make_engine(FakeExecutor(edit=edit), end_token_ids=frozenset([END]))
    engine.add(Request("a", (1, 2, 3), SamplingParams(n=8, seed=1, max_tokens=50)))
    for _ in range(6):
        engine.step()
    output = engine.abort("a")
    assert output is not None
    assert {o.finish_reason for o in output.outputs} == {"stop", "abort"}


def test_requests_that_do_not_stream_report_only_their_end() -> None:
    engine = make_engine(FakeExecutor())
    engine.add(Request("quiet", (1,), GREEDY), prompt="text", stream=False)
    engine.add(Request("loud", (1,), GREEDY))
    seen: dict[str, list[RequestOutput]] = {"quiet": [], "loud": []}
    while engine.has_work:
        for output in engine.step():
            seen[output.request_id].append(output)
    assert [len(seen["quiet"]), len(seen["loud"])] == [1, 12]
    assert (seen["quiet"][0].prompt, seen["loud"][0].prompt) == ("text", None)
    assert seen["quiet"][0].outputs == seen["loud"][-1].outputs
    lengths = [len(output.outputs[0].token_ids) for output in seen["loud"]]
    assert lengths == list(range(1, 13))


def test_metrics_are_in_order_and_stats_add_up() -> None:
    engine = make_engine(FakeExecutor(), max_num_batched_tokens=16)
    output = run(engine, [Request("a", tuple(range(40)), GREEDY)])["a"]
    metrics = output.metrics
    assert metrics.first_token_s is not None
    assert metrics.finished_s is not None
    assert metrics.arrived_s <= metrics.first_token_s <= metrics.finished_s
    stats = engine.stats
    assert (stats.prefill.steps, stats.prefill.rows) == (3, 40)
    assert (stats.decode.steps, stats.decode.rows) == (11, 11)
    assert stats.decode.work.read_bytes == 11
    assert stats.decode.elapsed_s == pytest.approx(0.011)


def test_a_late_executor_is_never_left_without_a_step() -> None:
    """Every sequence has a row in every step, though its last token is not known when that is launched."""
    executor = FakeExecutor()
    engine = make_engine(executor)
    results = run(
        engine, [Request(str(t), (t, 2), SamplingParams(temperature=0, max_tokens=9)) for t in (4, 5)]
    )
    assert {len(out.outputs[0].token_ids) for out in results.values()} == {9}
    assert [step.rows for step in executor.steps] == [4, *[2] * 8]


def test_close_drops_everything() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    engine.add(Request("a", (1,), GREEDY))
    engine.step()
    engine.close()
    assert executor.closed
    assert not engine.has_work
    assert engine.scheduler.cache.usage == 0


@pytest.mark.parametrize("budget", [3, 7, 16, 40])
def test_full_pages_are_shared_as_soon_as_their_tokens_are_known(budget: int) -> None:
    engine = make_engine(FakeExecutor(pages=(64,)), max_num_seqs=3, max_num_batched_tokens=budget)
    late = FakeExecutor.asynchronous  # the token of a row that was just launched is not known yet
    params = SamplingParams(temperature=0, max_tokens=45, ignore_eos=True)
    for name, length in (("a", 1), ("b", 37), ("c", 50)):
        engine.add(Request(name, tuple(range(length)), params), stream=False)
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.running:
            assert sequence.pages.shared >= (sequence.computed - late) // PAGE_TOKENS


@pytest.mark.parametrize("length", [32, 33, 34, 100])
def test_long_text_is_whole_however_it_is_told(length: int) -> None:
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=length, ignore_eos=True)
    engine = make_engine(FakeExecutor())
    told = run(engine, [Request("told at its end", (1, 2, 3), params)])["told at its end"].outputs[0]
    assert told.text == "".join(map(letter, told.token_ids))
    engine.add(Request("streamed", (1, 2, 3), params))
    texts = []
    while engine.has_work:
        texts += [output.outputs[0] for output in engine.step()]
    assert texts[-1].text == told.text
    assert all(len(each.token_ids) == place + 1 for place, each in enumerate(texts))
    assert all(told.text.startswith(each.text) for each in texts)


# ------------------------------------------------------------------------- what is told of an answer


@given(st.lists(st.text("ab", max_size=3), max_size=120), st.data())
def test_what_was_told_of_a_transcript_stays_as_it_was(pieces: list[str], data: st.DataObject) -> None:
    ids = [1, 2]
    transcript = Transcript(ids, 2)
    told, text = [], ""
    for token, piece in enumerate(pieces):
        ids.append(token)
        transcript.write(piece)
        text += piece
        told.append((CompletionOutput(0, transcript, token + 1, len(text)), text))
        begin = data.draw(st.integers(0, len(text)))
        assert told[-1][0].since(begin, token) == (text[begin:], (token,), None)
    for place, (output, expected) in enumerate(told):
        assert output.text == expected
        assert output.token_ids == tuple(range(place + 1))


@pytest.mark.parametrize(
    "settings_",
    [
        {"max_tokens": 70, "ignore_eos": True},
        {"max_tokens": 70, "min_tokens": 40},
        {"max_tokens": 70, "min_tokens": 40, "stop_token_ids": [70]},
        {"max_tokens": 70, "min_tokens": 40, "stop_token_ids": [70], "include_stop_str_in_output": True},
        {"max_tokens": 70, "stop": ["bc", "a"], "min_tokens": 33},
    ],
)
def test_an_answer_reads_the_same_whether_anybody_follows_it(settings_: dict[str, Any]) -> None:
    params = SamplingParams(temperature=1, **settings_)
    asked = [Request(str(seed), (seed, 3), replace(params, seed=seed)) for seed in range(12)]
    alone = run(make_engine(FakeExecutor(), end_token_ids=frozenset((END,))), asked)
    engine = make_engine(FakeExecutor(), end_token_ids=frozenset((END,)))
    for request in asked:
        engine.add(request, stream=True)
    told: dict[str, RequestOutput] = {}
    while engine.has_work:
        told |= {output.request_id: output for output in engine.step()}
    assert {name: output.outputs for name, output in told.items()} == {
        name: output.outputs for name, output in alone.items()
    }
