"""GGUF files that are split into parts: by the gguf package's writer, and wrong in one place each."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_files import ARRAY, U32, Gguf, key_value, open_descriptors, string_array, tensor_entry, u32
from conftest import FAMILIES
from gguf import quants
from tiny_models import TinyModel, gguf_tensors

from ridgeline.apps.describe import describe
from ridgeline.model.build import decoder
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.families import read_spec
from ridgeline.model.weights import Weights
from ridgeline.types import CheckpointError

U16, I32 = 2, 5


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
    assert str(caught.value).isprintable()
    return str(caught.value)


def name_of(part: int, parts: int = 3) -> str:
    return f"tiny-{part:05d}-of-{parts:05d}.gguf"


# -------------------------------------------------------------------------------------- sound files


def split_with_gguf(model: TinyModel, folder: Path, most: int) -> list[Path]:
    """The model's GGUF, rewritten by the gguf package with at most that many tensors in a part."""
    source = gguf.GGUFReader(model.gguf)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "", split_max_tensors=most)
    writer.kv_data[0].clear()
    for key, field in source.fields.items():
        if not key.startswith("GGUF."):
            array = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], array)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("tiny-*.gguf"))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_part_opens_the_whole_model(
    tiny: Callable[[str], TinyModel], tmp_path: Path, family: str
) -> None:
    model = tiny(family)
    expected = gguf_tensors(model.torch_model)
    paths = split_with_gguf(model, tmp_path, most=9)
    assert len(paths) > 2
    with open_checkpoint(model.gguf) as whole:
        keys, names, spec = dict(whole.metadata), set(whole.tensors), read_spec(whole)
    assert names >= set(expected)
    assert describe(paths[1]).size_bytes == sum(path.stat().st_size for path in paths)
    for path in [*paths, tmp_path]:
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.path == paths[0]
            assert {key: checkpoint.metadata[key] for key in keys} == keys
            assert set(checkpoint.tensors) == names
            for name, values in expected.items():
                np.testing.assert_array_equal(checkpoint.tensor(name).dequantise(), values)
                checkpoint.release(name)
            assert read_spec(checkpoint) == spec
            assert set(Weights(spec, decoder(spec), checkpoint).formats)


def test_parts_of_other_storages_and_alignments(tmp_path: Path) -> None:
    kinds = ["Q8_0", "Q5_0", "TQ2_0", "F16"]
    rng, expected = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama", split_max_tensors=1)
    for name in kinds:
        kind = gguf.GGMLQuantizationType[name]
        data = quants.quantize(rng.standard_normal((3, 256)).astype(np.float32), kind)
        expected[name] = quants.dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / name_of(2, 4)) as checkpoint:
        assert list(checkpoint.tensors) == kinds
        for name, values in expected.items():
            np.testing.assert_array_equal(checkpoint.tensor(name).dequantise(), values.reshape(3, 256))


def part(
    number: int, tensor: str | None, count: int = 3, tensors: int = 2, alignment: int | None = None
) -> Gguf:
    """Part `number`, from 0, with a tensor of eight values that are its number."""
    split: tuple[bytes, ...] = (
        key_value("split.no", U16, struct.pack("<H", number)),
        key_value("split.count", U16, struct.pack("<H", count)),
        key_value("split.tensors.count", I32, struct.pack("<i", tensors)),
    )
    if alignment is not None:
        split += (key_value("general.alignment", U32, u32(alignment)),)
    entries = (tensor_entry(tensor, [8], 0, 0),) if tensor else ()
    keys = (*Gguf().keys, *split) if number == 0 else split
    data = struct.pack("<8f", *[number] * 8) if tensor else b""
    return Gguf(keys=keys, entries=entries, data=data, alignment=alignment or 32)


def write_parts(folder: Path, *changed: tuple[int, Gguf]) -> list[Path]:
    """Three parts, of which the first holds no tensor; `changed` replaces some."""
    parts = {0: part(0, None), 1: part(1, "one"), 2: part(2, "two", alignment=1024)} | dict(changed)
    return [each.write(folder, name_of(number + 1)) for number, each in parts.items()]


def test_a_first_part_without_tensors_and_alignments_of_their_own(tmp_path: Path) -> None:
    for path in write_parts(tmp_path):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.metadata["tokenizer.ggml.tokens"] == ["a", "b", "é"]
            assert [checkpoint.tensor(name).dequantise()[0] for name in ("one", "two")] == [1, 2]


