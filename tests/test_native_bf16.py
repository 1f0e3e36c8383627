"""Bfloat16 weights and rows of the C++ extension: products, rounding, and a rounded query's attention."""

from __future__ import annotations

import numpy as np
import pytest
from native_oracles import (
    LEVELS,
    Floats,
    Part,
    Rows,
    bf16_bits,
    bf16_buffer,
    bf16_values,
    f32_buffer,
    packed,
    plain_step,
    step_inputs,
    widen,
)

from ridgeline import native
from ridgeline.precision.quantise import round_bfloat16

TEAMS = (native.Team(1), native.Team(2))
UNWRITTEN = 0x7FFF


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rounded(isa: str, x: Floats, gather: list[int] | None = None) -> np.ndarray:
    """The bfloat16 buffer that `quantise` fills from x."""
    rows, width = x.shape
    tape = native.Tape(TEAMS[0], isa, rows)
    out = bf16_buffer(rows, width)
    tape.quantise(f32_buffer(rows, width, x), out, width, gather=gather is not None)
    tape.run(plain_step(rows, output_rows=gather or ()))
    return out


def product(isa: str, x: Floats, weights: Floats, team: native.Team = TEAMS[1]) -> Floats:
    rows = len(x)
    tape = native.Tape(team, isa, rows)
    out = f32_buffer(rows, len(weights))
    tape.linear(rounded(isa, x), [native.Part(packed(weights, "BF16", team), out)])
    tape.run(plain_step(rows))
    return out[:, : len(weights)].copy()


def hard_values() -> Floats:
    """Every bfloat16, what lies half-way to the next, and a unit in the last place beside both."""
    high = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (high | low).reshape(256, -1).view(np.float32)


# ---------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("isa", LEVELS)
def test_rounding_is_the_rule_for_ties_infinities_denormals_and_nan(isa: str) -> None:
    x = hard_values()
    seen = widen(rounded(isa, x))
    with np.errstate(invalid="ignore"):
        expected = round_bfloat16(x)
    nan = np.isnan(x)
    assert nan.any()
    assert np.isinf(expected[np.isfinite(x)]).any(), "the largest values round to infinity"
    np.testing.assert_array_equal(np.isnan(seen), nan)
    np.testing.assert_array_equal(seen[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    np.testing.assert_array_equal(np.signbit(seen[nan]), np.signbit(x[nan]))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 32, 33, 70])
def test_rows_end_with_the_partner_of_their_last_value(isa: str, width: int) -> None:
    x = normal(width, 9, width)
    for gather, source in ((None, x), ([8, 3, 3], x[[8, 3, 3]])):
        seen = rounded(isa, x, gather)
        np.testing.assert_array_equal(seen[: len(source), :width], bf16_bits(source))
        assert (seen[: len(source), width : width + width % 2] == 0).all()
        assert (seen[: len(source), width + width % 2 :] == UNWRITTEN).all()
        assert (seen[len(source) :] == UNWRITTEN).all()


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("width", [45, 64])
def test_every_launch_rounds_what_it_would_have_written(isa: str, width: int) -> None:
    x, times, weights = normal(1, 5, width), normal(2, 5, width), normal(3, 83, width)
    tape = native.Tape(TEAMS[1], isa, 5)
    source, factor = f32_buffer(5, width, x), f32_buffer(5, width, times)
    operand, matrix = rounded(isa, x), packed(weights, "BF16", TEAMS[1])
    pairs = [[make(5, n) for make in (f32_buffer, bf16_buffer)] for n in (width, width, 83)]
    for normed, acted, multiplied in zip(*pairs, strict=True):
        tape.norm(source, normed, "rms", 1e-5, width)
        tape.activate(source, acted, width, "silu", times=factor)
        tape.linear(operand, [native.Part(matrix, multiplied, gate=matrix, activation="gelu_tanh")])
    tape.run(plain_step(5))
    for (wide, narrow), n in zip(pairs, (width, width, 83), strict=True):
        np.testing.assert_array_equal(narrow[:, :n], bf16_bits(wide[:, :n]))
        assert (narrow[:, n : n + n % 2] == 0).all()


