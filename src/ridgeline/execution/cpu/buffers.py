"""Where the values of a lowered program live: buffers that are reused as soon as nobody reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ridgeline.execution.cpu.launches import CpuLaunch
from ridgeline.execution.lowering import borders
from ridgeline.model.program import Program, Value
from ridgeline.native import a8_row_bytes, allocate
from ridgeline.types import ByteArray, Float32Array

Buffer = Float32Array | ByteArray
_LANES = 16  # float32 rows are padded to whole vectors


def value_row_bytes(value: Value) -> int:
    """Bytes of one row of a value in its buffer; values that live elsewhere take none."""
    if value.kind == "A8-g32":
        return a8_row_bytes(value.width)
    return 4 * value.width if value.kind in ("f32", "logits", "drawn") else 0


def assign_buffers(
    program: Program, launches: Sequence[CpuLaunch], max_rows: int
) -> dict[str, Buffer | None]:
    """A buffer for each value that crosses launches; None is the step's own logits array.

    A value that overwrites another has the other's buffer. Buffers are shared by values whose lives do
    not overlap, so their number does not grow with the layers.
    """
    crossing = borders(program, launches)
    last_read = {v.name: i for i, border in enumerate(crossing) for v in border.reads}
    buffers: dict[str, Buffer | None] = {}
    free: dict[tuple[str, int], list[Buffer]] = {}
    for index, (launch, border) in enumerate(zip(launches, crossing, strict=True)):
        inherited = {new.name: old.name for new, old in launch.overwrites}
        for value in border.writes:
            if value.kind in ("kv", "drawn"):
                continue
            if value.kind == "logits":
                buffers[value.name] = None
            elif value.name in inherited:
                buffers[value.name] = buffers[inherited[value.name]]
            else:
                pool = free.get((value.kind, value.width))
                buffers[value.name] = pool.pop() if pool else _new_buffer(value, max_rows)
        for value in border.reads:
            buffer = buffers.get(value.name)
            if last_read[value.name] == index and buffer is not None and value.name not in inherited.values():
                free.setdefault((value.kind, value.width), []).append(buffer)
    return buffers


def _new_buffer(value: Value, max_rows: int) -> Buffer:
    if value.kind == "A8-g32":
        row_bytes = a8_row_bytes(value.width)
        return allocate(max_rows * row_bytes).reshape(max_rows, row_bytes)
    stride = -(-value.width // _LANES) * _LANES
    return allocate(max_rows * stride * 4).view(np.float32).reshape(max_rows, stride)
