"""The families that we know: each a small file that maps metadata to a spec and names to weights."""

from __future__ import annotations

from difflib import get_close_matches

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.command_r import COHERE2, COMMAND_R
from ridgeline.model.families.deepseek import DEEPSEEK
from ridgeline.model.families.falcon import FALCON
from ridgeline.model.families.family import Family, PlannedFamily
from ridgeline.model.families.gemma2 import GEMMA2
from ridgeline.model.families.gemma3 import GEMMA3
from ridgeline.model.families.gpt2 import GPT2
from ridgeline.model.families.gpt_oss import GPT_OSS
from ridgeline.model.families.gptneox import GPTNEOX
from ridgeline.model.families.granite import GRANITE
from ridgeline.model.families.llama import LLAMA, MISTRAL, MIXTRAL
from ridgeline.model.families.olmo2 import OLMO2
from ridgeline.model.families.phi3 import PHI3
from ridgeline.model.families.qwen import QWEN2, QWEN3
from ridgeline.model.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from ridgeline.model.families.smollm3 import SMOLLM3
from ridgeline.model.families.stablelm import STABLELM
from ridgeline.model.families.starcoder2 import STARCODER2
from ridgeline.model.spec import ModelSpec
from ridgeline.types import CheckpointError

FAMILIES = (
    LLAMA,
    GPT2,
    GEMMA3,
    GPTNEOX,
    FALCON,
    STABLELM,
    STARCODER2,
    COMMAND_R,
    COHERE2,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA2,
    PHI3,
    GRANITE,
    SMOLLM3,
    OLMO2,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    GPT_OSS,
)

PLANNED = (DEEPSEEK,)
"""Those that no executor runs: a plan can be made for them, and nothing is loaded."""


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that a checkpoint names; raises CheckpointError when we do not know it."""
    gguf = checkpoint.kind == "gguf"
    key = "general.architecture" if gguf else "model_type"
    seen = checkpoint.metadata.get(key)
    for family in FAMILIES:
        if seen in (family.architectures if gguf else family.model_types):
            return family
    if planned_family_of(checkpoint) is not None:
        raise CheckpointError(
            f"{checkpoint.path}: {key} is {seen!r}, whose layers keep a latent vector, which nothing runs; "
            "accepted: `ridgeline plan`, which reads its config.json, and the families that run"
        )
    known = [name for f in FAMILIES for name in (f.architectures if gguf else f.model_types)]
    near = get_close_matches(str(seen)[:80], known, n=1, cutoff=0.7)
    hint = f"the nearest that is known is {near[0]!r}; " if near else ""
    raise CheckpointError(
        f"{checkpoint.path}: {key} is {str(seen)[:80]!r}; {hint}"
        "accepted: those of `ridgeline list --families`"
    )


def planned_family_of(checkpoint: Checkpoint) -> PlannedFamily | None:
    """The family of a checkpoint's configuration that only plans can be made for, None where it is none."""
    seen = None if checkpoint.kind == "gguf" else checkpoint.metadata.get("model_type")
    return next((family for family in PLANNED if seen in family.model_types), None)


def planned_spec(checkpoint: Checkpoint) -> ModelSpec:
    """As `read_spec`, of families too that only plans can be made for."""
    planned = planned_family_of(checkpoint)
    return read_spec(checkpoint) if planned is None else planned.from_config(checkpoint)


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
