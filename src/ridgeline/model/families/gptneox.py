"""GPT-NeoX and Pythia: parallel blocks with two layer norms, partial rotary, one fused projection."""

from __future__ import annotations

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
from ridgeline.model.families.partial_rope import partial_rope_from_config
from ridgeline.model.spec import FeedForwardSpec, LayerSpec, ModelSpec, NormSpec

NAMES = {
    "embed": ("token_embd", "embed_in"),
    "final_norm": ("output_norm", "final_layer_norm"),
    "head": ("output", "embed_out"),
    "layers.{i}.attention_norm": ("blk.{i}.attn_norm", "layers.{i}.input_layernorm"),
    "layers.{i}.q": ("blk.{i}.attn_qkv", "layers.{i}.attention.query_key_value"),
    "layers.{i}.k": ("blk.{i}.attn_qkv", "layers.{i}.attention.query_key_value"),
    "layers.{i}.v": ("blk.{i}.attn_qkv", "layers.{i}.attention.query_key_value"),
    "layers.{i}.o": ("blk.{i}.attn_output", "layers.{i}.attention.dense"),
    "layers.{i}.feed_forward_norm": ("blk.{i}.ffn_norm", "layers.{i}.post_attention_layernorm"),
    "layers.{i}.up": ("blk.{i}.ffn_up", "layers.{i}.mlp.dense_h_to_4h"),
    "layers.{i}.down": ("blk.{i}.ffn_down", "layers.{i}.mlp.dense_4h_to_h"),
}


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """GGUF files do not say which GELU; nearly all of the family (Pythia) has the exact one."""
    parallel = Fields(checkpoint.metadata, "gptneox.").flag("use_parallel_residual", True)
    return spec_from_gguf(checkpoint, "gptneox", Block("gelu", parallel=parallel))


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    heads, head_dim = head_sizes(fields)
    theta, fraction = fields.number("rotary_emb_base", 10000.0), fields.number("rotary_pct", 0.25)
    rope = partial_rope_from_config(fields, head_dim, theta, fraction)
    bias = fields.flag("attention_bias", True)
    feed_forward = FeedForwardSpec(
        width=fields.integer("intermediate_size"),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated=False,
        bias=True,
    )
    layer = LayerSpec(
        attention_of(fields, heads, rope, bias, bias),
        feed_forward,
        parallel=fields.flag("use_parallel_residual", True),
    )
    norm = NormSpec("layer", fields.number("layer_norm_eps", 1e-5))
    return spec_from_config(fields, "gptneox", norm, layer, context=2048, tied=False)


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """Q, K and V share a tensor: head by head in safetensors, one after another in GGUF files."""
    part = name.removesuffix(".bias").rpartition(".")[2]
    if part in ("q", "k", "v"):
        by_group = checkpoint.kind == "safetensors"
        return fused_heads(plain, layer_of(spec, name).attention, part, by_group)
    return plain


GPTNEOX = Family(
    name="gptneox",
    architectures=("gptneox",),
    model_types=("gpt_neox",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    source=source,
    prefixes=("gpt_neox.", ""),
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
)
