"""StarCoder2: layer norms, grouped heads, a plain feed-forward, biases, a window over the whole model."""

from __future__ import annotations

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families import decoder
from ridgeline.model.families.decoder import IGNORED, window_of, windowed
from ridgeline.model.families.family import Family
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.layer_normed import (
    ACTIVATIONS,
    Block,
    attention_of,
    head_sizes,
    spec_from_config,
    spec_from_gguf,
)
from ridgeline.model.families.rope import rope_from_config
from ridgeline.model.spec import FeedForwardSpec, LayerSpec, ModelSpec, NormSpec

NAMES = {
    **decoder.NAMES,
    "layers.{i}.up": ("blk.{i}.ffn_up", "model.layers.{i}.mlp.c_fc"),
    "layers.{i}.down": ("blk.{i}.ffn_down", "model.layers.{i}.mlp.c_proj"),
}


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata, "starcoder2.")
    spec = spec_from_gguf(checkpoint, "starcoder2", Block("gelu_tanh"))
    return windowed(spec, window_of(fields, "attention.sliding_window"))


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    heads, head_dim = head_sizes(fields)
    kv_heads = fields.integer("num_key_value_heads", heads, high=heads)
    rope = rope_from_config(fields, head_dim, theta=10000.0)
    bias = fields.flag("use_bias", True)
    feed_forward = FeedForwardSpec(
        width=fields.integer("intermediate_size"),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        gated=False,
        bias=bias,
    )
    layer = LayerSpec(attention_of(fields, kv_heads, rope, bias, bias), feed_forward)
    norm = NormSpec("layer", fields.number("norm_epsilon", 1e-5))
    spec = spec_from_config(fields, "starcoder2", norm, layer, context=4096, tied=True)
    return windowed(spec, window_of(fields, "sliding_window"))


STARCODER2 = Family(
    name="starcoder2",
    architectures=("starcoder2",),
    model_types=("starcoder2",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    ignored=IGNORED,
)
