"""StableLM: Llama's shape with layer norms and a partial rotary; some blocks are parallel behind one norm.

The layer norms of single heads that StableLM 2 12B has (`qk_layernorm`) are refused.
"""

from __future__ import annotations

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import IGNORED, NAMES
from ridgeline.model.families.family import Family
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.layer_normed import (
    Block,
    attention_of,
    head_sizes,
    spec_from_config,
    spec_from_gguf,
)
from ridgeline.model.families.partial_rope import partial_rope_from_config
from ridgeline.model.spec import FeedForwardSpec, LayerSpec, ModelSpec, NormSpec


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """A block is parallel where the file has no second norm; what files say in a flag need not be true."""
    parallel = "blk.0.ffn_norm.weight" not in checkpoint.tensors
    return spec_from_gguf(
        checkpoint, "stablelm", Block("silu", gated=True, parallel=parallel, one_norm=parallel)
    )


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    fields.refuse("qk_layernorm", False)
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
    return spec_from_config(fields, "stablelm", norm, layer, context=4096, tied=False)


STABLELM = Family(
    name="stablelm",
    architectures=("stablelm",),
    model_types=("stablelm",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    ignored=IGNORED,
)
