"""Command-R and Aya 23: parallel blocks behind one layer norm without bias, tied head, scaled logits.

The norms of heads that Command-R+ has (`use_qk_norm`) are refused.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import IGNORED, NAMES
from ridgeline.model.families.family import Family, Source, layer_of
from ridgeline.model.families.fields import MAX_CONTEXT, Fields
from ridgeline.model.families.layer_normed import (
    Block,
    attention_of,
    head_sizes,
    spec_from_config,
    spec_from_gguf,
)
from ridgeline.model.families.rope import rope_from_config
from ridgeline.model.spec import FeedForwardSpec, LayerSpec, ModelSpec, NormSpec


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    block = Block("silu", gated=True, parallel=True, one_norm=True, norm_bias=False)
    scale = Fields(checkpoint.metadata, "command-r.").number("logit_scale")
    return replace(spec_from_gguf(checkpoint, "command-r", block), logit_scale=scale)


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    """Models trained for more than `max_position_embeddings` say so in `model_max_length`."""
    fields = Fields(checkpoint.metadata)
    fields.refuse("use_qk_norm", False)
    heads, head_dim = head_sizes(fields)
    kv_heads = fields.integer("num_key_value_heads", heads, high=heads)
    rope = rope_from_config(fields, head_dim, theta=500000.0)
    bias = fields.flag("attention_bias", False)
    feed_forward = FeedForwardSpec(
        width=fields.integer("intermediate_size"),
        activation=fields.choice("hidden_act", {"silu": "silu"}, "silu"),
        gated=True,
    )
    attention = attention_of(fields, kv_heads, rope, bias, bias)
    layer = LayerSpec(attention, feed_forward, parallel=True, one_norm=True)
    norm = NormSpec("layer", fields.number("layer_norm_eps", 1e-5), bias=False)
    spec = spec_from_config(fields, "command-r", norm, layer, context=8192, tied=True)
    return replace(
        spec,
        context=fields.integer("model_max_length", spec.context, high=MAX_CONTEXT),
        logit_scale=fields.number("logit_scale", 0.0625),
    )


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """Files of both kinds interleave rotary pairs; the scale of the logits is one of the final norm."""
    part = name.removesuffix(".bias").rpartition(".")[2]
    if part in ("q", "k"):
        attention = layer_of(spec, name).attention
        heads = attention.heads if part == "q" else attention.kv_heads
        return replace(plain, interleaved_heads=heads)
    return replace(plain, factor=spec.logit_scale) if name == "final_norm" else plain


COMMAND_R = Family(
    name="command-r",
    architectures=("command-r",),
    model_types=("cohere",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    source=source,
    ignored=IGNORED,
)
