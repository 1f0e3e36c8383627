"""Rows 1 to 9: model files that lie about themselves are refused before anything is allocated or run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import (
    ARRAY,
    SOUND_DATA,
    SOUND_HEADER,
    STRING,
    U32,
    Gguf,
    field_of,
    key_value,
    safetensors_bytes,
    string,
    string_array,
    tensor_entry,
    u32,
    u64,
    write_folder,
)

from faults.commands import Command, refused
from faults.model_files import write_whole_gguf
from ridgeline import LLM
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.checkpoint import safetensors as reader

BIG = [2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
LARGEST = BIG[-1]
INDEX = "model.safetensors.index.json"


def with_tensors(*entries: bytes) -> Gguf:
    return replace(Gguf(), entries=entries)


# ---------------------------------------------------------------------------------- 1: magic and length


@pytest.mark.parametrize(
    ("file", "said"),
    [
        *((Gguf(magic=magic), "GGUF") for magic in (b"GGML", b"\0\0\0\0", b"GUFG", b"PK\3\4")),
        *((Gguf(version=version), f"version {version}") for version in (0, 1, 4, 2**32 - 1)),
        *((Gguf(version=version << 24), f"big-endian (version {version})") for version in (2, 3)),
        *(
            (Gguf(magic=b"FUGG", version=v), "is big-endian GGUF; accepted: little-endian")
            for v in (3, 3 << 24)
        ),
    ],
)
def test_row_01_bad_magic_or_version(tmp_path: Path, file: Gguf, said: str) -> None:
    assert said in refused(file.write(tmp_path))


def test_row_01_what_a_user_sees_of_it(command: Command, tmp_path: Path) -> None:
    assert "version 0" in command.refuses(Gguf(version=0).write(tmp_path))
    for content, said in ((b"", "is empty"), (b"once upon a time", "starts with b'once'")):
        (tmp_path / "model.gguf").write_bytes(content)
        assert said in command.refuses(tmp_path / "model.gguf")


def test_row_01_truncated_at_any_byte(tmp_path: Path) -> None:
    whole, path = Gguf().to_bytes(), tmp_path / "cut.gguf"
    for kept_bytes in range(len(whole)):
        path.write_bytes(whole[:kept_bytes])
        assert str(path) in refused(path)
    sound, folder = safetensors_bytes(SOUND_HEADER, SOUND_DATA), tmp_path / "folder"
    for kept_bytes in range(len(sound)):
        assert str(folder) in refused(write_folder(folder, sound[:kept_bytes]))


def test_row_01_a_whole_model_truncated(command: Command, tmp_path: Path, tiny: Any) -> None:
    """The reader at hundreds of lengths, and what a user sees at a few."""
    whole = write_whole_gguf(tiny("llama"), tmp_path / "whole.gguf").read_bytes()
    path, draw = tmp_path / "cut.gguf", random.Random(0)
    for kept_bytes in sorted(draw.sample(range(len(whole)), 300), reverse=True):
        if not path.exists():
            path.write_bytes(whole)
        os.truncate(path, kept_bytes)
        assert str(path) in refused(path)
    for kept_bytes in (3, 23, draw.randrange(4096), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept_bytes])
        assert str(path) in command.fails("run", "--model", path, "hi")
    path.write_bytes(whole)
    assert command.run("show", path).code == 0


# ----------------------------------------------------------------------------------- 2: absurd counts


def counts_of(big: int) -> list[Gguf]:
    """A file for each place in which a GGUF says how much of something is to come."""
    sound = Gguf()
    return [
        replace(sound, tensor_count=big),
        replace(sound, key_count=big),
        sound.with_keys(key_value("k", ARRAY, string_array(["a"], count=big))),
        sound.with_keys(key_value("k", ARRAY, u32(U32) + u64(big) + u32(1))),
        sound.with_keys(key_value("k", STRING, u64(big) + b"abc")),
        sound.with_keys(key_value("k", ARRAY, u32(STRING) + u64(2) + string("a") + u64(big) + b"b")),
        sound.with_keys(u64(big) + b"key"),
        with_tensors(u64(big) + b"name"),
        with_tensors(tensor_entry("one", [big], 0, 0)),
        with_tensors(tensor_entry("one", [big, big, big, big], 0, 0)),
        with_tensors(tensor_entry("one", [8], 0, big // 32 * 32)),
        with_tensors(string("one") + u32(big % 2**32) + u64(8) + u32(0) + u64(0)),
    ]


@pytest.mark.parametrize("big", BIG)
def test_row_02_counts_and_lengths_allocate_nothing(tmp_path: Path, big: int) -> None:
    for number, file in enumerate(counts_of(big)):
        path = file.write(tmp_path, f"{number}.gguf")
        tracemalloc.start()
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20, number


def test_row_02_what_a_user_sees_of_it(command: Command, tmp_path: Path) -> None:
    assert f"tensor count is {LARGEST}" in command.refuses(Gguf(tensor_count=LARGEST).write(tmp_path))
    assert f"count is {LARGEST}" in command.refuses(Gguf(key_count=LARGEST).write(tmp_path))


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.types import CheckpointError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        print(error)
"""


