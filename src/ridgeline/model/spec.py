"""What a model is: frozen data that a family reads from a checkpoint's metadata.

A spec names no tensors of a file and holds no weights. `build.py` turns it into a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMS norm, or layer norm with a bias."""

    kind: Literal["rms", "layer"]
    eps: float


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first `2 * len(frequencies)` values of a head.

    The pair (i, i + half) turns by `position * frequencies[i]` radians ("rotate half" order). Scalings
    that only change frequencies (linear, Llama 3's) are already in them.
    """

    frequencies: tuple[float, ...]

    @property
    def dim(self) -> int:
        return 2 * len(self.frequencies)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention. `window` w lets a row see the last w positions, its own included."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False


@dataclass(frozen=True, slots=True)
class FeedForwardSpec:
    """down(act(gate x) * up x) where gated, else down(act(up x))."""

    width: int
    activation: Activation
    gated: bool
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A pre-norm block; `post_norms` also normalises what each half adds to the stream (sandwich)."""

    attention: AttentionSpec
    feed_forward: FeedForwardSpec
    post_norms: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: embeddings, layers, a final norm and a head over the vocabulary."""

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
