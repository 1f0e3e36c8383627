"""What the families with layer norms have in common: how a file states sizes, and what a block may be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import each_attention
from ridgeline.model.families.family import layer_of
from ridgeline.model.families.fields import MAX_CONTEXT, MAX_LAYERS, MAX_VOCABULARY, Fields
from ridgeline.model.families.partial_rope import partial_rope_from_gguf
from ridgeline.model.spec import (
    Activation,
    AttentionSpec,
    FeedForwardSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class Block:
    """What GGUF files of a family do not say about their layers, or say each in its own way."""

    activation: Activation
    gated: bool = False
    parallel: bool = False
    one_norm: bool = False
    norm_bias: bool = True


def spec_from_gguf(checkpoint: Checkpoint, architecture: str, block: Block) -> ModelSpec:
    """The spec of a GGUF file, every layer alike and without windows; biases are where its tensors are."""
    fields = Fields(checkpoint.metadata, f"{architecture}.")
    hidden = fields.integer("embedding_length")
    heads = fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    fields.refuse("attention.value_length", head_dim)
    held = checkpoint.tensors
    attention = AttentionSpec(
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads, high=heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=partial_rope_from_gguf(checkpoint, fields, head_dim, theta=10000.0),
        qkv_bias="blk.0.attn_q.bias" in held or "blk.0.attn_qkv.bias" in held,
        output_bias="blk.0.attn_output.bias" in held,
    )
    width, bias = fields.integer("feed_forward_length"), "blk.0.ffn_up.bias" in held
    feed_forward = FeedForwardSpec(width, block.activation, block.gated, bias)
    layer = LayerSpec(attention, feed_forward, parallel=block.parallel, one_norm=block.one_norm)
    return ModelSpec(
        family=architecture,
        hidden=hidden,
        vocabulary=held["token_embd.weight"].shape[0],
        context=fields.integer("context_length", high=MAX_CONTEXT),
        norm=NormSpec("layer", fields.number("attention.layer_norm_epsilon"), block.norm_bias),
        layers=(layer,) * fields.integer("block_count", high=MAX_LAYERS),
        tied_head="output.weight" not in held,
    )


def head_sizes(fields: Fields) -> tuple[int, int]:
    """How many attention heads a config.json states, and how wide they are."""
    heads = fields.integer("num_attention_heads")
    return heads, fields.integer("head_dim", fields.integer("hidden_size") // heads)


def attention_of(
    fields: Fields, kv_heads: int, rope: RopeSpec, qkv_bias: bool = False, output_bias: bool = False
) -> AttentionSpec:
    heads, head_dim = head_sizes(fields)
    return AttentionSpec(
        heads, kv_heads, head_dim, head_dim**-0.5, rope, qkv_bias=qkv_bias, output_bias=output_bias
    )


def with_head_norms(spec: ModelSpec, wanted: bool) -> ModelSpec:
    """`spec`, where `wanted` with layer norms of each head of queries and keys, each with its own gain."""
    if not wanted:
        return spec
    return each_attention(
        spec, lambda _, each: replace(each, qk_norm=True, qk_norm_kind="layer", qk_norm_by_head=True)
    )


def heads_of(spec: ModelSpec, name: str) -> int | None:
    """How many heads a weight of queries or keys has: their projection, its bias or their norms."""
    part = name.removesuffix(".bias").rpartition(".")[2]
    if part not in ("q", "k", "q_norm", "k_norm"):
        return None
    attention = layer_of(spec, name).attention
    return attention.heads if part.startswith("q") else attention.kv_heads


def spec_from_config(
    fields: Fields, family: str, norm: NormSpec, layer: LayerSpec, context: int, tied: bool
) -> ModelSpec:
    """The spec of a config.json, every layer alike; `context` and `tied` hold where it says nothing."""
    return ModelSpec(
        family=family,
        hidden=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size", high=MAX_VOCABULARY),
        context=fields.integer("max_position_embeddings", context, high=MAX_CONTEXT),
        norm=norm,
        layers=(layer,) * fields.integer("num_hidden_layers", high=MAX_LAYERS),
        tied_head=fields.flag("tie_word_embeddings", tied),
    )