def test_row_02_a_process_with_little_memory_refuses_them_as_well(tmp_path: Path) -> None:
    """As with plenty: an allocation would be refused by the system, in other words."""
    paths = [file.write(tmp_path, f"{number}.gguf") for number, file in enumerate(counts_of(LARGEST))]
    paths.append(write_folder(tmp_path / "m", safetensors_bytes(b"{}", b"", LARGEST)))
    run = [sys.executable, "-c", LITTLE_MEMORY, *map(str, paths)]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [refused(path) for path in paths]
    assert not any("memory" in line for line in said)


def test_row_02_more_keys_or_tensors_than_any_model_has(tmp_path: Path) -> None:
    path = Gguf(key_count=70_000, data=bytes(4 << 20)).write(tmp_path)
    assert "key-value count is 70000; accepted: up to" in refused(path)
    path = Gguf(tensor_count=300_000, data=bytes(10 << 20)).write(tmp_path)
    assert "tensor count is 300000; accepted: up to" in refused(path)


# --------------------------------------------------------------------- 3, 4: dimensions and places

DIMENSIONS = [
    ([], "0 dimensions"),
    ([2, 2, 2, 1, 1], "5 dimensions"),
    ([0], "dimensions [0]"),
    ([8, 0], "dimensions [8, 0]"),
    ([2**32, 2**32], "what fits the file"),
    ([2**61, 2, 2, 2], "what fits the file"),
    ([2**64 - 1, 2**64 - 1], "what fits the file"),
]


@pytest.mark.parametrize(("dimensions", "said"), DIMENSIONS)
def test_row_03_dimensions(tmp_path: Path, dimensions: list[int], said: str) -> None:
    message = refused(with_tensors(tensor_entry("blk.0.odd", dimensions, 0, 0)).write(tmp_path))
    assert "tensor 'blk.0.odd'" in message
    assert said in message


def test_row_03_what_a_user_sees_of_it(command: Command, tmp_path: Path) -> None:
    path = with_tensors(tensor_entry("blk.0.odd", [2**32, 2**32], 0, 0)).write(tmp_path)
    assert "tensor 'blk.0.odd'" in command.refuses(path)


@pytest.mark.parametrize(
    ("dimensions", "offset", "said"),
    [
        ([8], 13, "offset 13; accepted: multiples of the alignment, 32"),
        ([8], 96, "ends at byte"),
        ([25], 0, "ends at byte"),
        ([8], 2**64 - 32, "ends at byte"),
    ],
)
def test_row_04_tensors_past_the_end_or_misaligned(
    tmp_path: Path, dimensions: list[int], offset: int, said: str
) -> None:
    message = refused(with_tensors(tensor_entry("blk.0.odd", dimensions, 0, offset)).write(tmp_path))
    assert "tensor 'blk.0.odd'" in message
    assert said in message


def test_row_04_overlapping_tensors(command: Command, tmp_path: Path) -> None:
    one = tensor_entry("one", [8, 2], 0, 0)
    path = with_tensors(one, tensor_entry("same", [8, 2], 0, 0)).write(tmp_path)
    assert "tensors 'one' and 'same' overlap" in refused(path)
    path = with_tensors(tensor_entry("two", [8], 0, 32), one).write(tmp_path)
    assert "tensors 'one' and 'two' overlap" in command.refuses(path)


# -------------------------------------------------------------------- 5, 6: alignment, names, types


@pytest.mark.parametrize("alignment", [0, 1, 4, 13, 48, 2**17, 2**31, 2**32 - 1])
def test_row_05_alignment(tmp_path: Path, alignment: int) -> None:
    path = Gguf().with_keys(key_value("general.alignment", U32, u32(alignment))).write(tmp_path)
    assert f"general.alignment is {alignment} " in refused(path)


@pytest.mark.parametrize(
    ("kind", "value"), [(10, u64(32)), (5, u32(32)), (6, struct.pack("<f", 32)), (STRING, string("32"))]
)
def test_row_05_alignment_of_another_type(tmp_path: Path, kind: int, value: bytes) -> None:
    path = Gguf().with_keys(key_value("general.alignment", kind, value)).write(tmp_path)
    assert f"of type {kind}" in refused(path)


