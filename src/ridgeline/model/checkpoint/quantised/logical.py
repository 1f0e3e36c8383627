"""A quantised folder as a checkpoint of its logical tensors, put together when they are asked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ridgeline.model.checkpoint.files import Kind, MappedCheckpoint, TensorInfo, shown
from ridgeline.precision.storage import STORAGES, Tensor, row_blocks
from ridgeline.types import ByteArray, CheckpointError

Decoder = Callable[[slice], ByteArray]
"""Some rows of a tensor, in its storage: uint8 (rows, row_bytes)."""


@dataclass(frozen=True, slots=True)
class Logical:
    """A tensor that a file holds in `parts`, which are hidden behind it.

    `start` reads what all rows share, once for a reading, and gives the function that decodes rows.
    """

    shape: tuple[int, ...]
    storage: str
    parts: tuple[str, ...]
    start: Callable[[], Decoder]

    @property
    def row_count(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.row_count * STORAGES[self.storage].row_bytes(self.shape[-1])


@dataclass(frozen=True, slots=True)
class Found:
    """What a scheme makes of a file: logical tensors by name, and tensors that nobody should see."""

    tensors: Mapping[str, Logical]
    hidden: Collection[str] = ()


class QuantisedCheckpoint:
    """Owns the checkpoint of the files' own tensors; what is not quantised is handed through.

    `tensor` gives a logical tensor in memory of its own. `TensorInfo` speaks of what is handed over, not of
    what the files hold. `settings` are those of the scheme, of which some may lie in a file of their own.
    Raises CheckpointError when a logical tensor is there as a plain one too.
    """

    def __init__(self, files: MappedCheckpoint, found: Found, settings: str = "") -> None:
        self._files = files
        self._settings = settings
        self._logical = found.tensors
        hidden = {part for logical in found.tensors.values() for part in logical.parts} | set(found.hidden)
        tensors = {name: info for name, info in files.tensors.items() if name not in hidden}
        for name, logical in found.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{files.path}: tensor {shown(name)} stands beside its quantised parts, such as "
                    f"{shown(logical.parts[0])}; accepted: one of both"
                )
            tensors[name] = TensorInfo(name, logical.shape, logical.storage, logical.nbytes)
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.path: Path = files.path
        self.kind: Kind = files.kind
        self.metadata: Mapping[str, Any] = files.metadata
        self.sidecar = files.sidecar

    def tensor(self, name: str) -> Tensor:
        logical = self._logical.get(name)
        if logical is None:
            return self._files.tensor(name)
        storage = STORAGES[logical.storage]
        decode = logical.start()
        data = np.empty((logical.row_count, storage.row_bytes(logical.shape[-1])), np.uint8)
        for rows in row_blocks(logical.row_count, logical.shape[-1]):
            data[rows] = decode(rows)
        return Tensor(storage, logical.shape, data)

    def prefetch(self, name: str, rows: slice) -> None:
        if name not in self._logical:
            self._files.prefetch(name, rows)

    def release(self, name: str, rows: slice | None = None) -> None:
        logical = self._logical.get(name)
        if logical is None:
            self._files.release(name, rows)
        elif rows is None:  # all rows read the same parts
            for part in logical.parts:
                self._files.release(part)

    def identity(self) -> bytes | None:
        files = self._files.identity()
        return None if files is None else hashlib.sha256(files + self._settings.encode()).digest()

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
