"""Phi-3, Phi-3.5 and Phi-4: Llama's shape with fused projections, and ropes that may be partial and long."""

from __future__ import annotations

from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import (
    IGNORED,
    NAMES,
    Traits,
    spec_from_config,
    spec_from_gguf,
    window_of,
    windowed,
)
from ridgeline.model.families.family import Family, Source, layer_of
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.rope import LONG_FACTORS, SHORT_FACTORS
from ridgeline.model.spec import FeedForwardSpec, ModelSpec

_TRAITS = Traits("phi3", eps=1e-5, context=4096, biases="none", rotary=1.0)
_QKV = ("blk.{i}.attn_qkv", "model.layers.{i}.self_attn.qkv_proj")
_GATE_UP = ("blk.{i}.ffn_up", "model.layers.{i}.mlp.gate_up_proj")


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata, "phi3.")
    spec = spec_from_gguf(checkpoint, _TRAITS, "phi3")
    return windowed(spec, window_of(fields, "attention.sliding_window"))


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    fields.refuse("attention_bias", False)
    fields.refuse("mlp_bias", False)
    return windowed(spec_from_config(checkpoint, _TRAITS), window_of(fields, "sliding_window"))


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """Q, K and V lie one below the other in a tensor, and so do gate and up."""
    part = name.rpartition(".")[2]
    if part not in ("q", "k", "v", "gate", "up"):
        return plain
    layer = layer_of(spec, name)
    if part in ("gate", "up"):
        assert isinstance(layer.feed_forward, FeedForwardSpec)
        width = layer.feed_forward.width
        start = width if part == "up" else 0
        return replace(plain, rows=(start, start + width), fused_rows=2 * width)
    dim = layer.attention.head_dim
    queries, keys = layer.attention.heads * dim, layer.attention.kv_heads * dim
    ends = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}
    return replace(plain, rows=ends[part], fused_rows=queries + 2 * keys)


PHI3 = Family(
    name="phi3",
    architectures=("phi3",),
    model_types=("phi3",),
    from_gguf=from_gguf,
    from_config=from_config,
    names={
        **NAMES,
        **{f"layers.{{i}}.{part}": _QKV for part in "qkv"},
        **{f"layers.{{i}}.{part}": _GATE_UP for part in ("gate", "up")},
    },
    source=source,
    ignored=(*IGNORED, LONG_FACTORS, SHORT_FACTORS),
)
