"""Logits of each family: transformers, the reference and the CPU executor, from safetensors and from GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FAMILIES
from running import assert_executors_agree, load, relative_error
from tiny_models import VOCABULARY, TinyModel

from ridgeline.native import isa_levels

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


@pytest.mark.parametrize("weights", ["W8A8-g32", "W4A8-g32", "W16A16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_logits_equal_the_reference(tiny: Tiny, family: str, weights: str) -> None:
    assert_executors_agree(tiny(family).folder, weights, TOKENS)
