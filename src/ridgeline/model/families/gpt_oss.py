"""gpt-oss: experts with biases and clamped activations, attention sinks, every other layer a window, YaRN."""

from __future__ import annotations

from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import (
    IGNORED,
    NAMES,
    SLIDING,
    Traits,
    each_attention,
    spec_from_config,
    spec_from_gguf,
    window_of,
    windowed,
)
from ridgeline.model.families.experts import (
    dense_of,
    expert_source,
    experts_from_config,
    experts_from_gguf,
    with_experts,
)
from ridgeline.model.families.family import Family, Source, layer_of
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.rope import rope_from_gguf
from ridgeline.model.spec import ExpertsSpec, ModelSpec

_TRAITS = Traits(
    "gpt-oss",
    theta=150_000.0,
    head_dim=64,
    eps=1e-5,
    context=131_072,
    activation="clamped_silu",
    biases="all",
    experts=True,
)
_WINDOW = 128
_SOFTMAX_OF_CHOSEN = 3  # is the softmax of all, renormalised

_MLP = "model.layers.{i}.mlp"
_NAMES = {
    **NAMES,
    "layers.{i}.feed_forward_norm": (
        "blk.{i}.post_attention_norm",
        "model.layers.{i}.post_attention_layernorm",
    ),
    "layers.{i}.sinks": ("blk.{i}.attn_sinks", "model.layers.{i}.self_attn.sinks"),
    "layers.{i}.router": ("blk.{i}.ffn_gate_inp", f"{_MLP}.router"),
    "layers.{i}.experts.gate": ("blk.{i}.ffn_gate_exps", f"{_MLP}.experts.gate_up_proj"),
    "layers.{i}.experts.up": ("blk.{i}.ffn_up_exps", f"{_MLP}.experts.gate_up_proj"),
    "layers.{i}.experts.down": ("blk.{i}.ffn_down_exps", f"{_MLP}.experts.down_proj"),
}


def _spec(spec: ModelSpec, experts: ExpertsSpec) -> ModelSpec:
    experts = replace(experts, expert=replace(experts.expert, bias=True), router_bias=True)
    return with_experts(each_attention(spec, lambda _, each: replace(each, sinks=True)), experts)


def _every_other(layers: int) -> list[bool]:
    return [i % 2 == 0 for i in range(layers)]


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata, "gpt-oss.")
    fields.refuse("attention.sliding_window_pattern", 2)
    spec = spec_from_gguf(checkpoint, _TRAITS, "gpt-oss")
    experts = experts_from_gguf(fields, dense_of(spec), gating=(0, 1, _SOFTMAX_OF_CHOSEN))
    # The model was trained with a ramp that begins and ends between pairs, as its config.json says.
    rope = rope_from_gguf(checkpoint, fields, spec.layers[0].attention.head_dim, _TRAITS.theta, whole=False)
    spec = each_attention(_spec(spec, experts), lambda _, each: replace(each, rope=rope))
    window = window_of(fields, "attention.sliding_window", _WINDOW)
    return windowed(spec, window, _every_other(len(spec.layers)))


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    fields = Fields(checkpoint.metadata)
    fields.refuse("attention_bias", True)
    fields.refuse("mlp_bias", False)
    fields.refuse("swiglu_limit", 7.0)
    fields.refuse("swiglu_alpha", 1.702)
    spec = spec_from_config(checkpoint, _TRAITS)
    spec = _spec(spec, experts_from_config(fields, dense_of(spec)))
    layers = len(spec.layers)
    sliding = fields.entries("layer_types", layers, SLIDING) or _every_other(layers)
    return windowed(spec, window_of(fields, "sliding_window", _WINDOW), sliding)


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """In safetensors, rows of gate and up take turns in one tensor, and names of what is no module's have no
    `.weight`. Unquantised experts are stored (inputs, outputs), those in MXFP4 (outputs, inputs)."""
    if checkpoint.kind == "gguf":
        return expert_source(spec, checkpoint, name, plain)
    if name.endswith(".sinks"):
        return replace(plain, tensor=plain.tensor.removesuffix(".weight"))
    if ".experts." not in name:
        return plain
    tensor = plain.tensor.removesuffix(".weight").replace(".bias", "_bias")
    held = checkpoint.tensors.get(tensor)
    turned = held is not None and held.storage != "MXFP4" and not name.endswith(".bias")
    plain = replace(plain, tensor=tensor, transposed=turned)
    part = name.removesuffix(".bias").rpartition(".")[2]
    if part != "down":
        feed_forward = layer_of(spec, name).feed_forward
        assert isinstance(feed_forward, ExpertsSpec)
        width, which = feed_forward.expert.width, int(part == "up")
        plain = replace(plain, rows=(which, which + 1), fused_rows=2 * width, row_groups=width)
    return expert_source(spec, checkpoint, name, plain)


GPT_OSS = Family(
    name="gpt-oss",
    architectures=("gpt-oss",),
    model_types=("gpt_oss",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=_NAMES,
    source=source,
    ignored=IGNORED,
)
