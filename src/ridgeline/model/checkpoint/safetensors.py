"""safetensors in a Hugging Face folder: `config.json` with one weights file, or shards and their index.

A weights file is an 8-byte length, a JSON header of that length, and the data, which the tensors must cover
without overlaps or holes. (https://github.com/huggingface/safetensors#format)

Nothing that the folder holds is executed or unpickled: `auto_map` is ignored.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ridgeline.model.checkpoint.files import (
    Checkpoint,
    Entry,
    MappedCheckpoint,
    MappedFile,
    TensorInfo,
    check_layout,
    contained,
    parse_json_object,
    read_file,
    read_sidecar,
    reading,
    shown,
)
from ridgeline.model.checkpoint.quantised import logical_checkpoint
from ridgeline.types import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
CONFIG_LIMIT_BYTES = 8 << 20
INDEX_LIMIT_BYTES = 64 << 20
HEADER_LIMIT_BYTES = 100_000_000
MAX_DIMENSIONS = 8

# Bytes of a value. Types that are not listed keep their declared size and are refused when they are read.
VALUE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
    "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def read_safetensors(folder: Path, open_file: Callable[[Path], MappedFile] = MappedFile) -> Checkpoint:
    """Open a folder with `config.json` and safetensors, whose tensors may be quantised.

    Raises CheckpointError for everything else.
    """
    config_path = contained(folder, "config.json")
    config = parse_json_object(read_file(config_path, CONFIG_LIMIT_BYTES), config_path, "the configuration")
    files: list[MappedFile] = []
    try:
        with reading(folder):
            entries = _read_weights(folder, files, open_file)
            sidecar = partial(read_sidecar, folder)
            return logical_checkpoint(
                MappedCheckpoint(folder, "safetensors", config, entries, files, sidecar)
            )
    except BaseException:
        for file in files:
            file.close()
        raise


def _read_weights(
    folder: Path, files: list[MappedFile], open_file: Callable[[Path], MappedFile]
) -> dict[str, Entry]:
    """All tensors of the folder; the files that are mapped for them are added to `files`, which owns them."""
    if (folder / INDEX_NAME).exists():
        return _read_shards(folder, files, open_file)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if "model.safetensors" in names:
        names = ["model.safetensors"]
    if len(names) != 1:
        raise CheckpointError(
            f"{folder} has {len(names)} safetensors files and no {INDEX_NAME}; "
            "accepted: one file, model.safetensors, or shards with their index"
        )
    files.append(open_file(contained(folder, names[0])))
    return _read_header(files[0])


def _read_shards(
    folder: Path, files: list[MappedFile], open_file: Callable[[Path], MappedFile]
) -> dict[str, Entry]:
    path = contained(folder, INDEX_NAME)
    index = parse_json_object(read_file(path, INDEX_LIMIT_BYTES), path, "the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            f"{path} has no weight_map of names; accepted: tensor names mapped to file names"
        )
    shards: dict[str, dict[str, Entry]] = {}
    for name in sorted(set(weight_map.values())):
        shard_path = contained(folder, name)
        if shard_path.suffix != ".safetensors":
            raise CheckpointError(f"{path} names the shard {shown(name)}; accepted: safetensors files")
        files.append(open_file(shard_path))
        shards[name] = _read_header(files[-1])
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise CheckpointError(
                f"{path} places tensor {shown(tensor)} in {shown(shard)}, which does not hold it"
            )
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}


def _read_header(file: MappedFile) -> dict[str, Entry]:
    if file.size_bytes < 8:
        raise CheckpointError(f"{file.path} has {file.size_bytes} bytes; accepted: a whole safetensors file")
    (length,) = struct.unpack_from("<Q", file.map)
    limit = min(HEADER_LIMIT_BYTES, file.size_bytes - 8)
    if not 2 <= length <= limit:
        raise CheckpointError(f"{file.path}: its header has {length} bytes; accepted: 2 to {limit}")
    start = 8 + length
    header = parse_json_object(file.map[8:start], file.path, "the header")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, start) for name, value in header.items()}
    _check_cover(file, entries, start)
    return entries


def _check_cover(file: MappedFile, entries: dict[str, Entry], start: int) -> None:
    """Tensors follow each other from the header to the end of the file, without holes."""
    end = start
    for entry in check_layout(file.path, entries.values()):
        if entry.offset != end:
            raise CheckpointError(
                f"{file.path}: there is a hole of {entry.offset - end} bytes before tensor "
                f"{shown(entry.info.name)}; accepted: tensors that follow each other"
            )
        end += entry.info.nbytes
    if end != file.size_bytes:
        raise CheckpointError(
            f"{file.path}: its tensors end at byte {end}; accepted: the end of the file, {file.size_bytes}"
        )


def _entry(file: MappedFile, name: str, value: Any, start: int) -> Entry:
    what = f"{file.path}: tensor {shown(name)}"
    fields = value if isinstance(value, dict) else {}
    storage, shape, offsets = fields.get("dtype"), _sizes(fields, "shape"), _sizes(fields, "data_offsets")
    if not isinstance(storage, str) or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{what} has no sound dtype, shape and data_offsets; accepted: all three")
    if 0 in shape or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{what} has shape {shown(shape)}; accepted: up to {MAX_DIMENSIONS} dimensions above zero"
        )
    begin, end = offsets
    if not begin <= end <= file.size_bytes - start:
        raise CheckpointError(
            f"{what} has data_offsets {offsets}; accepted: within the {file.size_bytes - start} bytes of data"
        )
    value_bytes = VALUE_BYTES.get(storage)
    if value_bytes is not None and math.prod(shape) * value_bytes != end - begin:
        raise CheckpointError(
            f"{what} of shape {shown(shape)} in {storage} has {end - begin} bytes; "
            f"accepted: {math.prod(shape) * value_bytes}"
        )
    return Entry(TensorInfo(name, tuple(shape), storage[:32], end - begin), file, start + begin)


def _sizes(fields: dict[str, Any], key: str) -> list[int] | None:
    """The list of sizes under a key, None when it is anything else."""
    value = fields.get(key)
    sound = isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    return value if sound else None
