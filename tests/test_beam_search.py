"""Beam search against transformers' on the same weights, and against trying every continuation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ridgeline import LLM, RequestError
from ridgeline.apps.beam_search import BeamSearchParams, beam_search

if TYPE_CHECKING:
    from tiny_models import TinyModel

PROMPT = [5, 9, 40, 77]


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], TinyModel]) -> TinyModel:
    return tiny("odd")


@pytest.fixture(scope="module")
def llm(model: TinyModel) -> Iterator[LLM]:
    options = {"weights": "W32A32", "threads": 1, "kv_cache_memory_bytes": 4 << 20}
    with LLM(str(model.folder), **options) as llm:
        yield llm


def logprobs(model: TinyModel, tokens: list[int]) -> np.ndarray:
    logits = model.logits(tokens)[-1].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_two_tokens_by_all_the_vocabulary(llm: LLM, model: TinyModel) -> None:
    prompt = [5, 9, 40]
    params = BeamSearchParams(beam_width=50, max_tokens=2, ignore_eos=True)
    (found,) = beam_search(llm, [prompt], params)
    first = logprobs(model, prompt)
    every = {
        (a, b): first[a] + second for a in range(50) for b, second in enumerate(logprobs(model, [*prompt, a]))
    }
    best = sorted(every, key=lambda pair: -every[pair])[:50]
    # Equals may change places by the last bits.
    assert len({beam.token_ids for beam in found} & set(best)) >= 49
    assert found[0].token_ids == best[0]
    for beam in found:
        assert beam.cumulative_logprob == pytest.approx(every[beam.token_ids], abs=1e-3)
        assert beam.finish_reason == "length"


def test_one_beam_is_greedy_and_more_are_no_worse(llm: LLM) -> None:
    from ridgeline import SamplingParams

    prompt = [5, 9, 40]
    greedy = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].outputs[
        0
    ]
    (single,) = beam_search(llm, [prompt], BeamSearchParams(1, 8, ignore_eos=True))
    assert single[0].token_ids == greedy.token_ids
    both = beam_search(llm, [prompt, [7]], BeamSearchParams(4, 8, ignore_eos=True))
    assert both[0][0].cumulative_logprob >= single[0].cumulative_logprob - 1e-4
    assert both[1] == beam_search(llm, [[7]], BeamSearchParams(4, 8, ignore_eos=True))[0], "as if alone"


def test_beams_end_at_an_end_token(llm: LLM) -> None:
    ends = llm.tokenizer.eos_ids
    found = beam_search(llm, [[5, 9]], BeamSearchParams(8, 12, length_penalty=0.0))[0]
    for beam in found:
        assert (beam.finish_reason == "stop") == (beam.token_ids[-1] in ends)
        assert ends.isdisjoint(beam.token_ids[:-1])


def test_values_out_of_range_are_refused() -> None:
    for width, length in ((0, 5), (51, 5), (2, 0)):
        with pytest.raises(RequestError):
            BeamSearchParams(width, length)
