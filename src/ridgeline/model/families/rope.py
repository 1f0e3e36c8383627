"""Rotary frequencies and the scalings that only change them."""

from __future__ import annotations

import math

import numpy as np

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.fields import Fields
from ridgeline.model.spec import RopeSpec
from ridgeline.types import CheckpointError, Float32Array

FACTORS = "rope_freqs.weight"

MAX_FREQUENCY = 1e4
"""Radians per position. A pair turns by one at most in every known model; far beyond, angles mean nothing."""


def rope(theta: float, dim: int, factors: Float32Array | float = 1.0) -> RopeSpec:
    """Frequencies theta^(-2i/dim), each divided by its factor (RoFormer, arXiv:2104.09864, section 3.4.2).

    Raises CheckpointError for an odd `dim` and for frequencies that are not of this world.
    """
    if dim % 2:
        raise CheckpointError(f"rotary dimension is {dim}; accepted: an even number")
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) / factors
    if not np.all((frequencies >= 0) & (frequencies <= MAX_FREQUENCY)):
        raise CheckpointError(
            f"rope base is {theta:g}, with factors from {np.min(factors):g} to {np.max(factors):g}; "
            f"accepted: what turns pairs by 0 to {MAX_FREQUENCY:g} radians per position"
        )
    return RopeSpec(tuple(frequencies.astype(np.float32).tolist()))


def rope_from_gguf(checkpoint: Checkpoint, fields: Fields, dim: int, theta: float) -> RopeSpec:
    """From a GGUF's keys: linear scaling, and the table of factors that stands for Llama 3's rule."""
    fields.refuse("rope.scaling.type", "none", "linear")
    fields.refuse("rope.scale_linear", 1.0)  # the older key for a factor
    fields.refuse("rope.dimension_count", dim)
    factors = np.full(dim // 2, fields.number("rope.scaling.factor", 1.0), np.float32)
    if FACTORS in checkpoint.tensors:
        shape = checkpoint.tensors[FACTORS].shape
        if shape != factors.shape:
            raise CheckpointError(f"tensor {FACTORS!r} has shape {shape}; accepted: {factors.shape}")
        factors *= checkpoint.tensor(FACTORS).dequantise()
    return rope(fields.number("rope.freq_base", theta), dim, factors)


def rope_from_config(config: Fields, dim: int, theta: float, section: Fields | None = None) -> RopeSpec:
    """From a Hugging Face config: `rope_parameters` or one section of it, or the older `rope_scaling`.

    Supports the types default, linear and llama3; others are refused by name.
    """
    scaling = section or config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    for fields in (config, scaling):
        fields.refuse("partial_rotary_factor", 1.0)
    theta = scaling.number("rope_theta", config.number("rope_theta", theta))
    key = "rope_type" if "rope_type" in scaling else "type"
    rule = scaling.choice(key, {k: k for k in ("default", "linear", "llama3")}, "default")
    if rule == "linear":
        return rope(theta, dim, scaling.number("factor"))
    if rule == "llama3":
        return rope(theta, dim, _llama3_factors(scaling, theta, dim))
    return rope(theta, dim)


def _llama3_factors(scaling: Fields, theta: float, dim: int) -> Float32Array:
    """Llama 3.1's rule: leave short wavelengths, divide long ones by `factor`, and blend between the two."""
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise CheckpointError(
            f"model metadata: low_freq_factor is {low:g}; accepted: below high_freq_factor, {high:g}"
        )
    context = scaling.number("original_max_position_embeddings")
    wavelength = 2 * math.pi * theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    blend = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 / (blend + (1 - blend) / factor)).astype(np.float32)
