"""SmolLM3: Llama's shape in which some layers have no rotary positions."""

from __future__ import annotations

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import (
    IGNORED,
    NAMES,
    SLIDING,
    Traits,
    interleaved,
    periodic,
    refuse_window_of_gguf,
    spec_from_config,
    spec_from_gguf,
    window_of,
    windowed,
    with_ropes,
)
from ridgeline.model.families.family import Family
from ridgeline.model.families.fields import MAX_LAYERS, Fields
from ridgeline.model.spec import ModelSpec

_TRAITS = Traits("smollm3", theta=2_000_000.0, context=32_768, tied=True)
_INTERVAL = 4  # the last of so many layers has no positions; GGUF files do not say it


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    spec = refuse_window_of_gguf(checkpoint, spec_from_gguf(checkpoint, _TRAITS, "smollm3"), "smollm3")
    return with_ropes(spec, periodic(len(spec.layers), _INTERVAL))


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    """`no_rope_layers` holds a 1 for each layer that has positions."""
    fields = Fields(checkpoint.metadata)
    spec = spec_from_config(checkpoint, _TRAITS)
    layers = len(spec.layers)
    turning = fields.entries("no_rope_layers", layers, {1: True, 0: False})
    if turning is None:
        turning = periodic(layers, fields.integer("no_rope_layer_interval", _INTERVAL, high=MAX_LAYERS))
    spec = with_ropes(spec, turning)
    if not fields.flag("use_sliding_window", False):
        return spec
    sliding = fields.entries("layer_types", layers, SLIDING)
    return windowed(spec, window_of(fields, "sliding_window"), sliding or [not turns for turns in turning])


SMOLLM3 = Family(
    name="smollm3",
    architectures=("smollm3",),
    model_types=("smollm3",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    source=interleaved,
    ignored=IGNORED,
)
