"""Small model files for tests, written byte by byte so that each field can be made wrong."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

U32, STRING, ARRAY = 4, 8, 9


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def key_value(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + u32(kind) + value


def string_array(items: list[str | bytes], count: int | None = None) -> bytes:
    return u32(STRING) + u64(len(items) if count is None else count) + b"".join(map(string, items))


def tensor_entry(name: str | bytes, dimensions: list[int], kind: int, offset: int) -> bytes:
    return string(name) + u32(len(dimensions)) + b"".join(map(u64, dimensions)) + u32(kind) + u64(offset)


@dataclass(frozen=True)
class Gguf:
    """A GGUF of two F32 tensors; `replace` a field to damage it. Counts follow the lists unless given."""

    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    keys: tuple[bytes, ...] = (
        key_value("general.architecture", STRING, string("llama")),
        key_value("llama.block_count", U32, u32(1)),
        key_value("tokenizer.ggml.tokens", ARRAY, string_array(["a", "b", "é"])),
    )
    entries: tuple[bytes, ...] = (tensor_entry("one", [8, 2], 0, 0), tensor_entry("two", [8], 0, 64))
    data: bytes = field(default=struct.pack("<24f", *range(24)))
    alignment: int = 32

    def with_keys(self, *more: bytes) -> Gguf:
        return replace(self, keys=(*self.keys, *more))

    def to_bytes(self) -> bytes:
        head = self.magic + u32(self.version)
        head += u64(len(self.entries) if self.tensor_count is None else self.tensor_count)
        head += u64(len(self.keys) if self.key_count is None else self.key_count)
        head += b"".join(self.keys) + b"".join(self.entries)
        return head + b"\0" * (-len(head) % self.alignment) + self.data

    def write(self, folder: Path, name: str = "model.gguf") -> Path:
        path = folder / name
        path.write_bytes(self.to_bytes())
        return path


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return u64(len(raw) if length is None else length) + raw + data


def field_of(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SOUND_HEADER: dict[str, Any] = {"one": field_of("F32", [2, 8], 0, 64), "two": field_of("F32", [8], 64, 96)}
SOUND_DATA = struct.pack("<24f", *range(24))


def write_folder(
    folder: Path, weights: bytes | None = None, config: bytes = b'{"model_type": "llama"}'
) -> Path:
    """A Hugging Face folder with one weights file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config)
    content = safetensors_bytes(SOUND_HEADER, SOUND_DATA) if weights is None else weights
    (folder / "model.safetensors").write_bytes(content)
    return folder


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
