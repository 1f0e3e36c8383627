"""bitsandbytes: NF4 and FP4 in 4 bits, and int8 with a scale for each output.

4 bits: X.weight, uint8, holds two codes to a byte, the first in its high half, of the matrix row by row.
X.weight.quant_map is the 16 values that codes stand for, X.weight.absmax the scale of each `blocksize` values
in a row, and X.weight.quant_state.bitsandbytes__nf4 (or __fp4) JSON in bytes with the sizes. With double
quantisation absmax is bytes: absmax = nested_quant_map[byte] * nested_absmax of its block + nested_offset.

8 bits: X.weight, int8, and X.SCB, float32 (outputs): value = code * SCB / 127.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from ridgeline.model.checkpoint.files import parse_json_object
from ridgeline.model.checkpoint.quantised.compressed import offset_codes
from ridgeline.model.checkpoint.quantised.grid import Grid, in_order, on_grid
from ridgeline.model.checkpoint.quantised.logical import Decoder, Found, Logical
from ridgeline.model.checkpoint.quantised.parts import FLOATS, Parts
from ridgeline.model.checkpoint.quantised.settings import Settings
from ridgeline.types import ByteArray, Float32Array

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_STATE_LIMIT_BYTES = 1 << 14
_LARGEST_OFFSET = 1e30


def read(parts: Parts, settings: Settings) -> Found:
    tensors, hidden = {}, set()
    for kind in _KINDS:
        for name in parts.stems(_STATE + kind):
            tensors[name] = _four_bits(parts, name, kind)
    for stem in parts.stems(".SCB"):
        tensors[f"{stem}.weight"] = _eight_bits(parts, stem)
        layout = f"{stem}.weight_format"
        if layout in parts:
            parts.check(layout, ("U8",), (), (1,))
            if parts.content(layout).any():
                parts.refuse(layout, "0, for rows in order")
            hidden.add(layout)
    return Found(tensors, hidden)


def _eight_bits(parts: Parts, stem: str) -> Logical:
    codes, scales = f"{stem}.weight", f"{stem}.SCB"
    outputs, inputs = parts.check(codes, ("I8",))
    parts.check(scales, FLOATS, (outputs,))

    def read_scales() -> Float32Array:
        return (parts.floats(scales) / np.float32(127)).reshape(outputs, 1)

    grid = Grid(
        (outputs, inputs), 8, partial(offset_codes, parts, codes), read_scales, in_order(inputs, inputs)
    )
    return on_grid(grid, (codes, scales))


def _state(parts: Parts, name: str, kind: str) -> Settings:
    """The JSON beside a weight."""
    state = f"{name}{_STATE}{kind}"
    info = parts.info(state)
    if info.nbytes > _STATE_LIMIT_BYTES:
        parts.refuse(state, f"up to {_STATE_LIMIT_BYTES} bytes")
    parts.check(state, ("U8",), (info.nbytes,))
    values = parse_json_object(parts.content(state).tobytes(), parts.path, f"tensor {state!r}")
    return Settings(parts.path, f"tensor {state!r}", values)


def _four_bits(parts: Parts, name: str, kind: str) -> Logical:
    state = _state(parts, name, kind)
    state.choice("quant_type", (kind,))
    shape, size = state.block("shape"), state.size("blocksize")
    if shape is None or size < 1:
        key = "shape" if shape is None else "blocksize"
        raise state.error(key, "two whole numbers" if shape is None else "a whole number above zero")
    count = math.prod(shape)
    packed = -(-count // 2)
    parts.check(name, ("U8",), (packed, 1), (1, packed), (packed,))
    absmax, table = f"{name}.absmax", f"{name}.quant_map"
    nested, nested_table = f"{name}.nested_absmax", f"{name}.nested_quant_map"
    blocks = -(-count // size)
    parts.check(table, ("F32",), (16,))
    names = [name, absmax, table, f"{name}{_STATE}{kind}"]
    offset, nested_size = 0.0, 1
    doubled = nested in parts
    parts.check(absmax, ("U8",) if doubled else ("F32",), (blocks,))
    if doubled:
        offset, nested_size = _nesting(state)
        parts.check(nested, ("F32",), (-(-blocks // nested_size),))
        parts.check(nested_table, ("F32",), (256,))
        names += [nested, nested_table]

    def read_scales() -> Float32Array:
        if not doubled:
            return parts.floats(absmax)
        scales: Float32Array = parts.floats(nested_table)[parts.array(absmax)]
        scales *= parts.floats(nested)[np.arange(blocks) // nested_size]
        scales += np.float32(offset)
        return scales

    def start() -> Decoder:
        scales, values = read_scales(), parts.floats(table)
        return partial(_decode_four_bits, parts, name, values, scales, (shape[1], size))

    return Logical(shape, "F32", tuple(names), start)


def _nesting(state: Settings) -> tuple[float, int]:
    offset, size = state.values.get("nested_offset"), state.size("nested_blocksize")
    if not isinstance(offset, int | float) or not abs(offset) <= _LARGEST_OFFSET:
        raise state.error("nested_offset", "a finite number")
    if size < 1:
        raise state.error("nested_blocksize", "a whole number above zero")
    return float(offset), size


def _decode_four_bits(
    parts: Parts, name: str, values: Float32Array, scales: Float32Array, sizes: tuple[int, int], rows: slice
) -> ByteArray:
    """Some rows; `sizes` are the values of a row and of a block, neither a multiple of the other."""
    cols, size = sizes
    start, stop = rows.start * cols, rows.stop * cols
    packed = parts.content(name)[start // 2 : -(-stop // 2)]
    codes = np.stack((packed >> np.uint8(4), packed & np.uint8(15)), axis=1).reshape(-1)
    codes = codes[start % 2 : start % 2 + stop - start]
    with np.errstate(over="ignore", invalid="ignore"):
        decoded: Float32Array = values[codes] * scales[np.arange(start, stop) // size]
    return decoded.astype("<f4", copy=False).reshape(-1, cols).view(np.uint8)
