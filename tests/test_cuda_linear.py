"""Linear layers of the CUDA executor: packing, and every product against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ridgeline.execution.cuda.arrays import A8, Activations, Packed, padded_groups
from ridgeline.execution.cuda.kernels.linear import linear, linear_reference
from ridgeline.execution.cuda.pack import dequantise, pack
from ridgeline.precision.quantise import quantise_activations
from ridgeline.precision.storage import STORAGES, Tensor
from ridgeline.types import CheckpointError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GUARD = 3  # columns and rows around views that nobody may write

PAIRS = [("f32", 32), ("bf16", 16), ("bf16", 8), ("bf16", 4), ("A8-g32", 8), ("A8-g32", 4)]
QUANTISED = PAIRS[2:]
STORAGE_OF_BITS = {32: "F32", 16: "BF16", 8: "Q8_0", 4: "Q4_1"}


def stored(name: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    """A weight in a storage: every code at random, and scales of either sign."""
    storage, rng = STORAGES[name], np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, storage.row_bytes(cols)), np.uint8)
    if storage.block_values == 1:
        values = rng.standard_normal((rows, cols), np.float32)
        words = values.view("<u4") >> 16 if name == "BF16" else values.view("<u4")
        data = np.ascontiguousarray(words.astype("<u2" if name == "BF16" else "<u4")).view(np.uint8)
    else:
        blocks = data.reshape(rows, -1, storage.block_bytes)
        fields = (storage.block_bytes - (32 if name == "Q8_0" else 16)) // 2
        scales = rng.standard_normal((*blocks.shape[:2], fields)).astype("<f2")
        blocks[..., : 2 * fields] = scales.view(np.uint8)
    data.flags.writeable = False
    return Tensor(storage, (rows, cols), data)


def matrix(bits: int, outputs: int, cols: int) -> Packed:
    return pack(stored(STORAGE_OF_BITS[bits], outputs, cols), DEVICE)


def activations(kind: str, rows: int, cols: int, seed: int = 1) -> Activations:
    """A column view whose surroundings hold NaN; of A8-g32 only the scales can."""
    values = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    if kind == "A8-g32":
        codes, scales = quantise_activations(values)
        held = torch.full((rows + GUARD, codes.shape[1] + 32), 77, dtype=torch.int8)
        held[:rows, 32:] = torch.from_numpy(codes)
        held_scales = torch.full((rows + GUARD, scales.shape[1] + GUARD), torch.nan)
        held_scales[:rows, GUARD:] = torch.from_numpy(scales)
        return A8(held.to(DEVICE)[:rows, 32:], held_scales.to(DEVICE)[:rows, GUARD:])
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    wide = torch.full((rows + GUARD, cols + 2 * GUARD), torch.nan, dtype=dtype)
    wide[:rows, GUARD:-GUARD] = torch.from_numpy(values).to(dtype)
    return wide.to(DEVICE)[:rows, GUARD:-GUARD]


def check_against_reference(x: Activations, w: Packed, rows: int, bias: torch.Tensor | None) -> None:
    wide = torch.full((rows + GUARD, w.rows + 2 * GUARD), torch.nan, device=DEVICE)
    expected = torch.full((rows, w.rows), torch.nan, device=DEVICE)
    linear(x, w, wide[:rows, GUARD:-GUARD], bias)
    linear_reference(x, w, expected, bias)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(
        wide[:rows, GUARD:-GUARD], expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )
    wide[:rows, GUARD:-GUARD] = torch.nan
    assert wide.isnan().all(), "written outside of the result"


@pytest.mark.parametrize(("kind", "bits"), PAIRS)
@pytest.mark.parametrize("rows", [1, 2, 5, 17, 33, 70])
def test_rows(kind: str, bits: int, rows: int) -> None:
    check_against_reference(activations(kind, rows, 96), matrix(bits, 70, 96), rows, None)


@pytest.mark.parametrize(("kind", "bits"), PAIRS)
@pytest.mark.parametrize("outputs", [1, 50, 160])
@pytest.mark.parametrize("rows", [1, 5])
def test_outputs_and_bias(kind: str, bits: int, outputs: int, rows: int) -> None:
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    check_against_reference(activations(kind, rows, 50), matrix(bits, outputs, 50), rows, bias)


@pytest.mark.parametrize(("kind", "bits"), PAIRS)
@pytest.mark.parametrize("cols", [32, 50, 160, 576, 1100])
@pytest.mark.parametrize("rows", [1, 3])
def test_inputs(kind: str, bits: int, cols: int, rows: int) -> None:
    check_against_reference(activations(kind, rows, cols), matrix(bits, 50, cols), rows, None)


@pytest.mark.parametrize(("kind", "bits"), QUANTISED)
def test_more_blocks_of_rows_than_run_together(kind: str, bits: int) -> None:
    rows = 64 * 17 + 5
    check_against_reference(activations(kind, rows, 32), matrix(bits, 1, 32), rows, None)


@pytest.mark.parametrize(("kind", "bits"), QUANTISED)
def test_row_does_not_depend_on_the_others(kind: str, bits: int) -> None:
    x, w = activations(kind, 16, 160), matrix(bits, 70, 160)
    whole = torch.empty((16, 70), device=DEVICE)
    linear(x, w, whole)
    for rows in range(2, 16):
        part = torch.empty((rows, 70), device=DEVICE)
        linear(x[:rows], w, part)
        assert torch.equal(part, whole[:rows])


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_product_is_the_same_at_every_number_of_rows(bits: int) -> None:
    x, w = activations("A8-g32", 70, 160), matrix(bits, 70, 160)
    whole = torch.empty((70, 70), device=DEVICE)
    linear(x, w, whole)
    for rows in (1, 17, 40):
        part = torch.empty((rows, 70), device=DEVICE)
        linear(x[:rows], w, part)
        assert torch.equal(part, whole[:rows])


def test_weights_are_multiplied_as_bfloat16() -> None:
    w = matrix(4, 50, 32)
    x = torch.zeros((2, 32), dtype=torch.bfloat16, device=DEVICE)
    x[:, 7] = 1
    values = dequantise(w)[:, 7]
    assert not torch.equal(values.to(torch.bfloat16).to(torch.float32), values)
    for rows in (1, 2):
        out = torch.empty((rows, 50), device=DEVICE)
        linear(x[:rows], w, out)
        assert torch.equal(out[0], values.to(torch.bfloat16).to(torch.float32))


@pytest.mark.parametrize(("kind", "bits"), PAIRS)
def test_some_of_the_outputs(kind: str, bits: int) -> None:
    x, w = activations(kind, 3, 96), matrix(bits, 70, 96)
    check_against_reference(x, w.slice(33, 60), 3, None)


@pytest.mark.parametrize(("kind", "bits"), PAIRS)
def test_no_rows(kind: str, bits: int) -> None:
    linear(activations(kind, 1, 32)[:0], matrix(bits, 5, 32), torch.empty((0, 5), device=DEVICE))


@pytest.mark.parametrize(("kind", "bits"), [("f32", 16), ("f32", 4), ("bf16", 32), ("A8-g32", 16)])
def test_refusal_names_the_reasons(kind: str, bits: int) -> None:
    with pytest.raises(ValueError, match=r"no product takes .* bits: dense float32 takes .*integer takes"):
        linear(activations(kind, 2, 32), matrix(bits, 5, 32), torch.empty((2, 5), device=DEVICE))


@pytest.mark.parametrize("bits", [16, 32])
def test_dense_product_needs_no_values(bits: int) -> None:
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    x, w = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 32), (5, 32)))
    out = torch.empty((2, 8), device="meta")[:, :5]
    linear(x, Packed(16 if bits == 16 else 32, 32, w), out, torch.empty(5, device="meta"))


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("cols", [32, 50, 576])
def test_packing_keeps_values(name: str, cols: int) -> None:
    tensor = stored(name, 700, cols)  # several blocks of rows
    packed = pack(tensor, DEVICE)
    assert (packed.rows, packed.cols) == (700, cols)
    np.testing.assert_array_equal(dequantise(packed).cpu().numpy(), tensor.dequantise())
    if packed.bits < 16:
        assert packed.codes.shape == (700, padded_groups(cols) * packed.bits * 4)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_packing_keeps_every_code(name: str) -> None:
    """Byte values 0 to 255 in every place of a block."""
    head = STORAGES[name].block_bytes - (32 if name == "Q8_0" else 16)
    data = np.arange(256, dtype=np.uint8)[:, None].repeat(STORAGES[name].block_bytes, axis=1)
    data[:, head:] += np.arange(data.shape[1] - head, dtype=np.uint8)
    data[:, :head] = np.tile(np.array([0.37], "<f2").view(np.uint8), head // 2)
    tensor = Tensor(STORAGES[name], (256, 32), data)
    np.testing.assert_array_equal(dequantise(pack(tensor, DEVICE)).cpu().numpy(), tensor.dequantise())


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "BF16", "F32"])
def test_packing_merges_leading_dimensions(name: str) -> None:
    tensor = stored(name, 6, 64)
    folded = Tensor(tensor.storage, (2, 3, 64), tensor.data)
    assert torch.equal(pack(folded, DEVICE).codes, pack(tensor, DEVICE).codes)


@pytest.mark.parametrize(("scale", "fits"), [(8188, True), (-8188, True), (8192, False), (2**-24, True)])
def test_packing_refuses_q4_0_beyond_float16(scale: float, fits: bool) -> None:
    data = np.zeros((3, 18), np.uint8)
    data[1, :2] = np.array([scale], "<f2").view(np.uint8)
    tensor = Tensor(STORAGES["Q4_0"], (3, 32), data)
    if fits:
        np.testing.assert_array_equal(dequantise(pack(tensor, DEVICE)).cpu().numpy(), tensor.dequantise())
    else:
        with pytest.raises(CheckpointError, match=r"'blk\.0' \(Q4_0\) holds the scale 8192"):
            pack(tensor, DEVICE, "blk.0")


def test_packing_refuses_other_storages() -> None:
    tensor = Tensor(STORAGES["F16"], (2, 4), np.zeros((2, 8), np.uint8))
    with pytest.raises(ValueError, match="is F16; accepted: F32, BF16, Q8_0, Q4_0, Q4_1"):
        pack(tensor, DEVICE)
