"""Bytes of what a model is made of, and how often a second they can be read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ridgeline.resources.presets import Preset
from ridgeline.resources.roofline import memory_s
from ridgeline.types import Work


def array_bytes(values: float, bits: float) -> int:
    """Bytes of so many numbers of `bits` each, without what a format adds for scales."""
    return math.ceil(values * bits / 8)


@dataclass(frozen=True, slots=True)
class DecodeBound:
    """The most steps per second at batch 1, on the fewest devices that hold the weights."""

    devices: int
    steps_per_s: float


def decode_bound(weights_bytes: int, preset: Preset) -> DecodeBound:
    """A decode step reads every weight of a dense model once, whatever the batch, and no faster than the
    memories that they lie in: an upper bound that leaves out KV cache, arithmetic and links."""
    devices = max(math.ceil(weights_bytes / preset.memory_bytes), 1)
    share = Work(read_bytes=math.ceil(weights_bytes / devices))
    return DecodeBound(devices, 1 / memory_s(share, preset))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is known of a model's bytes; None is what was not asked for."""

    weights_bits: float | None = None
    weights_bytes: int | None = None
    decode: DecodeBound | None = None
    embedding_floats: int | None = None
    embedding_bytes: int | None = None

    @classmethod
    def of(
        cls, parameters: float | None, bits: float, embedding_floats: int | None, preset: Preset | None
    ) -> Sizes:
        weights = array_bytes(parameters, bits) if parameters is not None else None
        return cls(
            weights_bits=bits if weights is not None else None,
            weights_bytes=weights,
            decode=decode_bound(weights, preset) if weights is not None and preset is not None else None,
            embedding_floats=embedding_floats,
            embedding_bytes=array_bytes(embedding_floats, 32) if embedding_floats is not None else None,
        )
