"""The packed formats of every block storage: sizes, values bit for bit, and products at each ISA level."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from block_storages import FLOAT16_AT, moderate_blocks, random_blocks
from gguf import quants
from native_oracles import (
    LEVELS,
    Floats,
    a8_buffer,
    a8_values,
    dequantised,
    f32_buffer,
    plain_step,
)

from ridgeline import native
from ridgeline.precision.storage import STORAGES
from ridgeline.types import ByteArray

TEAM = native.Team(2)
PACKED = list(FLOAT16_AT)
SUPER = [name for name in PACKED if STORAGES[name].block_values == 256]
GROUPS = [name for name in PACKED if name not in SUPER]
ENCODED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


def packed(name: str, data: ByteArray, team: native.Team = TEAM, cols: int | None = None) -> native.Matrix:
    storage = STORAGES[name]
    cols = cols or data.shape[1] // storage.block_bytes * storage.block_values
    return native.Matrix(native.pack(data, name, cols, team), name, len(data), cols)


def product(isa: str, matrix: native.Matrix, x: Floats, team: native.Team = TEAM) -> Floats:
    tape = native.Tape(team, isa, len(x))
    coded, out = a8_buffer(len(x), x.shape[1]), f32_buffer(len(x), matrix.rows)
    tape.quantise(f32_buffer(len(x), x.shape[1], x), coded, x.shape[1])
    tape.linear(coded, [native.Part(matrix, out)])
    tape.run(plain_step(len(x)))
    return out[:, : matrix.rows].copy()


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_product(actual: Floats, x: Floats, weights: Floats) -> None:
    """Within 1e-5 of the magnitudes that were summed, of what the kernel sees of both."""
    seen, wide = a8_values(x).astype(np.float64), weights.astype(np.float64)
    error = np.abs(actual - seen @ wide.T)
    assert (error <= 1e-5 * (np.abs(seen) @ np.abs(wide).T) + 1e-30).all()


# ------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_matrix_is_hardly_larger_than_the_file(name: str) -> None:
    for rows, cols in ((16, 256), (576, 768), (48, 1280), (4096, 4096)):
        file_bytes = rows * STORAGES[name].row_bytes(cols)
        assert file_bytes <= native.packed_bytes(name, rows, cols) <= 1.03 * file_bytes


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (16, 2), (37, 5)])
def test_rows_unpack_to_their_values_bit_for_bit(name: str, rows: int, blocks: int) -> None:
    data = random_blocks(name, rows, blocks, seed=rows)
    matrix, expected = packed(name, data), STORAGES[name].dequantise(data)
    assert matrix.nbytes == native.packed_bytes(name, *expected.shape)
    for row in range(rows):
        values = matrix.unpack_row(row)
        np.testing.assert_array_equal(values.view(np.uint32), expected[row].view(np.uint32))


def test_every_byte_of_a_ternary_file_unpacks() -> None:
    """Also those that are no sum of five digits: what counts is what they decode to."""
    data = np.zeros((256, 54), np.uint8)
    data[:, :52] = np.arange(256)[:, None]
    data[:, 52:] = np.array([1.0], "<f2").view(np.uint8)
    matrix, expected = packed("TQ1_0", data), dequantised(data, "TQ1_0")
    for row in range(256):
        np.testing.assert_array_equal(matrix.unpack_row(row), expected[row])


def test_mxfp4_exponents_unpack_down_to_subnormals() -> None:
    data = random_blocks("MXFP4", 253, 2)
    data.reshape(253, 2, 17)[..., 0] = np.arange(253)[:, None]
    matrix, expected = packed("MXFP4", data), STORAGES["MXFP4"].dequantise(data)
    for row in range(253):
        values = matrix.unpack_row(row)
        np.testing.assert_array_equal(values.view(np.uint32), expected[row].view(np.uint32))


@pytest.mark.parametrize("name", SUPER)
def test_widths_that_are_no_whole_blocks_are_refused(name: str) -> None:
    for cols in (255, 32, 300):
        with pytest.raises(ValueError, match=rf"cols is {cols}; accepted: multiples of 256 in {name}"):
            native.packed_bytes(name, 16, cols)
        with pytest.raises(ValueError, match="cols is"):
            native.pack(np.zeros((1, STORAGES[name].row_bytes(cols)), np.uint8), name, cols, TEAM)


@pytest.mark.parametrize("name", PACKED)
def test_files_of_another_size_are_refused(name: str) -> None:
    for wrong in (-1, 1):
        data = np.zeros((2, STORAGES[name].row_bytes(512) + wrong), np.uint8)
        with pytest.raises(ValueError, match=r"data\.shape\[1\] is"):
            native.pack(data, name, 512, TEAM)


# ----------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (48, 512), (37, 1280)])
def test_products_of_random_blocks(isa: str, name: str, rows: int, cols: int) -> None:
    data, x = moderate_blocks(name, rows, cols), normal(cols, 9, cols)
    assert_product(product(isa, packed(name, data), x), x, dequantised(data, name))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", ENCODED)
def test_products_of_encoded_weights(isa: str, name: str) -> None:
    weights, x = normal(2, 40, 768) * np.float32(0.05), normal(3, 4, 768)
    data = quants.quantize(weights, gguf.GGMLQuantizationType[name])
    values, actual = dequantised(data, name), product(isa, packed(name, data), x)
    assert_product(actual, x, values)
    exact = x.astype(np.float64) @ values.T.astype(np.float64)
    spread = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(values, axis=1)[None]
    assert np.abs(actual - exact).max() / spread.max() < 0.01
    assert np.sqrt(np.square(actual - exact).mean() / np.square(exact).mean()) < 0.01


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("cols", [32, 96, 160, 224])
def test_odd_numbers_of_groups(isa: str, name: str, cols: int) -> None:
    data, x = moderate_blocks(name, 20, cols), normal(cols, 3, cols)
    assert_product(product(isa, packed(name, data), x), x, dequantised(data, name))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", GROUPS)
def test_the_last_group_may_be_used_in_part(isa: str, name: str) -> None:
    data, x = moderate_blocks(name, 20, 96), normal(1, 3, 70)
    matrix = packed(name, data, cols=70)
    values = dequantised(data, name)[:, :70]
    np.testing.assert_array_equal(np.stack([matrix.unpack_row(row) for row in range(20)]), values)
    assert_product(product(isa, matrix, x), x, values)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", PACKED)
def test_extreme_codes_and_scales(isa: str, name: str) -> None:
    """Bytes of only ones, only zeros and only sign bits, under activations that are all at their ends."""
    data = moderate_blocks(name, 48, 512).reshape(48, -1, STORAGES[name].block_bytes)
    fields = {at + byte for at in FLOAT16_AT[name] for byte in (0, 1)} or {0}
    others = sorted(set(range(data.shape[2])) - fields)
    for row, byte in enumerate((0, 255, 128, 127, 0x55, 0xAA)):
        data[row, :, others] = byte
    data = data.reshape(48, -1)
    x = np.where(normal(5, 9, 512) > 0, np.float32(1), np.float32(-1))
    x[:3] = [[1.0], [-1.0], [0.0]]
    assert_product(product(isa, packed(name, data), x), x, dequantised(data, name))


@pytest.mark.parametrize("isa", LEVELS)
def test_products_with_mxfp4_exponents_of_all_sizes(isa: str) -> None:
    """Each row has one exponent; blocks that would have subnormal scales count as zeros."""
    data = moderate_blocks("MXFP4", 253, 256).reshape(253, 8, 17)
    data[..., 0] = np.arange(253)[:, None]
    data = data.reshape(253, -1)
    x = normal(6, 3, 256)
    actual, weights = product(isa, packed("MXFP4", data), x), dequantised(data, "MXFP4")
    assert (actual[:, :2] == 0).all()
    normal_rows = slice(8, 247)  # their products neither overflow nor become subnormal
    seen = a8_values(x).astype(np.float64)
    expected = seen @ weights.astype(np.float64).T
    bound = 1e-5 * np.abs(seen) @ np.abs(weights.astype(np.float64)).T
    assert (np.abs(actual - expected) <= bound)[:, normal_rows].all()
    zeros = np.zeros((1, 17), np.uint8)
    zeros[0, 0] = 252
    large = np.full((1, 32), 1e30, np.float32)
    assert product(isa, packed("MXFP4", zeros), large)[0, 0] == 0


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", PACKED)
def test_a_row_has_the_same_bits_in_every_batch_and_team(isa: str, name: str) -> None:
    data, x = moderate_blocks(name, 70, 512, seed=7), normal(8, 19, 512)
    matrix = packed(name, data)
    whole = product(isa, matrix, x)
    np.testing.assert_array_equal(product(isa, matrix, x, native.Team(1)), whole)
    for count in range(1, 12):
        np.testing.assert_array_equal(product(isa, matrix, x[:count]), whole[:count])
    for row in range(len(x)):
        np.testing.assert_array_equal(product(isa, matrix, x[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("outputs", "cols"), [(37, 512), (48, 256)])
def test_a_row_has_the_same_bits_in_a_long_prompt(isa: str, name: str, outputs: int, cols: int) -> None:
    """The weights are unpacked once for many rows: whole runs of them, odd ones, and more than one run."""
    data, x = moderate_blocks(name, outputs, cols, seed=7), normal(8, 300, cols)
    matrix = packed(name, data)
    single = np.concatenate([product(isa, matrix, x[row : row + 4]) for row in range(0, 300, 4)])
    assert_product(single, x, dequantised(data, name))
    for count in (24, 48, 53, 66, 131, 300):
        np.testing.assert_array_equal(product(isa, matrix, x[:count]), single[:count])
    np.testing.assert_array_equal(product(isa, matrix, x, native.Team(9)), single)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", [name for name in GROUPS if name != "Q8_0"])
@pytest.mark.parametrize("cols", [32, 288, 480])
def test_a_long_prompt_and_odd_numbers_of_groups(isa: str, name: str, cols: int) -> None:
    data, x = moderate_blocks(name, 20, cols), normal(cols, 50, cols)
    actual = product(isa, packed(name, data), x)
    np.testing.assert_array_equal(actual[:4], product(isa, packed(name, data), x[:4]))
    assert_product(actual, x, dequantised(data, name))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("gated", [False, True])
def test_parts_of_several_storages_in_a_long_prompt(isa: str, gated: bool) -> None:
    """Parts whose weights are unpacked for all rows, from other numbers of rows on, and one whose are not."""
    names, x = ("Q5_K", "Q8_0", "Q6_K"), normal(3, 70, 512)
    matrices = [packed(name, moderate_blocks(name, 100, 512, seed=i)) for i, name in enumerate(names)]
    gates = matrices[1:] + matrices[:1] if gated else [None] * 3

    def run(rows: int, first: int) -> list[Floats]:
        tape = native.Tape(TEAM, isa, rows)
        coded, outs = a8_buffer(rows, 512), [f32_buffer(rows, 100) for _ in names]
        tape.quantise(f32_buffer(rows, 512, x[first : first + rows]), coded, 512)
        parts = zip(matrices, outs, gates, strict=True)
        tape.linear(
            coded, [native.Part(matrix, out, gate=gate, activation="silu") for matrix, out, gate in parts]
        )
        tape.run(plain_step(rows))
        return [out[:, :100].copy() for out in outs]

    for rows in (30, 70):
        few = [run(2, first) for first in range(0, rows, 2)]
        for i, whole in enumerate(run(rows, 0)):
            np.testing.assert_array_equal(whole, np.concatenate([part[i] for part in few]))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", PACKED)
def test_embeddings_are_the_rows_bit_for_bit(isa: str, name: str) -> None:
    data = moderate_blocks(name, 40, 512, seed=9)
    out = f32_buffer(4, 512)
    tape = native.Tape(TEAM, isa, 4)
    tape.embed(packed(name, data), out, 1.0)
    tape.run(plain_step(4, tokens=[39, 0, 17, 16]))
    np.testing.assert_array_equal(out, STORAGES[name].dequantise(data)[[39, 0, 17, 16]])
