"""Rotary frequencies, and the scalings that change them and the length of what they turn."""

from __future__ import annotations

import math

import numpy as np

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.fields import Fields
from ridgeline.model.spec import RopeSpec
from ridgeline.types import CheckpointError, Float32Array

FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

MAX_FREQUENCY = 1e4
"""Radians per position. A pair turns by one at most in every known model; far beyond, angles mean nothing."""

_ORIGINAL = "original_max_position_embeddings"
_RULES = {rule: rule for rule in ("default", "linear", "llama3", "yarn", "longrope")} | {"su": "longrope"}
_MAX_SCALE = 1e3


def rope(theta: float, dim: int, factors: Float32Array | float = 1.0, scale: float = 1.0) -> RopeSpec:
    """Frequencies theta^(-2i/dim), each divided by its factor (RoFormer, arXiv:2104.09864, section 3.4.2).

    Raises CheckpointError for an odd `dim` and for frequencies or a `scale` that are not of this world.
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
    if not 1 / _MAX_SCALE <= scale <= _MAX_SCALE:
        raise CheckpointError(
            f"rope scales queries and keys by {scale:g}; accepted: {1 / _MAX_SCALE:g} to {_MAX_SCALE:g}"
        )
    return RopeSpec(tuple(frequencies.astype(np.float32).tolist()), scale)


# ------------------------------------------------------------------------------------------- GGUF


def rope_from_gguf(
    checkpoint: Checkpoint, fields: Fields, dim: int, theta: float, whole: bool = True
) -> RopeSpec:
    """From a GGUF's keys and its tables of factors: linear scaling, Llama 3's, YaRN and LongRoPE.

    Files do not say whether YaRN's ramp is widened to `whole` pairs; that is the model's rule."""
    fields.refuse("rope.scaling.type", "none", "linear", "yarn", "longrope")
    fields.refuse("rope.scale_linear", 1.0)  # the older key for a factor
    fields.refuse("rope.dimension_count", dim)
    theta = fields.number("rope.freq_base", theta)
    factor = fields.number("rope.scaling.factor", 1.0)
    scale = fields.number("rope.scaling.attn_factor", 1.0)
    factors = np.full(dim // 2, 1.0, np.float32)
    rule = fields.values.get(fields.prefix + "rope.scaling.type")
    if rule == "yarn":
        factors = _yarn_factors_of_gguf(fields, theta, dim, factor, whole)
        scale *= _yarn_scale(factor)
    elif rule == "longrope":  # whose tables hold all of it
        fields.refuse("rope.scaling.factor", 1.0)
    elif rule != "none":
        factors *= np.float32(factor)
    for name in (FACTORS, _longrope_table(checkpoint, fields)):
        if name in checkpoint.tensors:
            factors = factors * _table(checkpoint, name, factors.shape)
    return rope(theta, dim, factors, scale)


def _table(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Float32Array:
    seen = checkpoint.tensors[name].shape
    if seen != shape:
        raise CheckpointError(f"tensor {name!r} has shape {seen}; accepted: {shape}")
    return checkpoint.tensor(name).dequantise()


def _longrope_table(checkpoint: Checkpoint, fields: Fields) -> str:
    if LONG_FACTORS not in checkpoint.tensors and SHORT_FACTORS not in checkpoint.tensors:
        return ""
    original = fields.number("rope.scaling.original_context_length")
    return LONG_FACTORS if fields.number("context_length") > original else SHORT_FACTORS


def _yarn_factors_of_gguf(fields: Fields, theta: float, dim: int, factor: float, whole: bool) -> Float32Array:
    """The file's keys for YaRN. The length of queries and keys always follows from the factor there: a
    file may repeat that value, or hold the 1 that stands for it."""
    key = "rope.scaling.yarn_attn_factor"
    stated = fields.number(key, 1.0)
    if not any(math.isclose(stated, usual, rel_tol=1e-4) for usual in (1.0, _yarn_scale(factor))):
        raise CheckpointError(
            f"model metadata: {fields.prefix}{key} is {stated:g}; accepted: 1.0, {_yarn_scale(factor):.6g}"
        )
    fields.refuse("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    fields.refuse("rope.scaling.yarn_log_multiplier", 0.0)
    context = fields.number("rope.scaling.original_context_length", fields.number("context_length"))
    fast, slow = (fields.number(f"rope.scaling.yarn_beta_{end}", beta) for end, beta in _BETAS.items())
    return _yarn_factors(theta, dim, factor, context, (fast, slow), whole)


# ----------------------------------------------------------------------------------------- config


def rope_from_config(config: Fields, dim: int, theta: float, section: Fields | None = None) -> RopeSpec:
    """From a Hugging Face config: `rope_parameters` or one section of it, or the older `rope_scaling`.

    Supports the types default, linear, llama3, yarn and longrope; others are refused by name.
    """
    scaling = section or config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    for fields in (config, scaling):
        fields.refuse("partial_rotary_factor", 1.0)
    theta = scaling.number("rope_theta", config.number("rope_theta", theta))
    key = "rope_type" if "rope_type" in scaling else "type"
    rule = scaling.choice(key, _RULES, "default")
    if rule == "linear":
        return rope(theta, dim, scaling.number("factor"))
    if rule == "llama3":
        return rope(theta, dim, _llama3_factors(scaling, theta, dim))
    if rule == "yarn":
        return _yarn(config, scaling, theta, dim)
    if rule == "longrope":
        return _longrope(config, scaling, theta, dim)
    return rope(theta, dim)


def _original_context(config: Fields, scaling: Fields) -> float:
    """The context that the model was first trained with; some configs say it outside of the section."""
    return (config if _ORIGINAL in config and _ORIGINAL not in scaling else scaling).number(_ORIGINAL)


def _stretch(config: Fields, scaling: Fields, original: float) -> float:
    """By how much the context was extended."""
    return scaling.number_or_none("factor") or config.number("max_position_embeddings") / original


def _llama3_factors(scaling: Fields, theta: float, dim: int) -> Float32Array:
    """Llama 3.1's rule: leave short wavelengths, divide long ones by `factor`, and blend between the two."""
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise CheckpointError(
            f"model metadata: low_freq_factor is {low:g}; accepted: below high_freq_factor, {high:g}"
        )
    context = scaling.number(_ORIGINAL)
    wavelength = 2 * math.pi * theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    blend = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 / (blend + (1 - blend) / factor)).astype(np.float32)


