"""From weights as model files hold them to matrices as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ridgeline.execution.cuda.arrays import GROUP, Packed
from ridgeline.precision.storage import Tensor, row_blocks
from ridgeline.types import ByteArray, CheckpointError

Float16Array = NDArray[np.float16]


def pack(tensor: Tensor, device: torch.device, name: str = "weight") -> Packed:
    """The tensor on `device`; all of its dimensions but the last are rows.

    Q4_0 and Q4_1 become 4 bits, Q8_0 8 bits, BF16 16 bits, F32 32 bits. Codes and scales keep their values;
    Q4_0's (code - 8) * d becomes code * d + m with m = -8 d. Works on a block of rows at a time, so that
    the host never holds a second copy of the tensor.

    Raises CheckpointError that names the tensor when -8 d leaves the range of float16, and ValueError for
    another storage.
    """
    layout = _LAYOUTS.get(tensor.storage.name)
    if layout is None:
        raise ValueError(f"tensor {name!r} is {tensor.storage.name}; accepted: {', '.join(_LAYOUTS)}")
    rows, units = tensor.row_count, tensor.storage.row_bytes(tensor.cols) // tensor.storage.block_bytes
    codes = torch.empty((rows, units * layout.codes), dtype=layout.dtype, device=device)
    scales = None
    if layout.fields:
        shape = (rows, units) if layout.fields == 1 else (rows, units, layout.fields)
        scales = torch.empty(shape, dtype=torch.float16, device=device)
    for block in row_blocks(rows, tensor.cols):
        try:
            code_bytes, fields = layout.split(tensor.data[block])
        except _RangeError as error:
            raise CheckpointError(
                f"tensor {name!r} ({tensor.storage.name}) holds the scale {error.scale:g}; "
                "accepted: at most 8188 in magnitude, so that 8 times as much fits float16"
            ) from None
        codes[block].copy_(torch.from_numpy(code_bytes).view(layout.dtype))
        if scales is not None and fields is not None:
            scales[block].copy_(torch.from_numpy(fields).view(scales[block].shape))
    return Packed(layout.bits, tensor.cols, codes, scales)


def dequantise(matrix: Packed) -> torch.Tensor:
    """What the codes stand for: float32 (rows, cols), float32(code * d + m) rounded once."""
    if matrix.scales is None:
        return matrix.codes.to(torch.float32)
    scales = matrix.scales.to(torch.float32)
    if matrix.bits == 8:
        codes = matrix.codes.to(torch.float32).view(*scales.shape, GROUP)
        values = codes * scales[..., None]
    else:
        pairs = torch.stack((matrix.codes & 15, matrix.codes >> 4), dim=-1)
        codes = pairs.to(torch.float32).view(*scales.shape[:2], GROUP)
        # The product has at most 15 bits, so that only the sum rounds.
        values = codes * scales[..., :1] + scales[..., 1:]
    return values.view(matrix.rows, -1)[:, : matrix.cols]


class _RangeError(Exception):
    def __init__(self, scale: float) -> None:
        self.scale = scale


def _plain(data: ByteArray) -> tuple[ByteArray, Float16Array | None]:
    return data.copy(), None  # a mapped file is read-only, which torch does not take


def _blocks(data: ByteArray, fields: int, block_bytes: int) -> tuple[ByteArray, Float16Array]:
    """Codes (rows, blocks, bytes), and the float16 fields in front of them (rows, blocks, fields)."""
    blocks = data.reshape(len(data), -1, block_bytes)
    scales = blocks[..., : 2 * fields].copy().view("<f2").astype(np.float16, copy=False)
    return blocks[..., 2 * fields :], scales


def _q8_0(data: ByteArray) -> tuple[ByteArray, Float16Array]:
    codes, scales = _blocks(data, 1, 34)
    return codes.reshape(len(data), -1).copy(), scales


def _q4_1(data: ByteArray) -> tuple[ByteArray, Float16Array]:
    codes, scales = _blocks(data, 2, 20)
    return _neighbours(codes), scales


def _q4_0(data: ByteArray) -> tuple[ByteArray, Float16Array]:
    codes, d = _blocks(data, 1, 18)
    with np.errstate(over="ignore"):
        m = d * np.float16(-8)  # exact but for overflow
    lost = np.isinf(m) & np.isfinite(d)
    if lost.any():
        raise _RangeError(float(d[lost][0]))
    return _neighbours(codes), np.concatenate((d, m), axis=-1)


def _neighbours(codes: ByteArray) -> ByteArray:
    """Bytes that pair values i and i + 16 of a group of 32, to bytes that pair values 2i and 2i + 1."""
    out = np.empty(codes.shape, np.uint8)
    low, high = codes & 15, codes >> 4
    out[..., :8] = low[..., 0::2] | low[..., 1::2] << 4
    out[..., 8:] = high[..., 0::2] | high[..., 1::2] << 4
    return out.reshape(len(codes), -1)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a storage goes: `codes` of `dtype` and `fields` float16 for each of its blocks.

    `split` takes uint8 (rows, row_bytes) and gives new arrays: the bytes of the codes, and the fields.
    """

    bits: Literal[4, 8, 16, 32]
    dtype: torch.dtype
    codes: int
    fields: int
    split: Callable[[ByteArray], tuple[ByteArray, Float16Array | None]]


_LAYOUTS = {
    "F32": _Layout(32, torch.float32, 1, 0, _plain),
    "BF16": _Layout(16, torch.bfloat16, 1, 0, _plain),
    "Q8_0": _Layout(8, torch.int8, 32, 1, _q8_0),
    "Q4_0": _Layout(4, torch.uint8, 16, 2, _q4_0),
    "Q4_1": _Layout(4, torch.uint8, 16, 2, _q4_1),
}
