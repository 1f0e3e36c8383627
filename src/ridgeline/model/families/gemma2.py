"""Gemma 2: sandwich norms, scores and logits with soft caps, a window in every other layer."""

from __future__ import annotations

from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import (
    IGNORED,
    NAMES,
    POST_NORMS,
    SLIDING,
    Traits,
    each_attention,
    periodic,
    spec_from_config,
    spec_from_gguf,
    window_of,
    windowed,
)
from ridgeline.model.families.family import Family
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.gemma3 import embedding_scale, source
from ridgeline.model.spec import ModelSpec

WINDOW = 4096
PERIOD = 2  # every other layer has the window, the first one too
_TRAITS = Traits(
    "gemma2",
    head_dim=256,
    context=8192,
    tied=True,
    activation="gelu_tanh",
    activation_key=("hidden_activation", "gelu_pytorch_tanh"),
    post_norms=True,
)


def _spec(spec: ModelSpec, scale: float, caps: tuple[float | None, float | None]) -> ModelSpec:
    """`spec` with `caps` of scores and of logits."""
    spec = each_attention(spec, lambda _, each: replace(each, scale=scale, softcap=caps[0]))
    return replace(spec, embedding_scale=embedding_scale(spec.hidden), logit_softcap=caps[1])


def _cap(fields: Fields, key: str, default: float) -> float | None:
    """A soft cap; null says that there is none, and `default` stands for a key that is not there."""
    return fields.number_or_none(key) if fields.prefix + key in fields.values else default


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata, "gemma2.")
    fields.refuse("attention.sliding_window_pattern", 2)
    spec = spec_from_gguf(checkpoint, _TRAITS, "gemma2")
    # The file does not hold the query scale: only the 27B model (46 layers) differs from 1/sqrt(dim).
    attention = spec.layers[0].attention
    scale = (spec.hidden / attention.heads) ** -0.5 if len(spec.layers) == 46 else attention.scale
    caps = _cap(fields, "attn_logit_softcapping", 50.0), _cap(fields, "final_logit_softcapping", 30.0)
    window = window_of(fields, "attention.sliding_window", WINDOW)
    return windowed(_spec(spec, scale, caps), window, periodic(len(spec.layers), PERIOD))


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    fields.refuse("use_bidirectional_attention", False)
    spec = spec_from_config(checkpoint, _TRAITS)
    layers = len(spec.layers)
    caps = _cap(fields, "attn_logit_softcapping", 50.0), _cap(fields, "final_logit_softcapping", 30.0)
    scale = fields.number("query_pre_attn_scalar", 256.0) ** -0.5
    sliding = fields.entries("layer_types", layers, SLIDING) or periodic(layers, PERIOD)
    return windowed(_spec(spec, scale, caps), window_of(fields, "sliding_window", WINDOW), sliding)


GEMMA2 = Family(
    name="gemma2",
    architectures=("gemma2",),
    model_types=("gemma2",),
    from_gguf=from_gguf,
    from_config=from_config,
    names={**NAMES, **POST_NORMS},
    source=source,
    ignored=IGNORED,
)
