"""GGUF versions 2 and 3, little-endian, over mmap, in one file or split into several.

Layout: magic, version, counts of tensors and key-values; the key-values; name, dimensions, type and offset
of every tensor; then, from the next multiple of `general.alignment`, the data.
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)

The file is not trusted: each count, length and offset is compared with the file's size before it is used.
Arrays in the metadata, such as a vocabulary, are only walked over; they are decoded when their key is read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.model.checkpoint.files import (
    Entry,
    MappedCheckpoint,
    MappedFile,
    TensorInfo,
    check_layout,
    reading,
    shown,
)
from ridgeline.model.checkpoint.gguf_split import Part, joined, part_paths
from ridgeline.precision.storage import STORAGES
from ridgeline.types import CheckpointError

MAGIC = b"GGUF"
BIG_ENDIAN_MAGIC = MAGIC[::-1]
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_NAME_BYTES = 65_535
MAX_DIMENSIONS = 4
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18

# ggml's numbers for tensor types, withdrawn ones included; the names that STORAGES has are read, the others
# are refused by name.
TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_2", 5: "Q4_3", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 31: "Q4_0_4_4", 32: "Q4_0_4_8",
    33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"), 4: _U32,
    5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<B"), 10: _U64, 11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}  # fmt: skip

# The least that a key-value and a tensor's entry can take, to bound their counts by the file's size.
_KEY_VALUE_BYTES = 8 + 4 + 1
_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


def read_gguf(path: Path, open_file: Callable[[Path], MappedFile] = MappedFile) -> MappedCheckpoint:
    """Open a GGUF; one without tensors (a vocabulary) too. Raises CheckpointError for everything else.

    Any part of a split one opens all of them, under the path and with the metadata of the first.
    """
    files: list[MappedFile] = []
    try:
        opened = _read_part(open_file(path), files)
        with reading(path):
            paths = part_paths(opened)
        parts = [opened if each == path else _read_part(open_file(each), files) for each in paths]
        return MappedCheckpoint(paths[0], "gguf", parts[0].metadata, joined(parts), files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _read_part(file: MappedFile, files: list[MappedFile]) -> Part:
    """One file, which is added to `files`, its owner."""
    files.append(file)
    path = file.path
    with reading(path):
        cursor = _Cursor(file)
        tensor_count, key_count = _read_start(cursor)
        metadata = _read_metadata(cursor, key_count)
        return Part(file, metadata, _read_tensors(cursor, tensor_count, _alignment(path, metadata)))


class _Cursor:
    """A place in the file's header; everything read from it is known to lie inside the file."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.at = 0

    @property
    def left(self) -> int:
        return self.file.size_bytes - self.at

    def number(self, packed: struct.Struct, what: str) -> Any:
        if packed.size > self.left:
            raise CheckpointError(f"{self.file.path} ends inside {what}; accepted: a whole GGUF file")
        (value,) = packed.unpack_from(self.file.map, self.at)
        self.at += packed.size
        return value

    def count(self, what: str, item_bytes: int) -> int:
        """A count of items that take at least `item_bytes` each."""
        count: int = self.number(_U64, what)
        if count * item_bytes > self.left:
            raise CheckpointError(
                f"{self.file.path}: {what} is {count}; accepted: what fits the file's last {self.left} bytes"
            )
        return count

    def string(self, what: str) -> str:
        length = self.count(f"length of {what}", 1)
        raw = self.file.map[self.at : self.at + length]
        self.at += length
        return _text(raw, self.file.path, what)

    def name(self, what: str) -> str:
        text = self.string(what)
        if not 0 < len(text) <= MAX_NAME_BYTES:
            raise CheckpointError(
                f"{self.file.path}: {what} has {len(text)} characters; accepted: 1 to {MAX_NAME_BYTES}"
            )
        return text


