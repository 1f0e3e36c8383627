"""What every checkpoint offers, and the mapped files and small files under it.

Sizes and offsets come from strangers: everything here is checked before it is used, and whatever goes wrong
while a checkpoint is opened leaves as a CheckpointError of one line.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from ridgeline.precision.storage import STORAGES, Storage, Tensor
from ridgeline.types import ByteArray, CheckpointError

SIDECAR_LIMIT_BYTES = 256 << 20
_READ_AHEAD_BYTES = 128 << 10
# A file changed this recently could change again without its times moving.
_SETTLED_S = 2.0
Kind = Literal["gguf", "safetensors"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file says about a tensor. `shape` is in NumPy order; `storage` may be one that we do not read,
    which only `Checkpoint.tensor` refuses."""

    name: str
    shape: tuple[int, ...]
    storage: str
    nbytes: int


class Checkpoint(Protocol):
    """An open model: metadata and tensors, nothing of which has been read into memory yet.

    `metadata` is the GGUF's key-values as Python values, or the dict of `config.json`.
    """

    @property
    def path(self) -> Path: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def tensor(self, name: str) -> Tensor:
        """A read-only view of the mapped file. CheckpointError when it is missing or of a storage that we
        do not read."""
        ...

    def prefetch(self, name: str, rows: slice) -> None:
        """Start to bring rows of a tensor from the disk, where they are read from there one by one."""
        ...

    def release(self, name: str, rows: slice | None = None) -> None:
        """Let the system take back the memory that reading this tensor, or some rows, filled; it stays
        readable."""
        ...

    def identity(self) -> bytes | None:
        """What tells these files from all others, and from themselves after a change; None where they
        changed so recently that the next change might not show. It is made of their sizes, inodes and times
        of change, their headers and the model's other metadata, and so takes no reading of tensors."""
        ...

    def sidecar(self, name: str) -> bytes | None:
        """The content of a file beside the weights, such as `tokenizer.json`; None when there is none.
        A GGUF has no sidecars."""
        ...

    def close(self) -> None:
        """Views that are still in use keep their mapping until they go; nothing else can be asked for."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class MappedFile:
    """A regular file, mapped read-only. Owns the mapping and its descriptor.

    Raises CheckpointError when the file is missing, empty, unreadable or not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or not status.st_size:
                    seen = "empty" if stat.S_ISREG(status.st_mode) else "not a file"
                    raise CheckpointError(f"{path} is {seen}; accepted: a model file")
                self.size_bytes = status.st_size
                self.status = status
                self.map = mmap.mmap(descriptor, self.size_bytes, access=mmap.ACCESS_READ)
            finally:
                os.close(descriptor)

    def view(self, offset: int, nbytes: int) -> ByteArray:
        """uint8 (nbytes,), read-only, over the mapping."""
        if self.map.closed:
            raise CheckpointError(f"{self.path} is closed; accepted: reads before it is closed")
        return np.frombuffer(self.map, np.uint8, nbytes, offset)

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Have the system read these bytes while something else is done."""
        if hasattr(mmap, "MADV_WILLNEED") and not self.map.closed:
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            # Of one call Linux reads no more than its read-ahead window, which is seldom smaller than this.
            for at in range(start, offset + nbytes, _READ_AHEAD_BYTES):
                self.map.madvise(mmap.MADV_WILLNEED, at, min(_READ_AHEAD_BYTES, offset + nbytes - at))

    def identity(self, header_bytes: int) -> bytes | None:
        """What `Checkpoint.identity` says of one file that begins with such a header.

        A file that is written in place changes its time of change, which nobody sets by hand, whatever its
        time of writing is set to; one that takes its place is another inode.
        """
        status = self.status
        if time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED_S:
            return None
        stated = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
        return hashlib.sha256(repr(stated).encode() + self.map[:header_bytes]).digest()

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the resident pages that lie wholly within these bytes."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start and hasattr(mmap, "MADV_DONTNEED") and not self.map.closed:
            self.map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        try:
            self.map.close()
        except BufferError:
            # A tensor is still in use: its array owns the mapping from here on and unmaps it when it goes.
            self.map = _closed_map()


def _closed_map() -> mmap.mmap:
    empty = mmap.mmap(-1, 1)
    empty.close()
    return empty


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: `info.nbytes` bytes from `offset` of `file`."""

    info: TensorInfo
    file: MappedFile
    offset: int


def held_storage(path: Path, info: TensorInfo) -> Storage:
    """How a file stores a tensor. Raises CheckpointError for a type that is not read."""
    storage = STORAGES.get(info.storage)
    if storage is None:
        raise CheckpointError(
            f"{path}: tensor {shown(info.name)} is stored as {shown(info.storage)}; "
            f"accepted: {', '.join(STORAGES)}"
        )
    return storage


