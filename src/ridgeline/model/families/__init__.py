"""The families that we know: each a small file that maps metadata to a spec and names to weights."""

from __future__ import annotations

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.family import Family
from ridgeline.model.families.gemma3 import GEMMA3
from ridgeline.model.families.gpt2 import GPT2
from ridgeline.model.families.llama import LLAMA
from ridgeline.model.spec import ModelSpec
from ridgeline.types import CheckpointError

FAMILIES = (LLAMA, GPT2, GEMMA3)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that a checkpoint names; raises CheckpointError when we do not know it."""
    gguf = checkpoint.kind == "gguf"
    key = "general.architecture" if gguf else "model_type"
    seen = checkpoint.metadata.get(key)
    for family in FAMILIES:
        if seen in (family.architectures if gguf else family.model_types):
            return family
    known = ", ".join(name for f in FAMILIES for name in (f.architectures if gguf else f.model_types))
    raise CheckpointError(f"{checkpoint.path}: {key} is {str(seen)[:80]!r}; accepted: {known}")


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The ModelSpec of a checkpoint. Raises CheckpointError for an unknown family or unusable metadata."""
    family = family_of(checkpoint)
    if checkpoint.kind == "gguf" and "token_embd.weight" not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.path}: tensor 'token_embd.weight' is missing; the file holds no model"
        )
    spec = (family.from_gguf if checkpoint.kind == "gguf" else family.from_config)(checkpoint)
    for attention in (layer.attention for layer in spec.layers):
        if attention.heads % attention.kv_heads:
            raise CheckpointError(
                f"model metadata: {attention.heads} attention heads share {attention.kv_heads} key heads; "
                "accepted: as many for each"
            )
    return spec