# ---------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(
    ("rows", "cols", "outputs"),
    [(1, 1, 1), (1, 2, 16), (3, 33, 17), (8, 576, 64), (9, 95, 40), (17, 160, 50), (5, 1537, 33)],
)
def test_the_product_is_that_of_the_rounded_values(isa: str, rows: int, cols: int, outputs: int) -> None:
    x, weights = normal(rows, rows, cols), normal(cols, outputs, cols)
    a, b = (bf16_values(v).astype(np.float64) for v in (x, weights))
    # Bounded by the sum of magnitudes: single roundings of float32, however they are ordered.
    error = np.abs(product(isa, x, weights) - a @ b.T)
    assert (error <= 2**-23 * np.sqrt(cols + 1) * (np.abs(a) @ np.abs(b).T)).all()


@pytest.mark.parametrize("isa", LEVELS)
def test_a_row_has_the_same_bits_alone_and_in_every_batch(isa: str) -> None:
    x, weights = normal(4, 21, 131), normal(5, 84, 131)
    whole = product(isa, x, weights)
    np.testing.assert_array_equal(product(isa, x, weights, TEAMS[0]), whole)
    for rows in range(1, 10):
        for first in range(0, len(x), rows):
            part = x[first : first + rows]
            np.testing.assert_array_equal(product(isa, part, weights), whole[first : first + rows])


@pytest.mark.parametrize("isa", LEVELS)
def test_infinities_and_nan_stay_in_their_rows(isa: str) -> None:
    x, weights = normal(6, 9, 33), np.abs(normal(7, 20, 33))
    clean = product(isa, x, weights)
    dirty = x.copy()
    dirty[2, 5], dirty[4, 32] = np.inf, np.nan
    seen = product(isa, dirty, weights)
    assert (seen[2] == np.inf).all()
    assert np.isnan(seen[4]).all()
    others = [0, 1, 3, 5, 6, 7, 8]
    np.testing.assert_array_equal(seen[others], clean[others])


def test_packed_weights_keep_every_bit_and_no_more() -> None:
    values = hard_values()[:, ::6]  # the bfloat16 values themselves
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)[:, :255].copy()
    data = native.pack(bits.view(np.uint8), "BF16", 255, TEAMS[1])
    assert data.nbytes == native.packed_bytes("BF16", 256, 255) == 256 * 256 * 2
    matrix = native.Matrix(data, "BF16", 256, 255)
    unpacked = np.stack([matrix.unpack_row(row) for row in range(256)])
    np.testing.assert_array_equal(unpacked.view(np.uint32), bits.astype(np.uint32) << 16)


@pytest.mark.parametrize("isa", LEVELS)
def test_a_tied_matrix_embeds_and_gives_float32_logits(isa: str) -> None:
    table = normal(8, 50, 35)
    matrix = packed(table, "BF16", TEAMS[1])
    tape = native.Tape(TEAMS[1], isa, 4)
    stream, operand = f32_buffer(4, 35), bf16_buffer(4, 35)
    tape.embed(matrix, stream, 2.0)
    tape.quantise(stream, operand, 35, gather=True)
    tape.linear(operand, [native.Part(matrix, None)], outputs_only=True)
    logits = np.zeros((2, 50), np.float32)
    tape.run(plain_step(4, tokens=[7, 0, 49, 3], output_rows=[2, 0], logits=logits))
    held = bf16_values(table)
    np.testing.assert_array_equal(stream[:, :35], 2 * held[[7, 0, 49, 3]])
    expected = 2 * held[[49, 7]].astype(np.float64) @ held.T.astype(np.float64)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("head_dim", [6, 18, 32, 80])
