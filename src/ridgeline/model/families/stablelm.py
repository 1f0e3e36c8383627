"""StableLM: Llama's shape with layer norms and a partial rotary; some blocks are parallel behind one norm.

StableLM 2 12B has layer norms of single heads, too.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import IGNORED, NAMES
from ridgeline.model.families.family import Family, Source
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.layer_normed import (
    Block,
    attention_of,
    head_sizes,
    heads_of,
    spec_from_config,
    spec_from_gguf,
    with_head_norms,
)
from ridgeline.model.families.partial_rope import partial_rope_from_config
from ridgeline.model.spec import FeedForwardSpec, LayerSpec, ModelSpec, NormSpec

HEAD_NORMS = {
    f"layers.{{i}}.{part}_norm": (
        f"blk.{{i}}.attn_{part}_norm",
        f"model.layers.{{i}}.self_attn.{part}_layernorm.norms.{{e}}",
    )
    for part in "qk"
}


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """A block is parallel where the file has no second norm; what files say in a flag need not be true."""
    parallel = "blk.0.ffn_norm.weight" not in checkpoint.tensors
    block = Block("silu", gated=True, parallel=parallel, one_norm=parallel)
    spec = spec_from_gguf(checkpoint, "stablelm", block)
    return with_head_norms(spec, "blk.0.attn_q_norm.weight" in checkpoint.tensors)


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    heads, head_dim = head_sizes(fields)
    kv_heads = fields.integer("num_key_value_heads", heads, high=heads)
    rope = partial_rope_from_config(fields, head_dim, theta=10000.0, fraction=0.25)
    feed_forward = FeedForwardSpec(
        width=fields.integer("intermediate_size"),
        activation=fields.choice("hidden_act", {"silu": "silu"}, "silu"),
        gated=True,
    )
    attention = attention_of(fields, kv_heads, rope, qkv_bias=fields.flag("use_qkv_bias", False))
    parallel = fields.flag("use_parallel_residual", False)
    layer = LayerSpec(attention, feed_forward, parallel=parallel, one_norm=parallel)
    norm = NormSpec("layer", fields.number("layer_norm_eps", 1e-5))
    spec = spec_from_config(fields, "stablelm", norm, layer, context=4096, tied=False)
    return with_head_norms(spec, fields.flag("qk_layernorm", False))


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    return replace(plain, experts=heads_of(spec, name)) if name.endswith(("q_norm", "k_norm")) else plain


STABLELM = Family(
    name="stablelm",
    architectures=("stablelm",),
    model_types=("stablelm",),
    from_gguf=from_gguf,
    from_config=from_config,
    names={**NAMES, **HEAD_NORMS},
    source=source,
    ignored=IGNORED,
)
