"""Qwen 1.5 and 2 MoE (a shared expert beside the others) and Qwen 3 MoE: Qwen's shape with experts, in all
layers or in some."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import (
    IGNORED,
    NAMES,
    QK_NORMS,
    Traits,
    refuse_window_of_gguf,
    spec_from_config,
    spec_from_gguf,
)
from ridgeline.model.families.experts import (
    dense_of,
    expert_names,
    expert_source,
    experts_from_config,
    experts_from_gguf,
    with_experts,
)
from ridgeline.model.families.family import Family
from ridgeline.model.families.fields import MAX_LAYERS, Fields
from ridgeline.model.spec import ModelSpec

_QWEN2 = Traits("qwen2moe", context=32_768, biases="qkv", experts=True)
_QWEN3 = Traits("qwen3moe", context=32_768, qk_norm=True, experts=True)

_NAMES = {**NAMES, **expert_names("mlp", "gate_proj", "up_proj", "down_proj")}
_SHARED = {
    "layers.{i}.shared_gate": ("blk.{i}.ffn_gate_inp_shexp", "model.layers.{i}.mlp.shared_expert_gate"),
    **{
        f"layers.{{i}}.shared.{part}": (
            f"blk.{{i}}.ffn_{part}_shexp",
            f"model.layers.{{i}}.mlp.shared_expert.{part}_proj",
        )
        for part in ("gate", "up", "down")
    },
}


def _from_gguf(traits: Traits, checkpoint: Checkpoint) -> ModelSpec:
    """Every layer has experts. Files that do not say whether scores are renormalised follow the published
    models of their family."""
    fields = Fields(checkpoint.metadata, f"{traits.family}.")
    spec = spec_from_gguf(checkpoint, traits, traits.family)
    spec = refuse_window_of_gguf(checkpoint, spec, traits.family)
    dense = dense_of(spec)
    experts = experts_from_gguf(fields, dense)
    if "expert_feed_forward_length" not in fields:  # older files
        experts = replace(experts, expert=replace(dense, width=max(1, dense.width // experts.chosen)))
    experts = replace(experts, renormalise=fields.flag("expert_weights_norm", traits is _QWEN3))
    if traits is _QWEN2:
        width = fields.integer("expert_shared_feed_forward_length", dense.width)
        experts = replace(experts, shared=replace(dense, width=width))
    return with_experts(spec, experts)


def _from_config(traits: Traits, checkpoint: Checkpoint) -> ModelSpec:
    """Experts are in every `decoder_sparse_step`th layer but those of `mlp_only_layers`."""
    fields = Fields(checkpoint.metadata)
    fields.refuse("use_sliding_window", False)
    fields.refuse("mlp_bias", False)
    spec = spec_from_config(checkpoint, traits)
    dense = dense_of(spec)
    expert = replace(dense, width=fields.integer("moe_intermediate_size"))
    renormalise = fields.flag("norm_topk_prob", False)
    experts = replace(experts_from_config(fields, expert), renormalise=renormalise)
    if traits is _QWEN2:
        fields.refuse("qkv_bias", True)
        width = fields.integer("shared_expert_intermediate_size")
        experts = replace(experts, shared=replace(dense, width=width))
    step = fields.integer("decoder_sparse_step", 1, high=MAX_LAYERS)
    only_dense = fields.integers("mlp_only_layers", high=MAX_LAYERS)
    sparse = [(i + 1) % step == 0 and i not in only_dense for i in range(len(spec.layers))]
    return with_experts(spec, experts, sparse)


QWEN2_MOE = Family(
    name="qwen2moe",
    architectures=("qwen2moe",),
    model_types=("qwen2_moe",),
    from_gguf=partial(_from_gguf, _QWEN2),
    from_config=partial(_from_config, _QWEN2),
    names={**_NAMES, **_SHARED},
    source=expert_source,
    ignored=IGNORED,
)

QWEN3_MOE = Family(
    name="qwen3moe",
    architectures=("qwen3moe",),
    model_types=("qwen3_moe",),
    from_gguf=partial(_from_gguf, _QWEN3),
    from_config=partial(_from_config, _QWEN3),
    names={**_NAMES, **QK_NORMS},
    source=expert_source,
    ignored=IGNORED,
)
