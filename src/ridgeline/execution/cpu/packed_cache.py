"""Packed weights on disk, so that a model is not converted and packed at every start.

**What is kept.** One file for each key: a header with the key and a sum of each block, then the region of
`packing.Layout` as it lay in memory. The key is the SHA-256 of

- `Weights.identity`: size, inode, times of change and header of the checkpoint's files, and for each matrix
  its shape, format, storage and source;
- what packing and quantising make of a sample, in every storage and format that the model has. So a change
  of a layout or of a rule of rounding is another key, without anybody raising a number. Layouts are the same
  at every instruction-set level; if they were not, this would tell them apart too.

**Staleness.** Tensors are not read to know a checkpoint again. A file whose content changed while its size,
its inode, both of its times (to the nanosecond) and its header stayed would be taken for what it was: for
that one must set back the system's clock. Then the weights are those that were there before, whole and of
the right shapes. Files that changed within the last two seconds are not looked up.

**A private copy.** The file is read into memory of huge pages, by all threads, and not mapped: mapped files
have small pages, with which a decode step took 5% (1B parameters, Q4_K_M) to 10% (SmolLM2) more time. So
processes share the file in the system's page cache, and each has a copy to read from. A file that someone
cuts meanwhile is a short read, where a mapping would kill the process (SIGBUS).

**Damage.** Every byte is summed while it is copied. What is cut, damaged or another version counts as not
there, and is written again.

**When it pays** is `PackedCache.pays`. **Room.** At most `bound_bytes`, least recently used out first; a file
in use may go, since nobody has it open for longer than a start takes. Written under another name and renamed,
without waiting for the disk: after a crash the sums tell. Whatever goes wrong with the folder or the disk
costs time at the next start, nothing else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ridgeline.execution.cpu.packing import TILE_ROWS, Layout
from ridgeline.model.weights import Weights
from ridgeline.native import BLOCK_BYTES, Team, allocate, block_sums, pack_rows, packed_bytes, read_packed
from ridgeline.precision.formats import FORMATS
from ridgeline.precision.quantise import quantise_weight
from ridgeline.precision.storage import STORAGES
from ridgeline.resources.paths import DISK_SHARE, cache_dir, disk_share_bytes
from ridgeline.types import ByteArray

_MAGIC = b"RIDGEPAK"
_VERSION = 1
_HEADER = struct.Struct("<8sQ32sQQ")  # magic, version, key, bytes and blocks of the region; then the sums
_ALIGNMENT = 4096
_SUFFIX = ".packed"
_WRITE_BYTES = 8 << 20

_PAYS_S = 0.25
"""Time of one thread that a start must save to be worth a second copy of the weights on disk."""
_PACKED_S_PER_BYTE = 0.5e-9
_CONVERTED_S_PER_BYTE = 10e-9


@dataclass(frozen=True, slots=True)
class Usage:
    """What the cache takes of the disk, and may take; in bytes."""

    folder: Path
    files: int
    used_bytes: int
    bound_bytes: int


class PackedCache:
    """The packed weights under `folder`, by default in the user's cache."""

    def __init__(self, folder: Path | None = None, bound_bytes: int | None = None) -> None:
        self.folder = folder or cache_dir() / "packed"
        self._bound_bytes = bound_bytes

    @property
    def bound_bytes(self) -> int:
        """Most bytes that all files take together."""
        if self._bound_bytes is not None:
            return self._bound_bytes
        return disk_share_bytes(self.folder)

    def usage(self) -> Usage:
        sizes = [size for _, size, _ in self._files()]
        return Usage(self.folder, len(sizes), sum(sizes), self.bound_bytes)

    def pays(self, layout: Layout) -> bool:
        """Whether reading packed weights back saves enough time.

        Measured in time of one thread: packing what runs as it lies in the file takes 0.9 s for each GB, and
        reading it back 0.4 s; converting takes more, with the checks and decoding in NumPy. So weights
        that run as they are pay from 500 MB on, and converted ones from 25 MB on.
        """
        seconds = sum(
            place.nbytes * (_CONVERTED_S_PER_BYTE if place.reader.converts else _PACKED_S_PER_BYTE)
            for place in layout.places
        )
        return seconds >= _PAYS_S

    def load(self, key: bytes, region: ByteArray, team: Team) -> bool:
        """Fill the region from the file of that key. False when there is none, or it is not sound; then the
        region holds anything."""
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                sums = _read_header(file.fileno(), key, region.nbytes)
                start = _data_start(region.nbytes)
                if sums is None or not read_packed(file.fileno(), start, region, sums, team):
                    return False
                with suppress(OSError):  # a folder that cannot be written to
                    os.utime(file.fileno())
                return True
        except OSError:
            return False

    def store(self, key: bytes, region: ByteArray, team: Team) -> bool:
        """Keep a region for the next start; whether it was. It is not where it would take too much room, or
        another process is writing to the cache."""
        try:
            with self._alone() as alone:
                size = _data_start(region.nbytes) + region.nbytes
                if not alone or not self._make_room(size):
                    return False
                self._write(self._path(key), key, region, team)
                return True
        except OSError:
            return False

    def _path(self, key: bytes) -> Path:
        return self.folder / (key.hex() + _SUFFIX)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether this is the only process that writes to the cache. What others left half-written is
        removed: they have ended."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except (Timeout, NotImplementedError):  # the latter where the file system has no locks
            yield False
            return
        try:
            for partial in self.folder.glob(".partial-*"):
                partial.unlink(missing_ok=True)
            yield True
        finally:
            lock.release()

    def _make_room(self, size_bytes: int) -> bool:
        """Delete what was used least recently until a new file fits; whether it does."""
        bound = self.bound_bytes
        disk = shutil.disk_usage(self.folder)
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        spare = int(disk.free - disk.total * DISK_SHARE) if self._bound_bytes is None else disk.free
        if size_bytes > min(bound, spare + used):
            return False
        for _, size, path in files:
            if used + size_bytes <= bound and size_bytes <= spare:
                break
            path.unlink(missing_ok=True)
            used, spare = used - size, spare + size
        return True

    def _files(self) -> list[tuple[int, int, Path]]:
        """Time of last use, bytes and path of each file."""
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _write(self, path: Path, key: bytes, region: ByteArray, team: Team) -> None:
        descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=self.folder)
        partial = Path(name)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                _write_all(file.fileno(), _header(key, region, team))
                for start in range(0, region.nbytes, _WRITE_BYTES):
                    _write_all(file.fileno(), region[start : start + _WRITE_BYTES])
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def key_of(weights: Weights, layout: Layout) -> bytes | None:
    """The key of packed weights; None where the checkpoint is too new to be told from the next."""
    identity = weights.identity()
    if identity is None:
        return None
    storages = sorted({place.reader.storage.name for place in layout.places})
    converted = sorted({weights.formats[p.name].name for p in layout.places if p.reader.converts})
    found = hashlib.sha256(
        repr((_VERSION, layout.nbytes, [(p.name, p.start) for p in layout.places])).encode()
    )
    found.update(identity)
    for storage in storages:
        found.update(_packed_sample(storage))
    for fmt in converted:
        found.update(_quantised_sample(fmt))
    return found.digest()


