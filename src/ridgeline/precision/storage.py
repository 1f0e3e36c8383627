"""How numbers lie in model files: the storages, and a tensor as the bytes of one of them.

A block storage packs `block_values` neighbouring values of a row into `block_bytes` bytes; a row is a whole
number of blocks. All fields are little-endian. The block layouts are those of ggml, and stand with the
functions that decode them in `ridgeline.precision.blocks`; a new storage is a row there, with its function
that decodes and its function that finds the scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.precision.blocks.groups import GROUPS
from ridgeline.precision.blocks.k_quants import K_QUANTS
from ridgeline.precision.blocks.layout import Storage
from ridgeline.precision.blocks.tables import TABLES
from ridgeline.precision.blocks.ternary import TERNARY
from ridgeline.types import ByteArray, CheckpointError, Float32Array

__all__ = ["STORAGES", "Storage", "Tensor", "check_finite", "float32_tensor", "row_blocks"]

# Values that are decoded or checked at a time, so that temporaries stay in the processor's cache.
BLOCK_VALUES_AT_A_TIME = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A weight in its storage: `shape` is in NumPy order, (outputs, inputs) for a linear layer.

    `data` is uint8 (rows, row_bytes), rows being all dimensions but the last (1 for a vector). It may be a
    read-only view of a mapped file, at any byte alignment. Rows whose length is not a whole number of blocks
    are padded with zeros, which `dequantise` leaves out; only our own quantiser makes such tensors.
    """

    storage: Storage
    shape: tuple[int, ...]
    data: ByteArray

    def __post_init__(self) -> None:
        expected = (self.row_count, self.storage.row_bytes(self.cols))
        if self.data.dtype != np.uint8 or self.data.shape != expected:
            raise ValueError(
                f"data of a {self.storage.name} tensor of shape {self.shape} is {self.data.dtype} "
                f"{self.data.shape}; accepted: uint8 {expected}"
            )

    @property
    def cols(self) -> int:
        """Values of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def row_count(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def dequantise(self) -> Float32Array:
        """The values, as a new float32 array of the tensor's shape."""
        out = np.empty((self.row_count, self.cols), np.float32)
        for rows in row_blocks(self.row_count, self.cols):
            out[rows] = self.storage.dequantise(self.data[rows])[:, : self.cols]
        return out.reshape(self.shape)

    def rows(self, selection: slice | NDArray[np.integer[Any]]) -> Tensor:
        """The selected entries of the first dimension, undecoded; a slice gives a view, indices a copy.

        Of a vector the entries are its values, so its storage must not be blocked (ValueError).
        """
        if len(self.shape) == 1:
            if self.storage.block_values != 1:
                raise ValueError(f"cannot select values of a {self.storage.name} vector")
            values = self.data.reshape(self.shape[0], self.storage.block_bytes)[selection]
            return Tensor(self.storage, (len(values),), values.reshape(1, -1))
        entries = self.data.reshape(self.shape[0], -1, self.data.shape[1])[selection]
        return Tensor(self.storage, (len(entries), *self.shape[1:]), entries.reshape(-1, self.data.shape[1]))


def row_blocks(rows: int, cols: int) -> list[slice]:
    """Slices that cover `rows`, each of about `BLOCK_VALUES_AT_A_TIME` values and at least one row."""
    step = max(1, BLOCK_VALUES_AT_A_TIME // max(cols, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def float32_tensor(values: Float32Array) -> Tensor:
    """An F32 tensor over `values`, without a copy when they are contiguous and little-endian."""
    shape = values.shape
    flat = np.ascontiguousarray(values, dtype="<f4").reshape(math.prod(shape[:-1]), -1)
    return Tensor(STORAGES["F32"], shape, flat.view(np.uint8))


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse infinities and NaN: in the scales of a quantised tensor, in all values of another one.

    Raises CheckpointError that names the tensor.
    """
    for rows in row_blocks(tensor.row_count, tensor.cols):
        if not np.isfinite(tensor.storage.scales(tensor.data[rows])).all():
            what = "value" if tensor.storage.block_values == 1 else "scale"
            raise CheckpointError(
                f"tensor {name!r} ({tensor.storage.name}) holds a {what} that is infinite or not a number; "
                "accepted: finite numbers"
            )


# ----------------------------------------------------------------------------------------- decoding


def _f32_values(data: ByteArray) -> Float32Array:
    return data.view("<f4").astype(np.float32, copy=False)


def _f16_values(data: ByteArray) -> NDArray[np.float16]:
    return data.view("<f2").astype(np.float16, copy=False)


def _bf16_values(data: ByteArray) -> Float32Array:
    bits = data.view("<u2").astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _dequantise_f16(data: ByteArray) -> Float32Array:
    return _f16_values(data).astype(np.float32)


STORAGES: dict[str, Storage] = {
    storage.name: storage
    for storage in (
        Storage("F32", 1, 4, _f32_values, _f32_values),
        Storage("F16", 1, 2, _dequantise_f16, _f16_values),
        Storage("BF16", 1, 2, _bf16_values, _bf16_values),
        *GROUPS,
        *K_QUANTS,
        *TABLES,
        *TERNARY,
    )
}
