"""From one storage to another without rounding, where the other one has the same values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ridgeline.precision.formats import Format
from ridgeline.precision.quantise import GROUP, storage_of
from ridgeline.precision.storage import Tensor, row_blocks
from ridgeline.types import Float32Array


def recode(tensor: Tensor, fmt: Format) -> Tensor | None:
    """`tensor` in the storage of `fmt` with the same values bit for bit, or None where that cannot be.

    It can where `fmt` has 8-bit weights, a value is a code times the scale of its block (`Storage.split`),
    and all scales are float16. That matters beyond speed: quantising codes that lie on a grid of 12 steps a
    second time shifts each of them by the same up to 4% of its value everywhere, which does not average out.
    """
    split, storage = tensor.storage.split, storage_of(fmt)
    if split is None or not can_recode(tensor, fmt):
        return None
    data = np.empty((tensor.row_count, storage.row_bytes(tensor.cols)), np.uint8)
    for rows in row_blocks(tensor.row_count, tensor.cols):
        codes, scales = split(tensor.data[rows])
        halves = _halves(scales)
        blocks = data[rows].reshape(*scales.shape[:2], -1, storage.block_bytes)
        blocks[..., :2] = halves.astype("<f2", copy=False).view(np.uint8)[:, :, None]
        blocks[..., 2:] = codes.view(np.uint8).reshape(*blocks.shape[:3], GROUP)
    return Tensor(storage, tensor.shape, data)


def can_recode(tensor: Tensor, fmt: Format) -> bool:
    """Whether `recode` gives a tensor. Where it does, it gives all parts of it too."""
    split = tensor.storage.split
    if fmt.weight_bits != 8 or split is None:
        return False
    return all(
        np.array_equal(_halves(scales), scales)
        for _, scales in (split(tensor.data[rows]) for rows in row_blocks(tensor.row_count, tensor.cols))
    )


def _halves(scales: Float32Array) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return scales.astype(np.float16)
