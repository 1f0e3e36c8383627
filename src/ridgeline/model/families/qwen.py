"""Qwen 2 and 2.5 (biases on Q, K and V) and Qwen 3 (normalised Q and K)."""

from __future__ import annotations

from functools import partial

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import (
    IGNORED,
    NAMES,
    QK_NORMS,
    SLIDING,
    Traits,
    refuse_window_of_gguf,
    spec_from_config,
    spec_from_gguf,
    window_of,
    windowed,
)
from ridgeline.model.families.family import Family
from ridgeline.model.families.fields import MAX_LAYERS, Fields
from ridgeline.model.spec import ModelSpec

_QWEN2 = Traits("qwen2", context=32_768, biases="qkv")
_QWEN3 = Traits("qwen3", context=32_768, head_dim=128, qk_norm=True)


def _from_gguf(traits: Traits, checkpoint: Checkpoint) -> ModelSpec:
    spec = spec_from_gguf(checkpoint, traits, traits.family)
    return refuse_window_of_gguf(checkpoint, spec, traits.family)


def _from_config(traits: Traits, checkpoint: Checkpoint) -> ModelSpec:
    """The window, where it is used at all, is that of the layers from `max_window_layers` on."""
    fields = Fields(checkpoint.metadata)
    spec = spec_from_config(checkpoint, traits)
    if not fields.flag("use_sliding_window", False):
        return spec
    layers = len(spec.layers)
    sliding = fields.entries("layer_types", layers, SLIDING)
    if sliding is None:
        first = fields.integer("max_window_layers", 28, low=0, high=MAX_LAYERS)
        sliding = [i >= first for i in range(layers)]
    return windowed(spec, window_of(fields, "sliding_window", 4096), sliding)


QWEN2 = Family(
    name="qwen2",
    architectures=("qwen2",),
    model_types=("qwen2",),
    from_gguf=partial(_from_gguf, _QWEN2),
    from_config=partial(_from_config, _QWEN2),
    names=NAMES,
    ignored=IGNORED,
)

QWEN3 = Family(
    name="qwen3",
    architectures=("qwen3",),
    model_types=("qwen3",),
    from_gguf=partial(_from_gguf, _QWEN3),
    from_config=partial(_from_config, _QWEN3),
    names={**NAMES, **QK_NORMS},
    ignored=IGNORED,
)