def test_row_05_what_a_user_sees_of_it(command: Command, tmp_path: Path) -> None:
    path = Gguf().with_keys(key_value("general.alignment", U32, u32(0))).write(tmp_path)
    assert "general.alignment is 0 " in command.refuses(path)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (key_value("llama.block_count", U32, u32(2)), "key 'llama.block_count' stands twice"),
        (key_value("k", 13, u32(2)), "key 'k' has value type 13"),
        (key_value("k", 2**32 - 1, u32(2)), "value type 4294967295"),
        (key_value("k", ARRAY, u32(ARRAY) + u64(1) + u32(U32) + u64(0)), "item type 9"),
        (key_value("k", ARRAY, u32(77) + u64(0)), "item type 77"),
        (key_value("a\n\x1b[31mb", 13, u32(2)), r"key 'a\n\x1b[31mb'"),
    ],
)
def test_row_06_duplicate_keys_and_unknown_types_of_keys(tmp_path: Path, extra: bytes, said: str) -> None:
    assert said in refused(Gguf(data=bytes(1 << 17)).with_keys(extra).write(tmp_path))


@pytest.mark.parametrize(
    ("dimensions", "kind", "said"),
    [
        ([8], 28, "GGUF type F64 is not supported; accepted: F32, F16, Q4_0"),
        ([256], 16, "GGUF type IQ2_XXS is not supported; accepted: F32"),
        ([256], 19, "GGUF type IQ1_S is not supported"),
        ([256], 31, "GGUF type Q4_0_4_4 is not supported"),
        ([8], 99, "GGUF type number 99 is not supported; accepted: F32"),
        ([8], 2**32 - 1, "GGUF type number 4294967295"),
        ([31], 8, "multiple of 32 for Q8_0"),
        ([48], 20, "multiple of 32 for IQ4_NL"),
        ([576], 12, "multiple of 256 for Q4_K"),
        ([255, 256], 35, "multiple of 256 for TQ2_0"),
    ],
)
def test_row_06_unknown_types_of_tensors(tmp_path: Path, dimensions: list[int], kind: int, said: str) -> None:
    message = refused(with_tensors(tensor_entry("blk.0.odd", dimensions, kind, 0)).write(tmp_path))
    assert "tensor 'blk.0.odd'" in message
    assert said in message


def test_row_06_duplicate_tensors(command: Command, tmp_path: Path) -> None:
    twice = (tensor_entry("one", [8, 2], 0, 0), tensor_entry("one", [8], 0, 64))
    assert "tensor 'one' stands twice" in command.refuses(with_tensors(*twice).write(tmp_path))


# ------------------------------------------------------------------------------------ 7: safetensors


def refused_weights(folder: Path, header: dict[str, Any] | bytes, data: bytes = SOUND_DATA) -> str:
    return refused(write_folder(folder, safetensors_bytes(header, data)))


@pytest.mark.parametrize("length", [0, 1, 10_000, 100_000_001, 2**31, 2**63 - 1, 2**63, LARGEST])
def test_row_07_header_lengths(tmp_path: Path, length: int) -> None:
    folder = write_folder(tmp_path / "m", safetensors_bytes(SOUND_HEADER, SOUND_DATA, length))
    assert f"its header has {length} bytes" in refused(folder)


def test_row_07_a_header_over_its_limit_is_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", struct.pack("<Q", reader.HEADER_LIMIT_BYTES + 1))
    os.truncate(folder / "model.safetensors", reader.HEADER_LIMIT_BYTES + 9)
    tracemalloc.start()
    assert "accepted: 2 to 100000000" in refused(folder)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"[]      ", "a JSON list"),
        (b"{nonsense}", "not valid JSON"),
        (b'{"a": "\xff\xfe"}', "not UTF-8 at byte 7"),
        (b'{"a": {}, "a": {}}', "'a' stands twice"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1}', "no sound dtype, shape and data_offsets"),
        (b'{"a\\n\\ud800": 1}', r"'a\n\ud800'"),
    ],
)
def test_row_07_headers_that_are_not_what_they_should_be(tmp_path: Path, header: bytes, said: str) -> None:
    assert said in refused_weights(tmp_path / "m", header)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"dtype": value} for value in (4, None, "F16")),
        *(
            {"shape": value}
            for value in ("2", [2.0, 8], [-2, -8], [True, 16], [2**64, 8], {}, [2, 0], [2, 7])
        ),
        *({"shape": value} for value in ([2] + [1] * 8 + [8], [2**62, 2**62])),
        *({"data_offsets": value} for value in ([0], [0, 64, 64], [64, 0], [-64, 0], [0, 97], [None, 64])),
        {"data_offsets": [2**62, 2**62 + 64]},
    ],
)
def test_row_07_wrong_fields_name_the_tensor(tmp_path: Path, wrong: dict[str, Any]) -> None:
    header = {**SOUND_HEADER, "one": {**SOUND_HEADER["one"], **wrong}}
    assert "tensor 'one'" in refused_weights(tmp_path / "m", header)


