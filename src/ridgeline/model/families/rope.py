"""Rotary frequencies and the scalings that only change them."""

from __future__ import annotations

import math

import numpy as np

from ridgeline.model.families.fields import Fields
from ridgeline.model.spec import RopeSpec
from ridgeline.types import CheckpointError, Float32Array


def rope(theta: float, dim: int, factors: Float32Array | None = None) -> RopeSpec:
    """Frequencies theta^(-2i/dim), each divided by its factor (RoFormer, arXiv:2104.09864, section 3.4.2)."""
    if dim % 2:
        raise CheckpointError(f"rotary dimension is {dim}; accepted: an even number")
    frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if factors is not None:
        if factors.shape != frequencies.shape or not np.all(factors > 0):
            raise CheckpointError(
                f"rope factors have shape {factors.shape}; accepted: {frequencies.shape}, all above 0"
            )
        frequencies = frequencies / factors
    return RopeSpec(tuple(frequencies.astype(np.float32).tolist()))


def rope_from_config(config: Fields, dim: int, theta: float, section: Fields | None = None) -> RopeSpec:
    """From a Hugging Face config: `rope_parameters` or one section of it, or the older `rope_scaling`.

    Supports the types default, linear and llama3; others are refused by name.
    """
    scaling = section or config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    theta = scaling.number("rope_theta", config.number("rope_theta", theta))
    key = "rope_type" if "rope_type" in scaling else "type"
    rule = scaling.choice(key, {k: k for k in ("default", "linear", "llama3")}, "default")
    if rule == "linear":
        return rope(theta, dim, np.full(dim // 2, scaling.number("factor"), np.float32))
    if rule == "llama3":
        return rope(theta, dim, _llama3_factors(scaling, theta, dim))
    return rope(theta, dim)


def _llama3_factors(scaling: Fields, theta: float, dim: int) -> Float32Array:
    """Llama 3.1's rule: leave short wavelengths, divide long ones by `factor`, and blend between the two."""
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    context = scaling.number("original_max_position_embeddings")
    wavelength = 2 * math.pi * theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    blend = np.clip((context / wavelength - low) / (high - low), 0, 1) if high > low else wavelength * 0
    return (1 / (blend + (1 - blend) / factor)).astype(np.float32)
