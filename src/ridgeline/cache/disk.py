"""The lowest tier: pages in files of one folder.

**A file** is one page of one memory group: magic, key, length and a SHA-256 of all of it, then the page. The
key (`cache.names`) covers the model, the formats, the build, the salt and every token, so that a file that
belongs to somebody else is one that nobody asks for. It is written under another name and renamed, without
waiting for the disk: after a crash, the sums tell. What is cut, damaged, or not what its name says, is
removed.

**Privacy.** A prompt's keys and values tell the prompt. The folder is its owner's alone (0700), and so is
each file (0600).

**Room.** At most `bound_bytes`, least recently used out first, by the files' times. Several processes may
share the folder: each knows the files that were there when it last looked, and looks again whenever it has
written a 32nd of the bound, so that each may exceed the bound by that much. A disk on which nothing can be
written is left alone for a minute, and said so once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import stat
import struct
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np

from ridgeline.cache.names import KEY_BYTES
from ridgeline.resources.paths import disk_share_bytes
from ridgeline.types import ByteArray, ConfigError

logger = logging.getLogger("ridgeline.cache")

_MAGIC = b"RIDGEKV1"
_HEAD = struct.Struct(f"<8s{KEY_BYTES}sQ")  # magic, key, bytes of the page
_SUM_BYTES = 32
HEADER_BYTES = _HEAD.size + _SUM_BYTES
_SUFFIX = ".kv"
_PARTIAL = ".partial-"
_ABANDONED_S = 60.0
"""A file that is half-written for so long belongs to a process that has ended."""
_QUIET_S = 60.0
_LOOKS = 32


class DiskTier:
    """Pages under `folder`, which is made. `has`, `pages`, `used_bytes` and `damaged` may be asked from any
    thread, all else belongs to one.

    Raises ConfigError when the folder cannot be had, or is not its user's own.
    """

    def __init__(self, folder: Path, bound_bytes: int | None = None) -> None:
        self.folder = folder
        _make_private(folder)
        self.bound_bytes = disk_share_bytes(folder) if bound_bytes is None else bound_bytes
        self._files: OrderedDict[bytes, int] = OrderedDict()  # bytes by key, least recently used first
        self.damaged = 0  # pages that were not what they should be
        self._used_bytes = 0
        self._unseen_bytes = 0  # written since the folder was last looked at
        self._quiet_until_s = 0.0
        self._told = False
        self._look()

    def has(self, key: bytes) -> bool:
        """Whether the page is there, as far as this process knows."""
        return key in self._files

    @property
    def pages(self) -> int:
        return len(self._files)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def read(self, key: bytes, page_bytes: int) -> ByteArray | None:
        """The page, uint8 (page_bytes,); None, and the file is gone, where it is not sound."""
        page = None
        with suppress(OSError):  # another process may have removed it
            page = self._read(key, page_bytes)
            self.damaged += page is None
        if page is None:
            self._remove(key)
        return page

    def write(self, key: bytes, page: ByteArray) -> bool:
        """Keep a page; whether it is there now."""
        if self.has(key):
            return True
        size_bytes = HEADER_BYTES + page.nbytes
        if size_bytes > self.bound_bytes or time.monotonic() < self._quiet_until_s:
            return False
        try:
            self._make_room(size_bytes)
            self._write(key, page)
        except OSError as error:
            self._be_quiet(error)
            return False
        self._files[key] = size_bytes
        self._used_bytes += size_bytes
        self._unseen_bytes += size_bytes
        return True

    def check_integrity(self) -> None:
        """Raise AssertionError unless the account of the files adds up, within the bound."""
        assert self._used_bytes == sum(self._files.values()), "bytes on disk were miscounted"
        assert self._used_bytes <= self.bound_bytes or not self._files, "the disk tier exceeds its bound"
        assert all(len(key) == KEY_BYTES for key in self._files), "a key is of another length"

    # ---------------------------------------------------------------------------------------- files

    def _path(self, key: bytes) -> Path:
        return self.folder / (key.hex() + _SUFFIX)

    def _read(self, key: bytes, page_bytes: int) -> ByteArray | None:
        descriptor = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size != HEADER_BYTES + page_bytes:
                return None
            header, page = bytearray(HEADER_BYTES), np.empty(page_bytes, np.uint8)
            if os.preadv(descriptor, [header, page.data], 0) != status.st_size or header != _header(
                key, page
            ):
                return None
            with suppress(OSError):  # a folder that cannot be written to
                os.utime(descriptor)
        finally:
            os.close(descriptor)
        if key in self._files:
            self._files.move_to_end(key)
        return page

    def _write(self, key: bytes, page: ByteArray) -> None:
        partial = self.folder / (_PARTIAL + secrets.token_hex(8))
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                whole = HEADER_BYTES + page.nbytes
                if os.writev(descriptor, [_header(key, page), page.data]) != whole:
                    raise OSError(0, "it is full")
            finally:
                os.close(descriptor)
            partial.replace(self._path(key))
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise

    def _remove(self, key: bytes) -> None:
        with suppress(OSError):
            self._path(key).unlink()
        self._used_bytes -= self._files.pop(key, 0)

    def _make_room(self, size_bytes: int) -> None:
        """Remove what was used least recently, so that as much fits."""
        full = self._used_bytes + size_bytes > self.bound_bytes
        if self._unseen_bytes > self.bound_bytes // _LOOKS or (full and self._unseen_bytes):
            self._look()
        while self._files and self._used_bytes + size_bytes > self.bound_bytes:
            self._remove(next(iter(self._files)))

    def _look(self) -> None:
        """Take in what other processes have written and removed, and clear away what they left half done."""
        found: list[tuple[int, bytes, int]] = []
        self._unseen_bytes = 0
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.name.startswith(_PARTIAL):
                        _remove_abandoned(entry)
                    elif (key := _key_of_file(entry.name)) is not None:
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, key, status.st_size))
        self._files = OrderedDict((key, size) for _, key, size in sorted(found))
        self._used_bytes = sum(self._files.values())
        while self._used_bytes > self.bound_bytes:
            self._remove(next(iter(self._files)))

    def _be_quiet(self, error: OSError) -> None:
        self._quiet_until_s = time.monotonic() + _QUIET_S
        if not self._told:
            self._told = True
            logger.warning("KV cache folder cannot be written to (%s); going on without", error.strerror)


def _header(key: bytes, page: ByteArray) -> bytes:
    head = _HEAD.pack(_MAGIC, key, page.nbytes)
    found = hashlib.sha256(head)
    found.update(page.data)
    return head + found.digest()


def _key_of_file(name: str) -> bytes | None:
    if not name.endswith(_SUFFIX) or len(name) != 2 * KEY_BYTES + len(_SUFFIX):
        return None
    with suppress(ValueError):
        return bytes.fromhex(name[: -len(_SUFFIX)])
    return None


def _remove_abandoned(entry: os.DirEntry[str]) -> None:
    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_S:
        Path(entry.path).unlink()


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            if stat.S_IMODE(status.st_mode) & 0o077:
                folder.chmod(0o700)
            return
    except OSError as error:
        raise ConfigError(f"cache_dir {folder}: {error.strerror}; accepted: a folder to write to") from None
    raise ConfigError(f"cache_dir {folder} belongs to somebody else; accepted: a folder of one's own")
