"""Rows of rope tables that are looked up: positions come again with every sequence."""

from __future__ import annotations

import numpy as np

from ridgeline.execution.step_arrays import rope_tables
from ridgeline.model.spec import RopeSpec
from ridgeline.types import Float32Array, Int32Array

KEPT_POSITIONS = 2**15
"""Positions from 0 on whose rows are kept, once they were asked for: up to 16 MiB for heads of 128. Those of
later ones are made in each step."""
_AT_ONCE = 256


class RopeCache:
    """The rows of one spec's `rope_tables`. Not safe for concurrent use."""

    def __init__(self, spec: RopeSpec) -> None:
        self._spec = spec
        shape = (KEPT_POSITIONS, spec.dim // 2)  # memory that nobody writes to is not taken
        self._tables = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._made = 0

    def write(self, positions: Int32Array, buffers: tuple[Float32Array, Float32Array]) -> None:
        """Write cos and sin of the positions' angles, (positions, dim / 2), to two buffers' first rows."""
        places = positions.tolist()  # of a few rows, NumPy's minimum would take longer than all else here
        rows, end = len(places), max(places, default=-1) + 1
        if end > KEPT_POSITIONS or min(places, default=0) < 0:
            for buffer, made in zip(buffers, rope_tables(self._spec, positions), strict=True):
                buffer[:rows] = made
            return
        if end > self._made:
            self._make(end)
        for buffer, table in zip(buffers, self._tables, strict=True):
            table.take(positions, 0, buffer[:rows], "clip")  # that mode alone writes to its target directly

    def _make(self, end: int) -> None:
        end = min(-(-end // _AT_ONCE) * _AT_ONCE, KEPT_POSITIONS)
        positions = np.arange(self._made, end, dtype=np.int32)
        for table, made in zip(self._tables, rope_tables(self._spec, positions), strict=True):
            table[self._made : end] = made
        self._made = end
