"""The default model requantised to each GGUF type by llama.cpp: our perplexity on it against llama.cpp's.

Needs llama-cpp-python, in this Python or in the one that RIDGELINE_LLAMA_PYTHON names.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from compare_perplexity import TYPES, compare

RUINED = {"TQ1_0": 0.5, "TQ2_0": 0.5}
"""Types that destroy this model, whose perplexity then says little: how far the two may be apart."""


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("type_name", TYPES)
def test_perplexity_is_that_of_llama_cpp(type_name: str, default_model_path: Path, wiki_text: Path) -> None:
    python = os.environ.get("RIDGELINE_LLAMA_PYTHON", sys.executable)
    if python == sys.executable and find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed, and RIDGELINE_LLAMA_PYTHON names no Python with it")
    (found,) = compare(
        str(default_model_path), wiki_text.read_text("utf-8"), [type_name], python, False, 512, 40
    )
    assert found.ratio == pytest.approx(1, abs=RUINED.get(type_name, 0.005))
