"""A model that cannot be run is refused by a line that names what is wrong, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import tiny_models
import torch
from test_families import weights_of
from tiny_models import TinyModel

from ridgeline import LLM, loading
from ridgeline.model.checkpoint.files import MappedCheckpoint
from ridgeline.types import CheckpointError

Tiny = Callable[[str], TinyModel]
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]

NAMES = {"gguf": "blk.1.ffn_up.weight", "safetensors": "model.layers.1.mlp.up_proj.weight"}
STRANGE = {"gguf": "blk.1.ffn_sideways.weight", "safetensors": "model.layers.1.mlp.side_proj.weight"}
KINDS = tuple(NAMES)


@pytest.fixture(autouse=True)
def _nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("weights are read, or memory is taken for them")

    monkeypatch.setattr(MappedCheckpoint, "tensor", touched)
    monkeypatch.setattr(loading, "make_executor", touched)


def written(model: TinyModel, kind: str, folder: Path, change: Change, patch: pytest.MonkeyPatch) -> Path:
    """The model with other tensors, as a file of a kind."""
    if kind == "safetensors":
        tensors = safetensors.torch.load_file(model.folder / "model.safetensors")
        change(tensors)
        for sidecar in model.folder.glob("*.json"):
            (folder / sidecar.name).write_bytes(sidecar.read_bytes())
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        return folder
    tensors = {
        name: torch.from_numpy(held) for name, held in tiny_models.gguf_tensors(model.torch_model).items()
    }
    change(tensors)
    path = folder / "model.gguf"
    patch.setattr(
        tiny_models, "gguf_tensors", lambda _: {name: held.numpy() for name, held in tensors.items()}
    )
    tiny_models.write_gguf(model.torch_model, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        weights_of(path)
    message = str(raised.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_tensor(tiny: Tiny, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tensors: Tensors) -> None:
        tensors[STRANGE[kind]] = torch.zeros(3, 2)

    message = refusal(written(tiny("llama"), kind, tmp_path, change, monkeypatch))
    assert message == f"tensor '{STRANGE[kind]}' is not known to this family"


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_tensor(tiny: Tiny, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tiny("llama"), kind, tmp_path, lambda tensors: tensors.pop(NAMES[kind]), monkeypatch)
    assert refusal(path) == f"tensor '{NAMES[kind]}' is missing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 160), (160, 95), (160,), (1, 160, 96)])
def test_a_wrong_shape(
    tiny: Tiny, kind: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[NAMES[kind]] = torch.zeros(shape)

    message = refusal(written(tiny("llama"), kind, tmp_path, change, monkeypatch))
    expected = f"tensor '{NAMES[kind]}' has shape {shape}; the model's metadata asks for (160, 96)"
    assert message == expected


@pytest.mark.parametrize("dtype", [torch.int16, torch.float64, torch.bool])
def test_a_type_of_safetensors_that_is_not_read(
    tiny: Tiny, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[NAMES["safetensors"]] = torch.zeros((160, 96), dtype=dtype)

    path = written(tiny("llama"), "safetensors", tmp_path, change, monkeypatch)
    stored = {torch.int16: "I16", torch.float64: "F64", torch.bool: "BOOL"}[dtype]
    assert f"tensor '{NAMES['safetensors']}' is stored as '{stored}'; accepted: F32, " in refusal(path)
    with pytest.raises(CheckpointError, match=f"is stored as '{stored}'"):
        LLM(str(path))


def test_a_type_of_gguf_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 66), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "'blk.0.attn_q.weight': GGUF type IQ2_XXS is not supported; accepted: F32, " in refusal(path)


def test_a_scaling_of_safetensors_that_we_do_not_have(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tiny("llama"), "safetensors", tmp_path, len, monkeypatch)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rope_type": "default"', '"rope_type": "spiral"'))
    expected = "model metadata: rope_type is 'spiral'; accepted: default, linear, llama3, yarn, longrope, su"
    assert refusal(folder) == expected


def test_a_scaling_of_gguf_that_we_do_not_have(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_base = gguf.GGUFWriter.add_rope_freq_base

    def add_scaling(writer: gguf.GGUFWriter, base: float) -> None:
        writer.add_string("llama.rope.scaling.type", "spiral")
        add_base(writer, base)

    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", add_scaling)
    path = written(tiny("llama"), "gguf", tmp_path, len, monkeypatch)
    expected = "llama.rope.scaling.type is 'spiral'; accepted: 'none', 'linear', 'yarn', 'longrope'"
    assert refusal(path) == f"model metadata: {expected}"
