"""Drawing tokens on the device: the bits of its noise, and its tokens, against the CPU's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cuda_tensors import DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ridgeline.execution import noise as cpu_noise
from ridgeline.execution.cuda.arrays import DRAW_FIELDS
from ridgeline.execution.cuda.kernels.draw import draw, draw_configuration, draw_reference
from ridgeline.execution.cuda.kernels.noise import (
    bits_of_blocks,
    bits_of_tokens,
    gumbel,
    gumbel_above,
)
from ridgeline.execution.draw import Drawer
from ridgeline.execution.noise import Address, NoiseSource
from ridgeline.types import Draw, Float32Array

STALE = -77
VOCABULARIES = (1, 7, 8, 50, 288, 1000)

# -------------------------------------------------------------------------------------------- noise


@triton.jit
def _bits_kernel(address, by_token, by_block, BLOCKS: tl.constexpr):
    seed, choice, position = tl.load(address), tl.load(address + 1), tl.load(address + 2)
    ids = tl.arange(0, BLOCKS * 8)
    tl.store(by_token + ids, bits_of_tokens(ids, seed, choice, position))
    blocks, places = tl.arange(0, BLOCKS), tl.arange(0, 8)
    bits = bits_of_blocks(blocks, seed, choice, position)
    tl.store(by_block + blocks[:, None] * 8 + places[None, :], bits)


@triton.jit
def _gumbel_kernel(bits, noise, bound, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(bits + places)
    tl.store(noise + places, gumbel(numbers))
    tl.store(bound + places, gumbel_above(numbers))


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.one_of(st.integers(0, 127), st.integers(0, 2**63 - 1)),
    st.one_of(st.integers(0, 2**20), st.integers(0, 2**63 - 1)),
)
@example(0, 0, 0)
@example(2**64 - 1, 127, 2**31)
@example(2**63, 1, 2**63 - 1)
def test_the_bits_are_those_of_the_cpu(seed: int, choice: int, position: int) -> None:
    address = torch.tensor([signed(seed), choice, position], device=DEVICE)
    by_token, by_block = (torch.full((128,), STALE, dtype=torch.int32, device=DEVICE) for _ in range(2))
    _bits_kernel[(1,)](address, by_token, by_block, BLOCKS=16)
    expected = NoiseSource().all_bits(Address(seed, choice, position), 128).astype(np.int32)
    np.testing.assert_array_equal(by_token.cpu().numpy(), expected)
    np.testing.assert_array_equal(by_block.cpu().numpy(), expected)


def test_the_noise_has_the_bits_of_the_cpu() -> None:
    ends = np.arange(2048)
    numbers = np.concatenate((ends, 2**24 - 1 - ends, np.random.default_rng(0).integers(0, 2**24, 2**18)))
    bits = torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
    noise, bound = (torch.full(bits.shape, torch.nan, device=DEVICE) for _ in range(2))
    _gumbel_kernel[(len(bits) // 2048,)](bits, noise, bound, BLOCK=2048, enable_fp_fusion=False)
    expected = cpu_noise.gumbel(numbers.astype(np.uint32))
    np.testing.assert_array_equal(noise.cpu().numpy(), expected)
    assert (bound.cpu().numpy() >= expected).all()
    tight = numbers > 2**24 * 0.99
    assert (bound.cpu().numpy() - expected)[tight].max() < 0.01


# ------------------------------------------------------------------------------------------- tokens


def packed(draws: Sequence[Draw | None]) -> Tensor:
    """Draws as `arrays` describes them, in rows of a wider tensor."""
    rows = torch.full((len(draws), DRAW_FIELDS + 3), STALE, dtype=torch.int64)
    for row, how in zip(rows, draws, strict=True):
        if how is None:
            row[0] = 0
            continue
        log_min_p = math.log(how.min_p) if how.min_p else -math.inf
        reals = np.array([how.temperature, how.top_p, log_min_p]).view(np.int64).tolist()
        fields = [1, reals[0], how.top_k, reals[1], reals[2], signed(how.seed), how.choice, how.position]
        row[:DRAW_FIELDS] = torch.tensor(fields)
    return rows.to(DEVICE)[:, :DRAW_FIELDS]


def drawn(logits: NDArray[np.float32], draws: Sequence[Draw | None]) -> list[int]:
    """Tokens of the kernel, from a view whose rows are followed by NaN."""
    rows, vocabulary = logits.shape
    wide = torch.full((rows, vocabulary + 3), torch.nan, device=DEVICE)
    wide[:, :vocabulary] = torch.from_numpy(logits)
    tokens = torch.full((rows + 2,), STALE, dtype=torch.int32, device=DEVICE)
    draw(wide[:, :vocabulary], packed(draws), tokens[:rows])
    assert tokens[rows:].tolist() == [STALE, STALE]
    return tokens[:rows].tolist()


def check(logits: Float32Array, draws: Sequence[Draw | None]) -> None:
    assert drawn(logits, draws) == Drawer().rows(logits, draws).tolist()


def random_logits(rows: int, vocabulary: int, kind: str, seed: int) -> Float32Array:
    """Rows in the ways that matter to a search: spread, many equal, mostly forbidden, of extreme scales."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=3, size=(rows, vocabulary))
    if kind == "ties":
        logits = np.round(logits / 2)
    elif kind == "constant":
        logits[:] = logits[:, :1]
    elif kind == "forbidden":
        logits[generator.random(logits.shape) < 0.7] = -np.inf
        logits[:, -1] = 1.0
    elif kind == "tiny":
        logits *= 1e-41
    elif kind == "huge":
        logits *= 1e30
    elif kind == "signs":
        logits = np.where(generator.random(logits.shape) < 0.5, -0.0, 0.0)
    return logits.astype(np.float32)


