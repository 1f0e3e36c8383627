"""Falcon: parallel blocks, one layer norm (7B, 11B) or two (40B, 180B), one fused projection by key head.

The generation with ALiBi instead of rotary positions is refused.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.family import Family, Source, fused_heads, layer_of
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.layer_normed import (
    ACTIVATIONS,
    Block,
    attention_of,
    head_sizes,
    spec_from_config,
    spec_from_gguf,
)
from ridgeline.model.families.rope import rope_from_config
from ridgeline.model.spec import FeedForwardSpec, LayerSpec, ModelSpec, NormSpec

NAMES = {
    "embed": ("token_embd", "word_embeddings"),
    "final_norm": ("output_norm", "ln_f"),
    "head": ("output", "lm_head"),
    "layers.{i}.attention_norm": ("blk.{i}.attn_norm", "h.{i}.input_layernorm"),
    "layers.{i}.q": ("blk.{i}.attn_qkv", "h.{i}.self_attention.query_key_value"),
    "layers.{i}.k": ("blk.{i}.attn_qkv", "h.{i}.self_attention.query_key_value"),
    "layers.{i}.v": ("blk.{i}.attn_qkv", "h.{i}.self_attention.query_key_value"),
    "layers.{i}.o": ("blk.{i}.attn_output", "h.{i}.self_attention.dense"),
    "layers.{i}.feed_forward_norm": ("blk.{i}.ffn_norm", "h.{i}.post_attention_layernorm"),
    "layers.{i}.up": ("blk.{i}.ffn_up", "h.{i}.mlp.dense_h_to_4h"),
    "layers.{i}.down": ("blk.{i}.ffn_down", "h.{i}.mlp.dense_4h_to_h"),
}

TWO_NORMS = {
    ("gguf", "attention_norm"): (".attn_norm.", ".attn_norm_2."),
    ("gguf", "feed_forward_norm"): (".ffn_norm.", ".attn_norm."),
    ("safetensors", "attention_norm"): (".input_layernorm.", ".ln_attn."),
    ("safetensors", "feed_forward_norm"): (".post_attention_layernorm.", ".ln_mlp."),
}
"""What parallel blocks with a norm for each half call these norms."""


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """GGUF files hold only parallel blocks, and do not say so."""
    fields = Fields(checkpoint.metadata, "falcon.")
    fields.refuse("tensor_data_layout", "jploski")  # queries, keys and values one after another
    one_norm = "blk.0.attn_norm_2.weight" not in checkpoint.tensors
    return spec_from_gguf(checkpoint, "falcon", Block("gelu", parallel=True, one_norm=one_norm))


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    fields.refuse("alibi", False)
    heads, head_dim = head_sizes(fields)
    rope = rope_from_config(fields, head_dim, theta=10000.0)
    bias = fields.flag("bias", False)
    feed_forward = FeedForwardSpec(
        width=fields.integer("ffn_hidden_size", 4 * fields.integer("hidden_size")),
        activation=fields.choice("activation", ACTIVATIONS, "gelu"),
        gated=False,
        bias=bias,
    )
    one_norm = _one_norm(fields)
    parallel = fields.flag("parallel_attn", True)
    layer = LayerSpec(
        attention_of(fields, _kv_heads(fields, heads), rope, bias, bias),
        feed_forward,
        parallel=parallel,
        one_norm=parallel and one_norm,
    )
    norm = NormSpec("layer", fields.number("layer_norm_epsilon", 1e-5))
    return spec_from_config(fields, "falcon", norm, layer, context=2048, tied=True)


def _kv_heads(fields: Fields, heads: int) -> int:
    """The first generation has one key head or as many as heads, whatever `num_kv_heads` says."""
    if fields.flag("new_decoder_architecture", False):
        return fields.integer("num_kv_heads", heads, high=heads)
    return 1 if fields.flag("multi_query", True) else heads


def _one_norm(fields: Fields) -> bool:
    """Whether both halves of a parallel block read through one norm: always so in the first generation."""
    if fields.flag("new_decoder_architecture", False):
        fields.refuse("parallel_attn", True)
        return fields.integer("num_ln_in_parallel_attn", 2, high=2) == 1
    fields.refuse("num_ln_in_parallel_attn", 1)
    return True


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """Q, K and V share a tensor, by key head in safetensors; two norms have names of their own."""
    part = name.removesuffix(".bias").rpartition(".")[2]
    if part in ("q", "k", "v"):
        by_group = checkpoint.kind == "safetensors"
        return fused_heads(plain, layer_of(spec, name).attention, part, by_group)
    if (checkpoint.kind, part) in TWO_NORMS:
        layer = layer_of(spec, name)
        if layer.parallel and not layer.one_norm:
            return replace(plain, tensor=plain.tensor.replace(*TWO_NORMS[checkpoint.kind, part]))
    return plain


FALCON = Family(
    name="falcon",
    architectures=("falcon",),
    model_types=("falcon",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    source=source,
    prefixes=("transformer.", ""),
    ignored=("*.rotary_emb.inv_freq",),
)
