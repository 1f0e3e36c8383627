"""A matrix of a checkpoint, read some rows at a time in the storage of its format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import Lock

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.family import Source
from ridgeline.precision.formats import Format, native_storages
from ridgeline.precision.quantise import quantise_tensor
from ridgeline.precision.recode import can_recode, recode
from ridgeline.precision.storage import Storage, Tensor, check_finite, float32_tensor


class MatrixReader:
    """Several threads may read at once; what `Weights.matrix` gives whole, this gives in parts, bit for bit.

    `shape` is the weight's, (rows, cols) or (experts, rows, cols); `storage` is that of the parts. Where a
    file's tensor has to be decoded or transposed whole, that is done at the first reading and kept until
    `close`; otherwise no more is in memory than the parts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: Source,
        shape: tuple[int, ...],
        fmt: Format,
        device: str,
        storage: Storage,
    ) -> None:
        self.shape, self.storage = shape, storage
        self._checkpoint, self._source, self._format = checkpoint, source, fmt
        self._native = native_storages(fmt, device)
        self._lock = Lock()
        self._entries: Sequence[Tensor] = ()
        self._mixed = self._recodes = False

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def experts(self) -> int:
        """Matrices that lie one after the other; 1 for a plain one."""
        return math.prod(self.shape[:-2])

    @property
    def converts(self) -> bool:
        """Whether parts are computed; otherwise they are rows of the file, of which some may be reordered."""
        stored = {self._checkpoint.tensors[tensor].storage for tensor in self._source.tensors}
        return self._source.decodes or stored != {self.storage.name}

    def read(self, expert: int, rows: slice) -> Tensor:
        """Rows of one expert. What is converted has been checked for infinities, what is not has not been:
        whoever walks over it anyway does that, and calls `check`.

        Raises CheckpointError for values that cannot be converted.
        """
        entry = self._prepared()[expert]
        part = self._source.rows_of(entry, rows)
        if self._mixed:
            part = float32_tensor(part.dequantise())
        if part.storage.name in self._native:
            return part
        self.check(part)
        recoded = recode(part, self._format) if self._recodes else None
        return recoded or quantise_tensor(part, self._format, self._source.tensors[0])

    def check(self, part: Tensor) -> None:
        """Raise CheckpointError if a part of this matrix holds what is not finite."""
        check_finite(part, self._source.tensors[0])

    def prefetch(self, expert: int, rows: slice) -> None:
        """Start to bring from the disk what `read` will want."""
        for tensor, stored in self._stored(expert, rows):
            self._checkpoint.prefetch(tensor, stored)

    def release(self, expert: int, rows: slice) -> None:
        """These rows have been packed: their pages of the file need not stay in memory."""
        for tensor, stored in self._stored(expert, rows):
            self._checkpoint.release(tensor, stored)

    def close(self) -> None:
        """All rows have been packed."""
        self._entries = ()
        for tensor in self._source.tensors:
            self._checkpoint.release(tensor)

    def _prepared(self) -> Sequence[Tensor]:
        with self._lock:
            if not self._entries:
                tensors = [self._checkpoint.tensor(tensor) for tensor in self._source.tensors]
                self._mixed = len({tensor.storage.name for tensor in tensors}) > 1
                entries = self._source.entries(tensors)
                if not self._mixed and entries[0].storage.name not in self._native:
                    self._recodes = all(can_recode(entry, self._format) for entry in entries)
                self._entries = entries
            return self._entries

    def _stored(self, expert: int, rows: slice) -> list[tuple[str, slice]]:
        """The rows of the file's tensors that rows of an expert lie in; none where they are scattered."""
        source = self._source
        if source.transposed or source.interleaved_heads or source.row_groups > 1:
            return []
        first = source.rows[0] if source.rows else 0
        tensor = source.tensors[expert if len(source.tensors) > 1 else 0]
        if source.experts is not None and len(source.tensors) == 1:
            first += expert * (source.fused_rows or self.rows)
        return [(tensor, slice(first + rows.start, first + rows.stop))]