_BETAS = {"fast": 32.0, "slow": 1.0}
"""Turns within the original context: pairs that make more are left, those that make fewer are stretched."""


def _yarn(config: Fields, scaling: Fields, theta: float, dim: int) -> RopeSpec:
    """YaRN (arXiv:2309.00071, section 3.2 and equation 22 for the length of queries and keys)."""
    context = _original_context(config, scaling)
    factor = _stretch(config, scaling, context)
    fast, slow = (scaling.number(f"beta_{end}", beta) for end, beta in _BETAS.items())
    scale = scaling.number_or_none("attention_factor")
    if scale is None and "mscale" in scaling and "mscale_all_dim" in scaling:
        above, below = (scaling.number(key) for key in ("mscale", "mscale_all_dim"))
        scale = _yarn_scale(factor, above) / _yarn_scale(factor, below)
    elif scale is None:
        scale = _yarn_scale(factor)
    whole = scaling.flag("truncate", True)
    return rope(theta, dim, _yarn_factors(theta, dim, factor, context, (fast, slow), whole), scale)


def _yarn_scale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_factors(
    theta: float, dim: int, factor: float, context: float, betas: tuple[float, float], whole: bool
) -> Float32Array:
    """From 1 for fast pairs to `factor` for slow ones, by a ramp between the pairs that make `betas` turns in
    `context` positions; `whole` widens the ramp to whole pairs."""
    if theta <= 1:
        raise CheckpointError(f"rope base is {theta:g}; accepted with yarn: a number above 1")
    start, stop = (dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in betas)
    if whole:
        start, stop = math.floor(start), math.ceil(stop)
    low, high = float(max(start, 0)), float(min(stop, dim - 1))
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low or 1e-3), 0, 1)
    return (factor / (ramp + (1 - ramp) * factor)).astype(np.float32)


def _longrope(config: Fields, scaling: Fields, theta: float, dim: int) -> RopeSpec:
    """LongRoPE (arXiv:2402.13753): a factor for each pair. The long ones hold for every position of a model
    whose context is beyond the original, so that what is cached never changes its meaning."""
    original = _original_context(config, scaling)
    if original < 2:
        raise CheckpointError(f"model metadata: {_ORIGINAL} is {original:g}; accepted: from 2")
    long = config.number("max_position_embeddings") > original
    tables = [np.array(scaling.numbers(key, dim // 2), np.float32) for key in ("short_factor", "long_factor")]
    scale = scaling.number_or_none("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(max(_stretch(config, scaling, original), 1.0)) / math.log(original))
    return rope(theta, dim, tables[long], scale)
