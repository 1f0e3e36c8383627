"""Ropes that turn only the first values of a head: a fraction in configs, a dimension in GGUF files."""

from __future__ import annotations

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.rope import rope_from_config, rope_from_gguf
from ridgeline.model.spec import RopeSpec
from ridgeline.types import CheckpointError

_FRACTION = "partial_rotary_factor"


def partial_rope_from_config(config: Fields, head_dim: int, theta: float, fraction: float) -> RopeSpec:
    """As `rope_from_config`, over int(head_dim * partial_rotary_factor) values of a head.

    `theta` and `fraction` stand where the config gives none. Raises CheckpointError for a fraction that
    leaves nothing to turn or more than the head has.
    """
    section = config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    fraction = section.number(_FRACTION, config.number(_FRACTION, fraction))
    dim = int(head_dim * fraction)
    if not 2 <= dim <= head_dim:
        raise CheckpointError(
            f"model metadata: {_FRACTION} is {fraction:g}; accepted: 2 to all of {head_dim} values of a head"
        )
    return rope_from_config(_without_fraction(config), dim, theta, _without_fraction(section))


def partial_rope_from_gguf(checkpoint: Checkpoint, fields: Fields, head_dim: int, theta: float) -> RopeSpec:
    """As `rope_from_gguf`, over the file's own rotary dimension, which is at most `head_dim`."""
    dim = fields.integer("rope.dimension_count", head_dim, low=2, high=head_dim)
    return rope_from_gguf(checkpoint, fields, dim, theta)


def _without_fraction(fields: Fields) -> Fields:
    return Fields({key: value for key, value in fields.values.items() if key != _FRACTION}, fields.prefix)