def _text(raw: bytes, path: Path, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: {what} is not UTF-8 at its byte {error.start}") from None


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; the numbers of tensors and of key-values."""
    path = cursor.file.path
    magic = cursor.file.map[:4]
    if magic == BIG_ENDIAN_MAGIC:
        raise CheckpointError(f"{path} is big-endian GGUF; accepted: little-endian versions 2 and 3")
    if magic != MAGIC:
        raise CheckpointError(
            f"{path} starts with {magic!r}; accepted: a GGUF file, which starts with {MAGIC!r}"
        )
    cursor.at = 4
    version = cursor.number(_U32, "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        seen = f"big-endian (version {swapped})" if 0 < swapped <= 0xFFFF else f"version {version}"
        raise CheckpointError(f"{path} is GGUF of {seen}; accepted: little-endian versions 2 and 3")
    counts = []
    for what, item_bytes, most in (
        ("tensor count", _TENSOR_BYTES, MAX_TENSORS),
        ("key-value count", _KEY_VALUE_BYTES, MAX_KEYS),
    ):
        counts.append(cursor.count(what, item_bytes))
        if counts[-1] > most:
            raise CheckpointError(f"{path}: {what} is {counts[-1]}; accepted: up to {most}")
    return counts[0], counts[1]


# ----------------------------------------------------------------------------------------- metadata


@dataclass(frozen=True, slots=True)
class _Array:
    """An array in the metadata that was walked over: `count` items of `kind` in the bytes start to end."""

    kind: int
    count: int
    start: int
    end: int


class Metadata(Mapping[str, Any]):
    """Key-values of a GGUF: numbers, booleans and strings; arrays, as lists, are decoded on first use."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._values: dict[str, Any] = {}
        self._types: dict[str, int] = {}

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Array):
            with reading(self._file.path):
                value = _decode_array(self._file, value, key)
            self._values[key] = value
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, key: str, kind: int, value: Any) -> None:
        self._values[key] = value
        self._types[key] = kind

    def type_of(self, key: str) -> int:
        """The GGUF type number of a key's value."""
        return self._types[key]


def _read_metadata(cursor: _Cursor, count: int) -> Metadata:
    metadata = Metadata(cursor.file)
    for _ in range(count):
        key = cursor.name("a key")
        if key in metadata:
            raise CheckpointError(f"{cursor.file.path}: key {shown(key)} stands twice; accepted: unique keys")
        kind = cursor.number(_U32, f"the type of key {shown(key)}")
        metadata.add(key, kind, _read_value(cursor, kind, key))
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.string(f"the value of key {shown(key)}")
    if kind == _ARRAY:
        return _walk_array(cursor, key)
    packed = _SCALARS.get(kind)
    if packed is None:
        raise CheckpointError(
            f"{cursor.file.path}: key {shown(key)} has value type {kind}; accepted: 0 to 12"
        )
    value = cursor.number(packed, f"the value of key {shown(key)}")
    if kind != _BOOL:
        return value
    if value > 1:
        raise CheckpointError(
            f"{cursor.file.path}: key {shown(key)} is a boolean of {value}; accepted: 0 or 1"
        )
    return bool(value)


def _walk_array(cursor: _Cursor, key: str) -> _Array:
    what = f"array {shown(key)}"
    kind = cursor.number(_U32, f"the item type of {what}")
    if kind != _STRING and kind not in _SCALARS:
        raise CheckpointError(
            f"{cursor.file.path}: {what} has item type {kind}; accepted: numbers, booleans and strings"
        )
    item_bytes = _U64.size if kind == _STRING else _SCALARS[kind].size
    count = cursor.count(f"length of {what}", item_bytes)
    start = cursor.at
    if kind == _STRING:
        cursor.at = _end_of_strings(cursor, count, what)
    else:
        cursor.at += count * item_bytes
    return _Array(kind, count, start, cursor.at)


def _end_of_strings(cursor: _Cursor, count: int, what: str) -> int:
    """Where `count` strings end. A vocabulary has 10^5 of them: this loop is most of the time of an open."""
    unpack, data, at = _U64.unpack_from, cursor.file.map, cursor.at
    try:
        for _ in range(count):
            (length,) = unpack(data, at)
            at += 8 + length
    except (struct.error, OverflowError, ValueError):
        at = cursor.file.size_bytes + 1
    if at > cursor.file.size_bytes:
        raise CheckpointError(f"{cursor.file.path} ends inside {what}; accepted: strings that fit the file")
    return at


