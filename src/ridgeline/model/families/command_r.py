"""Command-R, Command-R+, Aya, Command R7B and Command A: parallel blocks behind one layer norm without bias,
tied head, scaled logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import (
    IGNORED,
    NAMES,
    QK_NORMS,
    periodic,
    sliding_layers,
    windowed,
    with_ropes,
)
from ridgeline.model.families.family import Family, Source
from ridgeline.model.families.fields import MAX_CONTEXT, Fields
from ridgeline.model.families.layer_normed import (
    Block,
    attention_of,
    head_sizes,
    heads_of,
    spec_from_config,
    spec_from_gguf,
    with_head_norms,
)
from ridgeline.model.families.rope import rope_from_config
from ridgeline.model.spec import FeedForwardSpec, LayerSpec, ModelSpec, NormSpec

WINDOW = 4096
PERIOD = 4  # three layers with a window and rotary positions, then one with neither


def _from_gguf(checkpoint: Checkpoint, architecture: str) -> ModelSpec:
    block = Block("silu", gated=True, parallel=True, one_norm=True, norm_bias=False)
    scale = Fields(checkpoint.metadata, f"{architecture}.").number("logit_scale")
    return replace(spec_from_gguf(checkpoint, architecture, block), logit_scale=scale)


def _from_config(fields: Fields, family: str, theta: float) -> ModelSpec:
    """Models trained for more than `max_position_embeddings` say so in `model_max_length`."""
    heads, head_dim = head_sizes(fields)
    kv_heads = fields.integer("num_key_value_heads", heads, high=heads)
    rope = rope_from_config(fields, head_dim, theta)
    bias = fields.flag("attention_bias", False)
    feed_forward = FeedForwardSpec(
        width=fields.integer("intermediate_size"),
        activation=fields.choice("hidden_act", {"silu": "silu"}, "silu"),
        gated=True,
    )
    attention = attention_of(fields, kv_heads, rope, bias, bias)
    layer = LayerSpec(attention, feed_forward, parallel=True, one_norm=True)
    norm = NormSpec("layer", fields.number("layer_norm_eps", 1e-5), bias=False)
    spec = spec_from_config(fields, family, norm, layer, context=8192, tied=True)
    return replace(
        spec,
        context=fields.integer("model_max_length", spec.context, high=MAX_CONTEXT),
        logit_scale=fields.number("logit_scale", 0.0625),
    )


def command_r_from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    return with_head_norms(
        _from_gguf(checkpoint, "command-r"), "blk.0.attn_q_norm.weight" in checkpoint.tensors
    )


def command_r_from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    return with_head_norms(_from_config(fields, "command-r", 500000.0), fields.flag("use_qk_norm", False))


def _sliding(spec: ModelSpec, fields: Fields, key: str, sliding: Sequence[bool]) -> ModelSpec:
    """Layers without a window have no positions either, even where the window covers the context."""
    return windowed(with_ropes(spec, sliding), fields.integer(key, WINDOW, high=MAX_CONTEXT), sliding)


def cohere2_from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata, "cohere2.")
    spec = _from_gguf(checkpoint, "cohere2")
    period = fields.integer("attention.sliding_window_pattern", PERIOD)
    return _sliding(spec, fields, "attention.sliding_window", periodic(len(spec.layers), period))


def cohere2_from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    fields.refuse("use_qk_norm", False)
    spec = _from_config(fields, "cohere2", 10000.0)
    return _sliding(spec, fields, "sliding_window", sliding_layers(fields, len(spec.layers), PERIOD))


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """Files of both kinds interleave rotary pairs; the scale of the logits is one of the final norm."""
    if name == "final_norm":
        return replace(plain, factor=spec.logit_scale)
    heads = heads_of(spec, name)
    if name.endswith(("q_norm", "k_norm")):
        return replace(plain, experts=heads, interleaved_heads=1)
    return replace(plain, interleaved_heads=heads)


COMMAND_R = Family(
    name="command-r",
    architectures=("command-r",),
    model_types=("cohere",),
    from_gguf=command_r_from_gguf,
    from_config=command_r_from_config,
    names={**NAMES, **QK_NORMS},
    source=source,
    ignored=IGNORED,
)

COHERE2 = Family(
    name="cohere2",
    architectures=("cohere2",),
    model_types=("cohere2",),
    from_gguf=cohere2_from_gguf,
    from_config=cohere2_from_config,
    names=NAMES,
    source=source,
    ignored=IGNORED,
)