class MappedCheckpoint:
    """The checkpoint of both file kinds: metadata, and tensors as views of mapped files that it owns."""

    def __init__(
        self,
        path: Path,
        kind: Kind,
        metadata: Mapping[str, Any],
        entries: Mapping[str, Entry],
        files: Iterable[MappedFile],
        read_sidecar: Callable[[str], bytes | None] = lambda name: None,
    ) -> None:
        self.path: Path = path
        self.kind: Kind = kind
        self.metadata = metadata
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, entry in entries.items()}
        self.sidecar = read_sidecar
        self._entries = entries
        self._files = tuple(files)

    def tensor(self, name: str) -> Tensor:
        entry = self._entry(name)
        info = entry.info
        storage = held_storage(self.path, info)
        row_bytes = storage.row_bytes(info.shape[-1]) if info.shape else info.nbytes
        return Tensor(storage, info.shape, entry.file.view(entry.offset, info.nbytes).reshape(-1, row_bytes))

    def content(self, name: str) -> ByteArray:
        """uint8 (nbytes,): the bytes of a tensor of any type, a read-only view of the mapped file."""
        entry = self._entry(name)
        return entry.file.view(entry.offset, entry.info.nbytes)

    def place(self, name: str) -> tuple[Path, int, int]:
        """The file that a tensor lies in, and its offset and bytes there."""
        entry = self._entry(name)
        return entry.file.path, entry.offset, entry.info.nbytes

    def prefetch(self, name: str, rows: slice) -> None:
        entry = self._entry(name)
        entry.file.prefetch(*_extent(entry, rows))

    def release(self, name: str, rows: slice | None = None) -> None:
        entry = self._entry(name)
        entry.file.release(*_extent(entry, rows))

    def identity(self) -> bytes | None:
        found = hashlib.sha256()
        for file in self._files:
            offsets = [entry.offset for entry in self._entries.values() if entry.file is file]
            identity = file.identity(min(offsets, default=file.size_bytes))
            if identity is None:
                return None
            found.update(identity)
        if self.kind != "gguf":  # whose metadata is in its header
            found.update(json.dumps(self.metadata, sort_keys=True).encode())
        return found.digest()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.path} has no tensor {shown(name)}; it has {len(self._entries)} others"
            )
        return entry

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _extent(entry: Entry, rows: slice | None) -> tuple[int, int]:
    """Where some rows of a tensor lie in its file, or all: their offset and bytes."""
    info = entry.info
    if rows is None or not info.shape:
        return entry.offset, info.nbytes
    row_bytes = info.nbytes // math.prod(info.shape[:-1])
    return entry.offset + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes


def check_layout(path: Path, entries: Iterable[Entry]) -> list[Entry]:
    """The entries of one file in the order of their bytes. CheckpointError when two overlap."""
    ordered = sorted(entries, key=lambda entry: entry.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.info.nbytes > after.offset:
            raise CheckpointError(
                f"{path}: tensors {shown(before.info.name)} and {shown(after.info.name)} overlap; "
                "accepted: tensors that lie apart"
            )
    return ordered


def shown(text: object) -> str:
    """Something from a file as it may stand in a one-line message: quoted, escaped, not too long."""
    quoted = repr(text[:200] if isinstance(text, str | bytes) else text)
    return quoted if len(quoted) <= 100 else f"{quoted[:96]}...{quoted[0]}"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or missing file makes the code inside raise into a CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; accepted: a model file or folder") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None
    except MemoryError:
        raise CheckpointError(f"{path} asks for more memory than there is") from None
    except (ValueError, OverflowError, RuntimeError, struct.error) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path} is damaged: {reason}") from None


def read_file(path: Path, limit_bytes: int) -> bytes:
    """A whole regular file of at most `limit_bytes`. CheckpointError otherwise, or when it is missing."""
    with reading(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a file; accepted: a regular file")
        if status.st_size > limit_bytes:
            raise CheckpointError(f"{path} has {status.st_size} bytes; accepted: up to {limit_bytes}")
        with path.open("rb") as file:
            return file.read(status.st_size)


def parse_json_object(content: bytes, path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `content`, UTF-8, without duplicate keys; `what` names it in the CheckpointError."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: {what} is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: {what} is nested too deeply") from None
    except MemoryError:
        raise CheckpointError(f"{path}: {what} asks for more memory than there is") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is a JSON {type(value).__name__}; accepted: an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {shown(twice)} stands twice")
    return found


def contained(folder: Path, name: str) -> Path:
    """`folder / name`, whose target must lie inside the folder, or in the blobs of the same hub repository.

    Hugging Face's cache keeps `models--x/snapshots/<revision>/<file>` as links into `models--x/blobs`.
    Raises CheckpointError for absolute names, `..`, unprintable names and links that lead out.
    """
    with reading(folder):
        root = folder.resolve()
        target = (root / name).resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    plain = Path(os.path.normpath(root / name)).is_relative_to(root) and not Path(name).is_absolute()
    if (
        not name.isprintable()
        or not name
        or not plain
        or not any(target.is_relative_to(place) for place in allowed)
    ):
        raise CheckpointError(
            f"{folder}: file name {shown(name)} leads out of the folder; accepted: files in it"
        )
    return folder / name


def read_sidecar(folder: Path, name: str) -> bytes | None:
    """A file of the model's folder; None when it is missing. CheckpointError when it is not a file inside."""
    path = contained(folder, name)
    return read_file(path, SIDECAR_LIMIT_BYTES) if path.exists() else None
