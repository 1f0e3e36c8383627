"""What families with experts share: the fields that say so, and where the experts' weights lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.family import Source, layer_of
from ridgeline.model.families.fields import Fields
from ridgeline.model.spec import ExpertsSpec, FeedForwardSpec, ModelSpec
from ridgeline.types import CheckpointError

MAX_EXPERTS = 4096

_ONLY_ACCEPTED = {
    "expert_weights_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0, 1),
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1),
    "expert_chunk_feed_forward_length": (0,),
}
"""Keys of GGUF files that would change what experts do, and their values that change nothing."""


def expert_names(block: str, gate: str, up: str, down: str) -> dict[str, tuple[str, str]]:
    """Names of a router and of experts that safetensors files keep apart, in a `block` of each layer."""
    path = f"model.layers.{{i}}.{block}"
    parts = {"gate": gate, "up": up, "down": down}
    return {
        "layers.{i}.router": ("blk.{i}.ffn_gate_inp", f"{path}.gate"),
        **{
            f"layers.{{i}}.experts.{part}": (f"blk.{{i}}.ffn_{part}_exps", f"{path}.experts.{{e}}.{theirs}")
            for part, theirs in parts.items()
        },
    }


def experts_from_gguf(fields: Fields, expert: FeedForwardSpec, gating: Sequence[int] = (0, 1)) -> ExpertsSpec:
    """Experts like `expert`, unless the file gives them a width of their own, with renormalised scores.

    `gating` are the accepted functions of the scores: 0 is unstated and 1 softmax over all experts.
    """
    for key, accepted in _ONLY_ACCEPTED.items():
        fields.refuse(key, *accepted)
    fields.refuse("expert_gating_func", *gating)
    count = fields.integer("expert_count", high=MAX_EXPERTS)
    chosen = fields.integer("expert_used_count", high=count)
    width = fields.integer("expert_feed_forward_length", expert.width)
    return ExpertsSpec(count, chosen, replace(expert, width=width))


def experts_from_config(fields: Fields, expert: FeedForwardSpec) -> ExpertsSpec:
    """Experts like `expert`, with renormalised scores."""
    key = "num_experts" if "num_experts" in fields else "num_local_experts"
    count = fields.integer(key, high=MAX_EXPERTS)
    return ExpertsSpec(count, fields.integer("num_experts_per_tok", high=count), expert)


def dense_of(spec: ModelSpec) -> FeedForwardSpec:
    """The feed-forward of a spec that has no experts yet."""
    feed_forward = spec.layers[0].feed_forward
    assert isinstance(feed_forward, FeedForwardSpec)
    return feed_forward


def with_experts(spec: ModelSpec, experts: ExpertsSpec, sparse: Sequence[bool] | None = None) -> ModelSpec:
    """`spec` with experts in the `sparse` layers, all where None."""
    layers = (
        replace(layer, feed_forward=experts) if sparse is None or sparse[i] else layer
        for i, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=tuple(layers))


def expert_source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """The source of a weight of all experts, and of the gate of shared ones; others stay as they are.

    GGUF files have a tensor for all experts, the oldest one for each.
    """
    held = checkpoint.tensors
    if name.endswith(".shared_gate"):  # a matrix of one row, or a vector
        return replace(plain, squeezed=plain.tensor in held and len(held[plain.tensor].shape) == 1)
    if ".experts." not in name:
        return plain
    feed_forward = layer_of(spec, name).feed_forward
    assert isinstance(feed_forward, ExpertsSpec)
    source = replace(plain, experts=feed_forward.count)
    apart = replace(source, tensor=plain.tensor.replace("_exps.", ".{e}."))
    if plain.tensor not in held and apart.tensors[0] in held:
        source = apart
    if source.tensors[-1] not in held:  # before a list of what may be far too many is made
        raise CheckpointError(f"tensor {source.tensors[-1]!r} is missing")
    return source
