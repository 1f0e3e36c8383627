"""AWQ in the layout "gemm" of AutoAWQ, of 4 bits.

Where a layer has inputs I, outputs O and groups G, its weight lies in

- qweight, int32 (I, O / 8), and qzeros, int32 (G, O / 8): each word holds eight neighbouring outputs, from
  its lowest bits on those of places 0, 2, 4, 6, 1, 3, 5, 7;
- scales, floating (G, O).
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from ridgeline.model.checkpoint.quantised.grid import Grid, Int16Array, in_order, on_grid
from ridgeline.model.checkpoint.quantised.logical import Found, Logical
from ridgeline.model.checkpoint.quantised.parts import FLOATS, Parts
from ridgeline.model.checkpoint.quantised.settings import Settings
from ridgeline.types import ByteArray, Float32Array

_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
_SHIFTS = np.array([4 * _PLACES.index(place) for place in range(8)], np.uint32)


def read(parts: Parts, settings: Settings) -> Found:
    _either(settings, "bits", "w_bit").choice("bits", (4,))
    group = _either(settings, "group_size", "q_group_size").size("group_size", 128)
    settings.choice("version", ("gemm", "GEMM"), "gemm")
    settings.choice("backend", ("autoawq",), "autoawq")
    return Found({f"{stem}.weight": _layer(parts, stem, group) for stem in parts.stems(".qweight")})


def _either(settings: Settings, key: str, older: str) -> Settings:
    """The settings with what stands under the name that AutoAWQ's own file gives a setting."""
    values = settings.values
    if values.get(key) is None and values.get(older) is not None:
        return Settings(settings.path, settings.where, {**values, key: values[older]})
    return settings


def _layer(parts: Parts, stem: str, group: int) -> Logical:
    codes, zeros, scales = (f"{stem}.{part}" for part in ("qweight", "qzeros", "scales"))
    inputs, words = parts.check(codes, ("I32",))
    group = inputs if group == -1 else group
    groups = -(-inputs // group)
    parts.check(zeros, ("I32",), (groups, words))
    parts.check(scales, FLOATS, (groups, words * 8))

    def read_codes(rows: slice) -> ByteArray:
        first = rows.start // 8
        unpacked = _unpack(parts.array(codes)[:, first : -(-rows.stop // 8)])
        return unpacked[rows.start - 8 * first : rows.stop - 8 * first]

    grid = Grid(
        (words * 8, inputs),
        4,
        read_codes,
        partial(_scales, parts, scales),
        in_order(inputs, group),
        partial(_zeros, parts, zeros),
    )
    return on_grid(grid, (codes, zeros, scales))


def _unpack(words: NDArray[np.int32]) -> ByteArray:
    """(rows, words) to uint8 (words * 8, rows)."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    codes = (turned[:, None, :] >> _SHIFTS[:, None]).astype(np.uint8)
    codes &= np.uint8(15)
    return codes.reshape(-1, len(words))


def _scales(parts: Parts, name: str) -> Float32Array:
    return np.ascontiguousarray(parts.floats(name).T)


def _zeros(parts: Parts, name: str) -> Int16Array:
    return _unpack(parts.array(name)).astype(np.int16)
