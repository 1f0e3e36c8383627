"""Embeddings of the CUDA executor against plain PyTorch: the result is exact."""

from __future__ import annotations

import pytest
import torch
from test_cuda_linear import DEVICE, matrix, stored

from ridgeline.execution.cuda.arrays import Packed
from ridgeline.execution.cuda.kernels.embed import embed, embed_reference
from ridgeline.execution.cuda.pack import pack

TOKENS = 20
DRAWN = torch.tensor([7, -1, 0, 19], dtype=torch.int32, device=DEVICE)


def check_against_reference(
    ids: list[int], table: Packed, *, scale: float = 1.0, sixteen: bool = False, accumulate: bool = False
) -> torch.Tensor:
    before = torch.full((len(ids) + 2, table.cols + 6), torch.nan, device=DEVICE)
    if accumulate:
        before[: len(ids), 3:-3] = 0.3
    wide, expected = before.clone(), before.clone()
    given = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
    for run, out in ((embed, wide), (embed_reference, expected)):
        view = out[: len(ids), 3:-3]
        run(given, DRAWN, table, view, scale=scale, sixteen=sixteen, accumulate=accumulate)
    torch.testing.assert_close(wide, expected, rtol=0, atol=0, equal_nan=True)
    result = wide[: len(ids), 3:-3]
    assert torch.isfinite(result).all()
    return result


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("cols", [1, 50, 96, 576, 1100])
def test_rows_of_the_table(bits: int, cols: int) -> None:
    check_against_reference([3, 0, TOKENS - 1, 3], matrix(bits, TOKENS, cols))


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("sixteen", [False, True])
def test_scale_comes_after_rounding(bits: int, sixteen: bool) -> None:
    table = matrix(bits, TOKENS, 96)
    scaled = check_against_reference([5, 6], table, scale=33.941125, sixteen=sixteen)
    plain = check_against_reference([5, 6], table, sixteen=sixteen)
    assert torch.equal(scaled, plain * torch.tensor(33.941125, device=DEVICE))
    rounded = torch.equal(plain, plain.to(torch.bfloat16).to(torch.float32))
    assert rounded == (sixteen or bits == 16)


@pytest.mark.parametrize("bits", [4, 32])
def test_adds_to_what_is_there(bits: int) -> None:
    check_against_reference([1, 2, 4], matrix(bits, TOKENS, 50), accumulate=True)


def test_ids_below_zero_are_drawn_tokens() -> None:
    table = matrix(32, TOKENS, 50)
    result = check_against_reference([-1, 5, -2, -3, -4], table)
    assert torch.equal(result, table.codes[[7, 5, 0, 0, 19]])


def test_nothing_was_drawn() -> None:
    """A step whose ids are all known reads nothing of `drawn`, which may be empty."""
    table, out = matrix(32, TOKENS, 32), torch.empty((1, 32), device=DEVICE)
    ids = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    embed(ids, DRAWN[:0], table, out, scale=1.0, sixteen=False, accumulate=False)
    assert torch.equal(out[0], table.codes[2])


def test_no_rows() -> None:
    ids, out = DRAWN[:0], torch.empty((0, 32), device=DEVICE)
    embed(ids, DRAWN, matrix(4, TOKENS, 32), out, scale=1.0, sixteen=False, accumulate=False)


def test_q4_0_table_gives_its_stored_values() -> None:
    tensor = stored("Q4_0", TOKENS, 64)
    result = check_against_reference([*range(TOKENS)], pack(tensor, DEVICE))
    assert torch.equal(result.cpu(), torch.from_numpy(tensor.dequantise()))