def test_row_07_overlaps_and_holes(command: Command, tmp_path: Path) -> None:
    one = SOUND_HEADER["one"]
    same = {"one": one, "again": one}
    assert "overlap" in refused_weights(tmp_path / "m", same, bytes(64))
    hole = {"one": one, "two": field_of("F32", [8], 68, 100)}
    assert "hole of 4 bytes before tensor 'two'" in refused_weights(tmp_path / "m", hole, bytes(100))
    late = {"one": field_of("F32", [2, 8], 4, 68)}
    assert "hole of 4 bytes before tensor 'one'" in refused_weights(tmp_path / "m", late, bytes(68))
    assert "the end of the file" in refused_weights(tmp_path / "m", {"one": one}, bytes(65))
    overlap = safetensors_bytes({"one": one, "two": field_of("F32", [8], 60, 92)}, bytes(92))
    assert "tensors 'one' and 'two' overlap" in command.refuses(write_folder(tmp_path / "m", overlap))


# -------------------------------------------------------------------------- 8: out of the folder


def write_shards(folder: Path, weight_map: dict[str, str], shards: dict[str, list[str]]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for file, names in shards.items():
        safetensors.numpy.save_file({name: np.zeros(2, np.float32) for name in names}, folder / file)
    return folder


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors", "sub/../../outside.safetensors", "{}/outside.safetensors", "/etc/passwd",
        "link.safetensors", "linked/outside.safetensors", "missing.safetensors", "config.json",
        "a\nb.safetensors", "a\0b.safetensors", "\ud800.safetensors", "", ".", "..",
    ],
)  # fmt: skip
def test_row_08_shards_stay_in_the_folder(tmp_path: Path, shard: str) -> None:
    """What lies outside is sound, so that nothing but its place can be the reason."""
    shard = shard.replace("{}", str(tmp_path))
    folder = write_shards(tmp_path / "m", {"a": "good.safetensors", "b": shard}, {"good.safetensors": ["a"]})
    safetensors.numpy.save_file({"b": np.zeros(2, np.float32)}, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    message = refused(folder)
    if "outside" in shard or shard == "link.safetensors":
        assert "leads out of the folder" in message


def test_row_08_other_files_stay_in_the_folder(command: Command, tmp_path: Path, tiny_llama: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        line = command.fails("serve", folder, "--port", 0)
        assert f"file name '{name}' leads out of the folder" in line
        assert command.fails("run", "--model", folder, "hi") == line
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


# ------------------------------------------------------------------------- 9: pickles and code


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "model.pkl"]
)
def test_row_09_pickles_are_refused_by_name(command: Command, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb).close()
    marker.unlink()  # it would have worked
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / name).write_bytes(bomb)
    assert refused(folder / name)
    if name == "pytorch_model.bin":
        line = command.refuses(folder)
        assert "'pytorch_model.bin'" in line
        assert "only safetensors and GGUF are read" in line
        assert "only safetensors and GGUF are read" in command.refuses(folder / name)
    else:
        assert refused(folder)
    assert not marker.exists()


@pytest.mark.parametrize("known", [True, False])
def test_row_09_code_beside_a_model_is_never_run(
    command: Command, tmp_path: Path, tiny_llama: Path, known: bool
) -> None:
    """A family that we have runs without its code; one that is nothing but its code is refused."""
    folder, marker = shutil.copytree(tiny_llama, tmp_path / "m"), tmp_path / "ran"
    for module in ("modeling_evil", "configuration_evil", "tokenization_evil", "tokenizer", "config"):
        (folder / f"{module}.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    config |= {"auto_map": names, "trust_remote_code": True}
    config["model_type"] = config["model_type"] if known else "evil"
    (folder / "config.json").write_text(json.dumps(config))
    sidecar = json.loads((folder / "tokenizer_config.json").read_text())
    sidecar["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(sidecar))
    if known:
        with LLM(str(folder), threads=1) as llm:
            assert llm.generate(["hi"])
    else:
        assert "model_type is 'evil'" in command.fails("run", "--model", folder, "hi")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.metadata["auto_map"] == names
    assert not marker.exists()
    assert not [name for name in sys.modules if "evil" in name]
