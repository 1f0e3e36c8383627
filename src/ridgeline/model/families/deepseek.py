"""DeepSeek-V2, V3 and those of their shape (Kimi K2): latent attention, and experts beside shared ones.

For plans alone: the spec has their sizes. How experts are scored and grouped, and YaRN's share of the scale
of attention, are not in it, nor are layers that predict further tokens.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import Traits, each_attention, spec_from_config
from ridgeline.model.families.experts import MAX_EXPERTS, dense_of, with_experts
from ridgeline.model.families.family import PlannedFamily
from ridgeline.model.families.fields import MAX_LAYERS, Fields
from ridgeline.model.families.rope import rope_from_config
from ridgeline.model.spec import AttentionSpec, ExpertsSpec, LatentSpec, ModelSpec

_TRAITS = Traits("deepseek", context=4096, biases="none")
_MAX_SHARED = 64


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    latent = LatentSpec(
        rank=fields.integer("kv_lora_rank"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
        query_rank=fields.integer("q_lora_rank") if "q_lora_rank" in fields else None,
    )
    head_dim = fields.integer("qk_nope_head_dim") + latent.rope_dim
    rope = rope_from_config(fields, latent.rope_dim, _TRAITS.theta)

    def attention(_: int, each: AttentionSpec) -> AttentionSpec:
        return AttentionSpec(each.heads, each.heads, head_dim, head_dim**-0.5, rope, latent=latent)

    spec = spec_from_config(checkpoint, replace(_TRAITS, head_dim=latent.rope_dim))
    return _with_experts(each_attention(spec, attention), fields)


def _with_experts(spec: ModelSpec, fields: Fields) -> ModelSpec:
    """Experts are in every `moe_layer_freq`th layer from `first_k_dense_replace` on; shared ones are one
    feed-forward of all their widths. A model may have none at all."""
    if "n_routed_experts" not in fields:
        return spec
    expert = replace(dense_of(spec), width=fields.integer("moe_intermediate_size"))
    count = fields.integer("n_routed_experts", high=MAX_EXPERTS)
    shared = fields.integer("n_shared_experts", 0, low=0, high=_MAX_SHARED)
    experts = ExpertsSpec(
        count,
        fields.integer("num_experts_per_tok", high=count),
        expert,
        router_bias=fields.values.get("topk_method") == "noaux_tc",
        shared=replace(expert, width=shared * expert.width) if shared else None,
        shared_gate=False,
    )
    first = fields.integer("first_k_dense_replace", 0, low=0, high=MAX_LAYERS)
    every = fields.integer("moe_layer_freq", 1, high=MAX_LAYERS)
    return with_experts(spec, experts, [i >= first and i % every == 0 for i in range(len(spec.layers))])


DEEPSEEK = PlannedFamily("deepseek", ("deepseek_v2", "deepseek_v3", "kimi_k2"), from_config)
