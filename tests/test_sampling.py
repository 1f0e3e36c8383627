"""Noise, processors, the sampler and stop strings, against published vectors, formulas and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from fake_executor import NO_WORK
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ridgeline import native
from ridgeline.execution import draw
from ridgeline.execution.draw import Candidates, Edit
from ridgeline.execution.noise import SEED, Address, NoiseSource, derived_seed, gumbel, gumbel_bound
from ridgeline.sampling import processors
from ridgeline.sampling.history import TokenHistory
from ridgeline.sampling.sampler import Chooser, Sampled, Sampler
from ridgeline.sampling.stop import StopMatcher
from ridgeline.types import SamplingParams, Step, StepResult

VOCABULARY = 200

# -------------------------------------------------------------------------------------------- noise

ALL = 2**64 - 1


def philox4x64(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x64-10 from the paper's description, in whole numbers of any size."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ k[0], second & ALL, (first >> 64) ^ c[3] ^ k[1], first & ALL]
        k = [(k[0] + 0x9E3779B97F4A7C15) & ALL, (k[1] + 0xBB67AE8584CAA73B) & ALL]
    return c


# The known answers that come with Random123, the authors' library.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
        ),
        (
            (ALL, ALL, ALL, ALL),
            (ALL, ALL),
            (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
        ),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    assert tuple(philox4x64(counter, key)) == words


@given(
    seed=st.integers(0, ALL),
    choice=st.integers(0, 127),
    position=st.integers(0, 2**32),
    token=st.integers(0, 300_000),
)
def test_bits_are_those_of_the_documented_address(seed: int, choice: int, position: int, token: int) -> None:
    block = philox4x64((1 + token // 8, position, choice, 0), (seed, 0))
    half = block[token % 8 // 2] >> 32 * (token % 2) & 0xFFFFFFFF
    bits = NoiseSource().bits(Address(seed, choice, position), np.array([token]))
    assert bits.tolist() == [half >> 8]


@given(
    ids=st.lists(
        st.one_of(st.integers(0, 60), st.integers(0, 200_000), st.integers(4000, 4100)),
        unique=True,
        max_size=60,
    )
)
@example(ids=[])
@example(ids=[0, 807, 808, 1623, 1624])
def test_bits_of_a_token_do_not_depend_on_which_others_are_asked_for(ids: list[int]) -> None:
    source, address = NoiseSource(), Address(99, 1, 7)
    together = source.bits(address, np.array(sorted(ids), np.int64))
    alone = [int(source.bits(address, np.array([i]))[0]) for i in sorted(ids)]
    assert together.tolist() == alone
    assert together.tolist() == source.all_bits(address, 200_001)[sorted(ids)].tolist()


def test_every_part_of_an_address_changes_the_noise() -> None:
    ids = np.arange(64)
    addresses = [
        Address(1, 0, 5),
        Address(2, 0, 5),
        Address(1, 1, 5),
        Address(1, 0, 6),
        Address(1, 0, 5, SEED),
    ]
    source = NoiseSource()
    rows = [source.bits(address, ids).tobytes() for address in addresses]
    assert len(set(rows)) == len(rows)


def test_gumbel_is_the_stated_function_on_a_grid() -> None:
    bits = np.concatenate([np.arange(1000), np.arange(0, 2**24, 997), np.arange(2**24 - 1000, 2**24)]).astype(
        np.uint32
    )
    noise = gumbel(bits)
    exact = -np.log(-np.log((bits.astype(np.longdouble) + 0.5) / 2**24))
    assert np.abs(noise - exact).max() <= 2.0**-21 + 2.0**-20, "half a grid step, and float32 above 16"
    assert (np.diff(noise[np.argsort(bits, kind="stable")]) >= 0).all()
    scaled = noise[np.abs(noise) < 16].astype(np.float64) * 2**20
    assert (scaled == np.rint(scaled)).all()
    assert gumbel_bound(0) == noise.min()
    assert gumbel_bound(2**24 - 1) == noise.max()


@pytest.mark.full
def test_no_value_of_the_noise_lies_near_a_rounding_boundary() -> None:
    if np.finfo(np.longdouble).nmant < 60:
        pytest.skip("needs a long double that is wider than a double")
    for start in range(0, 2**24, 2**21):
        bits = np.arange(start, start + 2**21, dtype=np.longdouble)
        exact = -np.log(-np.log((bits + 0.5) / 2**24)) * 2**20
        margin = np.abs(exact - np.floor(exact) - np.longdouble(0.5)) / 2**20
        assert (margin / (1 + np.abs(exact) / 2**20)).min() > 90 * 2.0**-53


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(NoiseSource().bits(Address(5, 0, 0), np.arange(200_000)))
    ordered = np.sort(noise)
    expected = np.exp(-np.exp(-ordered))
    # Kolmogorov-Smirnov: 1.63 / sqrt(n) is the 1% point.
    assert np.abs(expected - np.arange(noise.size) / noise.size).max() < 1.63 / np.sqrt(noise.size)


def test_seeds_derived_for_requests_differ_and_repeat() -> None:
    seeds = [derived_seed(seed, arrival) for seed in (0, 1, -1) for arrival in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derived_seed(3, 4) == derived_seed(3, 4)


# --------------------------------------------------------------------------------------- processors

rows = st.lists(st.integers(-40, 40), min_size=1, max_size=300).map(lambda v: np.array(v, np.float32) / 4)


def random_row(seed: int, size: int = VOCABULARY, spread: float = 3) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def ranked(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Ids by descending logit, then ascending id."""
    return np.lexsort((np.arange(logits.size), -logits))


