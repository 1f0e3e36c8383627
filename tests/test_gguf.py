"""The GGUF reader: against the gguf package's writer, and against files that are wrong in one place each."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_files import (
    ARRAY,
    STRING,
    U32,
    Gguf,
    key_value,
    open_descriptors,
    string,
    string_array,
    tensor_entry,
    u32,
)
from gguf import quants

from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.checkpoint.gguf import TENSOR_TYPES
from ridgeline.precision.storage import STORAGES
from ridgeline.types import CheckpointError

STORED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
METADATA: dict[str, Any] = {
    "u8": 200, "i8": -100, "u16": 60_000, "i16": -30_000, "u32": 4_000_000_000, "i32": -2_000_000_000,
    "u64": 2**63 + 5, "i64": -(2**62), "f32": 0.5, "f64": 0.1, "yes": True, "no": False, "text": "héllo\n",
    "empty": "", "tokens": ["<s>", "", "é", "\n", "🙂"], "scores": [0.5, -1.5], "types": [1, -2, 3],
    "flags": [True, False, True], "long": list(range(1000)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def refused(path: Path) -> str:
    """The one line with which a file is refused; what was opened on the way is closed again."""
    before = open_descriptors()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert open_descriptors() == before
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


# -------------------------------------------------------------------------------------- sound files


def write_with_gguf(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A file by the gguf package with every value type and storage; the decoded tensors."""
    writer = gguf.GGUFWriter(str(path), "llama")
    add: dict[str, Any] = {
        "u8": writer.add_uint8, "i8": writer.add_int8, "u16": writer.add_uint16, "i16": writer.add_int16,
        "u32": writer.add_uint32, "i32": writer.add_int32, "u64": writer.add_uint64, "i64": writer.add_int64,
        "f32": writer.add_float32, "f64": writer.add_float64, "yes": writer.add_bool, "no": writer.add_bool,
        "text": writer.add_string,
    }  # fmt: skip
    for key, value in METADATA.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key == "empty":
            writer.add_key_value(key, value, gguf.GGUFValueType.STRING)
        else:
            add[key](key, value)
    rng = np.random.default_rng(0)
    expected = {}
    for name in STORED:
        kind = gguf.GGMLQuantizationType[name]
        data = quants.quantize(rng.standard_normal((6, 256)).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        expected[f"{name}.weight"] = quants.dequantize(data, kind).reshape(6, 256)
    expected["bias"] = rng.standard_normal(5).astype(np.float32)
    expected["experts"] = rng.standard_normal((2, 3, 4)).astype(np.float32)
    for name in ("bias", "experts"):
        writer.add_tensor(name, expected[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    expected = write_with_gguf(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "gguf"
        assert checkpoint.path == path
        assert {key: checkpoint.metadata[key] for key in METADATA if key in checkpoint.metadata} == METADATA
        assert checkpoint.metadata["general.architecture"] == "llama"
        assert list(checkpoint.tensors) == list(expected)
        for name, values in expected.items():
            info, tensor = checkpoint.tensors[name], checkpoint.tensor(name)
            assert info.shape == tensor.shape == values.shape
            assert info.storage == tensor.storage.name
            assert info.nbytes == tensor.nbytes
            assert not tensor.data.flags.writeable
            np.testing.assert_array_equal(tensor.dequantise(), values)
        assert checkpoint.sidecar("tokenizer.json") is None


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_and_a_folder_with_one_file(tmp_path: Path, version: int) -> None:
    Gguf(version=version).write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("one").dequantise(), np.arange(16).reshape(2, 8))
        np.testing.assert_array_equal(checkpoint.tensor("two").dequantise(), np.arange(16, 24))


@pytest.mark.parametrize("name", [name for name in STORAGES if name not in STORED])
def test_storages_that_the_gguf_package_only_reads(tmp_path: Path, name: str) -> None:
    kind, storage = gguf.GGMLQuantizationType[name], STORAGES[name]
    raw = np.full((3, 2 * storage.block_bytes), 17, np.uint8)
    entry = tensor_entry("x", [2 * storage.block_values, 3], kind.value, 0)
    with open_checkpoint(Gguf(entries=(entry,), data=raw.tobytes()).write(tmp_path)) as checkpoint:
        assert checkpoint.tensors["x"].shape == (3, 2 * storage.block_values)
        np.testing.assert_array_equal(checkpoint.tensor("x").dequantise(), quants.dequantize(raw, kind))


def test_a_vocabulary_has_no_tensors(tmp_path: Path) -> None:
    path = Gguf(entries=(), data=b"", alignment=1).write(tmp_path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata["tokenizer.ggml.tokens"] == ["a", "b", "é"]
        assert not checkpoint.tensors


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignments(tmp_path: Path, alignment: int) -> None:
    sound = Gguf(
        alignment=alignment, entries=(tensor_entry("one", [8], 0, 0),), data=struct.pack("<8f", *range(8))
    )
    path = sound.with_keys(key_value("general.alignment", U32, u32(alignment))).write(tmp_path)
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("one").dequantise(), np.arange(8))


def test_arrays_are_decoded_on_first_use(tmp_path: Path) -> None:
    bad = key_value("tokens", ARRAY, string_array(["fine", b"\xff\xfe"]))
    with open_checkpoint(Gguf().with_keys(bad).write(tmp_path)) as checkpoint:
        assert "tokens" in checkpoint.metadata
        assert checkpoint.metadata["tokenizer.ggml.tokens"] is checkpoint.metadata["tokenizer.ggml.tokens"]
        with pytest.raises(CheckpointError, match="item 1 of array 'tokens' is not UTF-8"):
            checkpoint.metadata["tokens"]
        with pytest.raises(KeyError):
            checkpoint.metadata["missing"]


def resident_bytes(path: Path) -> int:
    """Resident memory of the mappings of a file."""
    resident, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident


def test_release_gives_memory_back_and_keeps_the_values(tmp_path: Path) -> None:
    values = np.arange(1 << 20, dtype="<f4")
    path = Gguf(entries=(tensor_entry("big", [1 << 20], 0, 0),), data=values.tobytes()).write(tmp_path)
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("big").dequantise(), values)
        assert resident_bytes(path) > values.nbytes // 2
        checkpoint.release("big")
        assert resident_bytes(path) < values.nbytes // 20
        np.testing.assert_array_equal(checkpoint.tensor("big").dequantise(), values)


def test_views_outlive_the_checkpoint_and_nothing_else_does(tmp_path: Path) -> None:
    before = open_descriptors()
    checkpoint = open_checkpoint(Gguf().write(tmp_path))
    tensor = checkpoint.tensor("one")
    checkpoint.close()
    checkpoint.close()
    np.testing.assert_array_equal(tensor.dequantise(), np.arange(16).reshape(2, 8))
    checkpoint.release("one")
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("one")
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.metadata["tokenizer.ggml.tokens"]
    del tensor
    assert open_descriptors() == before


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    with open_checkpoint(Gguf().write(tmp_path)) as checkpoint:
        for ask in (checkpoint.tensor, checkpoint.release):
            with pytest.raises(CheckpointError, match="no tensor 'three'"):
                ask("three")


# ------------------------------------------------------------------------------------ damaged files


def test_cut_anywhere(tmp_path: Path) -> None:
    whole_path = tmp_path / "whole.gguf"
    write_with_gguf(whole_path)
    whole = whole_path.read_bytes()
    with open_checkpoint(whole_path) as checkpoint:
        needed = len(whole) - 32  # padding after the last tensor may be missing
        assert sum(info.nbytes for info in checkpoint.tensors.values()) < needed
    path = tmp_path / "cut.gguf"
    rng = random.Random(0)
    for length in [*range(64), *(rng.randrange(needed) for _ in range(1000))]:
        path.write_bytes(whole[:length])
        assert str(path) in refused(path)


def test_types_have_the_numbers_of_the_gguf_package() -> None:
    assert {kind.value: kind.name for kind in gguf.GGMLQuantizationType}.items() <= TENSOR_TYPES.items()
    assert set(STORAGES) <= set(TENSOR_TYPES.values())


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (key_value("k", 7, b"\2"), "boolean of 2"),
        (key_value(b"\xc3\x28", U32, u32(1)), "a key is not UTF-8"),
        (key_value("", U32, u32(1)), "a key has 0 characters"),
        (key_value("k" * 70_000, U32, u32(1)), "a key has 70000 characters"),
        (key_value("k", STRING, string(b"ab\xff")), "value of key 'k' is not UTF-8 at its byte 2"),
        (key_value("split.count", 2, struct.pack("<H", 3)), "split.no is missing"),
        (key_value("split.count", ARRAY, string_array(["a"])), "split.count is ['a']; accepted: 0 to"),
    ],
)
def test_wrong_keys_are_named(tmp_path: Path, extra: bytes, reason: str) -> None:
    assert reason in refused(Gguf(data=bytes(1 << 17)).with_keys(extra).write(tmp_path))


# -------------------------------------------------------------------------------- paths of all kinds


def test_paths_without_a_model(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "missing.gguf")
    assert "has no model" in refused(tmp_path)
    (tmp_path / "empty.gguf").touch()
    assert "is empty" in refused(tmp_path / "empty.gguf")
    assert "not a file" in refused(Path("/dev/null"))
    assert "File name too long" in refused(tmp_path / ("x" * 300))
    with pytest.raises(CheckpointError, match="null byte"):
        open_checkpoint(tmp_path / "a\0b")


def test_a_folder_with_several_ggufs_lists_them(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        Gguf().write(tmp_path, name)
    assert "2 GGUF files ('a.gguf', 'b.gguf'); name one" in refused(tmp_path)


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Gguf().write(tmp_path)

    def no_memory(*args: object, **kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("ridgeline.model.checkpoint.files.mmap.mmap", no_memory)
    assert "Cannot allocate memory" in refused(path)
