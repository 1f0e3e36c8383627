"""The beginnings of a model's files, of which the rest was never fetched: names, shapes and types of tensors.

They lie in a folder under the files' own names, beside the configuration and a list of the sizes of the
whole files, which is written last: a folder without it is not complete. A piece of a file that lies further
on, such as a table of rotary factors, is a file `<name>@<offset>`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ridgeline.model.checkpoint.files import (
    Checkpoint,
    MappedFile,
    parse_json_object,
    read_file,
)
from ridgeline.model.checkpoint.gguf import read_gguf
from ridgeline.model.checkpoint.safetensors import read_safetensors
from ridgeline.types import ByteArray, CheckpointError

SIZES_NAME = "headers.json"
_SIZES_LIMIT_BYTES = 8 << 20
_MOST_BYTES = 1 << 50


class HeaderFile(MappedFile):
    """The beginning of a file of `size_bytes`."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        super().__init__(path)
        self.size_bytes = size_bytes

    def view(self, offset: int, nbytes: int) -> ByteArray:
        """As a whole file's. Raises CheckpointError for what was not fetched."""
        piece = piece_path(self.path, offset)
        if offset + nbytes > len(self.map) and piece.is_file() and piece.stat().st_size == nbytes:
            return np.frombuffer(read_file(piece, nbytes), np.uint8)
        if offset + nbytes > len(self.map):
            raise CheckpointError(
                f"{self.path} is the beginning of a file, whose byte {offset} was not fetched; "
                "accepted: the whole model (`ridgeline pull`)"
            )
        return super().view(offset, nbytes)


def piece_path(path: Path, offset: int) -> Path:
    """Where a piece of the file of which `path` is the beginning lies."""
    return path.with_name(f"{path.name}@{offset}")


def has_headers(folder: Path) -> bool:
    """Whether a folder holds the beginnings of a model's files, all of them."""
    return (folder / SIZES_NAME).is_file()


def open_headers(folder: Path, sizes: dict[str, int] | None = None) -> Checkpoint:
    """The model whose files begin as those in `folder`, and are as large as its list, or `sizes`, says.

    Raises CheckpointError for what `open_checkpoint` refuses, and for a beginning that is too short.
    """
    if sizes is None:
        path = folder / SIZES_NAME
        listed = parse_json_object(read_file(path, _SIZES_LIMIT_BYTES), path, "the list of sizes")
        sizes = {name: size for name, size in listed.items() if type(size) is int and 0 < size < _MOST_BYTES}

    def opened(path: Path) -> MappedFile:
        if path.name not in sizes:
            raise CheckpointError(f"{folder} does not say how large {path.name} is; accepted: it in the list")
        return HeaderFile(path, sizes[path.name])

    models = sorted(name for name in sizes if name.endswith(".gguf"))
    return read_gguf(folder / models[0], opened) if models else read_safetensors(folder, opened)