def edited(logits: NDArray[np.float32], edit: Edit | None) -> NDArray[np.float32]:
    return logits if edit is None else draw.edited(logits, edit)


def everything(logits: NDArray[np.float32]) -> Candidates:
    return Candidates(np.arange(logits.size), logits)


@given(rows, st.integers(1, 320))
def test_largest_keeps_the_first_among_equals(values: NDArray[np.float32], count: int) -> None:
    assert draw.largest(values, count).tolist() == sorted(ranked(values)[:count].tolist())


@pytest.mark.parametrize("count", [1, 2, 40, 512, 513, 4000])
@pytest.mark.parametrize("values", [4, 1000, 10**9])
def test_largest_of_a_long_row_equals_sorting_it(count: int, values: int) -> None:
    row = np.random.default_rng(count).integers(0, values, 5000).astype(np.float32)
    assert draw.largest(row, count).tolist() == sorted(ranked(row)[:count].tolist())


@given(rows, st.floats(0.01, 0.999))
def test_top_p_is_the_smallest_sufficient_set(values: NDArray[np.float32], p: float) -> None:
    kept = draw.top_p(p)(everything(values))
    probabilities = np.exp(values.astype(np.float64) - values.max())
    probabilities /= probabilities.sum()
    order = ranked(values)
    assert kept.ids.tolist() == sorted(order[: kept.ids.size].tolist()), "the most probable ones"
    assert np.array_equal(kept.logits, values[kept.ids])
    assert probabilities[order[: kept.ids.size]].sum() >= p - 1e-6
    assert probabilities[order[: kept.ids.size - 1]].sum() < p + 1e-6


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("p", [1e-9, 0.2, 0.95, 0.9999])
def test_top_p_of_a_long_row_equals_sorting_it(spread: float, p: float) -> None:
    row = np.round(random_row(8, 5000, spread) * 8) / np.float32(8)  # many equal ones
    row[100:300] = -np.inf
    weights = draw.weights(row - row.max())
    order = ranked(row)
    mass = np.cumsum(weights[order])
    expected = order[: int(np.searchsorted(mass, p * mass[-1])) + 1]
    assert draw.top_p(p)(everything(row)).ids.tolist() == sorted(expected.tolist())


def test_weights_are_exponentials_in_whole_numbers() -> None:
    distances = -np.concatenate((np.linspace(0, 40, 100_001), 10.0 ** np.arange(-45, 38))).astype(np.float32)
    weights = draw.weights(distances)
    exact = np.exp(distances.astype(np.float64)) * 2**30
    assert (np.abs(weights - exact) <= 0.51 + exact * 3e-7).all()
    assert (weights == np.trunc(weights)).all()
    assert draw.weights(np.array([0, -21.5, -np.inf], np.float32)).tolist() == [2**30, 0, 0]


