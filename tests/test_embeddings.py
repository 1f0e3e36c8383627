"""Pooled prompts: transformers' last hidden states, pooled; the same bits in any company; and how they get
through the engine process."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_executor import HIDDEN, FakeExecutor, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from running import Loaded, load, relative_error
from test_server_engine import running
from tiny_gated import make_gated
from tiny_models import VOCABULARY, TinyModel, write_tokenizer

from ridgeline import LLM, AsyncLLM, SamplingParams
from ridgeline.engine import Engine
from ridgeline.execution.draw import NOT_DRAWN
from ridgeline.model.build import encoder
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.families import read_spec
from ridgeline.model.rewrite import with_precision
from ridgeline.native import isa_levels
from ridgeline.precision.formats import parse_format
from ridgeline.server.engine_process import EngineWorker
from ridgeline.server.messages import Abort, Add, Embed, Embedded, Pieces, Refused
from ridgeline.types import (
    CapacityError,
    Float32Array,
    Pooling,
    PoolingParams,
    Request,
    RequestError,
    RequestOutput,
    Step,
)

Tiny = Callable[[str], TinyModel]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tokens(count: int, seed: int = 0, below: int = VOCABULARY) -> list[int]:
    return np.random.default_rng(seed).integers(3, below, count).tolist()


def hidden_states(model: TinyModel, prompt: list[int]) -> np.ndarray:
    """float32 (tokens, hidden), by transformers."""
    with torch.no_grad():
        return model.torch_model.model(torch.tensor([prompt])).last_hidden_state[0].float().numpy()


def pooled(states: np.ndarray, pooling: Pooling, normalise: bool) -> np.ndarray:
    vector = states[-1] if pooling == "last" else states.astype(np.float64).mean(axis=0)
    return vector / np.linalg.norm(vector) if normalise else vector


# ------------------------------------------------------------------------------------- hidden states


EXECUTORS = [(k, w) for k in ("reference", *isa_levels()) for w in ("W32A32", "W8A8-g32", "W16A16")]


@pytest.mark.parametrize(("kind", "weights"), [*EXECUTORS, ("cuda", "W32A32")])
def test_an_encoder_shares_the_decoders_weights_and_memory(tiny: Tiny, kind: str, weights: str) -> None:
    model = tiny("llama" if kind == "cuda" else "gemma3")  # interpreted kernels take their time
    prompt = tokens(8 if kind == "cuda" else 21)
    kv_format = "KV32" if weights == "W32A32" else "KV16"
    loaded = load(model.folder, kind, weights, kv_format)
    other = encoder_of(loaded, model.folder, weights, kv_format)

    def hidden(begin: int, outputs: range) -> np.ndarray:
        rows = replace(loaded.rows(prompt[begin:], begin), outputs=outputs)
        result = loaded.executor.run(other, Step((rows,))).result()
        assert result.tokens.tolist() == [NOT_DRAWN] * len(outputs)
        return result.logits.copy()

    logits = loaded.run(prompt)
    end = len(prompt)
    whole = hidden(0, range(end))
    if weights == "W32A32":
        assert relative_error(whole, hidden_states(model, prompt)) < 1e-4
    # The decoder goes on from what the encoder has stored, and the encoder from that.
    assert relative_error(loaded.run(prompt[end - 4 :], end - 4), logits[-4:]) < 1e-5
    assert relative_error(hidden(end - 4, range(1, 3)), whole[-3:-1]) < 1e-5
    assert hidden(end - 1, range(0)).shape == (0, 96)
    loaded.executor.close()


def encoder_of(loaded: Loaded, folder: Path, weights: str, kv_format: str) -> Any:
    spec = read_spec(open_checkpoint(folder))
    formats = {weight.name: parse_format(weights) for weight in loaded.program.weights()}
    return loaded.executor.compile(with_precision(encoder(spec), formats, kv_format))


# ---------------------------------------------------------------------------------- what LLM.embed gives


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_equal_transformers(tiny: Tiny, device: str, pooling: Pooling) -> None:
    model = tiny("llama")
    prompts = [tokens(30), tokens(1, 1), tokens(55, 2)]
    expected = [hidden_states(model, prompt) for prompt in prompts]
    with LLM(str(model.folder), device=device, weights="W32A32", threads=1) as llm:
        for normalise in (True, False):
            wanted = np.array([pooled(states, pooling, normalise) for states in expected])
            seen = llm.embed(prompts, pooling, normalise)
            assert seen.dtype == np.float32
            assert relative_error(seen, wanted) < 1e-5
        assert llm.embed([]).shape == (0, 0)
        (text,) = llm.embed("A text.", pooling)
        np.testing.assert_array_equal(llm.embed([llm.tokenizer.encode("A text.")], pooling)[0], text)


def test_quantised_weights_give_nearly_the_same_direction(tiny: Tiny) -> None:
    prompt = tokens(40)
    with LLM(str(tiny("llama").folder), weights="W8A8-g32", threads=1) as llm:
        (seen,) = llm.embed([prompt])
    assert seen @ pooled(hidden_states(tiny("llama"), prompt), "mean", True) > 0.99


def test_the_scale_of_logits_is_not_one_of_embeddings(tmp_path: Path) -> None:
    model = make_gated("granite", tmp_path)
    write_tokenizer(model.folder)
    prompt = tokens(20)
    with LLM(str(model.folder), weights="W32A32", threads=1) as llm:
        (seen,) = llm.embed([prompt], normalise=False)
    assert relative_error(seen, pooled(hidden_states(model, prompt), "mean", False)) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_same_bits_in_any_company_and_any_steps(tiny: Tiny, family: str) -> None:
    prompts = [tokens(length, length) for length in (70, 1, 33, 5, 48)]
    folder = str(tiny(family).folder)
    with LLM(folder, threads=1) as llm:
        alone = [llm.embed([prompt], p)[0] for p in ("mean", "last") for prompt in prompts]
        (generated,) = llm.generate([prompts[0]], GREEDY)
    for budget, threads in ((7, 1), (64, 2)):
        with LLM(folder, threads=threads, max_num_batched_tokens=budget, max_num_seqs=4) as llm:
            np.testing.assert_array_equal(llm.embed(prompts), alone[:5])
            stream = llm.stream(prompts[0], GREEDY)
            seen = [next(stream)]
            np.testing.assert_array_equal(llm.embed(prompts, "last"), alone[5:])
            seen += stream
            assert seen[-1].outputs[0].token_ids == generated.outputs[0].token_ids


def test_the_asynchronous_face_gives_the_same(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), threads=1) as llm:
        expected = llm.embed([tokens(9)], "last", normalise=False)[0]

    async def embed() -> tuple[float, ...]:
        async with AsyncLLM(str(tiny_llama), threads=1) as llm:
            return await llm.embed(tokens(9), "last", normalise=False)

    np.testing.assert_array_equal(np.array(asyncio.run(embed()), np.float32), expected)


# -------------------------------------------------------------------------------------- in the engine


@pytest.fixture(params=["at once", "one step late"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors that finish a step before the next, and that do not."""
    monkeypatch.setattr(FakeExecutor, "asynchronous", request.param == "one step late")


