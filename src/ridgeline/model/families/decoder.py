"""The shape that most families share: RMS norms, rotary positions, gated feed-forward. A family states its
traits, and changes what comes out where it does something more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.family import Source, layer_of
from ridgeline.model.families.fields import MAX_CONTEXT, MAX_LAYERS, MAX_VOCABULARY, Fields
from ridgeline.model.families.partial_rope import partial_rope_from_config, partial_rope_from_gguf
from ridgeline.model.families.rope import FACTORS, rope_from_config, rope_from_gguf
from ridgeline.model.spec import (
    Activation,
    AttentionSpec,
    FeedForwardSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)

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

QK_NORMS = {
    "layers.{i}.q_norm": ("blk.{i}.attn_q_norm", "model.layers.{i}.self_attn.q_norm"),
    "layers.{i}.k_norm": ("blk.{i}.attn_k_norm", "model.layers.{i}.self_attn.k_norm"),
}

POST_NORMS = {
    "layers.{i}.post_attention_norm": (
        "blk.{i}.post_attention_norm",
        "model.layers.{i}.post_attention_layernorm",
    ),
    "layers.{i}.feed_forward_norm": ("blk.{i}.ffn_norm", "model.layers.{i}.pre_feedforward_layernorm"),
    "layers.{i}.post_feed_forward_norm": (
        "blk.{i}.post_ffw_norm",
        "model.layers.{i}.post_feedforward_layernorm",
    ),
}
"""Of models that normalise what a half adds; a norm before the feed-forward has a name of its own there."""

IGNORED = (FACTORS, "*.rotary_emb.inv_freq")
SLIDING = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True, slots=True)
class Traits:
    """What a family fixes, and what holds where a file says nothing.

    `head_dim` None is the width divided by the heads. `biases` are those of Q, K, V and the output as the
    config's `attention_bias` says, all always, of Q, K and V always, or none; GGUF files show them by their
    tensors. `rotary` is the fraction of a head that turns, where a family allows other than all. `experts`
    lets a GGUF file have some, which the family puts into the spec (`experts.py`).
    """

    family: str
    theta: float = 10_000.0
    head_dim: int | None = None
    eps: float = 1e-6
    context: int | None = None
    tied: bool = False
    activation: Activation = "silu"
    activation_key: tuple[str, str] = ("hidden_act", "silu")
    biases: Literal["stated", "all", "qkv", "none"] = "stated"
    qk_norm: bool = False
    qk_norm_whole: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    rotary: float | None = None
    experts: bool = False


def spec_from_gguf(checkpoint: Checkpoint, traits: Traits, architecture: str) -> ModelSpec:
    """The spec of a GGUF file, every layer alike and without windows."""
    fields = Fields(checkpoint.metadata, f"{architecture}.")
    if not traits.experts:
        fields.refuse("expert_count", 0)
    hidden = fields.integer("embedding_length")
    heads = fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", traits.head_dim or hidden // heads)
    fields.refuse("attention.value_length", head_dim)
    read_rope = rope_from_gguf if traits.rotary is None else partial_rope_from_gguf
    attention = _attention(
        traits,
        heads,
        fields.integer("attention.head_count_kv", heads, high=heads),
        head_dim,
        read_rope(checkpoint, fields, head_dim, traits.theta),
        ("blk.0.attn_q.bias" in checkpoint.tensors, "blk.0.attn_output.bias" in checkpoint.tensors),
    )
    bias = "blk.0.ffn_up.bias" in checkpoint.tensors
    width = fields.integer("feed_forward_length")
    layer = _layer(traits, attention, FeedForwardSpec(width, traits.activation, gated=True, bias=bias))
    return ModelSpec(
        family=traits.family,
        hidden=hidden,
        vocabulary=checkpoint.tensors["token_embd.weight"].shape[0],
        context=fields.integer("context_length", high=MAX_CONTEXT),
        norm=NormSpec("rms", fields.number("attention.layer_norm_rms_epsilon")),
        layers=(layer,) * fields.integer("block_count", high=MAX_LAYERS),
        tied_head="output.weight" not in checkpoint.tensors,
    )


def spec_from_config(checkpoint: Checkpoint, traits: Traits) -> ModelSpec:
    """The spec of a config.json, every layer alike and without windows."""
    fields = Fields(checkpoint.metadata)
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", traits.head_dim or hidden // heads)
    attention = _attention(
        traits,
        heads,
        fields.integer("num_key_value_heads", heads, high=heads),
        head_dim,
        _rope_of_config(fields, traits, head_dim),
        _biases(fields, traits),
    )
    key, word = traits.activation_key
    feed_forward = FeedForwardSpec(
        width=fields.integer("intermediate_size"),
        activation=fields.choice(key, {word: traits.activation}, word),
        gated=True,
        bias=fields.flag("mlp_bias", False),
    )
    return ModelSpec(
        family=traits.family,
        hidden=hidden,
        vocabulary=fields.integer("vocab_size", high=MAX_VOCABULARY),
        context=fields.integer("max_position_embeddings", traits.context, high=MAX_CONTEXT),
        norm=NormSpec("rms", fields.number("rms_norm_eps", traits.eps)),
        layers=(_layer(traits, attention, feed_forward),)
        * fields.integer("num_hidden_layers", high=MAX_LAYERS),
        tied_head=fields.flag("tie_word_embeddings", traits.tied),
    )


def _attention(
    traits: Traits, heads: int, kv_heads: int, head_dim: int, rope: RopeSpec, biases: tuple[bool, bool]
) -> AttentionSpec:
    return AttentionSpec(
        heads,
        kv_heads,
        head_dim,
        head_dim**-0.5,
        rope,
        qk_norm=traits.qk_norm,
        qk_norm_whole=traits.qk_norm_whole,
        qkv_bias=biases[0],
        output_bias=biases[1],
    )


def _layer(traits: Traits, attention: AttentionSpec, feed_forward: FeedForwardSpec) -> LayerSpec:
    return LayerSpec(attention, feed_forward, pre_norms=traits.pre_norms, post_norms=traits.post_norms)


def _rope_of_config(fields: Fields, traits: Traits, head_dim: int) -> RopeSpec:
    if traits.rotary is None:
        return rope_from_config(fields, head_dim, traits.theta)
    return partial_rope_from_config(fields, head_dim, traits.theta, traits.rotary)


def _biases(fields: Fields, traits: Traits) -> tuple[bool, bool]:
    """Those of Q, K and V, and that of the output."""
    if traits.biases == "stated":
        return (fields.flag("attention_bias", False),) * 2
    return traits.biases in ("qkv", "all"), traits.biases == "all"


# ------------------------------------------------------------------------------------ changes to specs


def each_attention(spec: ModelSpec, change: Callable[[int, AttentionSpec], AttentionSpec]) -> ModelSpec:
    """`spec` with the attention of every layer changed; `change` is given the layer's index."""
    layers = (replace(layer, attention=change(i, layer.attention)) for i, layer in enumerate(spec.layers))
    return replace(spec, layers=tuple(layers))


