"""Logits of each family: transformers, the reference and the CPU executor, from safetensors and from GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FAMILIES
from running import load, relative_error
from tiny_models import VOCABULARY, TinyModel

from ridgeline.native import isa_levels
from ridgeline.precision.quantise import quantise_activations

TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, 70).tolist()
EXECUTORS = ("reference", *isa_levels())
Tiny = Callable[[str], TinyModel]


def paths(model: TinyModel) -> dict[str, Path]:
    return {"safetensors": model.folder, "gguf": model.gguf}


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("file", ["safetensors", "gguf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_equal_transformers(tiny: Tiny, family: str, file: str, kind: str) -> None:
    model = tiny(family)
    seen = load(paths(model)[file], kind, "W32A32", "KV32").run(TOKENS)
    assert relative_error(seen, model.logits(TOKENS)) < 1e-4


class Margins:
    """How near each row's activations came to where one unit in the last place changes an int8 code."""

    def __init__(self, rows: int) -> None:
        self.of_row = np.full(rows, np.inf)

    def quantise(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes, scales = quantise_activations(x)
        exact = np.pad(x, ((0, 0), (0, codes.shape[1] - x.shape[1]))).reshape(*scales.shape, 32)
        with np.errstate(divide="ignore", invalid="ignore"):
            exact = np.nan_to_num(exact.astype(np.float64) / scales[..., None])
        distance = np.abs(np.abs(exact - np.floor(exact)) - 0.5).min(axis=(1, 2))
        np.minimum(self.of_row, distance, out=self.of_row)
        return codes, scales


@pytest.mark.parametrize("weights", ["W8A8-g32", "W4A8-g32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_logits_equal_the_reference(
    tiny: Tiny, family: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5, but for rows in which a code lies so near a rounding boundary that the last place decides."""
    folder = tiny(family).folder
    count, length = 60, 3
    reference = load(folder, "reference", weights, "KV32")
    margins = Margins(count * length)
    monkeypatch.setattr("ridgeline.execution.reference.quantise_activations", margins.quantise)
    batch = [reference.rows(TOKENS[i : i + length], pages=[i]) for i in range(count)]
    expected = reference.logits(*batch)
    near = np.minimum.accumulate(margins.of_row.reshape(count, length), axis=1).reshape(-1) < 1e-4
    assert near.mean() < 0.9
    for isa in isa_levels():
        seen = load(folder, isa, weights, "KV32").logits(*batch)
        error = np.abs(seen - expected).max(axis=1) / np.abs(expected).max()
        assert error[~near].max() < 1e-5
        assert error.max() < 0.1
