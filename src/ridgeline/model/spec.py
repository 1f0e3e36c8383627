"""What a model is: frozen data that a family reads from a checkpoint's metadata.

A spec names no tensors of a file and holds no weights. `build.py` turns it into a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "clamped_silu"]
"""`clamped_silu` is only used gated: with g = min(gate, 7) it is g sigmoid(1.702 g) (clip(up, -7, 7) + 1)."""


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMS norm, or layer norm with a bias unless `bias` is False."""

    kind: Literal["rms", "layer"]
    eps: float
    bias: bool = True

    @property
    def has_bias(self) -> bool:
        return self.kind == "layer" and self.bias


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first `2 * len(frequencies)` values of a head.

    The pair (i, i + half) turns by `position * frequencies[i]` radians ("rotate half" order). Scalings
    that change frequencies (linear, Llama 3's, YaRN's) are already in them; `scale` is what some of them
    multiply queries and keys with.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0

    @property
    def dim(self) -> int:
        return 2 * len(self.frequencies)


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """What multi-head latent attention keeps of a token in place of keys and values (DeepSeek-V2,
    arXiv:2405.04434, section 2.1): a vector of `rank` numbers, of which those of all heads are made, and a
    rotary key of `rope_dim` numbers, which all heads share.

    A head's values have `value_dim` numbers. Queries are made of a vector of `query_rank` numbers, or of the
    row itself (None).
    """

    rank: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention. `window` w lets a row see the last w positions, its own included.

    `softcap` bounds scores: cap * tanh(score / cap). With `sinks`, each head has one more score, a weight,
    that takes its share of the softmax and gives nothing. `qk_norm` is an RMS norm of queries and keys over
    each head, or over all heads together where `qk_norm_whole`. Over each head it may be of another kind, a
    layer norm without bias, and with `qk_norm_by_head` each head has a gain of its own. With `latent`, keys
    and values are products of what that says is kept; `head_dim` is then that of queries and keys.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    qk_norm_kind: Literal["rms", "layer"] = "rms"
    qk_norm_by_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    latent: LatentSpec | None = None


@dataclass(frozen=True, slots=True)
class FeedForwardSpec:
    """down(act(gate x) * up x) where gated, else down(act(up x))."""

    width: int
    activation: Activation
    gated: bool
    bias: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """Many gated feed-forwards, of which each row passes through the `chosen` with the largest scores.

    Scores are the softmax over all experts of a linear of the row, with a bias where `router_bias`; ties go
    to the lower expert. Outputs are summed with the chosen scores, scaled to sum to 1 where `renormalise`.
    A `shared` feed-forward sees every row; its output is weighed with the sigmoid of a linear of the row
    where `shared_gate`.
    """

    count: int
    chosen: int
    expert: FeedForwardSpec
    renormalise: bool = True
    router_bias: bool = False
    shared: FeedForwardSpec | None = None
    shared_gate: bool = True


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Attention and feed-forward, each added to the stream.

    `pre_norms` normalise what each half reads, `post_norms` what it adds; both together are a sandwich. In a
    `parallel` block both halves read the same stream, each through a norm of its own, or through
    `one_norm`.
    """

    attention: AttentionSpec
    feed_forward: FeedForwardSpec | ExpertsSpec
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    one_norm: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: embeddings, layers, a final norm and a head over the vocabulary.

    `logit_scale` is no operation: a family that has one folds it into the gain of its final norm.
    """

    family: str
    hidden: int
    vocabulary: int
    context: int
    norm: NormSpec
    layers: tuple[LayerSpec, ...]
    tied_head: bool
    embedding_scale: float = 1.0
    learned_positions: int | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0
