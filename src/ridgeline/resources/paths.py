"""Where this user's files are kept, and how a file appears there: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ridgeline.types import CapacityError


def cache_dir() -> Path:
    """Folder for models, built tokenizers and measurements: RIDGELINE_CACHE, else the platform's user cache.

    The folder need not exist yet; whoever writes creates it.
    """
    chosen = os.environ.get("RIDGELINE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("ridgeline", appauthor=False)


SHARE_BYTES = 32 << 30
DISK_SHARE = 0.1
"""A cache takes at most so much of a disk, and at most this share of it."""


def disk_share_bytes(folder: Path) -> int:
    """What a cache under `folder`, which need not exist yet, may take of its disk."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return min(SHARE_BYTES, int(shutil.disk_usage(existing).total * DISK_SHARE))


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` under `path` by a rename in the same folder, which is created if it is missing.

    Readers see the old file or the new one, and a failure leaves nothing behind. Raises CapacityError
    when the disk is full, the quota spent or the folder not writable.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or type(error).__name__
            raise CapacityError(
                f"cannot write {path}: {reason}; set RIDGELINE_CACHE to a writable folder"
            ) from error
        raise