def drive(engine: Engine, *requests: Request) -> dict[str, RequestOutput]:
    for request in requests:
        engine.add(request, stream=False)
    results = {}
    while engine.has_work:
        for output in engine.step():
            results[output.request_id] = output
        engine.scheduler.check_integrity()
    assert all(pool.used_pages == 0 for pool in engine.scheduler.cache.pools)
    return results


KINDS = [
    PoolingParams("mean"),
    PoolingParams("last", normalise=False),
    SamplingParams(temperature=0.9, seed=5, max_tokens=30),
    SamplingParams(temperature=0, max_tokens=12, logprobs=1, prompt_logprobs=1),
]


@settings(max_examples=40, deadline=None)
@given(
    drawn=st.lists(st.tuples(st.integers(1, 60), st.sampled_from(KINDS)), min_size=1, max_size=7),
    pages=st.sampled_from([6, 7, 200]),
    budget=st.integers(1, 70),
    window=st.sampled_from([None, 20]),
    asynchronous=st.booleans(),
)
def test_both_kinds_of_requests_are_as_if_alone(
    drawn: list[tuple[int, PoolingParams | SamplingParams]],
    pages: int,
    budget: int,
    window: int | None,
    asynchronous: bool,
) -> None:
    requests = [
        Request(str(i), tuple(tokens(count, i, 97)), params) for i, (count, params) in enumerate(drawn)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeExecutor, "asynchronous", asynchronous)
        executor = FakeExecutor((window,), (pages,))
        engine = make_engine(executor, max_num_seqs=min(4, budget), max_num_batched_tokens=budget)
        together = drive(engine, *requests)
        for request in requests:
            plain = make_engine(FakeExecutor((window,), (200,)), max_num_batched_tokens=512)
            alone = drive(plain, request)[request.id]
            seen = together[request.id]
            assert (seen.outputs, seen.embedding) == (alone.outputs, alone.embedding)
            assert (seen.embedding is None) == isinstance(request.params, SamplingParams)
    assert executor.encoders == any(isinstance(params, PoolingParams) for _, params in drawn)


@pytest.mark.usefixtures("late")
def test_steps_take_turns_while_there_are_both_kinds() -> None:
    executor = FakeExecutor(pages=(200,))
    engine = make_engine(executor, max_num_batched_tokens=10, max_num_seqs=4)
    engine.add(Request("text", tuple(tokens(5, below=97)), SamplingParams(temperature=0, max_tokens=10)))
    engine.add(Request("vector", tuple(tokens(100, below=97)), PoolingParams()))
    told = []
    for _ in range(22):
        told += [output.request_id for output in engine.step()]
    assert told.count("text") == 10
    assert told[-1] == "vector"
    assert max(step.rows for step in executor.steps) == 10
    assert not engine.has_work


