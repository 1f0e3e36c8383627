"""Packing by blocks and threads gives what packing whole matrices gives, in bounded memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from block_storages import FLOAT16_AT
from running import load_program
from test_packed_models import write_model
from tiny_experts import make_sparse
from tiny_models import TinyModel

from ridgeline.execution.cpu import packing
from ridgeline.execution.cpu.packing import Layout, pack_all
from ridgeline.model.weights import Weights
from ridgeline.native import Team, allocate, pack, pack_rows, packed_bytes
from ridgeline.types import ByteArray, CheckpointError

MIB = 1 << 20


def packed_whole(weights: Weights) -> ByteArray:
    """The region as matrices packed one by one would fill it."""
    layout, team = Layout.of(weights), Team(1)
    region = np.zeros(layout.nbytes, np.uint8)
    for place in layout.places:
        tensor = weights.matrix(place.name)
        data = np.ascontiguousarray(tensor.data)
        packed = pack(data, tensor.storage.name, tensor.cols, team, experts=place.reader.experts)
        assert packed.nbytes == place.nbytes
        region[place.start : place.start + place.nbytes] = packed
    return region


def assert_packs_alike(path: Path, fmt: str = "auto") -> None:
    _, weights = load_program(path, fmt)
    expected = packed_whole(weights)
    for threads in (1, 3):
        layout = Layout.of(weights)
        region = layout.allocate()
        pack_all(layout, region, threads)
        np.testing.assert_array_equal(region, expected)
    weights.close()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have matrices of several blocks."""
    monkeypatch.setattr(packing, "_BLOCK_BYTES", 1 << 13)


@pytest.mark.parametrize("fmt", ["auto", "W4A8-g32", "W8A8-g32", "W16A16", "W32A32"])
@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("name", ["llama", "odd", "gpt2"])
def test_families_and_formats(tiny: Callable[[str], TinyModel], name: str, kind: str, fmt: str) -> None:
    model = tiny(name)
    assert_packs_alike(model.folder if kind == "folder" else model.gguf, fmt)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts(tmp_path: Path, name: str) -> None:
    model = make_sparse(name, tmp_path)
    assert_packs_alike(model.folder)
    assert_packs_alike(model.gguf, "W8A8-g32")


@pytest.mark.parametrize("fmt", ["auto", "W8A8-g32"])
def test_every_storage_of_blocks(tmp_path: Path, fmt: str) -> None:
    for name, storages in {"one.gguf": [*FLOAT16_AT], "other.gguf": [*reversed(FLOAT16_AT)]}.items():
        write_model(tmp_path / name, storages)  # eight matrices each
        assert_packs_alike(tmp_path / name, fmt)


@pytest.mark.parametrize("storage", ["Q4_K", "Q6_K", "MXFP4"])
def test_what_is_not_finite_is_refused_by_name(tmp_path: Path, storage: str) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, [storage])
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    (at,) = FLOAT16_AT[storage][:1] or (0,)
    tensor.data.reshape(-1).view(np.uint8)[at : at + 2] = (0xFF, 0x7F)
    del tensor, reader
    _, weights = load_program(path, "auto")
    layout = Layout.of(weights)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight'.* infinite or not a number"):
        pack_all(layout, layout.allocate(), 2)


@pytest.mark.parametrize(("storage", "dtype"), [("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2")])
def test_packing_finds_every_value_that_is_not_finite(storage: str, dtype: str) -> None:
    cols, team = 33, Team(1)
    out = allocate(packed_bytes(storage, 17, cols))
    largest, infinite = (0x7F7F, 0xFF80) if dtype == "<u2" else (np.finfo(dtype).max, -np.inf)
    for row, col in ((0, 0), (3, 31), (16, 32)):
        values = np.full((17, cols), largest, dtype)
        assert pack_rows(values.view(np.uint8), storage, cols, team, out)
        values[row, col] = infinite
        assert not pack_rows(values.view(np.uint8), storage, cols, team, out)


# ------------------------------------------------------------------------------------------ peak memory

_LOAD = """
import sys
from pathlib import Path
from running import load_program
from ridgeline.execution.base import Limits
from ridgeline.execution.cpu.executor import CpuExecutor
program, weights = load_program(Path(sys.argv[1]), sys.argv[2])
executor = CpuExecutor(Limits(16, (8,) * len(program.groups), "KV16"), 2)
executor.load(weights)
status = Path("/proc/self/status").read_text()
print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
"""

HIDDEN, FORWARD, VOCABULARY, LAYERS = 1024, 3072, 40960, 4
"""A small model with a large vocabulary: one matrix is a large share of it."""


def shapes(gguf_names: bool) -> dict[str, tuple[int, int]]:
    matrices = {
        ("attn_q", "self_attn.q_proj"): (HIDDEN, HIDDEN),
        ("attn_k", "self_attn.k_proj"): (HIDDEN // 2, HIDDEN),
        ("attn_v", "self_attn.v_proj"): (HIDDEN // 2, HIDDEN),
        ("attn_output", "self_attn.o_proj"): (HIDDEN, HIDDEN),
        ("ffn_gate", "mlp.gate_proj"): (FORWARD, HIDDEN),
        ("ffn_up", "mlp.up_proj"): (FORWARD, HIDDEN),
        ("ffn_down", "mlp.down_proj"): (HIDDEN, FORWARD),
    }
    found = {"token_embd.weight" if gguf_names else "model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    found["output.weight" if gguf_names else "lm_head.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for (ours, theirs), shape in matrices.items():
            name = f"blk.{layer}.{ours}" if gguf_names else f"model.layers.{layer}.{theirs}"
            found[f"{name}.weight"] = shape
    return found


def write_folder(folder: Path) -> Path:
    """A bfloat16 model of zeros: its file has holes instead of tensors."""
    folder.mkdir()
    norms = [
        f"model.layers.{i}.{n}_layernorm.weight" for i in range(LAYERS) for n in ("input", "post_attention")
    ]
    all_shapes: dict[str, tuple[int, ...]] = {**shapes(False), "model.norm.weight": (HIDDEN,)}
    all_shapes |= dict.fromkeys(norms, (HIDDEN,))
    header, at = {}, 0
    for name, shape in all_shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + at)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": FORWARD, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def write_k_quants(path: Path) -> Path:
    """A model in Q6_K and Q4_K whose blocks are zeros."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FORWARD)
    writer.add_block_count(LAYERS)
    writer.add_head_count(16)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    norms = [f"blk.{layer}.{name}" for layer in range(LAYERS) for name in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    for name, (rows, cols) in shapes(True).items():
        kind, size = ("Q4_K", 144) if name.startswith("blk") else ("Q6_K", 210)
        data = np.zeros((rows, cols // 256 * size), np.uint8)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("fmt", ["W16A16", "W8A8-g32", "k-quants"])
def test_peak_memory_while_loading(tmp_path: Path, fmt: str) -> None:
    if fmt == "k-quants":
        file = model = write_k_quants(tmp_path / "model.gguf")
        fmt = "auto"
    else:
        file, model = write_folder(tmp_path / "model"), tmp_path / "model"
    command = [sys.executable, "-c", _LOAD, str(model), fmt]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    size = file.stat().st_size
    assert size > 60 * MIB
    assert int(done.stdout) * 1024 <= 1.3 * size + 130e6
