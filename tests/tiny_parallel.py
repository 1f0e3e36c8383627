"""Tiny models of the families with layer norms and parallel blocks, and the same weights as GGUF files.

`tiny_models` says how weights are scaled; GGUF names and layouts are those of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tiny_models import SHARED, TinyModel, write_tokenizer

SIZES: dict[str, Any] = {
    **SHARED,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
WINDOW = 20
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}


def _gptneox(**changes: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
    config = transformers.GPTNeoXConfig(**SIZES | {"rope_parameters": rope} | changes)
    return transformers.GPTNeoXForCausalLM(config)


def _gptneox_sequential() -> Any:
    return _gptneox(use_parallel_residual=False, tie_word_embeddings=True)


def _falcon(**changes: Any) -> Any:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    config = transformers.FalconConfig(**sizes | {"ffn_hidden_size": 160} | changes)
    return transformers.FalconForCausalLM(config)


def _falcon_new() -> Any:
    return _falcon(new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False)


def _falcon_new_one_norm() -> Any:
    return _falcon(new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1)


def _falcon_sequential() -> Any:
    """As the first small ones, but with rotary positions: no GGUF file holds such a model."""
    return _falcon(parallel_attn=False, multi_query=False, bias=True)


def _stablelm(**changes: Any) -> Any:
    return transformers.StableLmForCausalLM(transformers.StableLmConfig(**GROUPED | changes))


def _stablelm_parallel() -> Any:
    return _stablelm(use_parallel_residual=True, use_qkv_bias=True)


def _starcoder2() -> Any:
    config = transformers.Starcoder2Config(**GROUPED | {"sliding_window": WINDOW, "norm_epsilon": 1e-4})
    return transformers.Starcoder2ForCausalLM(config)


def _starcoder2_plain() -> Any:
    """No window, no biases, and a head of its own."""
    changes = {"sliding_window": None, "use_bias": False, "tie_word_embeddings": False}
    return transformers.Starcoder2ForCausalLM(transformers.Starcoder2Config(**GROUPED | changes))


def _stablelm_heads() -> Any:
    """As StableLM 2 12B: a norm for each head."""
    return _stablelm(use_parallel_residual=True, qk_layernorm=True)


def _command_r(**changes: Any) -> Any:
    config = transformers.CohereConfig(**GROUPED | {"logit_scale": 0.3} | changes)
    return transformers.CohereForCausalLM(config)


def _command_r_plus() -> Any:
    return _command_r(use_qk_norm=True)


def _cohere2() -> Any:
    """Three layers with a window and positions, one with neither, and another with both."""
    changes = {"num_hidden_layers": 5, "sliding_window": WINDOW, "logit_scale": 0.3}
    return transformers.Cohere2ForCausalLM(transformers.Cohere2Config(**GROUPED | changes))


MODELS: dict[str, Callable[[], Any]] = {
    "gptneox": _gptneox,
    "gptneox-sequential": _gptneox_sequential,
    "falcon": _falcon,
    "falcon-new": _falcon_new,
    "falcon-new-one-norm": _falcon_new_one_norm,
    "falcon-sequential": _falcon_sequential,
    "stablelm": _stablelm,
    "stablelm-parallel": _stablelm_parallel,
    "starcoder2": _starcoder2,
    "starcoder2-plain": _starcoder2_plain,
    "stablelm-heads": _stablelm_heads,
    "command-r": _command_r,
    "command-r-plus": _command_r_plus,
    "cohere2": _cohere2,
}
WITHOUT_GGUF = ("falcon-sequential",)


def make(name: str, directory: Path, change: Callable[[Any], Any] = lambda model: model) -> TinyModel:
    """Build, change, scale and write the model; deterministic."""
    torch.manual_seed(sum(map(ord, name)))
    model = change(MODELS[name]()).float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 2 and "norm" not in key:
                weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
            else:
                weight.normal_(0, 0.2).add_(0 if key.endswith("bias") else 1)
    folder, path = directory / name, directory / f"{name}.gguf"
    model.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder)
    if name not in WITHOUT_GGUF:
        write_gguf(model, path)
    return TinyModel(name, model, folder, path)


# ------------------------------------------------------------------------------------------- GGUF

_ARCHITECTURES = {
    "gpt_neox": "gptneox",
    "falcon": "falcon",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "cohere": "command-r",
    "cohere2": "cohere2",
}
_TOP = {
    "embed_in": "token_embd",
    "embed_tokens": "token_embd",
    "word_embeddings": "token_embd",
    "final_layer_norm": "output_norm",
    "norm": "output_norm",
    "ln_f": "output_norm",
    "embed_out": "output",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "ln_attn": "attn_norm_2",
    "ln_mlp": "attn_norm",
    "query_key_value": "attn_qkv",
    "dense": "attn_output",
    "dense_h_to_4h": "ffn_up",
    "dense_4h_to_h": "ffn_down",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "c_fc": "ffn_up",
    "c_proj": "ffn_down",
}


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """The model's weights under GGUF's names and conventions, float32."""
    config = model.config
    tensors = {}
    for key, parameter in _stacked(model.state_dict()).items():
        *path, leaf = key.split(".")
        value = parameter.float().numpy()
        if path[-1] in _TOP:
            name = _TOP[path[-1]]
            if name == "output" and config.tie_word_embeddings:
                continue
        else:
            name = f"blk.{next(p for p in path if p.isdigit())}.{_LAYER[path[-1]]}"
        if name.endswith("attn_qkv"):
            value = _in_turn(value, config.num_attention_heads, _kv_heads(config))
        tensors[f"{name}.{leaf}"] = np.ascontiguousarray(value)
    return tensors


def _stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """StableLM's norms of single heads as one tensor for queries and one for keys."""
    stacked: dict[str, list[torch.Tensor]] = {}
    for key, value in state.items():
        path, norms, _ = key.partition("_layernorm.norms.")
        stacked.setdefault(f"{path}_norm.weight" if norms else key, []).append(value)
    return {key: torch.stack(values) if len(values) > 1 else values[0] for key, values in stacked.items()}


