"""The rarer processors, against transformers' where it has them and against a plain reading of the papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ridgeline.execution import draw
from ridgeline.execution.draw import Candidates, Drawer, Edit
from ridgeline.execution.noise import XTC, Address, NoiseSource
from ridgeline.sampling import filters, processors, repetition
from ridgeline.sampling.history import TokenHistory
from ridgeline.sampling.sampler import Chooser
from ridgeline.types import Request, RequestError, SamplingParams

SIX = np.log(np.array([0.35, 0.25, 0.18, 0.12, 0.07, 0.03]))
Floats = NDArray[np.float64]


class Letters:
    """A vocabulary in which token 97 is "a"."""

    vocab_size = 128
    special_ids = frozenset[int]()
    is_bytewise = True
    bos_id = None

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def row_of(seed: int, size: int = 300) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


def edited(logits: NDArray[np.float32], edit: Edit | None) -> NDArray[np.float32]:
    return logits if edit is None else draw.edited(logits, edit)


def everything(logits: NDArray[Any]) -> Candidates:
    return Candidates(np.arange(logits.size), logits.astype(np.float32))


def softmax(logits: NDArray[Any]) -> Floats:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def said(prompt: str, output: str = "") -> TokenHistory:
    history = TokenHistory(list(prompt.encode()))
    for token in output.encode():
        history.append(token)
    return history


# --------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("seed", range(6))
def test_typical_p_agrees_with_transformers(mass: float, seed: int) -> None:
    import torch
    from transformers.generation.logits_process import TypicalLogitsWarper

    row = row_of(seed)
    theirs = TypicalLogitsWarper(mass)(None, torch.from_numpy(row.astype(np.float64))[None])[0].numpy()
    kept = filters.typical_p(mass)(everything(row))
    assert kept.ids.tolist() == np.flatnonzero(np.isfinite(theirs)).tolist()


def test_bad_words_agree_with_transformers() -> None:
    import torch
    from transformers.generation.logits_process import NoBadWordsLogitsProcessor

    words = ["ab", "c", "abc", "dd"]
    ids = [[*word.encode()] for word in words] + [[*(" " + word).encode()] for word in words]
    theirs = NoBadWordsLogitsProcessor(ids)
    mine = repetition.BadWords(words, Letters())
    for output in ("", "a", "ab", "xab", "d", "ddd", " a", "zd"):
        row = row_of(len(output), 128)
        # Ours counts a word after a space only where it has as many tokens as alone, so theirs bans no more.
        expected = theirs(torch.tensor([[*output.encode()]]), torch.from_numpy(row)[None])[0].numpy()
        assert np.array_equal(edited(row, mine(said("ab", output))), expected), output


# --------------------------------------------------------------------------------- against the papers


@given(st.integers(0, 2**32), st.floats(0.1, 4))
@settings(max_examples=40)
def test_top_n_sigma_keeps_what_is_within_n_deviations(seed: int, n: float) -> None:
    row = row_of(seed)
    row[::7] = -np.inf
    got = processors.top_n_sigma(n)(row)
    finite = row[np.isfinite(row)].astype(np.float64)
    mean = finite.mean()
    deviation = np.sqrt(((finite - mean) ** 2).mean())
    expected = row.astype(np.float64) >= finite.max() - n * deviation
    near = np.abs(row - (finite.max() - n * deviation)) < 1e-4
    assert ((np.isfinite(got) == expected) | near).all()
    assert np.isfinite(got[row.argmax()])
    hotter = processors.top_n_sigma(n)(row / np.float32(4))
    assert ((np.isfinite(hotter) == np.isfinite(got)) | near).all(), "a temperature changes nothing"


def dry_by_hand(context: Sequence[str], allowed: int, breakers: str) -> dict[str, int]:
    """The longest repetition that each letter would go on with, by trying every one."""
    found: dict[str, int] = {}
    text = "".join(context)
    for end in range(len(text) - 1):
        if text[end + 1] in breakers:
            continue
        length = 0
        while length <= end and length < 50 and text[end - length] == text[len(text) - 1 - length]:
            if text[end - length] in breakers:
                break
            length += 1
        if length >= allowed:
            found[text[end + 1]] = max(length, found.get(text[end + 1], 0))
    return found


@given(st.text("ab:c", max_size=40), st.integers(1, 4), st.integers(0, 40))
@settings(max_examples=200)
def test_dry_is_its_definition(text: str, allowed: int, cut: int) -> None:
    params = SamplingParams(dry_multiplier=0.8, dry_base=1.5, dry_allowed_length=allowed)
    row = row_of(1, 128)
    got = edited(row, repetition.Dry(params, Letters())(said(text[:cut], text[cut:])))
    expected = row.astype(np.float64)
    for letter, length in dry_by_hand(text, allowed, ':"*\n').items():
        expected[ord(letter)] -= 0.8 * 1.5 ** (length - allowed)
    assert np.allclose(got, expected, atol=1e-4)


def test_dry_grows_with_its_sequence_and_looks_back_as_far_as_it_may() -> None:
    params = SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=["-->"], dry_allowed_length=2)
    growing = repetition.Dry(params, Letters())
    history = said("xyz-->abcd")
    for token in b"xyz abc":
        history.append(token)
        fresh = repetition.Dry(params, Letters())
        row = row_of(3, 128)
        assert np.array_equal(edited(row, growing(history)), edited(row, fresh(history)))
    penalised = np.flatnonzero(edited(row, growing(history)) != row)
    assert penalised.tolist() == [ord("d")]
    short = repetition.Dry(SamplingParams(dry_multiplier=1.0, dry_penalty_last_n=5), Letters())
    assert short(history) is None
    broken = said("ab-->q ab-->")
    assert repetition.Dry(params, Letters())(broken) is None, "a breaker of three tokens"


def xtc_by_hand(chances: Floats, threshold: float) -> list[int]:
    top = [i for i in range(len(chances)) if chances[i] >= threshold]
    if len(top) < 2:
        return list(range(len(chances)))
    least = min(top, key=lambda i: chances[i])
    return [i for i in range(len(chances)) if i not in top or i == least]


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.2, 0.5])
def test_xtc_excludes_the_top_choices_at_its_share_of_positions(threshold: float) -> None:
    at = filters.xtc(0.4, threshold, 9, 1)
    excluded = 0
    for position in range(2000):
        kept = at(position)(everything(SIX))
        bits = NoiseSource().bits(Address(9, 1, position, XTC), np.array([0]))[0]
        if (int(bits) + 0.5) / 2**24 < 0.4:
            excluded += 1
            assert kept.ids.tolist() == xtc_by_hand(np.exp(SIX), threshold)
        else:
            assert kept.ids.size == 6
    assert abs(excluded - 800) < 4 * np.sqrt(2000 * 0.24)


@pytest.mark.parametrize(("tau", "eta"), [(1.5, 0.1), (3.0, 0.5)])
def test_mirostat_follows_the_paper(tau: float, eta: float) -> None:
    mirostat = filters.Mirostat(tau, eta)
    mu, rng = 2 * tau, np.random.default_rng(4)
    for step in range(60):
        row = row_of(step)
        chances = softmax(row)
        surprise = -np.log2(chances)
        expected = np.flatnonzero((surprise <= mu) | (np.arange(row.size) == row.argmax()))
        kept = mirostat(everything(row))
        again = mirostat(everything(row))
        assert kept.ids.tolist() == again.ids.tolist() == expected.tolist()
        token = int(rng.choice(kept.ids))
        mirostat.append(token)
        observed = -np.log2(chances[token] / chances[expected].sum())
        mu -= eta * (observed - tau)
        assert mirostat.mu == pytest.approx(mu, abs=1e-4)


# -------------------------------------------------------------------------------- the chain as a whole


def drawn(params: SamplingParams, count: int, logits: Floats = SIX) -> Floats:
    """How often each token of a small vocabulary is drawn, as a share."""
    counts, drawer = np.zeros(logits.size), Drawer()
    chooser = Chooser(params, 21, 0, (), (), words=Letters())
    for position in range(count):
        row = chooser.adjusted(logits.astype(np.float32), chooser.adjustment())
        counts[drawer.one(row, chooser.draw(position), chooser.filters(position))] += 1
    return counts


def chi_square(counts: Floats, chances: Floats) -> float:
    expected = chances / chances.sum() * counts.sum()
    assert not counts[expected == 0].any()
    some = expected > 0
    return float(((counts[some] - expected[some]) ** 2 / expected[some]).sum())


ALL_SIX = np.exp(SIX)


@pytest.mark.parametrize(
    ("settings_", "chances"),
    [
        ({"typical_p": 0.5}, np.where(np.arange(6) < 3, ALL_SIX, 0)),
        ({"top_n_sigma": 1.0}, np.where(SIX.max() - SIX.std() <= SIX, ALL_SIX, 0)),
        (
            {"xtc_probability": 1.0, "xtc_threshold": 0.2},
            np.where(np.arange(6) == 0, 0, ALL_SIX),
        ),
        (
            {"xtc_probability": 0.25, "xtc_threshold": 0.1},
            0.75 * ALL_SIX + 0.25 * np.where(np.arange(6) < 3, 0, ALL_SIX) / ALL_SIX[3:].sum(),
        ),
        (
            {"mirostat": 2, "mirostat_tau": 1.1, "mirostat_eta": 0.0},
            np.where(-2 * np.log(2) <= SIX, ALL_SIX, 0),
        ),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_chances_that_are_left(settings_: dict[str, Any], chances: Floats) -> None:
    counts = drawn(SamplingParams(**settings_), 3000)
    assert chi_square(counts, chances) < 20.5, "chi-square, 5 degrees of freedom, 0.1%"


def test_the_order_is_as_documented() -> None:
    # Top-k leaves two, of which XTC sees the shares among these two alone; top-n-sigma sees the whole row.
    params = SamplingParams(top_k=2, xtc_probability=1.0, xtc_threshold=0.41, temperature=1.0)
    assert np.flatnonzero(drawn(params, 50)).tolist() == [1]
    params = SamplingParams(logit_bias={5: 10.0}, bad_words=[chr(5)], top_n_sigma=0.5)
    chooser = Chooser(params, 0, 0, (), (), words=Letters())
    row = chooser.adjusted(np.pad(SIX, (0, 122)).astype(np.float32), chooser.adjustment())
    assert row[5] == -np.inf
    greedy = SamplingParams(temperature=0, xtc_probability=1.0, mirostat=2, typical_p=0.1)
    assert np.flatnonzero(drawn(greedy, 20)).tolist() == [0], "a temperature of 0 takes the best"


def test_what_needs_a_vocabulary_says_so() -> None:
    for settings_ in ({"bad_words": ["x"]}, {"dry_multiplier": 1.0}):
        with pytest.raises(RequestError, match="knows no tokenizer"):
            Chooser(SamplingParams(**settings_), 0, 0, (), ())  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="bad_words"):
        repetition.BadWords([" "], Letters())


# ------------------------------------------------------------------------------------ in the engine


def finished(engine: Any, params: dict[str, SamplingParams], stagger: int = 0) -> dict[str, Any]:
    done, waiting = {}, list(params.items())
    while waiting or engine.has_work:
        for _ in range(len(waiting) if not stagger else min(stagger, len(waiting))):
            name, each = waiting.pop(0)
            engine.add(Request(name, (1, 2, 3, int(name)), each), stream=False)
        for output in engine.step():
            done[output.request_id] = output.outputs
    return done


MANY = [
    {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"mirostat": 2, "mirostat_tau": 2.0},
    {"typical_p": 0.4},
    {"top_n_sigma": 1.2, "temperature": 1.5},
    {"n": 2, "best_of": 4},
    {"mirostat": 2, "xtc_probability": 0.3, "top_p": 0.9, "logprobs": 2, "n": 2},
]


def test_a_request_gives_the_same_tokens_alone_and_in_company() -> None:
    params = {
        str(i): SamplingParams(seed=i, max_tokens=20, **MANY[i % len(MANY)])  # type: ignore[arg-type]
        for i in range(18)
    }
    together = finished(make_engine(FakeExecutor()), params)
    staggered = finished(make_engine(FakeExecutor(pages=(12,)), max_num_seqs=4), params, stagger=1)
    alone = {name: finished(make_engine(FakeExecutor()), {name: each})[name] for name, each in params.items()}
    assert together == alone == staggered


def test_best_of_gives_the_most_probable_answers() -> None:
    params = SamplingParams(seed=4, max_tokens=12, n=6, logprobs=0)
    (every,) = finished(make_engine(FakeExecutor()), {"0": params}).values()
    best = SamplingParams(seed=4, max_tokens=12, n=2, best_of=6)
    engine = make_engine(FakeExecutor())
    engine.add(Request("0", (1, 2, 3, 0), best))
    told = []
    while engine.has_work:
        told += engine.step()
    (output,) = told
    means = {each.token_ids: np.mean([p.logprob for p in each.logprobs]) for each in every}
    ranked = sorted(means, key=lambda tokens: -means[tokens])
    assert [each.token_ids for each in output.outputs] == ranked[:2]
    assert [each.index for each in output.outputs] == [0, 1]
    assert all(each.logprobs is None for each in output.outputs)
    with pytest.raises(RequestError, match="best_of"):
        SamplingParams(n=3, best_of=2)
