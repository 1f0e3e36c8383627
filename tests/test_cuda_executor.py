"""The CUDA executor end to end, on tiny models of every family, against the reference. Without a GPU its
kernels run in Triton's interpreter, which takes seconds for a step: prompts are short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from fake_executor import FakeDetokenizer
from msgspec.structs import replace
from page_moves import there_and_back
from running import PAGES, Loaded, load, relative_error
from tiny_experts import make_sparse
from tiny_models import TinyModel, write_gguf

from ridgeline.cache.kv import KVCache
from ridgeline.engine import Engine, ModelFacts
from ridgeline.execution.base import page_bytes
from ridgeline.precision.formats import FORMATS
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.types import PageCopy, Request, SamplingParams, Segment, SequenceRows

Tiny = Callable[[str], TinyModel]
TOKENS = np.random.default_rng(9).integers(0, 50, 40).tolist()


def both(path: Path, weights: str, kv_format: str = "KV32") -> tuple[Loaded, Loaded]:
    return load(path, "reference", weights, kv_format), load(path, "cuda", weights, kv_format)


def greedy(loaded: Loaded, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """Tokens of a prompt in two chunks and then one by one, and the logits that they come from."""
    first = len(prompt) // 2
    loaded.run(prompt[:first], pages=[7, 3])
    logits = [loaded.run(prompt[first:], first, pages=[7, 3])[-1]]
    for step in range(steps):
        token = int(logits[-1].argmax())
        logits.append(loaded.run([token], len(prompt) + step, pages=[7, 3])[-1])
    return [int(row.argmax()) for row in logits], np.stack(logits)


@pytest.mark.parametrize("family", ["llama", "llama3", "gpt2", "gemma3", "odd", "capped"])
def test_every_family_gives_the_tokens_of_the_reference_in_float32(tiny: Tiny, family: str) -> None:
    reference, cuda = both(tiny(family).folder, "W32A32")
    prompt = TOKENS[: 21 if family == "gemma3" else 7]  # longer than its window
    expected, expected_logits = greedy(reference, prompt, 2)
    tokens, logits = greedy(cuda, prompt, 2)
    assert tokens == expected
    assert relative_error(logits, expected_logits) < 1e-4
    cuda.executor.close()


@pytest.mark.parametrize("kv_format", ["KV8", "KV16", "KV32"])
@pytest.mark.parametrize("weights", [name for name in FORMATS if name != "W32A32"])
def test_every_format_follows_the_reference(tiny: Tiny, weights: str, kv_format: str) -> None:
    """Not to the last place: one more or less there may change a rounded activation by a whole step."""
    reference, cuda = both(tiny("llama").folder, weights, kv_format)
    expected, seen = reference.run(TOKENS[:6]), cuda.run(TOKENS[:6])
    assert relative_error(seen, expected) < 0.04
    assert np.median(np.abs(seen - expected)) < 0.005 * np.abs(expected).max()
    cuda.executor.close()


@pytest.mark.parametrize("weights", ["W4A16-g32", "W8A8-g32"])
def test_experts_follow_the_reference(weights: str, tmp_path: Path) -> None:
    """A prompt, and a row alone behind it."""
    reference, cuda = both(make_sparse("mixtral", tmp_path).folder, weights)
    for tokens, start in ((TOKENS[:3], 0), (TOKENS[3:4], 3)):
        expected, seen = reference.run(tokens, start), cuda.run(tokens, start)
        assert relative_error(seen, expected) < 0.04
        assert np.median(np.abs(seen - expected)) < 0.005 * np.abs(expected).max()
    cuda.executor.close()


@pytest.mark.parametrize("storage", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantised_files_keep_their_bits(tiny: Tiny, storage: str, tmp_path: Path) -> None:
    path = tmp_path / f"{storage}.gguf"
    write_gguf(tiny("llama").torch_model, path, gguf.GGMLQuantizationType[storage])
    weights = f"W{storage[1]}A16-g32"
    reference, cuda = both(path, weights)
    assert relative_error(cuda.run(TOKENS[:4]), reference.run(TOKENS[:4])) < 0.04
    cuda.executor.close()


def test_rows_of_a_step_do_not_meet(tiny: Tiny) -> None:
    """A ragged step over shuffled pages gives what its sequences give alone; pages begin as garbage."""
    reference, cuda = both(tiny("llama").folder, "W32A32")
    for loaded in (reference, cuda):
        loaded.run(TOKENS[:15], pages=[5, 2])
    steps = ((TOKENS[15:18], 15, [5, 2]), (TOKENS[30:34], 0, [9]), (TOKENS[3:4], 0, [0]))
    expected = np.concatenate([reference.run(*step) for step in steps])
    seen = cuda.logits(*[cuda.rows(*step) for step in steps])
    assert relative_error(seen, expected) < 1e-4
    cuda.executor.close()


def over_segments(loaded: Loaded, causal: bool) -> np.ndarray:
    """Rows at position 24 that see two prompts which were run apart, and each other."""
    tables = [tuple((page, page + 1) for _ in loaded.program.groups) for page in (0, 2, 4)]
    loaded.run(TOKENS[:17], pages=[0, 1])
    loaded.run(TOKENS[20:24], pages=[2, 3])
    segments = (
        Segment(tables[0], 17, first_position=3, bias=0.5),
        Segment(tables[1], 4, first_position=22, bias=-0.25, causal=causal),
        Segment(tables[2], 3, first_position=24),
    )
    first = loaded.logits(SequenceRows(TOKENS[30:33], 0, segments, (0, 2)))
    last = replace(segments[2], length=4)
    second = loaded.logits(SequenceRows(TOKENS[33:34], 3, (*segments[:2], last), (0,)))
    return np.concatenate([first, second])


@pytest.mark.parametrize("causal", [True, False])
def test_rows_see_every_segment(tiny: Tiny, causal: bool) -> None:
    reference, cuda = both(tiny("llama").folder, "W32A32")
    assert relative_error(over_segments(cuda, causal), over_segments(reference, causal)) < 1e-4
    cuda.executor.close()


@pytest.mark.parametrize("kv_format", ["KV8", "KV16"])
def test_copied_pages_stand_for_their_source(tiny: Tiny, kv_format: str) -> None:
    loaded = load(tiny("llama").folder, "cuda", "W32A32", kv_format)
    groups = range(len(loaded.program.groups))
    loaded.run(TOKENS[:18], pages=[0, 1])
    loaded.executor.transfer([PageCopy(g, *pair) for g in groups for pair in ((0, 5), (1, 9), (9, 6))])
    expected = loaded.run(TOKENS[20:22], 18, pages=[0, 1])
    np.testing.assert_array_equal(loaded.run(TOKENS[20:22], 18, pages=[5, 6]), expected)
    loaded.executor.close()


@pytest.mark.parametrize("kv_format", ["KV8", "KV16", "KV32"])
def test_spilled_pages_come_back_bit_for_bit(tiny: Tiny, kv_format: str) -> None:
    loaded = load(tiny("gemma3").folder, "cuda", "W32A32", kv_format)
    there_and_back(loaded, tuple(page_bytes(g, kv_format) for g in loaded.program.groups))
    loaded.executor.close()


def generated(loaded: Loaded, requests: list[Request]) -> dict[str, tuple[int, ...]]:
    """What an engine on this executor answers."""
    cache = KVCache(
        tuple(group.window for group in loaded.program.groups), (PAGES,) * len(loaded.program.groups)
    )
    facts = ModelFacts(loaded.program.output.width, 64)
    engine = Engine(loaded.executor, loaded.handle, Scheduler(cache, 4, 16), facts, FakeDetokenizer)
    for request in requests:
        engine.add(request, stream=False)
    answers = {}
    while engine.has_work:
        answers |= {out.request_id: out.outputs[0].token_ids for out in engine.step()}
    engine.close()
    return answers


def test_an_engine_gives_the_same_answers_on_every_executor(tiny: Tiny) -> None:
    """Greedy, drawn with filters on the device, and chosen on the host, in one batch of ragged requests."""
    requests = [
        Request("greedy", tuple(TOKENS[:5]), SamplingParams(temperature=0, max_tokens=4)),
        Request("drawn", tuple(TOKENS[9:11]), SamplingParams(seed=5, top_k=40, top_p=0.9, max_tokens=4)),
        Request("free", tuple(TOKENS[12:14]), SamplingParams(seed=2**64 - 1, min_p=0.01, max_tokens=3)),
        Request("host", tuple(TOKENS[14:19]), SamplingParams(seed=1, logprobs=2, max_tokens=3)),
        Request("late", tuple(TOKENS[19:24]), SamplingParams(seed=8, temperature=0.7, max_tokens=2)),
    ]
    reference, cuda = both(tiny("llama").folder, "W32A32")
    assert generated(cuda, requests) == generated(reference, requests)
