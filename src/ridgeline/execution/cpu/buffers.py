"""The memory of a value: padded rows of float32 or bfloat16, or of A8 as the kernels read it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ridgeline.model.program import Value
from ridgeline.native import a8_row_bytes, allocate
from ridgeline.types import ByteArray, Float32Array

Buffer = Float32Array | ByteArray | NDArray[np.uint16]
_LINE_BYTES = 64  # rows are padded to whole vectors


def value_row_bytes(value: Value) -> int:
    """Bytes of one row of a value in its buffer; values that live elsewhere take none."""
    if value.kind == "A8-g32":
        return a8_row_bytes(value.width)
    if value.kind == "bf16":
        return 2 * value.width
    return 4 * value.width if value.kind in ("f32", "logits", "drawn") else 0


def new_buffer(value: Value, max_rows: int) -> Buffer:
    """Room for `max_rows` rows of a value."""
    if value.kind == "A8-g32":
        row_bytes = a8_row_bytes(value.width)
        return allocate(max_rows * row_bytes).reshape(max_rows, row_bytes)
    row_bytes = -(-value_row_bytes(value) // _LINE_BYTES) * _LINE_BYTES
    memory = allocate(max_rows * row_bytes)
    if value.kind == "bf16":
        return memory.view(np.uint16).reshape(max_rows, row_bytes // 2)
    return memory.view(np.float32).reshape(max_rows, row_bytes // 4)