KINDS = ("spread", "ties", "constant", "forbidden", "tiny", "huge", "signs")

draws_strategy = st.builds(
    Draw,
    temperature=st.one_of(st.sampled_from([0.0, 1.0, 0.7]), st.floats(1e-5, 100)),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 400, 5000]),
    top_p=st.one_of(st.just(1.0), st.just(0.9), st.floats(1e-9, 1, exclude_min=True)),
    min_p=st.one_of(st.just(0.0), st.sampled_from([0.05, 1.0]), st.floats(1e-12, 1)),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 127),
    position=st.integers(0, 2**31 - 1),
)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(VOCABULARIES),
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
    st.lists(draws_strategy, min_size=1, max_size=2),
)
def test_tokens_are_those_of_the_cpu(vocabulary: int, kind: str, seed: int, draws: list[Draw]) -> None:
    check(random_logits(len(draws), vocabulary, kind, seed), draws)


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50},
    {"top_k": 5000},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize(("vocabulary", "kind"), [(288, "spread"), (50, "ties")])
def test_each_filter_and_their_combinations(vocabulary: int, kind: str) -> None:
    draws = [
        Draw(temperature=1.0 + 0.7 * (number % 2), seed=number, position=number, **filters)
        for number, filters in enumerate(FILTERS)
    ]
    check(random_logits(len(draws), vocabulary, kind, 4), draws)


@pytest.mark.parametrize("kind", ["spread", "ties"])
def test_a_row_with_more_candidates_than_its_lanes_hold_on_to(kind: str) -> None:
    lanes, _ = draw_configuration(1000)
    assert 6 * lanes < 1000
    draws = [
        Draw(temperature=1.0, seed=2, top_p=0.999),
        Draw(temperature=3.0, seed=3, top_k=700, top_p=0.9),
        Draw(temperature=9.0, seed=4, min_p=0.3),
    ]
    check(random_logits(len(draws), 1000, kind, 5), draws)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.74}])
def test_a_last_candidate_just_above_what_the_lanes_may_lack(filters: dict[str, Any]) -> None:
    # The lane of token 0 holds 32 and 16 back from it: its own logit is the largest that the hand lacks.
    lanes, _ = draw_configuration(50)
    assert lanes == 16
    logits = np.full((8, 50), -30, np.float32)
    logits[:, [16, 32]] = 1.25
    logits[:, 5] = np.nextafter(np.float32(1), np.float32(2))
    logits[:, 0] = 1
    check(logits, [Draw(temperature=1.0, seed=seed, **filters) for seed in range(8)])


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.zeros((3, 288), np.float32)
    logits[0, [40, 200]] = 5.0
    logits[2] = -np.inf
    logits[2, 287] = -3e38
    greedy = Draw(top_k=7, top_p=0.1, seed=3)
    assert drawn(logits, [greedy] * 3) == [40, 0, 287]
    check(logits, [greedy] * 3)


@pytest.mark.parametrize("how", [Draw(), Draw(temperature=1.0), Draw(temperature=0.7, top_k=3, top_p=0.9)])
def test_a_row_without_a_largest_finite_logit_has_no_token(how: Draw) -> None:
    logits = np.zeros((6, 50), np.float32)
    logits[0, 49] = np.nan
    logits[1, 0] = np.inf
    logits[2] = -np.inf
    logits[3] = np.nan
    logits[4, 20], logits[4, 30] = -np.inf, np.nan
    tokens = drawn(logits, [how] * 6)
    assert tokens[:5] == [-1] * 5
    assert tokens[5] >= 0
    check(logits, [how] * 6)


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_temperature_under_which_the_logits_overflow_has_no_token() -> None:
    logits = np.array([[1e38, 0, 0], [1, 0, 0]], np.float32)
    draws = [Draw(temperature=0.1, top_p=0.9)] * 2
    assert drawn(logits, draws) == [-1, 0]
    check(logits, draws)


def test_an_unwanted_row_is_left_to_the_host() -> None:
    logits = random_logits(3, 288, "spread", 0)
    logits[0] = np.nan
    draws = [None, Draw(temperature=1.0, seed=1), None]
    tokens = drawn(logits, draws)
    assert tokens[0] == tokens[2] == -1
    check(logits, draws)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = random_logits(3, 288, "spread", 8)
    draws = [Draw(temperature=0.8, top_k=20 * i, top_p=0.95, seed=i, position=i) for i in range(3)]
    together = drawn(logits, draws)
    assert drawn(logits[::-1].copy(), draws[::-1]) == together[::-1]
    assert [drawn(logits[i : i + 1], draws[i : i + 1])[0] for i in range(3)] == together


def test_a_large_vocabulary() -> None:
    draws = [
        Draw(temperature=1.0, seed=2**64 - 1, position=77),
        Draw(temperature=0.6, top_k=20, top_p=0.95, seed=11),
        Draw(temperature=1.0, top_p=0.95, seed=12),
        Draw(),
    ]
    check(random_logits(len(draws), 50257, "spread", 9), draws)


def test_the_reference_has_the_same_signature() -> None:
    logits = torch.from_numpy(random_logits(4, 50, "ties", 1))
    draws: list[Draw | None] = [Draw(temperature=1.2, top_k=9, min_p=0.01, seed=2**63 + 5), None, Draw()]
    draws.append(Draw(temperature=0.9, top_p=0.7, choice=3, position=9))
    tokens = torch.full((4,), STALE, dtype=torch.int32)
    draw_reference(logits, packed(draws).cpu(), tokens)
    assert tokens.tolist() == Drawer().rows(logits.numpy(), draws).tolist()
