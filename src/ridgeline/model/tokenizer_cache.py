"""Built tokenizers in the user's cache: reading one back takes less than building it from a GGUF again."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from ridgeline.model.tokenizer_library import library_call
from ridgeline.resources.paths import cache_dir, write_atomic
from ridgeline.types import CapacityError, CheckpointError

# Part of every cached file's name: raise it when the same GGUF builds another tokenizer than before.
_FORMAT = 2
_KEPT_FILES = 32
_HEADER_BYTES = 65
# A file changed this recently could change again without its time of change moving.
_SETTLED_S = 2.0


@dataclass(frozen=True, slots=True)
class CachedTokenizer:
    """A tokenizer.json with its SHA-256 before it, named after the identity of the GGUF it was built from."""

    file: Path

    @staticmethod
    def of(source: Path) -> CachedTokenizer | None:
        """Where the tokenizer of `source` is kept; None if that is too new to be told from the next."""
        try:
            real = source.resolve(strict=True)
            status = real.stat()
        except OSError:
            return None
        if time.time() - status.st_mtime < _SETTLED_S:
            return None
        identity = (
            _FORMAT, tokenizers.__version__, str(real),
            status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev,
        )  # fmt: skip
        name = hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).hexdigest()
        return CachedTokenizer(cache_dir() / "tokenizers" / f"{name}.json")

    def load(self) -> tokenizers.Tokenizer | None:
        """None when it is not there, or is not what was stored."""
        try:
            content = self.file.read_bytes()
        except OSError:
            return None
        payload = content[_HEADER_BYTES:]
        if content[:_HEADER_BYTES] != _header(payload):
            return None
        with suppress(CheckpointError), library_call(self.file, "the cached tokenizer"):
            return tokenizers.Tokenizer.from_buffer(payload)
        return None

    def store(self, library: tokenizers.Tokenizer) -> None:
        """Keep it for the next start. A cache that cannot be written to costs time, nothing else."""
        payload = _fast_json(library)
        with suppress(CapacityError, OSError):
            write_atomic(self.file, _header(payload) + payload)
            entries = self.file.parent.glob("*.json")
            kept = sorted(entries, key=lambda entry: entry.stat().st_mtime, reverse=True)
            for old in kept[_KEPT_FILES:]:
                old.unlink(missing_ok=True)


def _header(payload: bytes) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode() + b"\n"


def _fast_json(library: tokenizers.Tokenizer) -> bytes:
    """The tokenizer.json with merges as "left right", which the library reads a third faster than pairs."""
    described = json.loads(library.to_str())
    merges = described["model"]["merges"]
    if not any(" " in part for pair in merges for part in pair):
        described["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
