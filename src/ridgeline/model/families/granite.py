"""Granite 3: Llama's shape with multipliers on embeddings, scores, residuals and logits.

No operation is needed for them. Norms do not see the length of the stream, so that a stream divided by the
residual multiplier m (embeddings / m, epsilon / m^2) takes what each half adds as it is.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import (
    IGNORED,
    NAMES,
    Traits,
    each_attention,
    interleaved,
    spec_from_config,
    spec_from_gguf,
)
from ridgeline.model.families.family import Family, Source
from ridgeline.model.families.fields import Fields
from ridgeline.model.spec import ModelSpec
from ridgeline.types import CheckpointError

_TRAITS = Traits("granite", context=2048)
_GGUF_KEYS = {
    "embedding": "embedding_scale",
    "residual": "residual_scale",
    "logits": "logit_scale",
    "attention": "attention.scale",
}
_CONFIG_KEYS = {
    "embedding": "embedding_multiplier",
    "residual": "residual_multiplier",
    "logits": "logits_scaling",
    "attention": "attention_multiplier",
}


def _scaled(spec: ModelSpec, fields: Fields, keys: dict[str, str], attention: float) -> ModelSpec:
    """`spec` with its multipliers; `attention` is that of scores where the file says nothing."""

    def multiplier(what: str, default: float = 1.0) -> float:
        value = fields.number(keys[what], default)
        if not 1e-6 <= value <= 1e6:
            raise CheckpointError(
                f"model metadata: {fields.prefix}{keys[what]} is {value:g}; accepted: from 1e-06 to 1e+06"
            )
        return value

    residual = multiplier("residual")
    scale = multiplier("attention", attention)
    return replace(
        each_attention(spec, lambda _, each: replace(each, scale=scale)),
        norm=replace(spec.norm, eps=spec.norm.eps / residual**2),
        embedding_scale=multiplier("embedding") / residual,
        logit_scale=1 / multiplier("logits"),
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata, "granite.")
    fields.refuse("rope.scaling.finetuned", True)  # False turns positions off in such files
    spec = spec_from_gguf(checkpoint, _TRAITS, "granite")
    return _scaled(spec, fields, _GGUF_KEYS, spec.layers[0].attention.scale)


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    return _scaled(spec_from_config(checkpoint, _TRAITS), Fields(checkpoint.metadata), _CONFIG_KEYS, 1.0)


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """The scale of the logits is one of the final norm; rotary pairs are interleaved in GGUF files."""
    if name == "final_norm":
        return replace(plain, factor=spec.logit_scale)
    return interleaved(spec, checkpoint, name, plain)


GRANITE = Family(
    name="granite",
    architectures=("granite",),
    model_types=("granite",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    source=source,
    ignored=IGNORED,
)
