"""Gemma 3 (text): sandwich norms, normalised Q and K, window and full layers with a rope of their own,
scaled embeddings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import NAMES as DECODER_NAMES
from ridgeline.model.families.decoder import POST_NORMS, QK_NORMS, periodic, sliding_layers
from ridgeline.model.families.family import Family, Source
from ridgeline.model.families.fields import MAX_CONTEXT, MAX_LAYERS, MAX_VOCABULARY, Fields
from ridgeline.model.families.rope import FACTORS, rope, rope_from_config, rope_from_gguf
from ridgeline.model.spec import (
    Activation,
    AttentionSpec,
    FeedForwardSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)

LOCAL_THETA = 10_000.0
GLOBAL_THETA = 1_000_000.0
PERIOD = 6  # five window layers, then a full one
ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh"}

NAMES = {**DECODER_NAMES, **QK_NORMS, **POST_NORMS}


def _layers(
    attention: AttentionSpec, width: int, sliding: list[bool], ropes: tuple[RopeSpec, RopeSpec], window: int
) -> tuple[LayerSpec, ...]:
    """A layer for each entry of `sliding`; `ropes` are those of window and of full layers."""
    feed_forward = FeedForwardSpec(width, "gelu_tanh", gated=True)
    kinds = [
        LayerSpec(replace(attention, rope=ropes[1]), feed_forward, post_norms=True),
        LayerSpec(replace(attention, rope=ropes[0], window=window), feed_forward, post_norms=True),
    ]
    return tuple(kinds[slides] for slides in sliding)


def embedding_scale(hidden: int) -> float:
    """Of Gemma's models: the square root of the width, in float32."""
    return float(np.float32(hidden**0.5))


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata, "gemma3.")
    hidden = fields.integer("embedding_length")
    heads = fields.integer("attention.head_count")
    dim = fields.integer("attention.key_length", 256)
    fields.refuse("attention.value_length", dim)
    layers = fields.integer("block_count", high=MAX_LAYERS)
    # The file does not hold the query scale: only the 27B model (62 layers) differs from 1/sqrt(dim).
    scale = (hidden / heads) ** -0.5 if layers == 62 else dim**-0.5
    kv_heads = fields.integer("attention.head_count_kv", heads, high=heads)
    attention = AttentionSpec(heads, kv_heads, dim, scale, rope=None, qk_norm=True)
    ropes = (
        rope(fields.number("rope.freq_base_swa", LOCAL_THETA), dim),
        rope_from_gguf(checkpoint, fields, dim, GLOBAL_THETA),
    )
    sliding = periodic(layers, fields.integer("attention.sliding_window_pattern", PERIOD))
    window = fields.integer("attention.sliding_window", high=MAX_CONTEXT)
    return ModelSpec(
        family="gemma3",
        hidden=hidden,
        vocabulary=checkpoint.tensors["token_embd.weight"].shape[0],
        context=fields.integer("context_length", high=MAX_CONTEXT),
        norm=NormSpec("rms", fields.number("attention.layer_norm_rms_epsilon", 1e-6)),
        layers=_layers(attention, fields.integer("feed_forward_length"), sliding, ropes, window),
        tied_head="output.weight" not in checkpoint.tensors,
        embedding_scale=embedding_scale(hidden),
        logit_softcap=fields.number_or_none("final_logit_softcapping"),
    )


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    fields.refuse("attention_bias", False)
    fields.refuse("attn_logit_softcapping")
    fields.refuse("use_bidirectional_attention", False)
    fields.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    dim = fields.integer("head_dim", 256)
    kv_heads = fields.integer("num_key_value_heads", heads, high=heads)
    scale = fields.number("query_pre_attn_scalar", float(dim)) ** -0.5
    attention = AttentionSpec(heads, kv_heads, dim, scale, rope=None, qk_norm=True)
    layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    return ModelSpec(
        family="gemma3",
        hidden=hidden,
        vocabulary=fields.integer("vocab_size", high=MAX_VOCABULARY),
        context=fields.integer("max_position_embeddings", high=MAX_CONTEXT),
        norm=NormSpec("rms", fields.number("rms_norm_eps", 1e-6)),
        layers=_layers(
            attention,
            fields.integer("intermediate_size"),
            sliding_layers(fields, layers, PERIOD),
            _ropes(fields, dim),
            fields.integer("sliding_window", 4096, high=MAX_CONTEXT),
        ),
        tied_head=fields.flag("tie_word_embeddings", True),
        embedding_scale=embedding_scale(hidden),
        logit_softcap=fields.number_or_none("final_logit_softcapping"),
    )


def _ropes(fields: Fields, dim: int) -> tuple[RopeSpec, RopeSpec]:
    parameters = fields.section("rope_parameters")
    if "sliding_attention" in parameters or "full_attention" in parameters:
        local, whole = (parameters.section(f"{kind}_attention") for kind in ("sliding", "full"))
        return (
            rope_from_config(fields, dim, LOCAL_THETA, local),
            rope_from_config(fields, dim, GLOBAL_THETA, whole),
        )
    local_theta = fields.number("rope_local_base_freq", LOCAL_THETA)
    return rope(local_theta, dim), rope_from_config(fields, dim, GLOBAL_THETA)


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """Norm gains are stored as a difference from one in safetensors; GGUF files hold the gain itself."""
    return replace(plain, offset=1.0) if checkpoint.kind == "safetensors" and name.endswith("norm") else plain


GEMMA3 = Family(
    name="gemma3",
    architectures=("gemma3",),
    model_types=("gemma3_text",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    source=source,
    ignored=(FACTORS,),
)
