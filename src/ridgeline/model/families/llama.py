"""Llama 2 and 3 and those that share their shape (SmolLM), Mistral, which may attend within a window, and
Mixtral, which is Mistral with experts. GGUF files call all of them llama."""

from __future__ import annotations

from dataclasses import replace

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
from ridgeline.model.families.experts import (
    dense_of,
    expert_names,
    expert_source,
    experts_from_config,
    experts_from_gguf,
    with_experts,
)
from ridgeline.model.families.family import Family, Source
from ridgeline.model.families.fields import Fields
from ridgeline.model.spec import ModelSpec

__all__ = ["LLAMA", "MISTRAL", "MIXTRAL", "NAMES"]

_LLAMA = Traits("llama", context=2048)
_MISTRAL = Traits("mistral", context=131_072, biases="none")
_MIXTRAL = Traits("mixtral", theta=1_000_000.0, eps=1e-5, context=131_072, biases="none")

_ALL_NAMES = {**NAMES, **expert_names("block_sparse_moe", "w1", "w3", "w2")}


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata, "llama.")
    window = window_of(fields, "attention.sliding_window")
    if not fields.integer("expert_count", 0, low=0):
        return windowed(spec_from_gguf(checkpoint, _LLAMA, "llama"), window)
    traits = replace(_LLAMA, family="mixtral", experts=True)
    spec = windowed(spec_from_gguf(checkpoint, traits, "llama"), window)
    return with_experts(spec, experts_from_gguf(fields, dense_of(spec)))


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    return spec_from_config(checkpoint, _LLAMA)


def mistral_from_config(checkpoint: Checkpoint) -> ModelSpec:
    """The first Mistral's window holds where the config says nothing; null says that there is none."""
    fields = Fields(checkpoint.metadata)
    fields.refuse("layer_types")
    return windowed(spec_from_config(checkpoint, _MISTRAL), window_of(fields, "sliding_window", 4096))


def mixtral_from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    fields.refuse("mlp_bias", False)
    spec = windowed(spec_from_config(checkpoint, _MIXTRAL), window_of(fields, "sliding_window"))
    return with_experts(spec, experts_from_config(fields, dense_of(spec)))


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    return expert_source(spec, checkpoint, name, interleaved(spec, checkpoint, name, plain))


LLAMA = Family(
    name="llama",
    architectures=("llama",),
    model_types=("llama",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=_ALL_NAMES,
    source=source,
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

MIXTRAL = Family(
    name="mixtral",
    architectures=(),
    model_types=("mixtral",),
    from_gguf=from_gguf,
    from_config=mixtral_from_config,
    names=_ALL_NAMES,
    source=source,
    ignored=IGNORED,
)