_SAMPLE_ROWS, _SAMPLE_COLS = TILE_ROWS + 1, 512


def _packed_sample(storage: str) -> bytes:
    """What packing makes of bytes of all values."""
    shape = (_SAMPLE_ROWS, STORAGES[storage].row_bytes(_SAMPLE_COLS))
    data = (np.arange(shape[0] * shape[1], dtype=np.uint32) * np.uint32(2654435761) >> 23).astype(np.uint8)
    out = allocate(packed_bytes(storage, _SAMPLE_ROWS, _SAMPLE_COLS))
    pack_rows(data.reshape(shape), storage, _SAMPLE_COLS, Team(1), out)
    return storage.encode() + out.tobytes()


def _quantised_sample(fmt: str) -> bytes:
    """What our quantiser makes of values of many sizes."""
    values = np.arange(_SAMPLE_ROWS * _SAMPLE_COLS, dtype=np.float32).reshape(_SAMPLE_ROWS, _SAMPLE_COLS)
    values = (values * np.float32(0.618034)) % np.float32(1) - np.float32(0.5)
    return quantise_weight(values * values, FORMATS[fmt], "sample").data.tobytes()


def _header(key: bytes, region: ByteArray, team: Team) -> ByteArray:
    """The header, its sum, and zeros up to where the region begins."""
    sums = block_sums(region, team)
    fields = _HEADER.pack(_MAGIC, _VERSION, key, region.nbytes, len(sums)) + sums.astype("<u8").tobytes()
    whole = np.zeros(_data_start(region.nbytes), np.uint8)
    whole[: len(fields)] = np.frombuffer(fields, np.uint8)
    own = block_sums(whole[: len(fields)], team).astype("<u8").tobytes()
    whole[len(fields) : len(fields) + len(own)] = np.frombuffer(own, np.uint8)
    return whole


def _read_header(descriptor: int, key: bytes, region_bytes: int) -> NDArray[np.uint64] | None:
    """The sums of a region's blocks, if the file is the one of that key and of the right size."""
    start = _data_start(region_bytes)
    if os.fstat(descriptor).st_size != start + region_bytes:
        return None
    whole = os.pread(descriptor, start, 0)
    blocks = -(-region_bytes // BLOCK_BYTES)
    expected = _HEADER.pack(_MAGIC, _VERSION, key, region_bytes, blocks)
    if len(whole) != start or not whole.startswith(expected):
        return None
    end = _HEADER.size + 8 * blocks
    sum_of_header = block_sums(np.frombuffer(whole, np.uint8, end), Team(1)).astype("<u8").tobytes()
    if whole[end:] != sum_of_header + bytes(start - end - len(sum_of_header)):
        return None
    return np.frombuffer(whole, "<u8", blocks, _HEADER.size).astype(np.uint64)


def _data_start(region_bytes: int) -> int:
    blocks = -(-region_bytes // BLOCK_BYTES)
    header = _HEADER.size + 8 * blocks
    return -(-(header + 8 * -(-header // BLOCK_BYTES)) // _ALIGNMENT) * _ALIGNMENT


def _write_all(descriptor: int, data: ByteArray) -> None:
    left = data.data
    while left:
        left = left[os.write(descriptor, left) :]
