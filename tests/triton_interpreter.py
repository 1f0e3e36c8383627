"""Make Triton's interpreter exact where it is not: rounding to bfloat16, and products of bfloat16 tiles.

On a machine without a GPU the kernels run in the interpreter, on tensors in ordinary memory. It keeps a
bfloat16 as a uint16, cuts off the lower half of a float32 instead of rounding it, and multiplies such
tiles as integers. Arithmetic on bfloat16 other than `tl.dot` is not mended: kernels widen first.
"""

from __future__ import annotations

import os
from typing import Any


def use_where_there_is_no_gpu() -> None:
    """Switch the interpreter on; must run before any kernel is imported."""
    import torch

    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    _mend()


def _mend() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot
    handle = interpreter.TensorHandle

    def widened(data: Any) -> Any:
        return (data.astype(np.uint32) << 16).view(np.float32)

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return handle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(widened(source.data), tl.float32)
        return plain_cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            product = np.matmul(widened(a.data), widened(b.data), dtype=np.float32)
            return handle((product + d.data).astype(d.data.dtype), d.dtype.scalar)
        return plain_dot(self, a, b, d, *rest)

    builder.cast_impl, builder.create_dot = cast, dot
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, source, target: self.cast_impl(source, target))
