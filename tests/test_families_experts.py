"""Families with experts: logits as transformers', from both kinds of file, on every executor."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from running import assert_executors_agree
from test_families import EXTREMES, KINDS, Changed, file_of, read_all, refusal, rounded, spec_of, weights_of
from test_families_gated import TOKENS, assert_logits_equal, windows
from tiny_experts import (
    CHOSEN,
    CONFIG_ONLY,
    EXPERTS,
    SPARSE_MODELS,
    WINDOW,
    make_sparse,
    sparse_tensors,
    write_mxfp4_folder,
    write_sparse_gguf,
)
from tiny_models import TinyModel

from ridgeline.model.build import decoder
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.families import read_spec
from ridgeline.model.families.family import Source
from ridgeline.model.program import Route
from ridgeline.model.spec import ExpertsSpec, FeedForwardSpec
from ridgeline.model.weights import Weights
from ridgeline.native import isa_levels
from ridgeline.precision.storage import STORAGES, Tensor, float32_tensor
from ridgeline.types import CheckpointError

EXECUTORS = ("reference", *isa_levels())
Sparse = Callable[[str], TinyModel]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Sparse:
    directory = tmp_path_factory.mktemp("sparse")

    @cache
    def make(name: str) -> TinyModel:
        return make_sparse(name, directory)

    return make


# ----------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("family", SPARSE_MODELS)
def test_float32_logits_equal_transformers(sparse: Sparse, family: str, file: str, kind: str) -> None:
    model = sparse(family)
    assert_logits_equal(model, file_of(model, file), kind, TOKENS)


@pytest.mark.parametrize("name", CONFIG_ONLY)
def test_what_only_configs_say(sparse: Sparse, name: str) -> None:
    assert_logits_equal(sparse(name), sparse(name).folder, EXECUTORS[-1], TOKENS)


@pytest.mark.parametrize("family", SPARSE_MODELS)
def test_quantised_logits_equal_the_reference(sparse: Sparse, family: str) -> None:
    assert_executors_agree(sparse(family).folder, "W8A8-g32", TOKENS[:24])


@pytest.mark.parametrize("family", ["qwen2moe", "gpt-oss"])
def test_logits_on_cuda(sparse: Sparse, family: str) -> None:
    pytest.importorskip("triton")
    assert_logits_equal(sparse(family), sparse(family).folder, "cuda", TOKENS[:5])


@pytest.mark.parametrize("family", SPARSE_MODELS)
def test_the_models_choose_clearly_and_use_all_experts(sparse: Sparse, family: str) -> None:
    """What the comparisons above rest on: no choice hangs on the last place."""
    model = sparse(family)
    scores: list[np.ndarray] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: scores.append(out[0].numpy()))
        for module in model.torch_model.modules()
        if type(module).__name__.endswith("TopKRouter")
    ]
    model.logits(TOKENS)
    for hook in hooks:
        hook.remove()
    chosen = model.torch_model.config.num_experts_per_tok
    assert len(scores) == len(spec_of(model.folder).layers)
    for layer in scores:
        descending = -np.sort(-layer, axis=-1)
        assert (descending[:, chosen - 1] - descending[:, chosen]).min() > 1e-4
        assert set(np.argsort(-layer, axis=-1)[:, :chosen].flat) == set(range(EXPERTS))


# ----------------------------------------------------------------------------------- forms of files


def rewritten(model: TinyModel, path: Path, tensors: dict[str, np.ndarray]) -> TinyModel:
    write_sparse_gguf(model.torch_model.config, tensors, path)
    return replace(model, gguf=path)


def test_gguf_files_with_a_tensor_for_each_expert(sparse: Sparse, tmp_path: Path) -> None:
    model = sparse("mixtral")
    tensors = sparse_tensors(model.torch_model.config, model.folder, apart=True)
    assert f"blk.0.ffn_gate.{EXPERTS - 1}.weight" in tensors
    path = tmp_path / "apart.gguf"
    assert_logits_equal(rewritten(model, path, tensors), path, "reference", TOKENS[:8])


def test_a_gate_of_shared_experts_may_be_a_matrix_of_one_row(sparse: Sparse, tmp_path: Path) -> None:
    model = sparse("qwen2moe")
    tensors = sparse_tensors(model.torch_model.config, model.folder)
    for name, value in tensors.items():
        if name.endswith("ffn_gate_inp_shexp.weight"):
            assert value.ndim == 1
            tensors[name] = value[None]
    path = tmp_path / "row.gguf"
    assert_logits_equal(rewritten(model, path, tensors), path, "reference", TOKENS[:8])


def test_gpt_oss_as_it_is_published(sparse: Sparse, tmp_path: Path) -> None:
    """Experts in MXFP4 lie the other way round than unquantised ones, in parts of two tensors."""
    model = sparse("gpt-oss-mxfp4")
    folder = write_mxfp4_folder(model.folder, tmp_path / "published")
    assert_logits_equal(model, folder, "reference", TOKENS)
    with open_checkpoint(folder) as checkpoint:
        spec = read_spec(checkpoint)
        store = Weights(spec, decoder(spec), checkpoint)
        assert store.formats["layers.0.experts.up"].name == "W4A8-g32"
        assert store.matrix("layers.0.experts.up").storage.name == "MXFP4"
        assert store.formats["layers.0.experts.up"] == store.formats["layers.0.experts.down"]


def test_one_expert_is_a_stack_of_one() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    source = Source("expert.{e}", experts=1)
    assert source.tensors == ("expert.0",)
    assert source.apply([float32_tensor(values)]).shape == (1, 2, 3)


def test_transposed_tensors_keep_their_storage() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    bits = (values.view(np.uint32) >> 16).astype("<u2")
    turned = Source("w", transposed=True).apply([Tensor(STORAGES["BF16"], (2, 3), bits.view(np.uint8))])
    assert (turned.storage.name, turned.shape) == ("BF16", (3, 2))
    np.testing.assert_array_equal(turned.dequantise(), values.T)


# ------------------------------------------------------------------------------------------ specs


@pytest.mark.parametrize("family", SPARSE_MODELS)
def test_both_file_kinds_say_the_same(sparse: Sparse, family: str) -> None:
    from_gguf, from_config = (rounded(spec_of(file_of(sparse(family), kind))) for kind in KINDS)
    assert from_gguf[0] == from_config[0]
    assert from_gguf[0].family == family.removesuffix("-mxfp4")
    np.testing.assert_allclose(from_gguf[1], from_config[1], rtol=1e-6)


def test_experts_of_each_family(sparse: Sparse) -> None:
    def experts(name: str) -> list[ExpertsSpec | FeedForwardSpec]:
        return [layer.feed_forward for layer in spec_of(sparse(name).folder).layers]

    width = sparse("mixtral").torch_model.config.intermediate_size
    plain = FeedForwardSpec(width, "silu", gated=True)
    assert experts("mixtral") == [ExpertsSpec(EXPERTS, 2, plain)] * 3
    qwen3 = ExpertsSpec(EXPERTS, CHOSEN, replace(plain, width=64))
    assert experts("qwen3moe") == [qwen3] * 3
    assert experts("qwen3moe-some") == [plain, replace(qwen3, renormalise=False), plain, plain]
    qwen2 = replace(qwen3, shared=replace(plain, width=96))
    assert experts("qwen2moe") == [replace(qwen2, renormalise=False)] * 3
    assert experts("qwen2moe-some") == [qwen2, plain, qwen2]
    clamped = FeedForwardSpec(width, "clamped_silu", gated=True, bias=True)
    assert experts("gpt-oss") == [ExpertsSpec(EXPERTS, CHOSEN, clamped, router_bias=True)] * 3


def test_windows(sparse: Sparse) -> None:
    mixtral, oss = sparse("mixtral"), sparse("gpt-oss")
    assert windows(mixtral.folder) == windows(mixtral.gguf) == [WINDOW] * 3
    assert windows(mixtral.folder, sliding_window=None) == [None] * 3
    assert windows(oss.folder, layer_types=None) == windows(oss.gguf) == [WINDOW, None, WINDOW]
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert windows(oss.folder, layer_types=kinds) == [None, WINDOW, None]


def test_what_gguf_files_may_say_or_not(sparse: Sparse) -> None:
    def experts(name: str, **changes: Any) -> ExpertsSpec:
        feed_forward = spec_of(sparse(name).gguf, **changes).layers[0].feed_forward
        assert isinstance(feed_forward, ExpertsSpec)
        return feed_forward

    assert experts("qwen2moe", **{"qwen2moe.expert_weights_norm": True}).renormalise
    assert not experts("qwen3moe", **{"qwen3moe.expert_weights_norm": False}).renormalise
    older = experts("qwen2moe", **{"qwen2moe.expert_feed_forward_length": None})
    assert older.expert.width == 160 // CHOSEN
    same = {"gpt-oss.expert_weights_scale": 1.0, "gpt-oss.expert_gating_func": 3}
    assert experts("gpt-oss", **same) == experts("gpt-oss")


PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "mixtral-8x7b": (
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
         "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
         "sliding_window": None, "hidden_act": "silu", "tie_word_embeddings": False, "vocab_size": 32000},
        46.7,
    ),
    "qwen1.5-moe-a2.7b": (
        {"model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
         "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
         "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "norm_topk_prob": False,
         "decoder_sparse_step": 1, "max_window_layers": 21, "sliding_window": 32768,
         "use_sliding_window": False, "max_position_embeddings": 8192, "rope_theta": 1e6,
         "vocab_size": 151936},
        14.3,
    ),
    "qwen3-30b-a3b": (
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
         "mlp_only_layers": [], "attention_bias": False, "sliding_window": None, "use_sliding_window": False,
         "rope_scaling": None, "max_position_embeddings": 40960, "rope_theta": 1e6, "vocab_size": 151936},
        30.5,
    ),
    "gpt-oss-20b": (
        {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
         "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
         "num_experts_per_tok": 4, "experts_per_token": 4, "attention_bias": True, "swiglu_limit": 7.0,
         "layer_types": ["sliding_attention", "full_attention"] * 12, "sliding_window": 128,
         "rope_theta": 150000, "vocab_size": 201088, "max_position_embeddings": 131072,
         "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False,
                          "original_max_position_embeddings": 4096, "rope_type": "yarn"},
         "quantization_config": {"quant_method": "mxfp4"}},
        20.9,
    ),
}  # fmt: skip
"""The settings of published models, and their billions of parameters as their cards say."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_that_their_cards_say(sparse: Sparse, name: str) -> None:
    settings, billions = PUBLISHED[name]
    with open_checkpoint(sparse("mixtral").folder) as checkpoint:
        spec = read_spec(Changed(checkpoint, settings))  # type: ignore[arg-type]
    total = sum(math.prod(weight.shape) for weight in decoder(spec).weights())
    assert total / 1e9 == pytest.approx(billions, abs=0.05)


