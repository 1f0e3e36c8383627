"""Llama 2 and 3 and those that share their shape (SmolLM), and Mistral, which may attend within a window."""

from __future__ import annotations

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import (
    IGNORED,
    NAMES,
    Traits,
    interleaved,
    spec_from_config,
    spec_from_gguf,
    window_of,
    windowed,
)
from ridgeline.model.families.family import Family
from ridgeline.model.families.fields import Fields
from ridgeline.model.spec import ModelSpec

__all__ = ["LLAMA", "MISTRAL", "NAMES"]

_LLAMA = Traits("llama", context=2048)
_MISTRAL = Traits("mistral", context=131_072, biases="none")


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Of Mistral's files too, which call themselves llama."""
    fields = Fields(checkpoint.metadata, "llama.")
    spec = spec_from_gguf(checkpoint, _LLAMA, "llama")
    return windowed(spec, window_of(fields, "attention.sliding_window"))


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    return spec_from_config(checkpoint, _LLAMA)


def mistral_from_config(checkpoint: Checkpoint) -> ModelSpec:
    """The first Mistral's window holds where the config says nothing; null says that there is none."""
    fields = Fields(checkpoint.metadata)
    fields.refuse("layer_types")
    return windowed(spec_from_config(checkpoint, _MISTRAL), window_of(fields, "sliding_window", 4096))


LLAMA = Family(
    name="llama",
    architectures=("llama",),
    model_types=("llama",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    source=interleaved,
    ignored=IGNORED,
)

MISTRAL = Family(
    name="mistral",
    architectures=(),
    model_types=("mistral",),
    from_gguf=from_gguf,
    from_config=mistral_from_config,
    names=NAMES,
    source=interleaved,
    ignored=IGNORED,
)
