"""Packing and linear layers of the C++ extension against NumPy, and their independence of the batch."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_oracles import (
    ACTIVATIONS,
    LEVELS,
    QUANTISED,
    STORAGES,
    Floats,
    a8_buffer,
    a8_values,
    bf16_buffer,
    bf16_values,
    blocks,
    dequantised,
    f32_buffer,
    gate_factor,
    packed,
    plain_step,
    quantise_a8,
)

from ridgeline import native

TEAM = native.Team(2)
MAX_ROWS = 40


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def exact_product(x: Floats, weights: Floats, storage: str) -> np.ndarray:
    """x @ weights.T in float64, of what the kernels see of both."""
    seen = a8_values(x) if storage in QUANTISED else bf16_values(x) if storage == "BF16" else x
    return seen.astype(np.float64) @ dequantised(blocks(weights, storage), storage).astype(np.float64).T


def input_buffer(tape: native.Tape, x: Floats, storage: str) -> np.ndarray:
    source = f32_buffer(MAX_ROWS, x.shape[1], x)
    if storage in ("F32", "F16"):
        return source
    out = (bf16_buffer if storage == "BF16" else a8_buffer)(MAX_ROWS, x.shape[1])
    tape.quantise(source, out, x.shape[1])
    return out


def run_linear(isa: str, storage: str, x: Floats, weights: Floats, team: native.Team = TEAM) -> Floats:
    tape = native.Tape(team, isa, MAX_ROWS)
    source = input_buffer(tape, x, storage)
    out = f32_buffer(MAX_ROWS, len(weights))
    tape.linear(source, [native.Part(packed(weights, storage, team), out)])
    tape.run(plain_step(len(x)))
    assert np.isnan(out[len(x) :]).all(), "wrote beyond the step's rows"
    assert np.isnan(out[:, len(weights) :]).all(), "wrote beyond the width"
    return out[: len(x), : len(weights)].copy()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (16, 64), (37, 96), (100, 288)])
def test_packed_rows_unpack_to_their_values(storage: str, rows: int, cols: int) -> None:
    weights = normal(np.random.default_rng(1), rows, cols)
    matrix = packed(weights, storage, TEAM)
    expected = dequantised(blocks(weights, storage), storage)
    assert matrix.nbytes == native.packed_bytes(storage, rows, cols)
    for row in range(rows):
        np.testing.assert_array_equal(matrix.unpack_row(row), expected[row])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("storage", QUANTISED)
def test_the_last_group_may_be_padded(isa: str, storage: str) -> None:
    """Weights of our own quantiser: 50 columns in two blocks, with anything in the unused values."""
    rng = np.random.default_rng(8)
    data = blocks(normal(rng, 20, 64), storage)
    matrix = native.Matrix(native.pack(data, storage, 50, TEAM), storage, 20, 50)
    values = dequantised(data, storage)[:, :50]
    np.testing.assert_array_equal(np.stack([matrix.unpack_row(row) for row in range(20)]), values)
    x, out = normal(rng, 3, 50), f32_buffer(3, 20)
    tape = native.Tape(TEAM, isa, 3)
    coded = a8_buffer(3, 50)
    tape.quantise(f32_buffer(3, 50, x), coded, 50)
    tape.linear(coded, [native.Part(matrix, out)])
    tape.run(plain_step(3))
    expected = a8_values(x).astype(np.float64) @ values.T.astype(np.float64)
    np.testing.assert_allclose(out[:, :20], expected, rtol=1e-5, atol=1e-4)


def test_packed_weights_share_memory_but_not_bytes() -> None:
    """Arrays cut from one slab, and one that needs its own, keep what they hold when others go."""
    rng = np.random.default_rng(9)
    weights = [normal(rng, rows, 64) for rows in (16, 30, 140_000, 5)]
    matrices = [packed(w, "F32", TEAM) for w in weights]
    del matrices[1], weights[1]
    for matrix, w in zip(matrices, weights, strict=True):
        for row in (0, 4):
            np.testing.assert_array_equal(matrix.unpack_row(row), w[row])


def test_packed_matrix_is_hardly_larger_than_the_file() -> None:
    for storage in QUANTISED:
        for rows, cols in ((576, 576), (1536, 576), (576, 1536), (192, 576)):
            data = blocks(np.zeros((rows, cols), np.float32), storage)
            assert native.packed_bytes(storage, rows, cols) <= 1.03 * data.nbytes


def test_half_floats_unpack_exactly() -> None:
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    finite = np.isfinite(bits.view(np.float16))
    weights = np.where(finite, bits.view(np.float16), np.float16(0))
    matrix = native.Matrix(native.pack(weights.view(np.uint8), "F16", 256, TEAM), "F16", 256, 256)
    for row in range(256):
        np.testing.assert_array_equal(matrix.unpack_row(row), weights[row].astype(np.float32))


def test_scales_of_every_half_float() -> None:
    """Q8_0 blocks with code 1 and each finite half-precision scale, denormals included."""
    scales = np.arange(2**16, dtype=np.uint16).view(np.float16)
    scales = np.where(np.isfinite(scales), scales, np.float16(0)).reshape(-1, 1)
    data = np.concatenate([scales.view(np.uint8), np.ones((len(scales), 32), np.uint8)], axis=1)
    one = np.zeros((1, 32), np.float32)
    one[0, 0] = 127.0
    for isa in LEVELS:
        tape = native.Tape(TEAM, isa, 1)
        x, out = a8_buffer(1, 32), np.zeros((1, len(scales)), np.float32)
        tape.quantise(one, x, 32)
        matrix = native.Matrix(native.pack(data, "Q8_0", 32, TEAM), "Q8_0", len(scales), 32)
        tape.linear(x, [native.Part(matrix, out)])
        tape.run(plain_step(1))
        np.testing.assert_array_equal(out[0], scales[:, 0].astype(np.float32) * np.float32(127))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 200, 576])
def test_quantise_follows_the_rule_exactly(isa: str, width: int) -> None:
    x = normal(np.random.default_rng(width), 7, width) * np.float32(3)
    x[3] = 0
    x[4, 0] = 1e4
    x[6] *= np.float32(2.0**-104)
    x[5] = np.round(x[5] * 2) / 2 + np.float32(0.5)
    record = native.quantise(x, isa)
    codes, scales = quantise_a8(x)
    groups = codes.shape[1]
    np.testing.assert_array_equal(record[:, : groups * 32].view(np.int8), codes.reshape(7, -1))
    planes = record[:, groups * 32 : groups * 48].copy()
    np.testing.assert_array_equal(planes[:, : groups * 4].view(np.float32), scales)
    halves = codes.astype(np.int32).reshape(len(x), groups * 2, 16).sum(axis=2)
    np.testing.assert_array_equal(planes[:, groups * 4 : groups * 12].view(np.int32), halves)
    sums = halves.reshape(len(x), groups, 2).sum(axis=2).astype(np.float32)
    np.testing.assert_array_equal(planes[:, groups * 12 :].view(np.float32), scales * sums)
    np.testing.assert_array_equal(native.dequantise_a8(record, width), a8_values(x))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("rows", "cols", "outputs"), [(1, 32, 1), (3, 64, 17), (8, 576, 64), (9, 96, 40), (40, 160, 50)]
)
def test_linear_is_the_product(isa: str, storage: str, rows: int, cols: int, outputs: int) -> None:
    rng = np.random.default_rng(rows * cols)
    x, weights = normal(rng, rows, cols), normal(rng, outputs, cols)
    expected = exact_product(x, weights, storage)
    tolerance = 1e-5 * np.sqrt(cols)
    np.testing.assert_allclose(run_linear(isa, storage, x, weights), expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("storage", ["Q4_0", "Q4_1", "Q8_0", "F32", "BF16"])
def test_rows_do_not_depend_on_the_batch(isa: str, storage: str) -> None:
    rng = np.random.default_rng(3)
    x, weights = normal(rng, 29, 192), normal(rng, 84, 192)
    whole = run_linear(isa, storage, x, weights)
    for threads in (1, 5):
        np.testing.assert_array_equal(run_linear(isa, storage, x, weights, native.Team(threads)), whole)
    for row in range(len(x)):
        np.testing.assert_array_equal(run_linear(isa, storage, x[row : row + 1], weights)[0], whole[row])


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(LEVELS), st.sampled_from(["Q4_0", "Q4_1", "Q8_0", "F32", "BF16"]), st.data())
def test_rows_do_not_depend_on_the_chunks(isa: str, storage: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(4)
    x, weights = normal(rng, 24, 64), normal(rng, 48, 64)
    whole = run_linear(isa, storage, x, weights)
    cuts = sorted({0, 24, *data.draw(st.lists(st.integers(1, 23), max_size=6))})
    parts = [run_linear(isa, storage, x[a:b], weights) for a, b in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("storage", ["Q4_1", "F32", "BF16"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_gate_bias_activation_and_targets(isa: str, storage: str, activation: str, gated: bool) -> None:
    rng = np.random.default_rng(5)
    x, up, gate = normal(rng, 11, 64), normal(rng, 50, 64), normal(rng, 50, 64)
    bias, gate_bias = normal(rng, 50), normal(rng, 50)
    y = exact_product(x, up, storage) + bias
    act = ACTIVATIONS[activation]
    gate_values = exact_product(x, gate, storage) + gate_bias
    expected = act(gate_values) * gate_factor(activation, y) if gated else act(y)
    tape = native.Tape(TEAM, isa, MAX_ROWS)
    source = input_buffer(tape, x, storage)
    base = normal(rng, 11, 50)
    plain, added, coded = f32_buffer(MAX_ROWS, 50), f32_buffer(MAX_ROWS, 50, base), a8_buffer(MAX_ROWS, 50)

    def part(out: np.ndarray, accumulate: bool = False) -> native.Part:
        matrices = [packed(w, storage, TEAM) for w in (up, gate)]
        if not gated:
            return native.Part(matrices[0], out, bias, activation=activation, accumulate=accumulate)
        return native.Part(matrices[0], out, bias, matrices[1], gate_bias, activation, accumulate)

    tape.linear(source, [part(plain), part(added, accumulate=True), part(coded)])
    tape.run(plain_step(11))
    np.testing.assert_allclose(plain[:11, :50], expected, rtol=2e-5, atol=2e-4)
    np.testing.assert_array_equal(added[:11, :50], base + plain[:11, :50])
    np.testing.assert_array_equal(native.dequantise_a8(coded, 50)[:11], a8_values(plain[:11, :50].copy()))


@pytest.mark.parametrize("isa", LEVELS)
def test_logits_cover_the_output_rows_only(isa: str) -> None:
    rng = np.random.default_rng(6)
    x, weights = normal(rng, 10, 64), normal(rng, 45, 64)
    tape = native.Tape(TEAM, isa, MAX_ROWS)
    gathered = a8_buffer(MAX_ROWS, 64)
    tape.quantise(f32_buffer(MAX_ROWS, 64, x), gathered, 64, gather=True)
    tape.linear(gathered, [native.Part(packed(weights, "Q8_0", TEAM), None)], outputs_only=True)
    tape.softcap(45, 5.0)
    logits = np.full((4, 45), np.nan, np.float32)
    tape.run(plain_step(10, output_rows=[9, 2, 4], logits=logits))
    expected = 5.0 * np.tanh(exact_product(x[[9, 2, 4]], weights, "Q8_0") / 5.0)
    np.testing.assert_allclose(logits[:3], expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(logits[3]).all()
    tape.run(plain_step(10, logits=np.zeros((0, 45), np.float32)))


@pytest.mark.parametrize("isa", LEVELS)
def test_many_rows_and_long_units(isa: str) -> None:
    """More rows and tiles than one unit of work holds."""
    rng = np.random.default_rng(7)
    x, weights = normal(rng, 150, 32), normal(rng, 1000, 32)
    tape = native.Tape(TEAM, isa, 150)
    source, out = a8_buffer(150, 32), f32_buffer(150, 1000)
    tape.quantise(f32_buffer(150, 32, x), source, 32)
    tape.linear(source, [native.Part(packed(weights, "Q4_0", TEAM), out)])
    tape.run(plain_step(150))
    np.testing.assert_allclose(out[:, :1000], exact_product(x, weights, "Q4_0"), rtol=1e-5, atol=1e-4)


def test_wrong_arguments_are_refused_by_name() -> None:
    weights = np.zeros((16, 32), np.float32)
    matrix = packed(weights, "Q8_0", TEAM)
    tape = native.Tape(TEAM, "portable", 4)
    x, out = a8_buffer(4, 32), f32_buffer(4, 16)
    with pytest.raises(ValueError, match=r"^isa is 'sse9'; accepted: .*portable$"):
        native.Tape(TEAM, "sse9", 4)
    with pytest.raises(ValueError, match=r"^storage is 'Q9_9'"):
        native.pack(np.zeros((1, 32), np.uint8), "Q9_9", 32, TEAM)
    with pytest.raises(ValueError, match=r"^cols is 0"):
        native.packed_bytes("Q4_0", 4, 0)
    with pytest.raises(ValueError, match=r"^data.shape\[1\] is 35; accepted: 34"):
        native.pack(np.zeros((4, 35), np.uint8), "Q8_0", 32, TEAM)
    with pytest.raises(ValueError, match=r"^packed.shape\[0\]"):
        native.Matrix(np.zeros(64, np.uint8), "Q8_0", 16, 32)
    with pytest.raises(ValueError, match=r"^out is of item type 'd'"):
        tape.linear(x, [native.Part(matrix, np.zeros((4, 16)))])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^out.shape\[0\] is 3; accepted: at least 4"):
        tape.linear(x, [native.Part(matrix, f32_buffer(3, 16))])
    with pytest.raises(ValueError, match=r"^out.shape\[1\] is 24; accepted: a multiple of 16"):
        tape.linear(x, [native.Part(matrix, np.zeros((4, 24), np.float32))])
    with pytest.raises(ValueError, match=r"^x is a float32 buffer; accepted: A8"):
        tape.linear(f32_buffer(4, 32), [native.Part(matrix, out)])
    with pytest.raises(ValueError, match=r"^out is None"):
        tape.linear(x, [native.Part(matrix, None)])
    with pytest.raises(ValueError, match=r"^bias.shape\[0\] is 15"):
        tape.linear(x, [native.Part(matrix, out, np.zeros(15, np.float32))])
    with pytest.raises(ValueError, match=r"^activation is 'relu6'"):
        native.Part(matrix, out, activation="relu6")
    assert tape.launches == []


def test_a_roused_team_runs_as_any_other() -> None:
    """While it spins, asleep, roused for nothing, and closed."""
    rng = np.random.default_rng(3)
    x, weights = normal(rng, 3, 64), normal(rng, 32, 64)
    team = native.Team(3)
    expected = run_linear("portable", "Q8_0", x, weights, native.Team(1))
    for pause_s in (0.0, 0.01, 0.0):
        time.sleep(pause_s)
        team.rouse()
        team.rouse()
        np.testing.assert_array_equal(run_linear("portable", "Q8_0", x, weights, team), expected)
    team.rouse()
    team.close()
    team.rouse()


@pytest.mark.parametrize("isa", LEVELS)
def test_a_levels_tile_has_rows(isa: str) -> None:
    assert 1 <= native.tile_rows(isa) <= 16
    with pytest.raises(ValueError, match="isa is 'sse9'"):
        native.tile_rows("sse9")


def test_a_closed_team_does_not_run() -> None:
    team = native.Team(2)
    tape = native.Tape(team, "portable", 1)
    team.close()
    team.close()
    with pytest.raises(RuntimeError, match="closed"):
        tape.run(plain_step(1))
    with pytest.raises(ValueError, match=r"^threads is 0"):
        native.Team(0)


def test_a_team_does_not_run_in_a_forked_child() -> None:
    """It has no threads there. In a process of its own, because this one has threads of others."""
    program = """
import os, numpy as np
from ridgeline import native
team = native.Team(2)
native.pack(np.zeros((1, 4), np.uint8), "F32", 1, team)
child = os.fork()
if child == 0:
    try:
        native.pack(np.zeros((1, 4), np.uint8), "F32", 1, team)
    except RuntimeError as error:
        os._exit(7 if "fork" in str(error) else 1)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
native.pack(np.zeros((1, 4), np.uint8), "F32", 1, team)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)
