"""GPT-2: layer norm, learned positions, biases everywhere, one fused projection for Q, K and V."""

from __future__ import annotations

from dataclasses import replace

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.family import Family, Source, layer_of
from ridgeline.model.families.fields import MAX_CONTEXT, MAX_LAYERS, MAX_VOCABULARY, Fields
from ridgeline.model.spec import Activation, AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec, NormSpec
from ridgeline.types import CheckpointError

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}

NAMES = {
    "embed": ("token_embd", "wte"),
    "positions": ("position_embd", "wpe"),
    "final_norm": ("output_norm", "ln_f"),
    "head": ("output", "lm_head"),
    "layers.{i}.attention_norm": ("blk.{i}.attn_norm", "h.{i}.ln_1"),
    "layers.{i}.q": ("blk.{i}.attn_qkv", "h.{i}.attn.c_attn"),
    "layers.{i}.k": ("blk.{i}.attn_qkv", "h.{i}.attn.c_attn"),
    "layers.{i}.v": ("blk.{i}.attn_qkv", "h.{i}.attn.c_attn"),
    "layers.{i}.o": ("blk.{i}.attn_output", "h.{i}.attn.c_proj"),
    "layers.{i}.feed_forward_norm": ("blk.{i}.ffn_norm", "h.{i}.ln_2"),
    "layers.{i}.up": ("blk.{i}.ffn_up", "h.{i}.mlp.c_fc"),
    "layers.{i}.down": ("blk.{i}.ffn_down", "h.{i}.mlp.c_proj"),
}


def _spec(
    fields: Fields, keys: dict[str, str], activation: Activation, vocabulary: int, tied: bool
) -> ModelSpec:
    hidden = fields.integer(keys["hidden"])
    heads = fields.integer(keys["heads"])
    context = fields.integer(keys["context"], high=MAX_CONTEXT)
    if hidden % heads:
        raise CheckpointError(
            f"model metadata: {hidden} values for {heads} heads; accepted: a multiple of the heads"
        )
    attention = AttentionSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        scale=(hidden // heads) ** -0.5,
        rope=None,
        qkv_bias=True,
        output_bias=True,
    )
    width = fields.integer(keys["width"], 4 * hidden)
    layer = LayerSpec(attention, FeedForwardSpec(width, activation, gated=False, bias=True))
    return ModelSpec(
        family="gpt2",
        hidden=hidden,
        vocabulary=vocabulary,
        context=context,
        norm=NormSpec("layer", fields.number(keys["eps"], 1e-5)),
        layers=(layer,) * fields.integer(keys["layers"], high=MAX_LAYERS),
        tied_head=tied,
        learned_positions=context,
    )


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    keys = {
        "hidden": "embedding_length",
        "heads": "attention.head_count",
        "context": "context_length",
        "width": "feed_forward_length",
        "eps": "attention.layer_norm_epsilon",
        "layers": "block_count",
    }
    vocabulary = checkpoint.tensors["token_embd.weight"].shape[0]
    tied = "output.weight" not in checkpoint.tensors
    return _spec(Fields(checkpoint.metadata, "gpt2."), keys, "gelu_tanh", vocabulary, tied)


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    keys = {
        "hidden": "n_embd",
        "heads": "n_head",
        "context": "n_positions",
        "width": "n_inner",
        "eps": "layer_norm_epsilon",
        "layers": "n_layer",
    }
    fields = Fields(checkpoint.metadata)
    fields.refuse("scale_attn_weights", True)
    fields.refuse("scale_attn_by_inverse_layer_idx", False)
    fields.refuse("add_cross_attention", False)
    activation = fields.choice("activation_function", ACTIVATIONS, "gelu_new")
    tied = fields.flag("tie_word_embeddings", True)
    return _spec(fields, keys, activation, fields.integer("vocab_size", high=MAX_VOCABULARY), tied)


def source(spec: ModelSpec, checkpoint: Checkpoint, name: str, plain: Source) -> Source:
    """Q, K and V are thirds of one tensor, and the safetensors files store (inputs, outputs)."""
    part = name.removesuffix(".bias").rpartition(".")[2]
    if part in ("q", "k", "v"):
        attention = layer_of(spec, name).attention
        third = attention.heads * attention.head_dim
        start = "qkv".index(part) * third
        plain = replace(plain, rows=(start, start + third), fused_rows=3 * third)
    linear = part in ("q", "k", "v", "o", "up", "down") and not name.endswith(".bias")
    return replace(plain, transposed=linear and checkpoint.kind == "safetensors")


GPT2 = Family(
    name="gpt2",
    architectures=("gpt2",),
    model_types=("gpt2",),
    from_gguf=from_gguf,
    from_config=from_config,
    names=NAMES,
    source=source,
    prefixes=("transformer.", ""),
    ignored=("*.attn.bias", "*.attn.masked_bias"),
)