def _kv_heads(config: Any) -> int:
    if config.model_type == "gpt_neox":
        return int(config.num_attention_heads)
    if config.model_type != "falcon":
        return int(config.num_key_value_heads)
    return int(config.num_kv_heads) if config.new_decoder_architecture else 1


def _in_turn(fused: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Queries, keys and values of each key head to all queries, all keys, all values."""
    dim = len(fused) // (heads + 2 * kv_heads)
    by_head = fused.reshape(kv_heads, heads // kv_heads + 2, dim, -1)
    parts = (by_head[:, :-2], by_head[:, -2], by_head[:, -1])
    return np.concatenate([part.reshape(-1, *fused.shape[1:]) for part in parts])


def write_gguf(model: Any, path: Path) -> None:
    config = model.config
    arch = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.ffn_hidden_size if arch == "falcon" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    eps = {"falcon": "layer_norm_epsilon", "starcoder2": "norm_epsilon"}.get(arch, "layer_norm_eps")
    writer.add_layer_norm_eps(getattr(config, eps))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "falcon":
        writer.add_tensor_data_layout("jploski")
    if arch != "gptneox":
        writer.add_head_count_kv(_kv_heads(config))
    if arch in ("gptneox", "stablelm"):
        head_dim = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(head_dim * config.rope_parameters["partial_rotary_factor"]))
        writer.add_parallel_residual(config.use_parallel_residual)
    if getattr(config, "sliding_window", None) is not None:
        writer.add_sliding_window(config.sliding_window)
    if arch in ("command-r", "cohere2"):
        writer.add_logit_scale(config.logit_scale)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    for name, value in gguf_tensors(model).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