@pytest.mark.usefixtures("late")
def test_aborted_refused_and_failed_requests_leave_nothing_behind() -> None:
    def edit(logits: Float32Array, seen: list[int]) -> None:
        if seen[0] == 66 and len(seen) == 5:
            logits[HIDDEN - 1] = np.nan

    engine = make_engine(FakeExecutor(edit=edit), max_num_batched_tokens=8, max_model_len=64)
    for first in (65, 66, 67):
        engine.add(Request(str(first), (first, *tokens(20, below=97)), PoolingParams("mean")))
    engine.step()
    aborted = engine.abort("65")
    assert aborted is not None
    assert (aborted.embedding, aborted.outputs[0].finish_reason) == (None, "abort")
    with pytest.raises(RequestError, match="takes at most 64"):
        engine.add(Request("long", (1,) * 65, PoolingParams()))
    ends = drive(engine, Request("whole", (1,) * 64, PoolingParams()))
    assert ends["66"].outputs[0].stop_reason == (
        "pooling failed: ValueError: the hidden states are not finite numbers"
    )
    assert ends["66"].embedding is None
    assert len(ends["67"].embedding or ()) == len(ends["whole"].embedding or ()) == HIDDEN


def test_no_memory_for_the_encoder_refuses_the_request_alone(tiny_llama: Path) -> None:
    with LLM(str(tiny_llama), threads=1) as llm, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ridgeline.resources.machine.free_memory_bytes", lambda: 1000)
        with pytest.raises(CapacityError, match=r"embeddings need 2 MiB .* accepted: a smaller max_num_b"):
            llm.embed([[5]])
        patch.undo()
        assert llm.embed([[5]]).shape == (1, 96)
        assert len(llm.generate([[5]], GREEDY)[0].outputs[0].token_ids) == 8


def test_parameters_that_are_refused() -> None:
    with pytest.raises(RequestError, match="pooling is 'max'; accepted: mean, last"):
        PoolingParams("max")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="normalise is 1; accepted: true or false"):
        PoolingParams(normalise=1)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- in the engine process


def test_worker_tells_vectors_scores_and_refusals() -> None:
    told: list[Any] = []
    engine = make_engine(FakeExecutor(), max_model_len=40)
    commands: Any = queue.SimpleQueue()
    worker = EngineWorker(engine, commands, told.append)
    scored = SamplingParams(temperature=0, max_tokens=3, n=2, prompt_logprobs=1)
    for command in (
        Embed(1, tuple(tokens(6, below=97)), PoolingParams()),
        Embed(2, (500,), PoolingParams()),
        Add(3, (5, 6, 7), scored),
        Embed(4, tuple(tokens(30, below=97)), PoolingParams()),
        Abort(4),
        Add(5, (5, 6, 7), SamplingParams(max_tokens=0, prompt_logprobs=1)),
    ):
        worker._obey(command)
    while engine.has_work:
        worker.step()
    assert not worker._told
    (refused,) = (event for event in told if isinstance(event, Refused))
    assert (refused.id, refused.message) == (2, "prompt token is 500; accepted: 0 to 96")
    (embedded,) = (event for event in told if isinstance(event, Embedded))
    assert (embedded.id, len(embedded.embedding)) == (1, HIDDEN)
    pieces = [piece for event in told if isinstance(event, Pieces) for piece in event.pieces]
    with_scores = [(piece.id, piece.choice) for piece in pieces if piece.prompt_logprobs is not None]
    assert sorted(with_scores) == [(3, 0), (5, 0)], "once, with the first piece"
    (alone,) = (piece for piece in pieces if piece.id == 5)
    assert (alone.tokens, alone.finish_reason) == ((), "length")
    first = next(piece for piece in pieces if piece.id == 3)
    assert alone.prompt_logprobs == first.prompt_logprobs
    assert alone.prompt_logprobs is not None
    assert len(alone.prompt_logprobs) == 3


def test_client_gets_what_the_model_gives(tiny_llama: Path) -> None:
    prompt = tokens(50)
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1)
    with LLM(str(tiny_llama), threads=1) as llm:
        expected, (scored,) = llm.embed([prompt])[0], llm.generate([prompt], params)

    async def run() -> None:
        async with running(tiny_llama) as client:
            many = [client.embed(prompt) for _ in range(3)]
            pieces = [piece async for some in client.submit(prompt, params) for piece in some]
            for found in await asyncio.gather(*many):
                np.testing.assert_array_equal(np.array(found.embedding, np.float32), expected)
            assert [piece.prompt_logprobs for piece in pieces] == [scored.prompt_logprobs]
            with pytest.raises(RequestError, match="prompt token is 288; accepted: 0 to 287"):
                await client.embed([VOCABULARY])
            given_up = asyncio.create_task(client.embed(prompt))
            await asyncio.sleep(0)
            given_up.cancel()
            assert client.open_requests == 1
            with pytest.raises(asyncio.CancelledError):
                await given_up
            assert client.open_requests == 0
            assert len((await client.embed(prompt, "last", normalise=False)).embedding) == len(expected)

    asyncio.run(run())
