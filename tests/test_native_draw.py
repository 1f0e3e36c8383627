"""The drawing of tokens in C++ against the rule in NumPy, at every level and number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator
from numpy.typing import NDArray

from ridgeline import native
from ridgeline.execution import draw
from ridgeline.execution.draw import NOT_DRAWN, Adjustment, Edit
from ridgeline.execution.noise import Address, NoiseSource, gumbel
from ridgeline.sampling.sampler import Chooser
from ridgeline.types import Draw, Float32Array, Int32Array, SamplingParams

TEAMS = [native.Team(1), native.Team(2)]
DRAWERS = [native.Drawer(team, isa) for isa in native.isa_levels() for team in TEAMS]
ORACLE = draw.Drawer()
KINDS = ["spread", "flat", "steep", "ties", "constant", "forbidden", "tiny", "huge", "zeros", "broken"]


def row_of(generator: Generator, kind: str, size: int) -> NDArray[np.float64]:
    row = generator.normal(scale=3, size=size)
    match kind:
        case "flat":
            return row / 300
        case "steep":
            return row * 10
        case "ties":
            return np.round(row / 2)
        case "constant":
            return np.full(size, row[0])
        case "forbidden":
            return np.where((generator.random(size) < 0.7) & (np.arange(size) > 0), -np.inf, row)
        case "tiny":
            return row * 1e-41
        case "huge":
            return row * 1e30
        case "zeros":
            return np.where(generator.random(size) < 0.5, -0.0, 0.0)
        case "broken":
            row[generator.integers(size)] = generator.choice([np.nan, np.inf, -np.nan])
    return row


def mask_of(bits: NDArray[np.bool_]) -> Int32Array:
    padded = np.zeros(-(-bits.size // 32) * 32, bool)
    padded[: bits.size] = bits
    return np.packbits(padded, bitorder="little").view(np.int32)


def draw_of(generator: Generator) -> Draw | None:
    if generator.random() < 0.1:
        return None
    return Draw(
        temperature=float(generator.choice([0, 1, 0.3, 0.8, 1.3, 5, generator.random() + 0.01])),
        top_k=int(generator.choice([0, 0, 1, 2, 20, 500, 10**6])),
        top_p=float(generator.choice([1, 1, 1e-9, 0.1, 0.5, 0.95, 0.9999])),
        min_p=float(generator.choice([0, 0, 1e-5, 0.05, 1])),
        seed=int(generator.integers(2**64, dtype=np.uint64)),
        choice=int(generator.integers(5)),
        position=int(generator.integers(2000)),
    )


def adjustment_of(generator: Generator, size: int) -> Adjustment | None:
    if generator.random() < 0.3:
        return None
    mask = None
    if generator.random() < 0.6:
        bits = generator.random(size) < generator.choice([0.002, 0.1, 0.5, 0.99])
        bits[generator.integers(size)] = True
        mask = mask_of(bits)
    edits = []
    for kind in generator.integers(3, size=generator.integers(4)):
        count = int(generator.integers(0, min(size, 200) + 1)) if generator.random() < 0.9 else size
        ids = generator.permutation(size)[:count]
        amounts = (generator.normal(size=count) * 3).astype(np.float32)
        edits.append([Edit(ids), Edit(ids, amounts=amounts), Edit(ids, factor=1.3)][kind])
    return Adjustment(mask, tuple(edits))


def check(logits: Float32Array, draws: Any, adjustments: Any = ()) -> list[int]:
    with np.errstate(all="ignore"):
        expected = ORACLE.rows(logits, draws, adjustments).tolist()
    before = logits.tobytes()
    for drawer in DRAWERS:
        assert drawer.rows(logits, draws, adjustments).tolist() == expected
    assert logits.tobytes() == before
    return list(expected)


@given(st.integers(0, 2**32), st.sampled_from([1, 7, 16, 63, 64, 65, 1000, 5000]), st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None)
def test_tokens_are_those_of_the_rule(seed: int, size: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    logits = np.stack([row_of(generator, kind, size) for _ in range(4)]).astype(np.float32)
    check(logits, [draw_of(generator) for _ in logits])
    check(logits, [draw_of(generator) for _ in logits], [adjustment_of(generator, size) for _ in logits])


@pytest.mark.parametrize("kind", ["spread", "flat", "ties"])
def test_rows_of_a_real_width(kind: str) -> None:
    generator = np.random.default_rng(len(kind))
    logits = np.stack([row_of(generator, kind, 49_152) for _ in range(6)]).astype(np.float32)
    draws = [
        Draw(temperature=0.8, top_p=0.95, seed=1),
        Draw(temperature=1.0, seed=2),
        Draw(temperature=1.3, top_k=2000, top_p=0.9, seed=3),
        Draw(temperature=1.0, top_p=0.9999999, seed=4),
        Draw(temperature=0.7, top_k=50, min_p=0.05, seed=5),
        Draw(),
    ]
    drawn = check(logits, draws)
    alone = [check(logits[i : i + 1], draws[i : i + 1])[0] for i in range(6)]
    assert drawn == alone


@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 65, 1025])
def test_greedy_rows(width: int) -> None:
    random = np.random.default_rng(width)
    logits = random.standard_normal((10, width)).astype(np.float32)
    logits[1] = 3.0  # the lowest of equals
    logits[2] = np.round(logits[2])
    logits[3] = -np.inf
    logits[4, random.integers(width)] = np.inf
    logits[5, random.integers(width)] = np.nan
    logits[6, random.integers(width)] = -np.nan
    logits[7, :-1] = -np.inf
    logits[8] = -0.0
    logits[9] = -(logits[9] ** 2) - 1e30
    drawn = check(logits, [Draw()] * 10)
    assert drawn[1] == drawn[8] == 0
    assert drawn[3:7] == [NOT_DRAWN] * 4
    assert drawn[7] == width - 1
    assert check(logits[:0], []) == []
    assert check(logits, ()) == [NOT_DRAWN] * 10


def test_a_mask_hides_what_is_broken_and_edits_give_way_to_it() -> None:
    logits = np.array([[1, np.nan, np.inf, 3, 2]], np.float32)
    mask = mask_of(np.array([True, False, False, False, True]))
    assert check(logits, [Draw()], [Adjustment(mask)]) == [4]
    assert check(logits, [Draw()], [Adjustment(mask, (Edit(np.array([4])),))]) == [0]
    assert check(logits, [Draw()], [Adjustment(mask, (Edit(np.array([0, 4])),))]) == [4]
    assert check(logits, [Draw()], [Adjustment(None, (Edit(np.arange(5)),))]) == [NOT_DRAWN]


def test_the_chain_is_that_of_transformers() -> None:
    import torch
    from transformers.generation import logits_process as theirs

    size, prompt, output = 5000, [3, 5, 5, 9, 4711], [9, 120, 7, 7]
    bias = {120: 4.0, 9: -2.5, 4000: 9.0}
    params = SamplingParams(
        logit_bias=bias,
        min_tokens=9,
        repetition_penalty=1.3,
        temperature=0.7,
        top_k=90,
        top_p=0.93,
        min_p=0.02,
    )
    processors = [
        theirs.SequenceBiasLogitsProcessor({(token,): amount for token, amount in bias.items()}),
        theirs.MinNewTokensLengthLogitsProcessor(len(prompt), 9, [4000]),
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.TemperatureLogitsWarper(0.7),
        theirs.TopKLogitsWarper(90),
        theirs.TopPLogitsWarper(0.93),
        theirs.MinPLogitsWarper(0.02),
    ]
    generator = np.random.default_rng(5)
    said = torch.tensor([prompt + output])
    drawn, expected = [], []
    for seed in range(60):
        chooser = Chooser(params, seed, 0, prompt, (4000,))
        for token in output:
            chooser.append(token)
        row = (generator.standard_normal((1, size)) * 3).astype(np.float32)
        scores = torch.from_numpy(row)
        for processor in processors:
            scores = processor(said, scores)
        noise = gumbel(NoiseSource().bits(Address(seed, 0, 9), np.arange(size)))
        expected.append(int((scores[0].numpy() + noise).argmax()))
        drawn += check(row, [chooser.draw(9)], [chooser.adjustment()])
    assert drawn == expected
    assert len(set(drawn)) > 40


def test_what_is_wrong_is_said() -> None:
    drawer, logits = DRAWERS[0], np.zeros((2, 40), np.float32)
    plain, none = Draw(), Adjustment()
    past, under = (Adjustment(None, (Edit(np.array([token])),)) for token in (40, -1))
    short = Adjustment(np.zeros(1, np.int32))
    wrong: list[tuple[Any, Any, Any, str]] = [
        (logits, [plain], (), r"^the length of draws is 1; accepted: 2, one for each row"),
        (logits, [plain, plain], [none], r"^the length of adjustments is 1; accepted: 2"),
        (logits[:, ::2], [plain, plain], (), r"^logits is not C-contiguous"),
        (np.zeros((2, 0), np.float32), [plain, plain], (), r"^logits.shape\[1\] is 0; accepted: 1 to"),
        (logits, [plain, Draw(seed=-1)], (), r"^seed is -1; accepted: 0 to 2\^64 - 1"),
        (logits, [plain, Draw(position=2**64)], (), r"^position is 18446744073709551616; accepted"),
        (
            logits,
            [plain] * 2,
            [none, past],
            r"^ids is 40; accepted: 0 to 39",
        ),
        (
            logits,
            [plain] * 2,
            [none, under],
            r"^ids is -1; accepted: 0 to 39",
        ),
        (
            logits,
            [plain] * 2,
            [none, short],
            r"^mask.shape\[0\] is 1; accepted: at least 2",
        ),
        (
            logits,
            [plain] * 2,
            [none, Adjustment(None, (Edit(np.array([1]), amounts=np.zeros(2, np.float32)),))],
            r"^amounts.shape\[0\] is 2; accepted: 1",
        ),
    ]
    for values, draws, adjustments, message in wrong:
        with pytest.raises(ValueError, match=message):
            drawer.rows(values, draws, adjustments)
    frozen = logits.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"^logits is read-only"):
        drawer.rows(frozen, [plain] * 2, [none, none])
    assert drawer.rows(frozen, [plain] * 2).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"^isa is 'abacus'"):
        native.Drawer(TEAMS[0], "abacus")
