"""Tensors, formats and quantisers, against the gguf package and against their own stated bounds."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from ridgeline.precision.formats import FORMATS, parse_format
from ridgeline.precision.quantise import (
    GROUP,
    TINY,
    dequantise_activations,
    quantise_activations,
    quantise_tensor,
    quantise_weight,
)
from ridgeline.precision.storage import STORAGES, Tensor, check_finite, float32_tensor
from ridgeline.types import CheckpointError, ConfigError, Float32Array

STORED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]
QUANTISED = ["W4A8-g32", "W8A8-g32"]


def normal(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored_by_gguf(values: Float32Array, name: str) -> Tensor:
    data = quants.quantize(values, gguf.GGMLQuantizationType[name])
    return Tensor(
        STORAGES[name], values.shape, data.view(np.uint8).reshape(-1, data.view(np.uint8).shape[-1])
    )


# ----------------------------------------------------------------------------------------- storages


@pytest.mark.parametrize("name", STORED)
def test_decodes_as_the_gguf_package_does(name: str) -> None:
    tensor = stored_by_gguf(normal(300, 96), name)
    expected = quants.dequantize(tensor.data, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(tensor.dequantise(), expected.reshape(300, 96))


@pytest.mark.parametrize("name", STORED)
def test_rows_selects_without_decoding(name: str) -> None:
    tensor = stored_by_gguf(normal(20, 64), name)
    values, order = tensor.dequantise(), np.array([7, 0, 19, 7])
    np.testing.assert_array_equal(tensor.rows(order).dequantise(), values[order])
    part = tensor.rows(slice(3, 11, 2))
    np.testing.assert_array_equal(part.dequantise(), values[3:11:2])
    assert part.shape == (4, 64)
    assert np.shares_memory(part.data, tensor.data)


def test_rows_of_vectors_and_of_three_dimensions() -> None:
    vector = float32_tensor(normal(10))
    np.testing.assert_array_equal(vector.rows(np.array([3, 1])).dequantise(), vector.dequantise()[[3, 1]])
    experts = stored_by_gguf(normal(4, 6, 32), "Q8_0")
    np.testing.assert_array_equal(experts.rows(slice(1, 3)).dequantise(), experts.dequantise()[1:3])
    with pytest.raises(ValueError, match="Q8_0 vector"):
        stored_by_gguf(normal(32), "Q8_0").rows(slice(0, 2))


def test_decodes_views_at_odd_addresses() -> None:
    values = normal(3, 32)
    shifted = np.zeros(values.nbytes + 1, np.uint8)
    shifted[1:] = values.view(np.uint8).reshape(-1)
    tensor = Tensor(STORAGES["F32"], (3, 32), shifted[1:].reshape(3, -1))
    np.testing.assert_array_equal(tensor.dequantise(), values)


def test_decoded_values_are_the_callers_own() -> None:
    values = normal(2, 32)
    decoded = float32_tensor(values).dequantise()
    decoded[:] = 0
    assert values.any()


def test_data_must_fit_the_shape() -> None:
    with pytest.raises(ValueError, match="accepted: uint8"):
        Tensor(STORAGES["Q8_0"], (2, 64), np.zeros((2, 34), np.uint8))


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_numbers_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    tensor = stored_by_gguf(normal(40, 64), name)
    check_finite(tensor, "fine")
    data = tensor.data.copy()
    if name == "F32":
        data[30, :4] = np.array([bad], "<f4").view(np.uint8)
    else:
        field = np.array([bad], "<f2").view(np.uint8)
        if name == "BF16":
            field = np.array([bad], "<f4").view(np.uint8)[2:]
        data[30, :2] = field
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q"):
        check_finite(Tensor(tensor.storage, tensor.shape, data), "blk.0.attn_q")


def test_the_minimum_of_a_block_is_checked_too() -> None:
    tensor = stored_by_gguf(normal(4, 64), "Q4_1")
    data = tensor.data.copy()
    data[2, 22:24] = np.array([np.inf], "<f2").view(np.uint8)
    with pytest.raises(CheckpointError, match="infinite"):
        check_finite(Tensor(tensor.storage, tensor.shape, data), "x")


# ------------------------------------------------------------------------------------------ formats


def test_formats_have_one_name_each() -> None:
    assert parse_format("W4A8-g32").weight_bits == 4
    assert parse_format("W8A16-g32").activation_bits == 16
    with pytest.raises(
        ConfigError, match=r"'int8'; accepted: W4A8-g32, W8A8-g32, W4A16-g32, W8A16-g32, W16A16, W32A32"
    ):
        parse_format("int8")


# -------------------------------------------------------------------------------------- activations


def activations_by_the_letter(row: list[np.float32]) -> tuple[list[int], list[np.float32]]:
    """The rule of `ridgeline.precision.quantise`, one number at a time."""
    codes: list[int] = []
    scales = []
    padded = row + [np.float32(0)] * (-len(row) % 32)
    for start in range(0, len(padded), 32):
        group = padded[start : start + 32]
        amax = max(abs(x) for x in group)
        scales.append(np.float32(amax * np.float32(1 / 127)))
        inverse = np.float32(127) / amax if amax >= TINY else np.float32(0)
        codes += [max(-127, min(127, round(float(np.float32(x * inverse))))) for x in group]
    return codes, scales


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows_of_floats = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 80)), elements=finite)


@settings(max_examples=150, deadline=None)
@given(rows_of_floats)
def test_activations_follow_the_rule_and_stay_within_half_a_scale(x: Float32Array) -> None:
    codes, scales = quantise_activations(x)
    groups = -(-x.shape[1] // GROUP)
    assert codes.shape == (len(x), groups * GROUP)
    assert codes.dtype == np.int8
    assert scales.shape == (len(x), groups)
    assert np.abs(codes.astype(int)).max() <= 127
    assert not codes[:, x.shape[1] :].any()
    for row in range(len(x)):
        expected_codes, expected_scales = activations_by_the_letter(list(x[row]))
        assert codes[row].tolist() == expected_codes
        assert scales[row].tolist() == [float(scale) for scale in expected_scales]
    error = np.abs(dequantise_activations(codes, scales, x.shape[1]).astype(float) - x)
    bound = np.repeat(scales, GROUP, axis=1)[:, : x.shape[1]].astype(float) * 0.5 * (1 + 1e-4)
    assert (error <= np.maximum(bound, TINY)).all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e-3, 1.0, 1e30, 3.4e38])
def test_activations_of_every_magnitude(magnitude: float) -> None:
    x = np.linspace(-magnitude, magnitude, 64, dtype=np.float64).astype(np.float32)[None]
    codes, scales = quantise_activations(x)
    assert np.isfinite(scales).all()
    if magnitude < TINY:
        assert not codes.any()
    else:
        assert codes[0, 0] == -127
        assert codes[0, -1] == 127
        np.testing.assert_allclose(
            dequantise_activations(codes, scales, 64), x, atol=float(scales.max()) * 0.51
        )


def test_activations_round_half_to_even() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = 127, 0.5, 1.5, 2.5, -0.5
    codes, scales = quantise_activations(x)
    assert codes[0, :5].tolist() == [127, 0, 2, 2, 0]
    assert scales[0, 0] == np.float32(127) * np.float32(1 / 127)


def test_a_rows_activations_do_not_depend_on_the_batch() -> None:
    x = normal(9, 100)
    codes, scales = quantise_activations(x)
    for row in range(9):
        alone = quantise_activations(x[row : row + 1])
        np.testing.assert_array_equal(alone[0][0], codes[row])
        np.testing.assert_array_equal(alone[1][0], scales[row])


# ------------------------------------------------------------------------------------------ weights


def step_of(tensor: Tensor) -> NDArray[np.float64]:
    """The scale that belongs to each value."""
    scales = tensor.storage.scales(tensor.data)[..., 0].astype(np.float64)
    return np.repeat(scales, 32, axis=1)[:, : tensor.cols]


@pytest.mark.parametrize("name", QUANTISED)
@settings(max_examples=100, deadline=None)
@given(
    weight=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 70)),
        elements=st.floats(-60000, 60000, width=32),
    )
)
def test_no_weight_is_off_by_more_than_half_a_step(name: str, weight: Float32Array) -> None:
    tensor = quantise_weight(weight, FORMATS[name])
    assert tensor.shape == weight.shape
    # Beside half a step there is the float32 rounding of the encoder and the decoder.
    error = np.abs(tensor.dequantise().astype(float) - weight)
    assert (error <= step_of(tensor) * 0.5 + np.abs(weight).max() * 1e-6).all()


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_as_good_as_the_gguf_packages(name: str) -> None:
    weight = normal(64, 320)
    ours = quantise_weight(weight, FORMATS[name])
    theirs = stored_by_gguf(weight, ours.storage.name).dequantise()
    expected = quants.dequantize(ours.data, gguf.GGMLQuantizationType[ours.storage.name])
    np.testing.assert_array_equal(ours.dequantise(), expected)
    assert np.square(ours.dequantise() - weight).mean() <= np.square(theirs - weight).mean() * 1.02


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e-7, 3e-5, -65504.0])
def test_constant_rows(name: str, value: float) -> None:
    tensor = quantise_weight(np.full((2, 64), value, np.float32), FORMATS[name])
    np.testing.assert_allclose(tensor.dequantise(), value, rtol=1e-3, atol=3e-8)
    check_finite(tensor, "constant")


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("value", [1e9, -1e38, np.inf, np.nan])
def test_weights_beyond_the_scales_are_refused_with_their_value(name: str, value: float) -> None:
    weight = normal(700, 640)
    weight[650, 3] = value
    with pytest.raises(CheckpointError, match=rf"'up' holds {value:g}.*W32A32".replace("+", r"\+")):
        quantise_weight(weight, FORMATS[name], "up")


def test_blocks_of_rows_do_not_show() -> None:
    weight = normal(2000, 257)  # more values than are encoded at a time
    whole = quantise_weight(weight, FORMATS["W8A8-g32"])
    for row in (0, 1019, 1020, 1999):
        alone = quantise_weight(weight[row : row + 1], FORMATS["W8A8-g32"])
        np.testing.assert_array_equal(alone.data[0], whole.data[row])


def test_full_precision_shares_memory_and_is_checked() -> None:
    weight = normal(4, 33)
    tensor = quantise_weight(weight, FORMATS["W32A32"])
    assert np.shares_memory(tensor.data, weight)
    np.testing.assert_array_equal(tensor.dequantise(), weight)
    weight[1, 1] = np.nan
    with pytest.raises(CheckpointError, match="'x'"):
        quantise_weight(weight, FORMATS["W32A32"], "x")


@pytest.mark.parametrize("source", ["F16", "BF16", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_requantising_a_stored_tensor_equals_quantising_its_values(source: str, name: str) -> None:
    tensor = stored_by_gguf(normal(30, 64), source)
    ours = quantise_tensor(tensor, FORMATS[name])
    expected = quantise_weight(tensor.dequantise(), FORMATS[name])
    assert ours.storage is expected.storage
    if ours is not tensor:
        np.testing.assert_array_equal(ours.data, expected.data)