def test_filters_never_leave_nothing() -> None:
    row = random_row(3)
    for narrow in (draw.top_k(1), draw.top_p(1e-9), draw.min_p(1.0)):
        assert narrow(everything(row)).ids.tolist() == [int(row.argmax())]
    tied = np.zeros(50, np.float32)
    assert draw.min_p(1.0)(everything(tied)).ids.size == 50
    assert draw.top_k(3)(everything(tied)).ids.tolist() == [0, 1, 2]
    assert draw.top_p(0.1)(everything(tied)).ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 0.7},
        {"top_k": 17},
        {"top_p": 0.8},
        {"min_p": 0.07},
        {"temperature": 1.7, "top_k": 90, "top_p": 0.93, "min_p": 0.02},
        {"temperature": 0.4, "top_p": 0.99, "min_p": 0.001},
    ],
)
def test_filters_agree_with_transformers(settings_: dict[str, float], seed: int) -> None:
    import torch
    from transformers.generation import logits_process as theirs

    scores = torch.from_numpy(random_row(seed, 5000))[None]
    makers = {
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }
    expected = scores
    for name, value in settings_.items():
        expected = makers[name](value)(None, expected)
    params = SamplingParams(**settings_)  # type: ignore[arg-type]
    kept = draw.candidates(scores[0].numpy(), Chooser(params, 0, 0, (), ()).draw(0))
    mine = np.full(5000, -np.inf, np.float32)
    mine[kept.ids] = kept.logits
    assert np.array_equal(mine, expected[0].numpy())


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_agrees_with_transformers(penalty: float) -> None:
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    prompt, output = [3, 5, 5, 9], [9, 120, 7, 7]
    history = TokenHistory(prompt)
    for token in output:
        history.append(token)
    row = random_row(1)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + output]), torch.from_numpy(row)[None]
    )
    mine = edited(row, processors.repetition_penalty(penalty)(history))
    assert np.array_equal(mine, theirs[0].numpy())


def test_frequency_and_presence_count_the_output_only() -> None:
    history = TokenHistory([1, 1, 2])
    for token in (2, 3, 3, 3):
        history.append(token)
    row = random_row(2)
    got = row
    for editor in (processors.frequency_penalty(0.5), processors.presence_penalty(0.25)):
        got = edited(got, editor(history))
    expected = row.copy()
    expected[2] -= 0.5 + 0.25
    expected[3] -= 3 * 0.5 + 0.25
    assert np.allclose(got, expected, atol=1e-6)
    assert np.array_equal(got[[0, 1, 4]], row[[0, 1, 4]])


def test_bias_and_ban_touch_only_their_tokens() -> None:
    row = random_row(4)
    history = TokenHistory([])
    biased = edited(row, processors.logit_bias({7: 5.0, 0: -100.0})(history))
    assert np.flatnonzero(biased != row).tolist() == [0, 7]
    assert biased[7] == row[7] + np.float32(5)
    ban = processors.end_ban(2, [4, 9])
    for generated in range(4):
        banned = np.flatnonzero(np.isneginf(edited(row, ban(history)))).tolist()
        assert banned == ([4, 9] if generated < 2 else [])
        history.append(1)


@given(st.lists(st.integers(0, 30), max_size=20), st.lists(st.integers(0, 500), max_size=300))
@settings(max_examples=30)
def test_history_counts_as_a_dictionary_would(prompt: list[int], output: list[int]) -> None:
    history = TokenHistory(prompt)
    for token in output:
        history.append(token)
    counted = dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True))
    assert counted == {token: output.count(token) for token in {*prompt, *output}}
    assert history.generated == len(output)


def test_processors_run_in_the_documented_order() -> None:
    # The bias makes token 0 positive, so the penalty divides it; in another order it would multiply.
    params = SamplingParams(
        logit_bias={0: 4.0}, repetition_penalty=2.0, presence_penalty=1.0, temperature=0.5
    )
    chooser = Chooser(params, 0, 0, [0], ())
    chooser.append(0)
    row = np.array([-2.0, 0.25], np.float32)
    kept = draw.candidates(chooser.adjusted(row, chooser.adjustment()), chooser.draw(1))
    assert kept.logits.tolist() == [((-2.0 + 4.0) / 2.0 - 1.0) / 0.5, 0.5]
    assert row.tolist() == [-2.0, 0.25], "the executor's logits stay as they are"


# ------------------------------------------------------------------------------------------ sampler


