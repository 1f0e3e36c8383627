"""Tiny random models of the families with experts, and the same weights as GGUF files.

GGUF tensors are named by the `gguf` package's own map of Hugging Face names. Windows are shorter than the
tests' prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import torch
import transformers
from tiny_gated import SIZES, WINDOW
from tiny_models import TinyModel, _interleave

EXPERTS = 8
CHOSEN = 3
SPARSE = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 64}
MXFP4 = gguf.GGMLQuantizationType.MXFP4
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}


def _mixtral(**more: Any) -> Any:
    config = transformers.MixtralConfig(
        **SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=WINDOW, **more
    )
    return transformers.MixtralForCausalLM(config)


def _qwen2_moe(**more: Any) -> Any:
    config = transformers.Qwen2MoeConfig(**SIZES, **SPARSE, shared_expert_intermediate_size=96, **more)
    return transformers.Qwen2MoeForCausalLM(config)


def _qwen3_moe(**more: Any) -> Any:
    settings = {"norm_topk_prob": True} | more
    config = transformers.Qwen3MoeConfig(**(SIZES | SPARSE | {"head_dim": 32} | settings))
    return transformers.Qwen3MoeForCausalLM(config)


def _gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **SIZES,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        head_dim=32,
        sliding_window=WINDOW,
        rope_parameters=dict(YARN),
        attn_implementation="eager",  # the only one that has sinks without a GPU
    )
    return transformers.GptOssForCausalLM(config)


SPARSE_MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": _mixtral,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "gpt-oss": _gpt_oss,
    "gpt-oss-mxfp4": _gpt_oss,
}
CONFIG_ONLY: dict[str, Callable[[], Any]] = {
    "qwen2moe-some": lambda: _qwen2_moe(norm_topk_prob=True, mlp_only_layers=[1]),
    "qwen3moe-some": lambda: _qwen3_moe(
        norm_topk_prob=False,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        attention_bias=True,
    ),
}
"""What a GGUF file cannot say, or leaves to its family's rule: dense layers among the others, and scores."""

ARCHITECTURES = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
}


def make_sparse(name: str, directory: Path, change: Callable[[Any], Any] = lambda model: model) -> TinyModel:
    """Build, change, scale and write the model; deterministic. One of `CONFIG_ONLY` has no GGUF file.

    The experts of one in MXFP4 hold what its blocks stand for, in all three forms.
    """
    torch.manual_seed(sum(map(ord, name)))
    model = change((SPARSE_MODELS | CONFIG_ONLY)[name]()).float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("bias", "sinks")):
                weight.normal_(0, 1.0 if key.endswith("sinks") else 0.2)
            elif weight.ndim == 1:
                weight.normal_(1, 0.2)
            else:
                turned = model.config.model_type == "gpt_oss" and weight.ndim == 3
                weight.normal_(0, 1.5 / weight.shape[1 if turned else -1] ** 0.5)
            if name.endswith("mxfp4") and weight.ndim == 3:
                weight.copy_(_rounded_to_mxfp4(weight))
    folder, path = directory / name, directory / f"{name}.gguf"
    model.save_pretrained(folder, safe_serialization=True)
    if name in SPARSE_MODELS:
        write_sparse_gguf(model.config, sparse_tensors(model.config, folder), path, name.endswith("mxfp4"))
    return TinyModel(name, model, folder, path)


def _rounded_to_mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """A stack of experts (experts, inputs, outputs), with blocks along its inputs."""
    blocks = gguf.quants.quantize(np.ascontiguousarray(weight.numpy().swapaxes(1, 2)), MXFP4)
    return torch.from_numpy(gguf.quants.dequantize(blocks, MXFP4).swapaxes(1, 2).copy())


def write_mxfp4_folder(source: Path, folder: Path) -> Path:
    """A copy of a gpt-oss folder with its experts in MXFP4: (experts, outputs, inputs), codes in pairs of
    neighbours, and exponents beside them."""
    tensors = {}
    for key, value in safetensors.numpy.load_file(source / "model.safetensors").items():
        if not key.endswith("_proj"):
            tensors[key] = value
            continue
        rows = np.ascontiguousarray(value.swapaxes(1, 2))
        blocks = gguf.quants.quantize(rows, MXFP4).reshape(*rows.shape[:2], -1, 17)
        halves = blocks[..., 1:]
        codes = np.concatenate([halves & 15, halves >> 4], axis=-1)
        tensors[f"{key}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        tensors[f"{key}_scales"] = np.ascontiguousarray(blocks[..., 0])
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


# ------------------------------------------------------------------------------------------- GGUF


def sparse_tensors(config: Any, folder: Path, apart: bool = False) -> dict[str, np.ndarray]:
    """The folder's weights under GGUF's names and conventions, float32; `apart`, a tensor for each expert as
    the first files with experts had them."""
    arch = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for key, value in _stacked(safetensors.numpy.load_file(folder / "model.safetensors")).items():
        path, leaf = key.removesuffix(".bias").removesuffix(".weight"), "bias" if "bias" in key else "weight"
        name = names.get_name(path)
        assert name is not None, key
        part = name.rpartition(".")[2]
        if config.model_type == "mixtral" and part in heads:
            value = _interleave(value, heads[part])
        if part == "ffn_gate_inp_shexp":
            value = value[0]
        if apart and part.endswith("_exps"):
            for expert, each in enumerate(value):
                tensors[f"{name.removesuffix('_exps')}.{expert}.{leaf}"] = np.ascontiguousarray(each)
        else:
            tensors[f"{name}.{leaf}"] = np.ascontiguousarray(value)
    return tensors


def _stacked(held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts that lie apart in one tensor, and gate and up that lie in one tensor apart."""
    tensors: dict[str, Any] = {}
    for key, value in held.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+\.weight)", key):
            tensors.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = value
        elif match := re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj(_bias)?", key):
            leaf = "bias" if match[3] else "weight"
            rows = value if match[3] else value.swapaxes(1, 2)
            parts = {"down": rows} if match[2] == "down" else {"gate": rows[:, ::2], "up": rows[:, 1::2]}
            tensors |= {f"{match[1]}.{part}_proj.{leaf}": each for part, each in parts.items()}
        else:
            tensors[key] = value
    return {
        key: np.stack([value[i] for i in range(len(value))]) if isinstance(value, dict) else value
        for key, value in tensors.items()
    }


def write_sparse_gguf(config: Any, tensors: dict[str, np.ndarray], path: Path, mxfp4: bool = False) -> None:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type.startswith("qwen"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    for name, value in tensors.items():
        if mxfp4 and name.endswith("_exps.weight"):
            writer.add_tensor(name, gguf.quants.quantize(value, MXFP4), raw_dtype=MXFP4)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