def _decode_array(file: MappedFile, array: _Array, key: str) -> list[Any]:
    raw = file.view(array.start, array.end - array.start).tobytes()
    if array.kind == _STRING:
        return _decode_strings(raw, array.count, file.path, key)
    if array.kind == _BOOL:
        return [bool(byte) for byte in raw]
    return list(np.frombuffer(raw, _SCALARS[array.kind].format).tolist())


def _decode_strings(raw: bytes, count: int, path: Path, key: str) -> list[str]:
    unpack, at, found = _U64.unpack_from, 0, []
    try:
        for _ in range(count):
            start = at + 8
            at = start + unpack(raw, at)[0]
            found.append(raw[start:at].decode())
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: item {len(found)} of array {shown(key)} is not UTF-8 at its byte {error.start}"
        ) from None
    return found


def _alignment(path: Path, metadata: Metadata) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    value = metadata[key]
    if metadata.type_of(key) != _UINT32 or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise CheckpointError(
            f"{path}: {key} is {shown(value)} of type {metadata.type_of(key)}; "
            f"accepted: an unsigned 32-bit power of two from 8 to {MAX_ALIGNMENT}"
        )
    return int(value)


# ------------------------------------------------------------------------------------------ tensors


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Entry]:
    found: dict[str, tuple[TensorInfo, int]] = {}
    for _ in range(count):
        info, offset = _read_tensor(cursor)
        if info.name in found:
            raise CheckpointError(
                f"{cursor.file.path}: tensor {shown(info.name)} stands twice; accepted: unique names"
            )
        found[info.name] = info, offset
    start = -(-cursor.at // alignment) * alignment
    entries = {}
    for name, (info, offset) in found.items():
        if offset % alignment:
            raise CheckpointError(
                f"{cursor.file.path}: tensor {shown(name)} starts at offset {offset}; "
                f"accepted: multiples of the alignment, {alignment}"
            )
        if start + offset + info.nbytes > cursor.file.size_bytes:
            raise CheckpointError(
                f"{cursor.file.path}: tensor {shown(name)} ends at byte {start + offset + info.nbytes}; "
                f"accepted: inside the file's {cursor.file.size_bytes} bytes"
            )
        entries[name] = Entry(info, cursor.file, start + offset)
    check_layout(cursor.file.path, entries.values())
    return entries


def _read_tensor(cursor: _Cursor) -> tuple[TensorInfo, int]:
    """A tensor's description and the offset of its data."""
    name = cursor.name("a tensor's name")
    what = f"tensor {shown(name)}"
    rank = cursor.number(_U32, f"the number of dimensions of {what}")
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise CheckpointError(
            f"{cursor.file.path}: {what} has {rank} dimensions; accepted: 1 to {MAX_DIMENSIONS}"
        )
    dimensions = [cursor.number(_U64, f"the dimensions of {what}") for _ in range(rank)]
    type_number = cursor.number(_U32, f"the type of {what}")
    offset = cursor.number(_U64, f"the offset of {what}")
    type_name = TENSOR_TYPES.get(type_number, f"number {type_number}")
    storage = STORAGES.get(type_name)
    if storage is None:
        raise CheckpointError(
            f"{cursor.file.path}: {what}: GGUF type {type_name} is not supported; "
            f"accepted: {', '.join(name for name in TENSOR_TYPES.values() if name in STORAGES)}"
        )
    # ggml lists the dimension that is contiguous in memory first. Python's integers cannot overflow.
    shape = tuple(reversed(dimensions))
    if 0 in shape or shape[-1] % storage.block_values:
        raise CheckpointError(
            f"{cursor.file.path}: {what} has dimensions {dimensions}; accepted: above zero, the first a "
            f"multiple of {storage.block_values} for {storage.name}"
        )
    nbytes = math.prod(shape[:-1]) * storage.row_bytes(shape[-1])
    if nbytes > cursor.file.size_bytes:
        raise CheckpointError(
            f"{cursor.file.path}: {what} has dimensions {dimensions}, {nbytes} bytes; "
            f"accepted: what fits the file's {cursor.file.size_bytes} bytes"
        )
    return TensorInfo(name, shape, storage.name, nbytes), offset