@dataclass(frozen=True)
class Row:
    chooser: Chooser
    token_ids: Sequence[int]

    @property
    def prompt_length(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class RowPlan:
    """By default every row's token is drawn by the executor where that can be."""

    sampled: Sequence[Row]
    on_host: bool = False
    pooled: bool = False

    @property
    def positions(self) -> list[int]:
        return [len(row.token_ids) for row in self.sampled]

    @property
    def certain(self) -> range:
        return range(len(self.sampled))

    @property
    def step(self) -> Step:
        kinds = [(row.chooser, len(row.token_ids)) for row in self.sampled]
        if self.on_host:
            return Step(())
        return Step((), tuple(None if c.needs_logits else c.draw(at) for c, at in kinds))


@dataclass(frozen=True)
class Done:
    logits: NDArray[np.float32]
    step: Step

    def result(self) -> StepResult:
        draws = self.step.draws
        return StepResult(
            draw.undrawn(self.logits, draws), draw.Drawer().rows(self.logits, draws), 0.0, NO_WORK
        )


def row_of(
    params: SamplingParams, seed: int = 0, tokens: Sequence[int] = (1, 2), ends: Sequence[int] = ()
) -> Row:
    return Row(Chooser(params, seed, 0, tokens, ends), tokens)


def choose(logits: NDArray[np.float32], sampled: Sequence[Row]) -> list[Sampled]:
    """The tokens of the rows, which must be the same whoever draws them."""
    plans = [RowPlan(sampled, on_host) for on_host in (False, True)]
    drawn, *chosen = (
        Sampler(drawer).finish(Done(logits, plan.step), plan) for plan in plans for drawer in DRAWERS
    )
    assert all(each == drawn for each in chosen)
    return drawn


DRAWERS = (draw.Drawer(), native.Drawer(native.Team(2), native.isa_levels()[0]))
UNSAMPLED = "the largest logit, over the temperature, is not a finite number"
MANY_PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.6, top_p=0.9),
    SamplingParams(temperature=1.5, top_k=20, min_p=0.05, logprobs=3),
    SamplingParams(temperature=0, repetition_penalty=1.2, logprobs=0),
    SamplingParams(temperature=2.0, presence_penalty=1.0, logit_bias={5: 2.0}),
]


def test_a_row_is_sampled_as_if_it_were_alone() -> None:
    logits = np.stack([random_row(i, 3000) for i in range(24)])
    plan = [row_of(MANY_PARAMS[i % len(MANY_PARAMS)], seed=i, tokens=range(i + 1)) for i in range(24)]
    together = choose(logits, plan)
    alone = [choose(logits[i : i + 1], [plan[i]])[0] for i in range(24)]
    assert together == alone


def test_greedy_ties_go_to_the_lowest_id_alone_and_in_a_batch() -> None:
    logits = np.zeros((3, 40), np.float32)
    logits[1, [7, 30]] = 2
    logits[2, [39, 38]] = 1
    greedy = [row_of(SamplingParams(temperature=0)) for _ in range(3)]
    assert [s.token_id for s in choose(logits, greedy)] == [0, 7, 38]
    mixed = [*greedy[:2], row_of(SamplingParams(temperature=0, logprobs=1))]
    assert [s.token_id for s in choose(logits, mixed)] == [0, 7, 38]


@given(
    st.integers(0, 2**32),
    st.sampled_from([300, 1000, 5000]),
    st.sampled_from([0.0, 0.01, 1.0, 4.0, 30.0]),
)
@settings(max_examples=60)
def test_pruning_never_changes_the_winner(seed: int, size: int, spread: float) -> None:
    logits = random_row(seed, size, spread)
    (sampled,) = choose(logits[None], [row_of(SamplingParams(), seed=seed)])
    noise = gumbel(NoiseSource().bits(Address(seed, 0, 2), np.arange(size)))
    assert sampled.token_id == int((logits + noise).argmax())


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.07, 0.03]], np.float32))
    draws = 4000
    counts = np.zeros(5)
    sampler = Sampler(DRAWERS[1])
    chooser = Chooser(SamplingParams(), 11, 0, (), ())
    for position in range(draws):
        plan = RowPlan([Row(chooser, range(position))])
        counts[sampler.finish(Done(logits, plan.step), plan)[0].token_id] += 1
    expected = draws * np.exp(logits[0].astype(np.float64))
    assert ((counts - expected) ** 2 / expected).sum() < 18.47, "chi-square, 4 degrees of freedom, 0.1%"


