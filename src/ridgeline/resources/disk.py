"""How fast the disk is read where the models lie: a file that no page cache holds.

The file is written first and has no name from the moment on that it is open for reading, so that nothing is
left behind however the process ends. What was just written may still be in the device's own cache, or in a
host's; a virtual disk may answer from there.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ridgeline.resources.measurement import Measurement, best
from ridgeline.types import CapacityError

FILE_BYTES = 256 << 20
WRITE_S = 3.0
READ_S = 1.5
"""Bounds of writing, which ends early with a smaller file, and of reading."""

BLOCK_BYTES = 8 << 20
_READERS = 4
"""Blocks that are read at once: a fast disk needs several requests to be busy."""

_LEAST_BLOCKS = 2 * _READERS
_LARGEST_SHARE = 10
"""No more than a tenth of the free disk is taken."""

DIRECT = "O_DIRECT"
DROPPED = "dropped from the page cache"


def measure_disk(folder: Path, file_bytes: int = FILE_BYTES, read_s: float = READ_S) -> Measurement:
    """Bytes per second of reading a file in `folder`, which is created; `how` says how the cache was avoided.

    Raises CapacityError when the disk has too little room, or cannot be written or read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file_bytes = min(file_bytes, shutil.disk_usage(folder).free // _LARGEST_SHARE)
        if file_bytes < _LEAST_BLOCKS * BLOCK_BYTES:
            need = _LEAST_BLOCKS * BLOCK_BYTES * _LARGEST_SHARE >> 20
            raise CapacityError(f"the disk of {folder} is nearly full; measuring it takes {need} MiB free")
        with _unnamed_file(folder) as (writing, reading, direct):
            blocks = _fill(writing, file_bytes // BLOCK_BYTES)
            if blocks < _LEAST_BLOCKS:
                least = _LEAST_BLOCKS * BLOCK_BYTES >> 20
                raise CapacityError(f"the disk of {folder} takes over {WRITE_S:.0f} s to write {least} MiB")
            how = _drop(writing, reading)  # nor does anybody else want it in the memory that pages take
            return best("disk", "B/s", _read(reading, blocks, read_s), how=DIRECT if direct else how)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CapacityError(f"cannot measure the disk of {folder}: {reason}") from error


@contextmanager
def _unnamed_file(folder: Path) -> Iterator[tuple[int, int, bool]]:
    """A file open for writing and for reading, and whether reading goes past the page cache."""
    writing, name = tempfile.mkstemp(prefix=".disk-probe-", dir=folder)
    reading = None
    try:
        try:
            reading, direct = _open_direct(name)
        finally:
            Path(name).unlink()
        yield writing, reading, direct
    finally:
        os.close(writing)
        if reading is not None:
            os.close(reading)


def _open_direct(name: str) -> tuple[int, bool]:
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        try:
            return os.open(name, os.O_RDONLY | flag), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # what file systems in memory say
                raise
    return os.open(name, os.O_RDONLY), False


def _fill(writing: int, blocks: int) -> int:
    """Write up to `blocks` blocks in about WRITE_S and have them reach the disk; how many there are.

    No two are equal and none can be compressed, for file systems that do.
    """
    deadline = time.monotonic() + WRITE_S
    content = os.urandom(BLOCK_BYTES)
    for done in range(blocks):
        turn = done * 4099 % BLOCK_BYTES
        _write(writing, content[turn:] + content[:turn])
        os.fsync(writing)  # what is written late would be read from memory, and writing would have no bound
        if time.monotonic() > deadline:
            return done + 1
    return blocks


def _write(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _drop(writing: int, reading: int) -> str:
    """Have the system forget the file's pages where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(writing, 0, 0, os.POSIX_FADV_DONTNEED)
        return DROPPED
    import fcntl

    if hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(reading, fcntl.F_NOCACHE, 1)
        fcntl.fcntl(writing, fcntl.F_NOCACHE, 1)
        return "F_NOCACHE"
    return "page cache"


def _read(reading: int, blocks: int, seconds: float) -> list[float]:
    """Bytes per second of each round, in which every reader takes a block of its own."""
    buffers = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(_READERS)]  # aligned to pages, as O_DIRECT wants
    deadline = time.monotonic() + seconds
    rates: list[float] = []
    try:
        with ThreadPoolExecutor(_READERS) as readers:
            for first in range(0, blocks - _READERS + 1, _READERS):
                start = time.perf_counter()
                tasks = [
                    readers.submit(_read_block, reading, first + i, buffer)
                    for i, buffer in enumerate(buffers)
                ]
                for task in tasks:
                    task.result()
                rates.append(_READERS * BLOCK_BYTES / (time.perf_counter() - start))
                if time.monotonic() > deadline:
                    break
    finally:
        for buffer in buffers:
            buffer.close()
    return rates


def _read_block(reading: int, block: int, buffer: mmap.mmap) -> None:
    preadv: Callable[[int, list[memoryview], int], int] = os.preadv
    with memoryview(buffer) as whole:
        done = 0
        while done < BLOCK_BYTES:
            with whole[done:] as rest:
                count = preadv(reading, [rest], block * BLOCK_BYTES + done)
            if count == 0:
                raise OSError(errno.EIO, "the file ends early")
            done += count