def test_all_parts_are_closed_together(tmp_path: Path) -> None:
    before = open_descriptors()
    checkpoint = open_checkpoint(write_parts(tmp_path)[0])
    assert open_descriptors() == before + 3
    tensor = checkpoint.tensor("two")
    checkpoint.close()
    assert tensor.dequantise()[0] == 2
    for name in ("one", "two"):
        checkpoint.release(name)
        with pytest.raises(CheckpointError, match="closed"):
            checkpoint.tensor(name)
    del tensor
    assert open_descriptors() == before


@pytest.mark.parametrize("count", [0, 1])
def test_a_model_of_one_part_may_have_any_name(tmp_path: Path, count: int) -> None:
    path = Gguf().with_keys(key_value("split.count", U16, struct.pack("<H", count))).write(tmp_path)
    open_checkpoint(path).close()


# -------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(tmp_path: Path, missing: int) -> None:
    paths = write_parts(tmp_path)
    paths[missing].unlink()
    for path in paths:
        if path != paths[missing]:
            message = refused(path)
            assert f"has no '{name_of(missing + 1)}', which is part {missing + 1} of 3" in message


@pytest.mark.parametrize("name", ["model.gguf", name_of(1), name_of(2, 4), "tiny-2-of-3.gguf"])
def test_a_name_that_contradicts_the_part(tmp_path: Path, name: str) -> None:
    path = part(1, "one").write(tmp_path, name)
    message = refused(path)
    assert f"{name} says that it is part 2 of a GGUF split into 3" in message
    assert "accepted: a name that ends in -00002-of-00003.gguf" in message


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (part(2, "one"), "split.no is 2; accepted: 1"),
        (part(1, "one", count=4), "split.count is 4; accepted: 3"),
        (part(1, "one", tensors=5), "split.tensors.count is 5; accepted: 2"),
        (part(1, "two"), f"tensor 'two' stands in {name_of(2)!r} too"),
        (Gguf(), "split.count is missing"),
        (Gguf().with_keys(key_value("split.count", ARRAY, string_array(["3"]))), "split.count is ['3']"),
        (Gguf(magic=b"GGML"), "starts with b'GGML'"),
        (Gguf(entries=(tensor_entry("one", [8], 16, 0),)), "GGUF type IQ2_XXS"),
        (part(1, "one", alignment=24), "general.alignment is 24"),
    ],
)
def test_a_part_that_contradicts_the_others_is_named(tmp_path: Path, wrong: Gguf, reason: str) -> None:
    paths = write_parts(tmp_path, (1, wrong))
    message = refused(paths[0])
    assert reason in message
    assert name_of(3 if "stands in" in reason else 2) in message


@pytest.mark.parametrize("total", [0, 1, 3, 2**31 - 1])
def test_the_number_of_tensors_must_be_that_of_all_parts(tmp_path: Path, total: int) -> None:
    parts = [(0, part(0, None, tensors=total)), (1, part(1, "one", tensors=total))]
    paths = write_parts(tmp_path, *parts, (2, part(2, "two", tensors=total)))
    message = refused(paths[1])
    assert f"split.tensors.count is {total}; its 3 parts hold 2 tensors" in message


def test_numbers_beyond_the_parts(tmp_path: Path) -> None:
    path = part(3, "one").write(tmp_path, name_of(1))
    assert "split.no is 3; accepted: 0 to 2" in refused(path)
    huge = Gguf().with_keys(key_value("split.count", 10, struct.pack("<Q", 2**63)))
    assert f"split.count is {2**63}; accepted: 0 to 99999" in refused(huge.write(tmp_path, name_of(1)))


def test_a_part_that_is_cut_or_empty_is_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    whole = paths[2].read_bytes()
    for length in (0, 3, 40, len(whole) - 1):
        paths[2].write_bytes(whole[:length])
        assert name_of(3) in refused(paths[0])
    paths[2].unlink()
    paths[2].mkdir()
    assert f"{name_of(3)} is not a file" in refused(paths[0])


def test_random_damage_to_one_part(tmp_path: Path) -> None:
    """A line that says why, or a sound model; and nothing stays open either way."""
    rng, paths = random.Random(0), write_parts(tmp_path)
    sound = [path.read_bytes() for path in paths]
    opened, messages = 0, []
    for _ in range(600):
        number = rng.randrange(3)
        raw = bytearray(sound[number])
        for _ in range(rng.choice((1, 2, 4))):
            raw[rng.randrange(len(raw) - 32)] = rng.choice((0, 1, 2, 3, 127, 255))
        paths[number].write_bytes(raw)
        try:
            with open_checkpoint(paths[rng.randrange(3)]) as checkpoint:
                assert all(checkpoint.tensor(name).dequantise().size for name in checkpoint.tensors)
                opened += 1
        except CheckpointError as error:
            messages.append(str(error))
        paths[number].write_bytes(sound[number])
    assert 50 < opened < 550
    assert all(message.isprintable() for message in messages)