def test_filtered_tokens_are_never_drawn() -> None:
    logits = random_row(8, 500)[None]
    allowed = {
        "top_k": set(ranked(logits[0])[:5].tolist()),
        "min_p": set(np.flatnonzero(logits[0] >= logits[0].max() + np.log(0.01)).tolist()),
    }
    for name, value in (("top_k", 5), ("min_p", 0.01)):
        params = SamplingParams(temperature=5.0 if name == "top_k" else 1.0, **{name: value})  # type: ignore[arg-type]
        drawn = {choose(logits, [row_of(params, seed=seed)])[0].token_id for seed in range(200)}
        assert drawn <= allowed[name]
        assert len(drawn) > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", MANY_PARAMS)
def test_a_row_that_cannot_be_sampled_fails_alone(params: SamplingParams, bad: float) -> None:
    logits = np.stack([random_row(i) for i in range(3)])
    logits[1, 77] = bad
    plan = [row_of(params, seed=i) for i in range(3)]
    sampled = choose(logits, plan)
    assert [s.error is None for s in sampled] == [True, False, True]
    assert sampled[1].error == UNSAMPLED
    assert sampled[0] == choose(logits[:1], plan[:1])[0]


def test_a_row_whose_every_token_is_forbidden_fails() -> None:
    params = SamplingParams(temperature=0, min_tokens=1)
    (sampled,) = choose(np.zeros((1, 3), np.float32), [row_of(params, ends=(0, 1, 2))])
    assert sampled.error == UNSAMPLED
    (sampled,) = choose(
        np.array([[3e38, 1.0]], np.float32), [row_of(SamplingParams(temperature=1e-4, top_p=0.5))]
    )
    assert sampled.error == UNSAMPLED


def test_an_exception_in_one_row_fails_that_row() -> None:
    logits = np.stack([random_row(i) for i in range(2)])
    broken = row_of(SamplingParams(logit_bias={VOCABULARY + 5: 1.0}))
    plan = RowPlan([row_of(SamplingParams(seed=1)), broken], on_host=True)
    for drawer in DRAWERS:
        sampled = Sampler(drawer).finish(Done(logits, plan.step), plan)
        assert sampled[0] == choose(logits[:1], [row_of(SamplingParams(seed=1))])[0]
        assert sampled[1].error is not None
        assert str(VOCABULARY + 5) in sampled[1].error


def test_logprobs_are_those_of_the_raw_model() -> None:
    import torch

    logits = random_row(6, 1000)
    params = SamplingParams(temperature=3.0, top_k=4, presence_penalty=2.0, logprobs=5)
    (sampled,) = choose(logits[None], [row_of(params)])
    expected = torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), 0).numpy()
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(expected[sampled.token_id], abs=1e-5)
    assert [token for token, _ in sampled.logprobs.top] == ranked(logits)[:5].tolist()
    assert sampled.logprobs.rank == 1 + ranked(logits).tolist().index(sampled.token_id)
    assert [p for _, p in sampled.logprobs.top] == pytest.approx(
        expected[ranked(logits)[:5]].tolist(), abs=1e-5
    )
    (sampled,) = choose(logits[None], [row_of(replace(params, logprobs=0))])
    assert sampled.logprobs is not None
    assert sampled.logprobs.top == ()


# --------------------------------------------------------------------------------------------- stop


def naive_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The match that ends first, the longest of those: found by looking at every prefix."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@given(
    text=st.text("ab", max_size=40),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=10),
    include=st.booleans(),
)
@example(text="aaab", stops=["aab"], cuts=[], include=False)
@example(text="abababba", stops=["ababba", "bbb"], cuts=[3], include=True)
@example(text="aabaab", stops=["aabaaa", "baab"], cuts=[2, 4], include=False)
@settings(max_examples=300)
def test_stop_strings_are_found_and_never_shown(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    expected, stop = naive_stop(text, stops, include)
    matcher = StopMatcher(stops, include)
    shown = ""
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    for begin, end in pairwise(edges):
        shown += matcher.push(text[begin:end])
        assert expected.startswith(shown), "nothing that a stop string takes back was shown"
    shown += matcher.flush()
    assert (shown, matcher.matched) == (expected, stop)
    if stop is not None:
        assert matcher.push("more") + matcher.flush() == ""


def test_text_that_cannot_begin_a_stop_string_is_shown_at_once() -> None:
    matcher = StopMatcher(["</end>", "\n\n"])
    assert matcher.push("one\ntwo <") == "one\ntwo "
    assert matcher.push("/en") == ""
    assert matcher.push("try> x") == "</entry> x"
    assert matcher.push("\n") == ""
    assert matcher.push("\nrest") == ""
    assert (matcher.matched, matcher.flush()) == ("\n\n", "")
