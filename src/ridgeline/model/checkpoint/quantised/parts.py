"""The tensors of a file by their own types: what a scheme checks and reads its parts with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.model.checkpoint.files import MappedCheckpoint, TensorInfo, shown
from ridgeline.types import ByteArray, CheckpointError, Float32Array

FLOATS = ("F16", "BF16", "F32")
_TYPES = {"I8": "i1", "U8": "u1", "I32": "<i4", "I64": "<i8", "F8_E4M3": "u1"}


class Parts:
    """Read access to the files' own tensors. All errors are CheckpointErrors that name the tensor."""

    def __init__(self, files: MappedCheckpoint) -> None:
        self._files = files
        self.path: Path = files.path
        self.metadata: Mapping[str, Any] = files.metadata

    def __contains__(self, name: str) -> bool:
        return name in self._files.tensors

    def info(self, name: str) -> TensorInfo:
        return self._files.tensors[name]

    def stems(self, suffix: str) -> list[str]:
        """What stands before `suffix` in the names that end in it."""
        return [name.removesuffix(suffix) for name in self._files.tensors if name.endswith(suffix)]

    def check(self, name: str, storages: tuple[str, ...], *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, which must be one of `shapes`; none given: any matrix."""
        info = self._files.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} is missing, which belongs to a quantised weight"
            )
        if info.storage not in storages:
            self.refuse(name, " or ".join(storages))
        if info.shape not in shapes if shapes else len(info.shape) != 2:
            self.refuse(name, " or ".join(map(str, shapes)) or "a matrix")
        return info.shape

    def refuse(self, name: str, accepted: str) -> None:
        """Raise for what the file says about a tensor that it has."""
        info = self._files.tensors[name]
        raise CheckpointError(
            f"{self.path}: tensor {shown(name)} is {shown(info.storage)} of shape {info.shape}; "
            f"accepted: {accepted}"
        )

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view in the file of a tensor of integers, or of the codes of FP8."""
        info = self._files.tensors[name]
        return self._files.content(name).view(_TYPES[info.storage]).reshape(info.shape)

    def floats(self, name: str) -> Float32Array:
        """A tensor of floating-point numbers, in memory of its own."""
        return self._files.tensor(name).dequantise()

    def content(self, name: str) -> ByteArray:
        return self._files.content(name)

    def release(self, name: str) -> None:
        self._files.release(name)


def unpack(words: NDArray[np.int32], bits: int) -> ByteArray:
    """Codes of `bits` bits that follow one another from the lowest bit of the first word of a row on.

    (rows, words) to uint8 (rows, words * 32 // bits). A code may straddle two words.
    """
    packed = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if 8 % bits:
        single = np.unpackbits(packed, axis=1, bitorder="little")
        count = single.shape[1] // bits
        places = np.uint8(1) << np.arange(bits, dtype=np.uint8)
        codes: ByteArray = (single[:, : count * bits].reshape(len(words), count, bits) * places).sum(
            axis=2, dtype=np.uint8
        )
        return codes
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape, 8 // bits), np.uint8)
    for place in range(8 // bits):
        np.right_shift(packed, np.uint8(bits * place), out=codes[..., place])
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(len(words), -1)
