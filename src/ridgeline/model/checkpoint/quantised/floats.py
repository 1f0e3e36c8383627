"""FP8 weights (E4M3, the variant without infinities) with a scale for each block of a matrix.

    value = E4M3[code] * scale, in float32

A code of 0x7f or 0xff is not a number, which whoever checks the values refuses. The quantisation methods
"fp8" and "fbgemm_fp8" keep the codes in X.weight and the scales in X.weight_scale_inv, or X.weight_scale: one
for the tensor, one for each output, or one for each of `weight_block_size` blocks (DeepSeek). Scales of
activations are for kernels that quantise these to FP8 too, and are hidden.
"""

from __future__ import annotations

import numpy as np

from ridgeline.model.checkpoint.quantised.logical import Decoder, Found, Logical
from ridgeline.model.checkpoint.quantised.parts import FLOATS, Parts
from ridgeline.model.checkpoint.quantised.settings import Settings
from ridgeline.types import ByteArray, Float32Array

STORAGE = "F8_E4M3"
ACTIVATION_SCALES = (
    "input_scale", "input_zero_point", "input_scale_ub", "activation_scale", "output_scale",
    "output_zero_point", "q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point",
)  # fmt: skip


def read(parts: Parts, settings: Settings) -> Found:
    """Of the methods "fp8" and "fbgemm_fp8"."""
    settings.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    block = settings.block("weight_block_size")
    tensors = {}
    for stem in parts.stems(".weight"):
        if parts.info(f"{stem}.weight").storage == STORAGE:
            plain = f"{stem}.weight_scale"
            scales = plain if plain in parts else f"{stem}.weight_scale_inv"
            tensors[f"{stem}.weight"] = scaled_floats(parts, f"{stem}.weight", scales, block)
    return Found(tensors, activation_scales(parts))


def activation_scales(parts: Parts) -> set[str]:
    return {f"{stem}.{name}" for name in ACTIVATION_SCALES for stem in parts.stems(f".{name}")}


def scaled_floats(parts: Parts, codes: str, scales: str, block: tuple[int, int] | None) -> Logical:
    """The logical tensor of FP8 codes, with scales of `block`, or of the tensor or its rows where None."""
    shape = parts.check(codes, (STORAGE,))
    rows, cols = shape
    accepted: list[tuple[int, ...]] = [(), (1,), (1, 1), (rows,), (rows, 1)]
    if block is not None:
        accepted = [(-(-rows // block[0]), -(-cols // block[1]))]
    seen = parts.check(scales, FLOATS, *accepted)
    if block is None:
        block = (rows, cols) if seen in accepted[:3] and rows > 1 else (1, cols)

    def start() -> Decoder:
        by_block = parts.floats(scales).reshape(-(-rows // block[0]), -(-cols // block[1]))

        def decode(selected: slice) -> ByteArray:
            values: Float32Array = _E4M3[parts.array(codes)[selected]]
            bands = by_block[np.arange(selected.start, selected.stop) // block[0]]
            with np.errstate(over="ignore", invalid="ignore"):
                values *= bands[:, np.arange(cols) // block[1]]
            return np.ascontiguousarray(values, "<f4").view(np.uint8)

        return decode

    return Logical(shape, "F32", (codes, scales), start)


def _e4m3() -> Float32Array:
    """Values of the 256 codes: a sign, four bits of exponent less 7, three bits of fraction."""
    code = np.arange(128)
    exponent, fraction = code >> 3, code & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    values[127] = np.nan
    return np.concatenate((values, -values)).astype(np.float32)


_E4M3 = _e4m3()
