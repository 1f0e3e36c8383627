"""The safetensors reader: against the safetensors package, and against folders wrong in one place each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import (
    SOUND_DATA,
    SOUND_HEADER,
    Gguf,
    field_of,
    open_descriptors,
    safetensors_bytes,
    write_folder,
)
from numpy.typing import NDArray

from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.types import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def refused(folder: Path) -> str:
    before = open_descriptors()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert open_descriptors() == before
    message = str(caught.value)
    assert message.isprintable()
    return message


def write_shards(folder: Path, weight_map: dict[str, Any], shards: dict[str, list[str]]) -> Path:
    """A sharded folder; each tensor is its name's length, repeated."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for file, names in shards.items():
        tensors = {name: np.full((2, 3), len(name), np.float32) for name in names}
        safetensors.numpy.save_file(tensors, folder / file)
    return folder


# ------------------------------------------------------------------------------------ sound folders


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected: dict[str, NDArray[Any]] = {
        "odd": rng.standard_normal(3).astype(np.float16),  # what follows is not aligned
        "embedding": rng.standard_normal((7, 5)).astype(np.float32),
        "experts": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
    }
    folder = write_folder(tmp_path / "m", safetensors.numpy.save(expected, {"format": "pt"}))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.kind == "safetensors"
        assert checkpoint.path == folder
        assert checkpoint.metadata == {"model_type": "llama"}
        assert set(checkpoint.tensors) == set(expected)
        for name, values in expected.items():
            tensor = checkpoint.tensor(name)
            assert checkpoint.tensors[name].shape == tensor.shape == values.shape
            assert checkpoint.tensors[name].storage == tensor.storage.name
            np.testing.assert_array_equal(tensor.dequantise(), values.astype(np.float32))
            checkpoint.release(name)


def test_bfloat16(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2")
    folder = write_folder(
        tmp_path / "m", safetensors_bytes({"w": field_of("BF16", [4, 6], 0, 48)}, bits.tobytes())
    )
    with open_checkpoint(folder) as checkpoint:
        widened = (bits.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(checkpoint.tensor("w").dequantise(), widened)
        np.testing.assert_allclose(widened, values, rtol=1e-2)


def test_the_files_of_these_tests_are_sound(tmp_path: Path) -> None:
    tensors = safetensors.numpy.load(safetensors_bytes(SOUND_HEADER, SOUND_DATA))
    with open_checkpoint(write_folder(tmp_path / "m")) as checkpoint:
        for name, values in tensors.items():
            np.testing.assert_array_equal(checkpoint.tensor(name).dequantise(), values)


def test_shards(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = {"a": first, "bb": second, "ccc": first}
    folder = write_shards(tmp_path / "m", weight_map, {first: ["a", "ccc"], second: ["bb"]})
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "bb", "ccc"]
        for name in weight_map:
            np.testing.assert_array_equal(checkpoint.tensor(name).dequantise(), np.full((2, 3), len(name)))


def test_a_hub_snapshot_links_into_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    source = write_folder(tmp_path / "m")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (source / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    with open_checkpoint(snapshot) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("two").dequantise(), np.arange(16, 24))


def test_other_types_are_refused_only_when_they_are_read(tmp_path: Path) -> None:
    header = {
        "mask": field_of("BOOL", [4], 0, 4),
        "ids": field_of("I64", [1, 2], 4, 20),
        "w": field_of("F32", [2], 20, 28),
        "new": field_of("F9_NEW", [3], 28, 29),
    }
    folder = write_folder(tmp_path / "m", safetensors_bytes(header, bytes(29)))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors["ids"].storage == "I64"
        assert not checkpoint.tensor("w").dequantise().any()
        for name in ("mask", "ids", "new"):
            with pytest.raises(CheckpointError, match=f"'{name}' is stored as .*; accepted: F32"):
                checkpoint.tensor(name)


def test_sidecars_stay_in_the_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "pipe").mkdir()
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.sidecar("tokenizer.json") == b"{}"
        assert checkpoint.sidecar("chat_template.jinja") is None
        for name in (
            "../secret",
            str(tmp_path / "secret"),
            "link",
            "loop",
            "pipe",
            "",
            "a\0b",
            "a\nb",
            "x/../../secret",
        ):
            with pytest.raises(CheckpointError):
                checkpoint.sidecar(name)


# ----------------------------------------------------------------------------------- damaged weights


# ---------------------------------------------------------------------------- damaged configurations


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "a JSON list"),
        (b"\xff", "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b" " * ((8 << 20) + 1), "has 8388609 bytes; accepted: up to 8388608"),
    ],
)
def test_configurations(tmp_path: Path, config: bytes, reason: str) -> None:
    message = refused(write_folder(tmp_path / "m", config=config))
    assert reason in message
    assert "config.json" in message


def test_folders_with_parts_missing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    assert "the folder with it" in refused(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    open_checkpoint(folder).close()
    (folder / "b.safetensors").write_bytes(b"")
    assert "2 safetensors files and no model.safetensors.index.json" in refused(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)
    (folder / "config.json").mkdir()
    assert "is not a file" in refused(folder)


def test_safetensors_go_before_a_gguf_beside_them(tmp_path: Path) -> None:
    Gguf().write(write_folder(tmp_path / "m"))
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.kind == "safetensors"


# ------------------------------------------------------------------------------------ damaged shards


def test_a_tensor_that_its_shard_does_not_hold(tmp_path: Path) -> None:
    shards = {"x.safetensors": ["a"], "y.safetensors": ["bb"]}
    folder = write_shards(tmp_path / "m", {"a": "x.safetensors", "bb": "x.safetensors"}, shards)
    assert "places tensor 'bb' in 'x.safetensors', which does not hold it" in refused(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": None}])
def test_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    assert "no weight_map of names" in refused(write_shards(tmp_path / "m", weight_map, {}))


def test_a_damaged_shard_closes_the_others(tmp_path: Path) -> None:
    shards = {"x.safetensors": ["a"], "y.safetensors": ["bb"]}
    folder = write_shards(tmp_path / "m", {"a": "x.safetensors", "bb": "y.safetensors"}, shards)
    (folder / "y.safetensors").write_bytes(b"short")
    assert "y.safetensors has 5 bytes" in refused(folder)
