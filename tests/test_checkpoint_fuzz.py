"""Both readers under random damage, with a fixed seed: a CheckpointError or a sound model, nothing else."""

from __future__ import annotations

import json
import random
import re
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import (
    ARRAY,
    STRING,
    U32,
    Gguf,
    field_of,
    key_value,
    open_descriptors,
    safetensors_bytes,
    string,
    string_array,
    tensor_entry,
    u32,
    u64,
    write_folder,
)

from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.precision.storage import STORAGES, check_finite
from ridgeline.types import CheckpointError

PEAK_BYTES = 4 << 20  # the files have a few kB; anything more was believed from a damaged size
EXTREMES = [0, 1, 2, 7, 31, 2**8 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**64 - 1]

SOUND_GGUF = Gguf(
    entries=(
        tensor_entry("q4_0", [64, 2], 2, 0),
        tensor_entry("q4_1", [32, 3], 3, 96),
        tensor_entry("q8_0", [32], 8, 160),
        tensor_entry("f16", [5, 3], 1, 224),
        tensor_entry("bf16", [4], 30, 256),
    ),
    data=bytes(at % 60 for at in range(264)),  # small positive numbers in every storage
).with_keys(
    key_value("general.alignment", U32, u32(32)),
    key_value("list", ARRAY, u32(5) + u64(3) + struct.pack("<3i", 1, 2, 3)),
    key_value("flags", ARRAY, u32(7) + u64(2) + b"\0\1"),
    key_value("text", STRING, string("some text")),
    key_value("merges", ARRAY, string_array(["a b", "c d", "e f"])),
)
SOUND_SAFETENSORS = safetensors_bytes(
    {
        "__metadata__": {"format": "pt"},
        "one": field_of("F32", [2, 8], 0, 64),
        "half": field_of("F16", [5], 64, 74),
        "other": field_of("I64", [1], 74, 82),
        "b": field_of("BF16", [3, 1, 1], 82, 88),
    },
    bytes(at % 60 for at in range(88)),
)


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Memory that Python or NumPy allocated stays small, and no descriptor or mapping stays open."""
    before = open_descriptors()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()
    assert open_descriptors() == before
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if "fuzzed" in line]


def survives(path: Path) -> bool:
    """Open and read everything. True when it was sound; only a CheckpointError may refuse it."""
    try:
        with open_checkpoint(path) as checkpoint:
            dict(checkpoint.metadata)
            for name, info in checkpoint.tensors.items():
                if info.storage not in STORAGES:
                    with pytest.raises(CheckpointError):
                        checkpoint.tensor(name)
                    continue
                tensor = checkpoint.tensor(name)
                assert tensor.shape == info.shape
                with np.errstate(all="ignore"):
                    assert tensor.dequantise().shape == info.shape
                check_finite(tensor, name)
                checkpoint.release(name)
                del tensor
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    assert message.isprintable()
    return False


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A few random changes: bytes, bits, extreme numbers, stretches removed, doubled or moved."""
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(raw))
        kind = rng.randrange(6)
        if kind == 0:
            raw[at] = rng.randrange(256)
        elif kind == 1:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            number = struct.pack("<Q", rng.choice(EXTREMES))[: rng.choice((1, 2, 4, 8))]
            raw[at : at + len(number)] = number
        elif kind == 3 and len(raw) > 40:
            del raw[at : at + rng.randrange(1, 24)]
        elif kind == 4:
            raw[at:at] = raw[at : at + rng.randrange(1, 24)]
        else:
            other = rng.randrange(len(raw))
            raw[at : at + 8] = raw[other : other + 8]
    return bytes(raw)


def test_the_undamaged_files_are_sound(tmp_path: Path) -> None:
    path = SOUND_GGUF.write(tmp_path)
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.tensors) == 5
        assert len(dict(checkpoint.metadata)) == 8
    with open_checkpoint(write_folder(tmp_path / "m", SOUND_SAFETENSORS)) as checkpoint:
        assert len(checkpoint.tensors) == 4
    assert survives(path)
    assert survives(tmp_path / "m")


def test_gguf_with_extreme_numbers_everywhere(tmp_path: Path) -> None:
    whole, path = SOUND_GGUF.to_bytes(), tmp_path / "fuzzed.gguf"
    with nothing_left_behind():
        for at in range(len(whole) - len(SOUND_GGUF.data)):
            for value in (0, 2**32 - 1, 2**63, 2**64 - 1):
                number = struct.pack("<Q", value)
                path.write_bytes(whole[:at] + number + whole[at + 8 :])
                survives(path)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_gguf(tmp_path: Path, seed: int) -> None:
    rng, whole, path = random.Random(seed), SOUND_GGUF.to_bytes(), tmp_path / "fuzzed.gguf"
    refused = 0
    with nothing_left_behind():
        for _ in range(2000):
            path.write_bytes(damaged(whole, rng))
            refused += not survives(path)
    assert 1000 < refused < 2000


@pytest.mark.parametrize("seed", range(2))
def test_damaged_safetensors(tmp_path: Path, seed: int) -> None:
    rng, folder = random.Random(seed), write_folder(tmp_path / "fuzzed")
    refused = 0
    with nothing_left_behind():
        for _ in range(1200):
            (folder / "model.safetensors").write_bytes(damaged(SOUND_SAFETENSORS, rng))
            refused += not survives(folder)
    assert 600 < refused < 1200


NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "1e9",
    "0.5",
    "null",
    '"2"',
    "[]",
    "{}",
    "true",
    "1e999",
    "NaN",
    *map(str, EXTREMES),
]


def test_safetensors_with_any_value_in_place_of_a_number(tmp_path: Path) -> None:
    """The header stays JSON of the declared length, so that the damage reaches the fields."""
    length = struct.unpack("<Q", SOUND_SAFETENSORS[:8])[0]
    header, data = SOUND_SAFETENSORS[8 : 8 + length].decode(), SOUND_SAFETENSORS[8 + length :]
    folder = write_folder(tmp_path / "fuzzed")
    with nothing_left_behind():
        for place in re.finditer(r"\b\d+\b|\"[^\"]*\"(?=[,}])", header):
            for value in NUMBERS:
                changed = header[: place.start()] + value + header[place.end() :]
                (folder / "model.safetensors").write_bytes(safetensors_bytes(changed.encode(), data))
                survives(folder)


def test_damaged_configuration_and_index(tmp_path: Path) -> None:
    rng, folder = random.Random(0), write_folder(tmp_path / "fuzzed", SOUND_SAFETENSORS)
    config = json.dumps({"model_type": "llama", "rope": {"theta": 1e4, "x": [1, None, "é"]}}).encode()
    names = ("one", "half", "other", "b")
    index = json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}).encode()
    opened = 0
    with nothing_left_behind():
        for number in range(1200):
            (folder / "config.json").write_bytes(damaged(config, rng) if number % 2 else config)
            (folder / "model.safetensors.index.json").write_bytes(
                index if number % 2 else damaged(index, rng)
            )
            opened += survives(folder)
    assert 0 < opened < 600