def test_routes_are_named_in_the_program(sparse: Sparse) -> None:
    program = decoder(spec_of(sparse("qwen2moe").folder))
    routes = [op for op in program.operations if isinstance(op, Route)]
    assert [op.router.shape for op in routes] == [(EXPERTS, 96)] * 3
    assert {op.shared_gate.shape for op in routes if op.shared_gate} == {(1, 96)}


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("family", "kind", "key", "value", "reason"),
    [
        ("mixtral", "gguf", "llama.expert_count", 7, "ffn_gate_inp.weight' has shape (8, 96)"),
        ("mixtral", "gguf", "llama.expert_count", 0, "blk.0.ffn_down.weight' is missing"),
        ("mixtral", "gguf", "llama.expert_count", 1 << 16, "accepted: a whole number from 1 to 4096"),
        ("mixtral", "gguf", "llama.expert_used_count", 9, "expert_used_count is 9; accepted: a whole"),
        ("mixtral", "safetensors", "num_local_experts", 7, "experts.7.w1.weight' is not known"),
        ("mixtral", "safetensors", "num_local_experts", 4096, "experts.4095.w1.weight' is missing"),
        ("mixtral", "safetensors", "num_local_experts", None, "num_local_experts is missing"),
        ("mixtral", "safetensors", "num_experts_per_tok", 0, "num_experts_per_tok is 0"),
        ("qwen2moe", "gguf", "qwen2moe.expert_weights_scale", 2.5, "weights_scale is 2.5; accepted: 0, 1"),
        ("qwen2moe", "gguf", "qwen2moe.expert_gating_func", 2, "expert_gating_func is 2; accepted: 0, 1"),
        ("qwen2moe", "gguf", "qwen2moe.expert_group_count", 4, "expert_group_count is 4"),
        ("qwen2moe", "gguf", "qwen2moe.expert_shared_feed_forward_length", 64, "ffn_up_shexp.weight' has"),
        ("qwen2moe", "safetensors", "use_sliding_window", True, "use_sliding_window is True"),
        ("qwen2moe", "safetensors", "qkv_bias", False, "qkv_bias is False; accepted: True"),
        ("qwen3moe", "gguf", "qwen3moe.leading_dense_block_count", 1, "block_count is 1; accepted: 0"),
        ("qwen3moe", "safetensors", "mlp_only_layers", [-1], "mlp_only_layers is [-1]; accepted: whole"),
        ("qwen3moe", "safetensors", "mlp_only_layers", [0], "mlp.down_proj.weight' is missing"),
        ("qwen3moe", "safetensors", "decoder_sparse_step", 0, "decoder_sparse_step is 0"),
        ("qwen3moe", "safetensors", "moe_intermediate_size", 32, "gate_proj.weight' has shape (64, 96)"),
        ("gpt-oss", "safetensors", "swiglu_limit", 10.0, "swiglu_limit is 10.0; accepted: 7.0"),
        ("gpt-oss", "safetensors", "swiglu_alpha", 1.0, "swiglu_alpha is 1.0; accepted: 1.702"),
        ("gpt-oss", "safetensors", "attention_bias", False, "attention_bias is False; accepted: True"),
        ("gpt-oss", "safetensors", "hidden_act", "gelu", "hidden_act is 'gelu'; accepted: silu"),
        ("gpt-oss", "gguf", "gpt-oss.expert_gating_func", 2, "expert_gating_func is 2; accepted: 0, 1, 3"),
        ("gpt-oss", "gguf", "gpt-oss.expert_feed_forward_length", 64, "ffn_gate_exps.weight' has shape"),
    ],
)  # fmt: skip
def test_bad_metadata_is_refused_in_one_line(
    sparse: Sparse, family: str, kind: str, key: str, value: Any, reason: str
) -> None:
    with open_checkpoint(file_of(sparse(family), kind)) as checkpoint:
        message = refusal(checkpoint, key, value)
    assert message.isprintable()
    assert reason in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2moe", "qwen3moe", "gpt-oss"])
