"""The block storages: each against the gguf package bit for bit, their scales, and what they run in."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from block_storages import FLOAT16_AT, random_blocks
from gguf import quants

from ridgeline.precision.formats import (
    DEVICE_FORMATS,
    FILE_FORMATS,
    FORMATS,
    auto_format,
    check_device_format,
    native_storages,
    parse_format,
)
from ridgeline.precision.quantise import quantise_tensor, quantise_weight, storage_of
from ridgeline.precision.recode import recode
from ridgeline.precision.storage import BLOCK_VALUES_AT_A_TIME, STORAGES, Tensor, check_finite
from ridgeline.types import ByteArray, CheckpointError, ConfigError, Float32Array

BLOCKED = list(FLOAT16_AT)
QUANTISABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
NEW = [name for name in BLOCKED if name not in ("Q4_0", "Q4_1", "Q8_0")]


def tensor_of(name: str, data: ByteArray) -> Tensor:
    storage = STORAGES[name]
    return Tensor(storage, (len(data), data.shape[1] // storage.block_bytes * storage.block_values), data)


def by_gguf(name: str, data: ByteArray) -> Float32Array:
    return quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[name])


def same_bits(ours: Float32Array, theirs: Float32Array) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


# ---------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("name", BLOCKED)
def test_sizes_are_those_of_the_gguf_package(name: str) -> None:
    storage = STORAGES[name]
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (storage.block_values, storage.block_bytes) == sizes
    assert storage.row_bytes(2 * sizes[0] + 1) == 3 * sizes[1]


def test_every_block_storage_is_tested() -> None:
    assert {name for name, storage in STORAGES.items() if storage.block_values > 1} == set(BLOCKED)


@pytest.mark.parametrize("name", BLOCKED)
def test_random_blocks_decode_to_the_same_bits(name: str) -> None:
    data = random_blocks(name, 150, 7)
    same_bits(tensor_of(name, data).dequantise(), by_gguf(name, data))


@pytest.mark.parametrize("name", QUANTISABLE)
def test_quantised_weights_decode_to_the_same_bits(name: str) -> None:
    weight = np.random.default_rng(3).standard_normal((40, 768)).astype(np.float32)
    data = quants.quantize(weight, gguf.GGMLQuantizationType[name])
    same_bits(tensor_of(name, data).dequantise(), by_gguf(name, data))


@pytest.mark.parametrize("name", BLOCKED)
def test_the_largest_and_the_smallest_numbers(name: str) -> None:
    """Scales at the ends of float16, subnormal and zero ones, under bytes of only ones and only zeros."""
    extremes = np.array([65504, -65504, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0], "<f2")
    for byte in (0, 255, 0x55, 0xAA):
        data = np.full((len(extremes), STORAGES[name].block_bytes), byte, np.uint8)
        for at in FLOAT16_AT[name]:
            data[:, at : at + 2] = extremes[:, None].view(np.uint8)
        if name == "MXFP4":
            data[:, 0] = (0, 1, 2, 3, 127, 251, 252)
        tensor = tensor_of(name, data)
        check_finite(tensor, "sound")
        same_bits(tensor.dequantise(), by_gguf(name, data))
        assert np.isfinite(tensor.dequantise()).all()


@pytest.mark.parametrize("name", BLOCKED)
def test_views_at_odd_addresses_and_of_read_only_memory(name: str) -> None:
    data = random_blocks(name, 5, 3)
    shifted = np.zeros(data.size + 1, np.uint8)
    shifted[1:] = data.reshape(-1)
    shifted.flags.writeable = False
    view = shifted[1:].reshape(data.shape)
    same_bits(tensor_of(name, view).dequantise(), by_gguf(name, data))
    same_bits(tensor_of(name, view).rows(slice(1, 5, 2)).dequantise(), by_gguf(name, data[1:5:2]))
    np.testing.assert_array_equal(shifted[1:], data.reshape(-1))


@pytest.mark.parametrize("name", NEW)
def test_more_rows_than_are_decoded_at_a_time(name: str) -> None:
    blocks = 4
    cols = blocks * STORAGES[name].block_values
    rows = BLOCK_VALUES_AT_A_TIME // cols + 3
    data = np.tile(random_blocks(name, 64, blocks), (-(-rows // 64), 1))[:rows]
    values = tensor_of(name, data).dequantise()
    same_bits(values[-70:], by_gguf(name, data[-70:]))


@pytest.mark.parametrize("name", BLOCKED)
def test_three_dimensions_select_and_decode(name: str) -> None:
    data = random_blocks(name, 6, 2)
    cols = 2 * STORAGES[name].block_values
    experts = Tensor(STORAGES[name], (3, 2, cols), data)
    same_bits(experts.rows(np.array([2, 0])).dequantise()[0], by_gguf(name, data[4:]))


# ------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", [name for name in BLOCKED if FLOAT16_AT[name]])
def test_every_field_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    sound = random_blocks(name, 4, 3)
    check_finite(tensor_of(name, sound), "sound")
    for at in FLOAT16_AT[name]:
        for block in range(3):
            data = sound.copy().reshape(4, 3, -1)
            data[2, block, at : at + 2] = np.array([bad], "<f2").view(np.uint8)
            with pytest.raises(CheckpointError, match=rf"'blk\.0\.odd' \({name}\) holds a scale"):
                check_finite(tensor_of(name, data.reshape(4, -1)), "blk.0.odd")


@pytest.mark.parametrize("name", BLOCKED)
def test_bytes_that_are_no_scales_may_be_anything(name: str) -> None:
    sound = random_blocks(name, 4, 3).reshape(4, 3, -1)
    scales = {at + byte for at in FLOAT16_AT[name] for byte in (0, 1)} or {0}
    for byte in set(range(sound.shape[2])) - scales:
        sound[..., byte] = 255
    check_finite(tensor_of(name, sound.reshape(4, -1)), "sound")


@pytest.mark.parametrize("exponent", [253, 254, 255])
def test_mxfp4_scales_whose_values_overflow_or_that_are_nan_are_refused(exponent: int) -> None:
    data = random_blocks("MXFP4", 4, 3)
    data[3, 17] = exponent
    with pytest.raises(CheckpointError, match=r"\(MXFP4\) holds a scale"):
        check_finite(tensor_of("MXFP4", data), "odd")


@pytest.mark.parametrize("name", BLOCKED)
def test_scales_that_are_finite_decode_to_finite_values(name: str) -> None:
    """Whatever the bytes: a tensor that is accepted has no infinity and no NaN in it."""
    storage = STORAGES[name]
    data = np.random.default_rng(5).integers(0, 256, (400, storage.block_bytes), np.uint8)
    accepted = np.isfinite(storage.scales(data).reshape(len(data), -1)).all(axis=1)
    assert accepted.sum() > 300
    assert np.isfinite(tensor_of(name, data[accepted]).dequantise()).all()


# ------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("device", list(DEVICE_FORMATS))
@pytest.mark.parametrize("name", list(STORAGES))
def test_auto_gives_every_storage_a_format_that_the_device_runs(name: str, device: str) -> None:
    fmt = auto_format(name, device)
    assert fmt.activation_bits == (16 if device == "cuda" else 8)
    stored_bits = STORAGES[name].block_bytes * 8 / STORAGES[name].block_values
    if device == "cuda":
        assert fmt.name in DEVICE_FORMATS[device]
        assert fmt.weight_bits == (16 if stored_bits >= 16 else 4 if name in ("Q4_0", "Q4_1") else 8)
    elif stored_bits >= 16:
        assert fmt.name == "W8A8-g32"
    else:
        assert name in native_storages(fmt, device)
        assert 0 <= stored_bits - fmt.weight_bits < 1.5 or name == "TQ1_0"


@pytest.mark.parametrize("name", list(STORAGES))
def test_a_weight_whose_codes_are_lost_takes_a_format_that_can_be_quantised_to(name: str) -> None:
    assert auto_format(name, "cpu", decoded=True).name == "W8A8-g32"
    assert auto_format(name, "cuda", decoded=True) is auto_format(name, "cuda")


def test_every_block_storage_runs_as_it_is_on_a_cpu_in_one_format_of_8_bit_activations() -> None:
    formats = [fmt for fmt in (*FORMATS.values(), *FILE_FORMATS.values()) if fmt.activation_bits == 8]
    for device in ("cpu", "reference"):
        assert sorted(s for fmt in formats for s in native_storages(fmt, device)) == sorted(BLOCKED)
    for fmt in FORMATS.values():
        assert set(native_storages(fmt, "cuda")) <= {"Q4_0", "Q4_1", "Q8_0", "BF16", "F32"}
        assert native_storages(fmt, "cuda")[0] == storage_of(fmt).name


@pytest.mark.parametrize("name", list(FILE_FORMATS))
def test_formats_of_files_can_be_neither_chosen_nor_quantised_to(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"number format is '{name}'; accepted: W4A8-g32, W8A8-g32"):
        parse_format(name)
    with pytest.raises(ConfigError, match=rf"weights is '{name}'; accepted on cpu: auto, W4A8-g32"):
        check_device_format(name, "cpu")
    with pytest.raises(ValueError, match=rf"nothing is quantised to {name}"):
        quantise_weight(np.zeros((1, 256), np.float32), FILE_FORMATS[name])


@pytest.mark.parametrize("format_name", list(FORMATS))
@pytest.mark.parametrize("name", NEW)
def test_requantising_equals_quantising_the_values(name: str, format_name: str) -> None:
    data = random_blocks(name, 300, 4).reshape(300, 4, -1)
    for at in FLOAT16_AT[name]:
        data[..., at : at + 2] = np.array([0.01], "<f2").view(np.uint8)
    if name == "MXFP4":
        data[..., 0] = np.random.default_rng(2).integers(110, 130, data.shape[:2])
    tensor = tensor_of(name, data.reshape(300, -1))
    ours = quantise_tensor(tensor, FORMATS[format_name])
    expected = quantise_weight(tensor.dequantise(), FORMATS[format_name])
    assert ours.storage is expected.storage
    np.testing.assert_array_equal(ours.data, expected.data)


@pytest.mark.parametrize("name", NEW)
def test_eight_bits_lose_next_to_nothing(name: str) -> None:
    """Weights as models have them: within 1% of their spread after the way through W8A8-g32."""
    rng = np.random.default_rng(4)
    data = random_blocks(name, 64, 4).reshape(64, 4, -1)
    for at in FLOAT16_AT[name]:
        scales = np.abs(rng.normal(0.002, 0.0005, (64, 4)))
        data[..., at : at + 2] = scales.astype("<f2")[..., None].view(np.uint8)
    if name == "MXFP4":
        data[..., 0] = 118
    tensor = tensor_of(name, data.reshape(64, -1))
    values = tensor.dequantise()
    error = quantise_tensor(tensor, FORMATS["W8A8-g32"]).dequantise() - values
    assert np.sqrt(np.square(error).mean() / np.square(values).mean()) < 0.01


# ---------------------------------------------------------------------------------------- recoding

SPLIT = [name for name in BLOCKED if STORAGES[name].split is not None]


def test_storages_of_one_scale_for_a_block_can_be_split() -> None:
    assert set(SPLIT) == {"Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "TQ1_0", "TQ2_0"}


@pytest.mark.parametrize("format_name", ["W8A8-g32", "W8A16-g32"])
@pytest.mark.parametrize("name", SPLIT)
def test_recoding_keeps_every_bit(name: str, format_name: str) -> None:
    rows = BLOCK_VALUES_AT_A_TIME // (4 * STORAGES[name].block_values) + 3
    data = np.tile(random_blocks(name, 50, 4), (-(-rows // 50), 1))[:rows]
    if name == "MXFP4":
        data.reshape(rows, 4, -1)[..., 0] %= 40  # from 2**-24, the least float16, to 2**15
        data.reshape(rows, 4, -1)[..., 0] += 104
    tensor = tensor_of(name, data)
    recoded = recode(tensor, FORMATS[format_name])
    assert recoded is not None
    assert (recoded.storage.name, recoded.shape) == ("Q8_0", tensor.shape)
    same_bits(recoded.dequantise(), tensor.dequantise())
    same_bits(recoded.dequantise()[-9:], by_gguf("Q8_0", recoded.data[-9:]))


@pytest.mark.parametrize("exponent", [0, 1, 103, 144, 252])
def test_scales_beyond_float16_are_not_recoded(exponent: int) -> None:
    data = random_blocks("MXFP4", 4, 3) % 2
    data.reshape(4, 3, -1)[..., 0] = 120
    assert recode(tensor_of("MXFP4", data), FORMATS["W8A8-g32"]) is not None
    data[3, 17] = exponent
    assert recode(tensor_of("MXFP4", data), FORMATS["W8A8-g32"]) is None


@pytest.mark.parametrize("name", BLOCKED)
def test_nothing_else_is_recoded(name: str) -> None:
    tensor = tensor_of(name, random_blocks(name, 2, 2))
    for format_name in ("W4A8-g32", "W16A16", "W32A32"):
        assert recode(tensor, FORMATS[format_name]) is None
    if name not in SPLIT:
        assert recode(tensor, FORMATS["W8A8-g32"]) is None
