"""Tiny random models of the gated families beside Llama, and the same weights as GGUF files.

Windows and original contexts are shorter than the tests' prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tiny_models import _GEMMA_NAMES, GGUF_LLAMA_NAMES, SHARED, TinyModel, _interleave, is_query_or_key

SIZES = {
    **SHARED,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
WINDOW = 20
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.01 * i for i in range(12)],
    "long_factor": [1.0 + 0.2 * i for i in range(12)],
}


def _mistral() -> Any:
    config = transformers.MistralConfig(**SIZES, head_dim=24, sliding_window=WINDOW)
    return transformers.MistralForCausalLM(config)


def _qwen2(**more: Any) -> Any:
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=True, **more)
    return transformers.Qwen2ForCausalLM(config)


def _qwen3(**more: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=32, **more))


def _gemma2() -> Any:
    config = transformers.Gemma2Config(
        **(SIZES | {"num_attention_heads": 4}),
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        attn_implementation="eager",  # the only one that caps scores
    )
    return transformers.Gemma2ForCausalLM(config)


def _phi3(**more: Any) -> Any:
    config = transformers.Phi3Config(
        **(SIZES | {"hidden_size": 128, "num_attention_heads": 4, "sliding_window": WINDOW} | more),
        original_max_position_embeddings=32,
        rope_parameters=dict(LONGROPE),
    )
    return transformers.Phi3ForCausalLM(config)


def _granite() -> Any:
    config = transformers.GraniteConfig(
        **SIZES,
        rms_norm_eps=0.05,  # not lost beside a stream of length one
        tie_word_embeddings=True,
        embedding_multiplier=6.0,
        residual_multiplier=0.3,
        attention_multiplier=0.15,
        logits_scaling=4.0,
    )
    return transformers.GraniteForCausalLM(config)


def _smollm3(**more: Any) -> Any:
    config = transformers.SmolLM3Config(**(SIZES | {"num_hidden_layers": 5}), **more)
    return transformers.SmolLM3ForCausalLM(config)


def _olmo2() -> Any:
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES))


GATED: dict[str, Callable[[], Any]] = {
    "mistral": _mistral,
    "qwen2": lambda: _qwen2(rope_parameters=dict(YARN)),
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "phi3": _phi3,
    "phi4-mini": lambda: _phi3(sliding_window=262144, tie_word_embeddings=True),
    "granite": _granite,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
}

CONFIG_ONLY: dict[str, Callable[[], Any]] = {
    "qwen2-window": lambda: _qwen2(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3-bias": lambda: _qwen3(attention_bias=True),
    "smollm3-window": lambda: _smollm3(
        use_sliding_window=True,
        sliding_window=WINDOW,
        no_rope_layers=[1, 0, 1, 1, 0],
        attention_bias=True,
        mlp_bias=True,
    ),
}
"""What a GGUF file of the family cannot say."""

PERMUTED = ("mistral", "granite", "smollm3")
ARCHITECTURES = {"mistral": "llama"}
_NAMES = GGUF_LLAMA_NAMES | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
_TOP = {"lm_head": "output", "embed_tokens": "token_embd", "norm": "output_norm"}


def make_gated(name: str, directory: Path, change: Callable[[Any], Any] = lambda model: model) -> TinyModel:
    """Build, change, scale and write the model; deterministic. One of `CONFIG_ONLY` has no GGUF file."""
    torch.manual_seed(sum(map(ord, name)))
    model = change((GATED | CONFIG_ONLY)[name]()).float().eval()
    around_zero = model.config.model_type == "gemma2"
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
            else:
                weight.normal_(0, 0.2).add_(0 if around_zero or key.endswith("bias") else 1)
    folder, path = directory / name, directory / f"{name}.gguf"
    model.save_pretrained(folder, safe_serialization=True)
    if name in GATED:
        write_gated_gguf(model, path)
    return TinyModel(name, model, folder, path)


def gated_tensors(model: Any) -> dict[str, np.ndarray]:
    """The model's weights under GGUF's names and conventions, float32."""
    config = model.config
    names = _GEMMA_NAMES if config.model_type in ("gemma2", "olmo2") else _NAMES
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for key, parameter in model.state_dict().items():
        value = parameter.float().numpy()
        path, _, leaf = key.removeprefix("model.").rpartition(".")
        if path == "lm_head" and config.tie_word_embeddings:
            continue
        if path in _TOP:
            name = _TOP[path]
        else:
            _, layer, rest = path.split(".", 2)
            name = f"blk.{layer}.{names[rest]}"
        if config.model_type in PERMUTED and is_query_or_key(name):
            value = _interleave(value, heads[name.rpartition(".")[2]])
        if config.model_type == "gemma2" and name.endswith("norm"):
            value = value + 1
        tensors[f"{name}.{leaf}"] = np.ascontiguousarray(value)
    return tensors


def write_gated_gguf(model: Any, path: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(config.model_type, config.model_type))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    _write_rope(writer, config)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    for name, value in gated_tensors(model).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters["rope_theta"])
    kind = parameters["rope_type"]
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    if kind == "longrope":
        original = parameters["original_max_position_embeddings"]
        stretch = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(stretch) / np.log(original))))
        writer.add_rope_dimension_count(2 * len(parameters["long_factor"]))
        for length in ("long", "short"):
            table = np.array(parameters[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", table)
