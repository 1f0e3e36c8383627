"""Beam search against trying every continuation, and its rules against plainer ones on made-up models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline import LLM, RequestError
from ridgeline.apps.beam_search import Beam, BeamSearchParams, beam_search
from ridgeline.model.detokenizer import ByteDetokenizer, Detokenizer, TokenBytes, WindowDetokenizer
from ridgeline.sampling.beam_search import BeamSearch
from ridgeline.sampling.stop import StopMatcher
from ridgeline.types import TokenLogprobs

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


# ------------------------------------------------------------------------------- the algorithm alone

LETTERS = "abcdef$"
END = 6


class Spelled:
    """A detokenizer: each token is a letter."""

    def push(self, token_id: int) -> str:
        return LETTERS[token_id]

    def finish(self) -> str:
        return ""

    def copy(self) -> Spelled:
        return self


def made_up(seed: int, tokens: tuple[int, ...]) -> TokenLogprobs:
    """A language model of seven tokens, best first."""
    values = np.random.default_rng([seed, *tokens]).normal(size=7) * 1.5
    values -= np.log(np.exp(values).sum())
    order = np.argsort(-values)
    return TokenLogprobs(int(order[0]), 0.0, tuple((int(t), float(values[t])) for t in order))


def searched(seed: int, params: BeamSearchParams, limit: int) -> tuple[list[Beam], int]:
    """What a search finds, and how many rounds it took."""
    search, rounds = BeamSearch((9,), params, {END}, limit, lambda skip: Spelled()), 0
    while prompts := search.prompts:
        rounds += 1
        assert all(prompt[0] == 9 for prompt in prompts)
        search.extend([made_up(seed, prompt[1:]) for prompt in prompts])
    return search.best(), rounds


def plainly(seed: int, params: BeamSearchParams, limit: int) -> list[tuple[int, ...]]:
    """The same without an end before the limit: every ended beam is kept, and texts are searched whole."""
    going: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    ended: list[tuple[tuple[int, ...], float]] = []
    for _ in range(limit):
        grown = []
        for tokens, total in going:
            for token, logprob in made_up(seed, tokens).top[: 2 * params.beam_width]:
                longer = (*tokens, token)
                text = "".join(LETTERS[each] for each in longer)
                over = token == END or token in params.stop_token_ids or any(s in text for s in params.stop)
                (ended if over else grown).append((longer, total + logprob))
        going = sorted(grown, key=lambda each: -each[1])[: params.beam_width]
    ranked = sorted(ended + going, key=lambda each: -each[1] / len(each[0]) ** params.length_penalty)
    return [tokens for tokens, _ in ranked[: params.n or params.beam_width]]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 3),
    told=st.integers(1, 3),
    limit=st.integers(1, 7),
    penalty=st.sampled_from([0.0, 1.0, 0.6, 2.0, -1.0]),
    stop=st.lists(st.text("abc", min_size=1, max_size=3), max_size=2),
    ids=st.lists(st.integers(0, 5), max_size=2),
)
def test_an_end_before_the_limit_changes_nothing(
    seed: int, width: int, told: int, limit: int, penalty: float, stop: list[str], ids: list[int]
) -> None:
    options = {"length_penalty": penalty, "stop": stop, "stop_token_ids": ids, "n": min(told, width)}
    params = BeamSearchParams(width, None, **options)
    found, rounds = searched(seed, params, limit)
    assert [beam.token_ids for beam in found] == plainly(seed, params, limit)
    assert rounds <= limit
    for beam in found:
        whole = "".join(LETTERS[each] for each in beam.token_ids)
        if beam.finish_reason == "length":
            assert (beam.text, len(beam.token_ids), beam.stop_reason) == (whole, limit, None)
        elif isinstance(beam.stop_reason, str):
            assert whole == beam.text + beam.stop_reason
            assert beam.stop_reason in stop
        else:
            assert whole == beam.text + LETTERS[beam.token_ids[-1]]
            assert beam.stop_reason in (None, *ids)


def test_searches_end_as_soon_as_nothing_can_change() -> None:
    spent = [searched(seed, BeamSearchParams(2, None, length_penalty=0.0), 100)[1] for seed in range(20)]
    assert max(spent) < 100, "a sum of log-probabilities only falls"
    early = [searched(seed, BeamSearchParams(3, None, early_stopping=True), 100) for seed in range(20)]
    whole = [searched(seed, BeamSearchParams(3, None), 100) for seed in range(20)]
    assert all(rounds < 100 for _, rounds in early)
    assert all(rounds > most for (_, rounds), (_, most) in zip(whole, early, strict=True))
    assert all(beam.finish_reason == "stop" for found, _ in early for beam in found)


def test_what_has_ended_a_beam_is_shown_where_that_is_wanted() -> None:
    for stop, ids in ((["a", "b", "cd"], []), ([], [0, 1, 2])):
        options = {"stop": stop, "stop_token_ids": ids}
        hidden, _ = searched(3, BeamSearchParams(3, None, **options), 5)
        shown, _ = searched(3, BeamSearchParams(3, None, include_stop_str_in_output=True, **options), 5)
        assert any(beam.finish_reason == "stop" for beam in hidden)
        for short, long in zip(hidden, shown, strict=True):
            assert long.token_ids == short.token_ids
            whole = "".join(LETTERS[each] for each in long.token_ids)
            assert long.text == (short.text if long.token_ids[-1] == END else whole)


def test_log_probabilities_add_up_and_have_ranks() -> None:
    for beam in searched(5, BeamSearchParams(3, None, logprobs=2), 6)[0]:
        assert beam.logprobs is not None
        assert [each.token_id for each in beam.logprobs] == list(beam.token_ids)
        assert sum(each.logprob for each in beam.logprobs) == pytest.approx(beam.cumulative_logprob)
        for at, each in enumerate(beam.logprobs):
            top = made_up(5, beam.token_ids[:at]).top
            assert each.top == top[:2]
            assert each.rank is not None
            assert top[each.rank - 1] == (each.token_id, each.logprob)


@pytest.mark.parametrize("byte_level", [True, False])
def test_a_copy_of_a_text_goes_on_alone(byte_level: bool) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
    if byte_level:
        alphabet = {chr(c): i for i, c in enumerate(range(0x100, 0x120))}
        alphabet |= {c: 32 + i for i, c in enumerate("ab\u00e2\u0124\u00ac")}
        library = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
        library.decoder = tokenizers.decoders.ByteLevel()
        table = TokenBytes.of(library)
        assert table is not None
        first: Detokenizer = ByteDetokenizer(table, frozenset())
        tokens = [32, 34]  # "a", and the first byte of a character of three
    else:
        words = {"one": 0, "two": 1, "##s": 2}
        library = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="one"))
        library.decoder = tokenizers.decoders.WordPiece()
        first, tokens = WindowDetokenizer(library, frozenset()), [0, 1]
    for token in tokens:
        first.push(token)
    second = first.copy()
    more = [33, 33] if byte_level else [2, 1]
    alone = [second.push(token) for token in more] + [second.finish()]
    assert [first.push(token) for token in more] + [first.finish()] == alone


def test_a_copy_of_a_matcher_goes_on_alone() -> None:
    first = StopMatcher(["stop"])
    assert first.push("a st") == "a "
    second = first.copy()
    assert second.push("op") == ""
    assert (first.matched, second.matched) == (None, "stop")
    assert first.push("ay") == "stay"
