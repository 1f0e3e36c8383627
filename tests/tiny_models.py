"""Tiny random-weight models of each family, written by transformers, and the same weights as GGUF files.

Weights are scaled so that logits are far from uniform, and sizes are chosen to be awkward: a hidden size
that is no multiple of 64, grouped heads, window layers shorter than the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

VOCABULARY = 288
SHARED = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SHARED | sizes | changes)))


def _llama3() -> Any:
    return _llama(head_dim=32, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False)


def _odd() -> Any:
    """Nothing is a multiple of anything, and the vocabulary is as wide as the stream."""
    return _llama(
        vocab_size=50,
        hidden_size=50,
        intermediate_size=70,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=6,
        attention_bias=True,
        mlp_bias=True,
    )


def _gpt2() -> Any:
    config = transformers.GPT2Config(**SHARED, n_embd=80, n_layer=3, n_head=5, n_positions=512)
    return transformers.GPT2LMHeadModel(config)


def _gemma3(**changes: Any) -> Any:
    config = transformers.Gemma3TextConfig(
        **SHARED,
        **changes,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=20,
        max_position_embeddings=512,
    )
    return transformers.Gemma3ForCausalLM(config)


def _capped() -> Any:
    return _gemma3(final_logit_softcapping=2.0)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama3": _llama3,
    "gpt2": _gpt2,
    "gemma3": _gemma3,
    "odd": _odd,
    "capped": _capped,
}


@dataclass(frozen=True)
class TinyModel:
    """A model in memory, its safetensors folder and its GGUF file."""

    name: str
    torch_model: Any
    folder: Path
    gguf: Path

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 (tokens, vocabulary), by transformers."""
        with torch.no_grad():
            return self.torch_model(torch.tensor([tokens])).logits[0].float().numpy()


def pool_bytes(model: TinyModel, tokens: int) -> int:
    """Keys and values of one sequence of `tokens`, every layer counted as if it had no window."""
    config = model.torch_model.config
    return 2 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * tokens


def make(name: str, directory: Path, change: Callable[[Any], Any] = lambda model: model) -> TinyModel:
    """Build, change, scale and write the model; deterministic."""
    torch.manual_seed(sum(map(ord, name)))
    model = change(MODELS[name]()).float().eval()
    gemma3 = model.config.model_type == "gemma3_text"
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 2 and not key.endswith("wpe.weight"):
                weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
            else:
                weight.normal_(0, 0.2).add_(0 if gemma3 or key.endswith("bias") else 1)
    folder = directory / name
    model.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder)
    path = directory / f"{name}.gguf"
    write_gguf(model, path)
    return TinyModel(name, model, folder, path)


def write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary of 256 bytes and a few special tokens, without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: i for i, piece in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "eos_token": "<|im_end|>"})
    )


# ------------------------------------------------------------------------------------------- GGUF

GGUF_LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_NAMES = {
    **GGUF_LLAMA_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GPT2_NAMES = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_TOP = {
    "embed_tokens": "token_embd",
    "wte": "token_embd",
    "wpe": "position_embd",
    "norm": "output_norm",
    "ln_f": "output_norm",
}


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves to pairs, as GGUF files of the Llama family have them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """The model's weights under GGUF's names and conventions, float32."""
    kind = model.config.model_type
    names = {"llama": GGUF_LLAMA_NAMES, "gemma3_text": _GEMMA_NAMES, "gpt2": _GPT2_NAMES}[kind]
    tied = model.config.tie_word_embeddings
    tensors = {}
    for key, parameter in model.state_dict().items():
        value = parameter.float().numpy()
        path, _, leaf = key.removeprefix("model.").removeprefix("transformer.").rpartition(".")
        if path == "lm_head":
            if not tied:
                tensors["output.weight"] = value
            continue
        if path in _TOP:
            name = _TOP[path]
        else:
            _, layer, rest = path.split(".", 2)
            name = f"blk.{layer}.{names[rest]}"
        if kind == "llama" and is_query_or_key(name):
            heads = (
                model.config.num_attention_heads if name.endswith("q") else model.config.num_key_value_heads
            )
            value = _interleave(value, heads)
        if kind == "gemma3_text" and name.endswith("norm"):
            value = value + 1
        if kind == "gpt2" and leaf == "weight" and name.startswith("blk") and value.ndim == 2:
            value = value.T
        tensors[f"{name}.{leaf}"] = np.ascontiguousarray(value)
    return tensors


def is_query_or_key(name: str) -> bool:
    return name.endswith(("attn_q", "attn_k"))


def write_gguf(model: Any, path: Path, storage: gguf.GGMLQuantizationType | None = None) -> None:
    """Write the model; matrices whose rows allow it are quantised to `storage` where one is given."""
    config = model.config
    arch = {"llama": "llama", "gemma3_text": "gemma3", "gpt2": "gpt2"}[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    elif arch == "llama":
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        if config.rope_parameters["rope_type"] == "llama3":
            plain = 10000.0 ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
            scaled = model.model.rotary_emb.inv_freq.numpy()
            writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    for name, value in gguf_tensors(model).items():
        if (
            storage is not None
            and value.ndim == 2
            and value.shape[1] % 32 == 0
            and name != "position_embd.weight"
        ):
            writer.add_tensor(name, gguf.quants.quantize(value, storage), raw_dtype=storage)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