def windowed(spec: ModelSpec, window: int | None, sliding: Sequence[bool] | None = None) -> ModelSpec:
    """`spec` with a window in the `sliding` layers (all where None). One that covers the context is none."""
    if window is None or window >= spec.context:
        return spec
    return each_attention(
        spec, lambda i, each: replace(each, window=window) if sliding is None or sliding[i] else each
    )


def with_ropes(spec: ModelSpec, turning: Sequence[bool]) -> ModelSpec:
    """`spec` with rotary positions in the `turning` layers alone."""
    return each_attention(spec, lambda i, each: each if turning[i] else replace(each, rope=None))


def sliding_layers(fields: Fields, layers: int, period: int) -> list[bool]:
    """Which layers a config gives a window: all but the last of every `period` where it does not say."""
    sliding = fields.entries("layer_types", layers, SLIDING)
    if sliding is not None:
        return sliding
    return periodic(layers, fields.integer("sliding_window_pattern", period))


def periodic(layers: int, period: int) -> list[bool]:
    """True for all layers but the last of every `period`."""
    return [(i + 1) % period != 0 for i in range(layers)]


def window_of(fields: Fields, key: str, default: int | None = None) -> int | None:
    """A sliding window; null and 0 say that there is none, `default` stands for an absent key."""
    full = fields.prefix + key
    if full not in fields.values:
        return default
    return fields.integer(key, 0, low=0, high=MAX_CONTEXT) or None


def refuse_window_of_gguf(checkpoint: Checkpoint, spec: ModelSpec, architecture: str) -> ModelSpec:
    """`spec` as it is. Which layers a window would cover is not in files of such an architecture."""
    fields = Fields(checkpoint.metadata, f"{architecture}.")
    window = window_of(fields, "attention.sliding_window")
    if window is not None and window < spec.context:
        fields.refuse("attention.sliding_window", 0)
    return spec


def interleaved(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """GGUF files of some families keep rotary pairs interleaved in the rows of Q and K."""
    suffix = name.removesuffix(".bias").rpartition(".")[2]
    if checkpoint.kind == "gguf" and suffix in ("q", "k"):
        attention = layer_of(spec, name).attention
        return replace(plain, interleaved_heads=attention.heads if suffix == "q" else attention.kv_heads)
    return plain