def test_any_value_in_any_field_is_taken_or_refused(sparse: Sparse, family: str, kind: str) -> None:
    refused = 0
    with open_checkpoint(file_of(sparse(family), kind)) as checkpoint:
        for key in checkpoint.metadata:
            for value in EXTREMES:
                message = refusal(checkpoint, key, value)
                assert message.isprintable()
                assert len(message) < 400
                refused += bool(message)
    assert refused > 100


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.5.w2.weight", (96, 159)),
        ("qwen2moe", "model.layers.0.mlp.shared_expert_gate.weight", (96, 1)),
        ("qwen3moe", "model.layers.0.mlp.gate.weight", (9, 96)),
        ("gpt-oss", "model.layers.0.mlp.experts.gate_up_proj", (EXPERTS, 320, 96)),
        ("gpt-oss", "model.layers.2.self_attn.sinks", (5,)),
    ],
)
def test_wrong_tensors_are_named(
    sparse: Sparse, tmp_path: Path, family: str, name: str, shape: tuple[int, ...]
) -> None:
    folder = sparse(family).folder
    shutil.copy(folder / "config.json", tmp_path)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    held = tensors.pop(name)

    def store(**more: np.ndarray) -> Weights:
        safetensors.numpy.save_file(tensors | more, tmp_path / "model.safetensors")
        return weights_of(tmp_path)

    with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
        store()
    with pytest.raises(CheckpointError, match=f"tensor '{name}' has shape"):
        store(**{name: np.zeros(shape, np.float32)})
    held.reshape(-1)[5] = np.inf
    with pytest.raises(CheckpointError, match=f"tensor '{name}' .* infinite"):
        read_all(store(**{name: held}))


def test_other_names_for_these_families_are_refused_with_the_nearest(sparse: Sparse) -> None:
    with pytest.raises(CheckpointError, match="'gptoss'; the nearest that is known is 'gpt-oss'"):
        spec_of(sparse("gpt-oss").gguf, **{"general.architecture": "gptoss"})
    config = json.loads((sparse("qwen3moe").folder / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    with pytest.raises(CheckpointError, match="nearest that is known is 'qwen3_moe'"):
        spec_of(sparse("qwen3moe").folder, model_type="qwen3_vl_moe")
