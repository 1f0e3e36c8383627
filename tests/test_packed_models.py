"""Models whose matrices are in one block storage: on the CPU they run as they lie in the file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from block_storages import FLOAT16_AT, moderate_blocks
from running import assert_executors_agree, load, load_program, relative_error

from ridgeline.native import packed_bytes
from ridgeline.precision.formats import FILE_FORMATS, FORMATS
from ridgeline.precision.storage import STORAGES

HIDDEN, FORWARD, HEAD, VOCABULARY, LAYERS = 256, 512, 64, 90, 1
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, 12).tolist()
MATRICES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FORWARD, HIDDEN),
    "ffn_up": (FORWARD, HIDDEN),
    "ffn_down": (HIDDEN, FORWARD),
}


def write_model(path: Path, storages: list[str]) -> None:
    """A small Llama of random weights; its matrices take the storages in turn."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FORWARD)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HIDDEN // HEAD)
    writer.add_head_count_kv(HIDDEN // HEAD // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    rng = np.random.default_rng(0)

    def add_norm(name: str) -> None:
        # Uneven gains: a scaled row of codes would lie on rounding boundaries of activations.
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32))

    shapes = {"token_embd": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in MATRICES.items()}
        for norm in ("attn_norm", "ffn_norm"):
            add_norm(f"blk.{layer}.{norm}")
    add_norm("output_norm")
    for seed, (name, shape) in enumerate(shapes.items()):
        storage = storages[seed % len(storages)]
        data = moderate_blocks(storage, *shape, seed=seed, spread=0.08)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[storage])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", list(FLOAT16_AT))
def test_a_model_runs_as_its_file_holds_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, [name])
    program, store = load_program(path, "auto")
    (fmt,) = set(store.formats.values())
    assert fmt.name in (FORMATS.keys() | FILE_FORMATS.keys())
    matrices = {weight for weight in program.weights() if weight.name in store.formats}
    held = sum(STORAGES[name].row_bytes(weight.shape[1]) * weight.shape[0] for weight in matrices)
    vectors = 4 * sum(weight.shape[0] for weight in program.weights() if weight.name not in store.formats)
    assert store.nbytes == held + vectors
    assert all(store.matrix(weight.name).storage.name == name for weight in matrices)
    padded = sum(packed_bytes(name, -(-w.shape[0] // 16) * 16, w.shape[1]) for w in matrices)
    assert padded <= 1.04 * held  # 90 rows take 96
    store.close()
    assert_executors_agree(path, "auto", TOKENS)
    exact = load(path, "reference", "W32A32", "KV32").run(TOKENS)
    assert relative_error(load(path, "reference", "auto", "KV32").run(TOKENS), exact) < 0.1


def test_a_file_may_mix_all_storages(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, list(FLOAT16_AT))
    assert_executors_agree(path, "auto", TOKENS)


def test_a_chosen_format_keeps_the_storages_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, ["IQ4_XS", "Q6_K"])
    for device, kept in (("cpu", {"IQ4_XS", "Q4_1"}), ("cuda", {"Q4_1"})):
        _, store = load_program(path, "W4A8-g32", device)
        assert {store.matrix(name).storage.name for name in store.formats} == kept
        store.close()
