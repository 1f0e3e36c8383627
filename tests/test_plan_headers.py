"""Of a model on the hub a plan fetches the beginnings of its files, and is that of the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from command_line import Cli, command_line
from test_catalog import FakeHub
from test_gguf_split import split_with_gguf
from tiny_models import TinyModel

from ridgeline.apps.plan.model import open_model
from ridgeline.model.catalog import resolve_metadata
from ridgeline.model.checkpoint.headers import SIZES_NAME, open_headers
from ridgeline.types import CheckpointError

Tiny = Callable[[str], TinyModel]


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))
    # Tiny files have tiny headers: of each only what they are is asked for first.
    monkeypatch.setattr("ridgeline.model.hub_headers._FIRST_BYTES", 64)
    monkeypatch.setattr("ridgeline.model.hub_headers._GGUF_BYTES", (64, 4096, 1 << 20))


def same(one: Path, other: Path) -> None:
    with open_model(one) as here, open_model(other) as there:
        assert here.spec == there.spec
        assert not there.bare
        for weights in ("auto", "W4A8-g32"):
            seen, expected = (model.in_format(weights, "cpu", "KV16") for model in (there, here))
            assert seen.weights_bytes == expected.weights_bytes
            assert seen.formats == expected.formats


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fetched(hub: FakeHub, ending: str) -> int:
    """The last byte that was asked for of files of a kind."""
    return max(end for name, _, end in hub.ranges if name.endswith(ending))


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_of_a_gguf(tiny: Tiny, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary factors lie among the tensors, and are fetched alone."""
    path = tiny(family).gguf
    hub = FakeHub(monkeypatch, tmp_path / "hub", {"some/m-Q8_0.gguf": path.read_bytes(), "m-F16.gguf": b"x"})
    found = resolve_metadata("hf.co/org/m:q8_0")
    same(path, found)
    tables = [(start, end) for _, start, end in hub.ranges if start]
    assert len(tables) == (family == "llama3")
    asked = len(hub.ranges)
    assert resolve_metadata("hf.co/org/m:q8_0") == found
    assert len(hub.ranges) == asked
    with pytest.raises(CheckpointError, match="was not fetched"), open_headers(found) as checkpoint:
        checkpoint.tensor("output_norm.weight")


def test_of_a_folder(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("llama3").folder
    hub = FakeHub(monkeypatch, tmp_path / "hub", contents(folder))
    same(folder, resolve_metadata("hf.co/org/m"))
    assert {name for name, _, _ in hub.ranges} == {"config.json", "model.safetensors"}
    assert fetched(hub, ".safetensors") < 0.1 * (folder / "model.safetensors").stat().st_size


def test_of_shards(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.copy(tiny("llama").folder / "config.json", folder)
    tensors = safetensors.torch.load_file(tiny("llama").folder / "model.safetensors")
    places: dict[str, str] = {}
    for number in range(3):
        name = f"model-{number}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::3]}
        safetensors.torch.save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    FakeHub(monkeypatch, tmp_path / "hub", contents(folder))
    same(folder, resolve_metadata("hf.co/org/m"))


def test_of_a_split_gguf(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    parts = split_with_gguf(tiny("llama"), folder, 12)
    # Of further parts no more is fetched than the first piece.
    monkeypatch.setattr("ridgeline.model.hub_headers._GGUF_BYTES", (16 << 10, 64 << 10))
    FakeHub(monkeypatch, tmp_path / "hub", contents(folder))
    same(parts[0], resolve_metadata("hf.co/org/m"))


def test_a_family_that_nothing_runs_is_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: dict[str, Any] = {"model_type": "deepseek_v3"}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": b"never fetched"}
    hub = FakeHub(monkeypatch, tmp_path / "hub", files)
    assert resolve_metadata("hf.co/org/m").name == "config.json"
    assert hub.ranges == []


def test_damaged_beginnings_are_one_line_and_leave_nothing_complete(
    ridgeline: Cli, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(tiny("llama").folder)
    for damaged in ({"model.safetensors": b"\xff" * 99}, {"model.safetensors": b"1"}, {"config.json": b"["}):
        FakeHub(monkeypatch, tmp_path / "hub", whole | damaged)
        outcome = ridgeline("plan", "hf.co/org/m", "--machine", "a100")
        assert outcome.code == 1
        assert outcome.err.count("\n") == 1
        assert not [*(tmp_path / "cache").rglob(SIZES_NAME)]
    short = FakeHub(monkeypatch, tmp_path / "hub", whole)
    monkeypatch.setattr(short, "cat_file", lambda *_, **__: b"")
    outcome = ridgeline("plan", "hf.co/org/m", "--machine", "a100")
    assert outcome.code == 1
    assert "bytes of" in outcome.err
