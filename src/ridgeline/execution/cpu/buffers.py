"""The memory of a value: padded rows of float32 or bfloat16, or of A8 or routes as the kernels read them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ridgeline.model.program import Value
from ridgeline.native import a8_row_bytes, allocate, routes_size
from ridgeline.types import ByteArray, Float32Array, Int32Array

Buffer = Float32Array | ByteArray | NDArray[np.uint16] | Int32Array
_LINE_BYTES = 64  # rows are padded to whole vectors


def value_row_bytes(value: Value) -> int:
    """Bytes of one row of a value in its buffer, of one expert if it has several; values that live elsewhere
    take none."""
    if value.kind == "A8-g32":
        return a8_row_bytes(value.width)
    if value.kind == "bf16":
        return 2 * value.width
    return 4 * value.width if value.kind in ("f32", "routes", "logits", "drawn") else 0


def new_buffer(value: Value, max_rows: int) -> Buffer:
    """Room for a value of `max_rows` rows."""
    if value.kind == "routes":
        return allocate(4 * routes_size(max_rows, value.width)).view(np.int32)
    max_rows *= value.experts
    if value.kind == "A8-g32":
        row_bytes = a8_row_bytes(value.width)
        return allocate(max_rows * row_bytes).reshape(max_rows, row_bytes)
    row_bytes = -(-value_row_bytes(value) // _LINE_BYTES) * _LINE_BYTES
    memory = allocate(max_rows * row_bytes)
    if value.kind == "bf16":
        return memory.view(np.uint16).reshape(max_rows, row_bytes // 2)
    return memory.view(np.float32).reshape(max_rows, row_bytes // 4)
