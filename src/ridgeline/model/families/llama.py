"""Llama 2 and 3, and those that share its shape (SmolLM): RMS norm, rotary halves, gated SiLU."""

from __future__ import annotations

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.checkpoint.files import Kind
from ridgeline.model.families.family import Family, Source, layer_of
from ridgeline.model.families.fields import MAX_CONTEXT, MAX_LAYERS, MAX_VOCABULARY, Fields
from ridgeline.model.families.rope import FACTORS, rope_from_config, rope_from_gguf
from ridgeline.model.spec import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec, NormSpec

NAMES = {
    "embed": ("token_embd", "model.embed_tokens"),
    "final_norm": ("output_norm", "model.norm"),
    "head": ("output", "lm_head"),
    "layers.{i}.attention_norm": ("blk.{i}.attn_norm", "model.layers.{i}.input_layernorm"),
    "layers.{i}.q": ("blk.{i}.attn_q", "model.layers.{i}.self_attn.q_proj"),
    "layers.{i}.k": ("blk.{i}.attn_k", "model.layers.{i}.self_attn.k_proj"),
    "layers.{i}.v": ("blk.{i}.attn_v", "model.layers.{i}.self_attn.v_proj"),
    "layers.{i}.o": ("blk.{i}.attn_output", "model.layers.{i}.self_attn.o_proj"),
    "layers.{i}.feed_forward_norm": ("blk.{i}.ffn_norm", "model.layers.{i}.post_attention_layernorm"),
    "layers.{i}.gate": ("blk.{i}.ffn_gate", "model.layers.{i}.mlp.gate_proj"),
    "layers.{i}.up": ("blk.{i}.ffn_up", "model.layers.{i}.mlp.up_proj"),
    "layers.{i}.down": ("blk.{i}.ffn_down", "model.layers.{i}.mlp.down_proj"),
}


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata, "llama.")
    fields.refuse("expert_count", 0)
    hidden = fields.integer("embedding_length")
    heads = fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    fields.refuse("attention.value_length", head_dim)
    attention = AttentionSpec(
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads, high=heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope_from_gguf(checkpoint, fields, head_dim, theta=10000.0),
        qkv_bias="blk.0.attn_q.bias" in checkpoint.tensors,
        output_bias="blk.0.attn_output.bias" in checkpoint.tensors,
    )
    bias = "blk.0.ffn_up.bias" in checkpoint.tensors
    feed_forward = FeedForwardSpec(fields.integer("feed_forward_length"), "silu", gated=True, bias=bias)
    return ModelSpec(
        family="llama",
        hidden=hidden,
        vocabulary=checkpoint.tensors["token_embd.weight"].shape[0],
        context=fields.integer("context_length", high=MAX_CONTEXT),
        norm=NormSpec("rms", fields.number("attention.layer_norm_rms_epsilon")),
        layers=(LayerSpec(attention, feed_forward),) * fields.integer("block_count", high=MAX_LAYERS),
        tied_head="output.weight" not in checkpoint.tensors,
    )


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", hidden // heads)
    attention = AttentionSpec(
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads, high=heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope_from_config(fields, head_dim, theta=10000.0),
        qkv_bias=fields.flag("attention_bias", False),
        output_bias=fields.flag("attention_bias", False),
    )
    feed_forward = FeedForwardSpec(
        width=fields.integer("intermediate_size"),
        activation=fields.choice("hidden_act", {"silu": "silu"}, "silu"),
        gated=True,
        bias=fields.flag("mlp_bias", False),
    )
    return ModelSpec(
        family="llama",
        hidden=hidden,
        vocabulary=fields.integer("vocab_size", high=MAX_VOCABULARY),
        context=fields.integer("max_position_embeddings", 2048, high=MAX_CONTEXT),
        norm=NormSpec("rms", fields.number("rms_norm_eps", 1e-6)),
        layers=(LayerSpec(attention, feed_forward),) * fields.integer("num_hidden_layers", high=MAX_LAYERS),
        tied_head=fields.flag("tie_word_embeddings", False),
    )


def source(spec: ModelSpec, kind: Kind, name: str, plain: Source) -> Source:
    """GGUF files of this family keep rotary pairs interleaved in the rows of Q and K."""
    suffix = name.removesuffix(".bias").rpartition(".")[2]
    if kind == "gguf" and suffix in ("q", "k"):
        attention = layer_of(spec, name).attention
        heads = attention.heads if suffix == "q" else attention.kv_heads
        return Source(plain.tensor, interleaved_heads=heads)
    return plain


LLAMA = Family(
    name="llama",
    architectures=("llama",),
    model_types=("llama",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    source=source,
    ignored=(FACTORS, "*.rotary_emb.inv_freq"),
)