@pytest.mark.parametrize("turned", [False, True])
def test_attention_reads_a_rounded_query(isa: str, head_dim: int, turned: bool) -> None:
    """Beside attention over float32 rows that hold the rounded values: equal, but where one instruction adds
    the products of a pair, and may round otherwise."""
    rows, heads, half = 23, 4, head_dim // 2
    q, k, v = normal(1, rows, heads * head_dim), normal(2, rows, 2 * head_dim), normal(3, rows, 2 * head_dim)
    angles = np.random.default_rng(4).uniform(-3, 3, (rows, half))
    rope = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), 2 * half) if turned else ()
    steps = [step_inputs([Rows(0, rows, (Part(rows),), ((1, 0),))])]
    steps += [step_inputs([Rows(rows - 1, 1, (Part(rows),), ((1, 0),))])]
    for team in TEAMS:
        tape = native.Tape(team, isa, rows)
        wide, raw = f32_buffer(rows, q.shape[1], q), f32_buffer(rows, q.shape[1], q)
        keys, values = f32_buffer(rows, k.shape[1], k), f32_buffer(rows, v.shape[1], v)
        pool = np.full((2, 2, 32 * head_dim), UNWRITTEN, np.uint16)
        query, narrow = bf16_buffer(rows, q.shape[1]), bf16_buffer(rows, q.shape[1])
        geometry = (0, heads, 2, head_dim)
        tape.rope_store(raw, keys, values, pool, *geometry, *rope, rounded_q=query)
        tape.rope_store(wide, keys, values, pool, *geometry, *rope)
        tape.run(steps[0])
        np.testing.assert_array_equal(raw[:, : q.shape[1]], q)
        np.testing.assert_array_equal(query[:, : q.shape[1]], bf16_bits(wide[:, : q.shape[1]]))
        widened = f32_buffer(rows, q.shape[1], widen(query[:, : q.shape[1]]))
        outs = [f32_buffer(rows, q.shape[1]) for _ in range(2)]
        tape = native.Tape(team, isa, rows)
        for source, out in ((query, outs[0]), (widened, outs[1]), (query, narrow)):
            tape.attention(source, out, pool, *geometry, 0.3)
        for step in steps:
            tape.run(step)
            if isa == "avx512_bf16":
                # Each weight of the values is rounded to bfloat16, too.
                np.testing.assert_allclose(outs[0], outs[1], rtol=1e-4, atol=2**-8 * np.abs(v).max())
            else:
                np.testing.assert_array_equal(outs[0], outs[1])
            np.testing.assert_array_equal(narrow[:, : q.shape[1]], bf16_bits(outs[0][:, : q.shape[1]]))


# ----------------------------------------------------------------------------------------- mistakes


def test_wrong_buffers_are_refused_by_name() -> None:
    matrix = packed(normal(1, 16, 40), "BF16", TEAMS[0])
    tape = native.Tape(TEAMS[0], "portable", 4)
    x, out = bf16_buffer(4, 40), f32_buffer(4, 16)
    part = native.Part(matrix, out)
    with pytest.raises(ValueError, match=r"^x is a float32 buffer; accepted: bfloat16 for a matrix of BF16"):
        tape.linear(f32_buffer(4, 40), [part])
    with pytest.raises(ValueError, match=r"^x is a bfloat16 buffer; accepted: float32 for a matrix of F32"):
        tape.linear(x, [native.Part(packed(normal(1, 16, 40), "F32", TEAMS[0]), out)])
    with pytest.raises(ValueError, match=r"^x.shape\[1\] is 40; accepted: a multiple of 32"):
        tape.linear(np.zeros((4, 40), np.uint16), [part])
    with pytest.raises(ValueError, match=r"^x.shape\[0\] is 3; accepted: at least 4"):
        tape.linear(x[:3], [part])
    with pytest.raises(ValueError, match=r"^accumulate is True; accepted: False where out is not"):
        native.Part(matrix, bf16_buffer(4, 16), accumulate=True)
    with pytest.raises(ValueError, match=r"^out is not an A8 or bfloat16 buffer"):
        tape.quantise(f32_buffer(4, 40), f32_buffer(4, 40), 40)  # type: ignore[arg-type]
    pool, q, k = np.zeros((1, 1, 32 * 24), np.uint16), f32_buffer(4, 48), f32_buffer(4, 24)
    with pytest.raises(ValueError, match=r"^rounded_q.shape\[1\] is 32; accepted: at least 48"):
        tape.rope_store(q, k, k, pool, 0, 2, 1, 24, rounded_q=bf16_buffer(4, 24))
    assert tape.launches == []
