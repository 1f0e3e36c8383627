"""What every executor does alike below the engine: page copies, segments, steps without outputs, recycled
pages, odd sizes, and the storages of GGUF files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from page_moves import there_and_back
from running import PAGES, Loaded, assert_executors_agree, load, relative_error
from tiny_experts import make_sparse
from tiny_models import VOCABULARY, TinyModel, write_gguf

from ridgeline.config import KV_FORMATS, WEIGHT_FORMATS
from ridgeline.execution.base import KV_STORAGES, page_bytes, slot_bytes
from ridgeline.execution.cpu.executor import CpuExecutor
from ridgeline.execution.reference import ReferenceExecutor
from ridgeline.model.program import MemoryGroup
from ridgeline.native import isa_levels
from ridgeline.precision.formats import FORMATS
from ridgeline.types import PageCopy, Segment, SequenceRows

Tiny = Callable[[str], TinyModel]
TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, 70).tolist()
EXECUTORS = ("reference", *isa_levels())
KINDS = pytest.mark.parametrize("kind", EXECUTORS)


def poison(loaded: Loaded) -> None:
    """Put NaN into every page."""
    if isinstance(loaded.executor, ReferenceExecutor):
        for memory in loaded.executor._memory.values():
            memory.fill(np.nan)
    elif isinstance(loaded.executor, CpuExecutor):
        for pool in loaded.executor._pools.values():
            if pool.dtype == np.uint8:
                pool.fill(0xFF)  # codes of -1, whose scales are NaN
            else:
                pool.fill(0x7FFF if pool.dtype == np.uint16 else np.nan)


def test_names_of_formats_are_the_same_in_every_room() -> None:
    assert set(WEIGHT_FORMATS) == {"auto", *FORMATS}
    assert set(KV_FORMATS) == {"auto", *KV_STORAGES}


# ------------------------------------------------------------------------------------------- pages


@KINDS
@pytest.mark.parametrize("kv_format", KV_STORAGES)
def test_copied_pages_stand_for_their_source(tiny: Tiny, kind: str, kv_format: str) -> None:
    loaded = load(tiny("gemma3").folder, kind, "W32A32", kv_format)
    groups = range(len(loaded.program.groups))
    loaded.run(TOKENS[:20], pages=[0, 1])
    loaded.run(TOKENS[30:60], pages=[5, 6])  # what the copies overwrite
    moves = [PageCopy(g, *pair) for g in groups for pair in ((0, 5), (1, 9), (9, 6))]
    loaded.executor.transfer(moves)
    expected = loaded.run(TOKENS[20:23], 20, pages=[0, 1])
    np.testing.assert_array_equal(loaded.run(TOKENS[20:23], 20, pages=[5, 6]), expected)
    loaded.executor.transfer([PageCopy(0, 40, 5)])
    changed = loaded.run(TOKENS[20:23], 20, pages=[5, 6])  # page 40 was never written
    assert not np.array_equal(changed, expected, equal_nan=False)
    np.testing.assert_array_equal(loaded.run(TOKENS[20:23], 20, pages=[0, 1]), expected)
    loaded.executor.close()


@KINDS
@pytest.mark.parametrize("kv_format", KV_STORAGES)
def test_spilled_pages_come_back_bit_for_bit(tiny: Tiny, kind: str, kv_format: str) -> None:
    loaded = load(tiny("gemma3").folder, kind, "W32A32", kv_format)
    held = None if kind == "reference" else tuple(page_bytes(g, kv_format) for g in loaded.program.groups)
    there_and_back(loaded, held)
    assert kind in loaded.executor.numerics
    loaded.executor.close()


@KINDS
@pytest.mark.parametrize("kv_format", KV_STORAGES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_pages_held_before_does_not_matter(tiny: Tiny, family: str, kind: str, kv_format: str) -> None:
    loaded = load(tiny(family).folder, kind, "W32A32", kv_format)
    expected = loaded.run(TOKENS)
    poison(loaded)
    for start, stop in ((0, 7), (7, 16), (16, 17), (17, 50), (50, 70)):
        seen = loaded.run(TOKENS[start:stop], start)
        if kind == "reference":  # its matrix products may differ in the last place
            assert relative_error(seen, expected[start:stop]) < 1e-4 + 0.05 * (kv_format != "KV32")
        else:
            np.testing.assert_array_equal(seen, expected[start:stop])
    loaded.executor.close()


@pytest.mark.parametrize("weights", ["W32A32", "W8A8-g32"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "odd", "gpt-oss"])
def test_kv8_rounds_like_the_reference(tiny: Tiny, tmp_path: Path, family: str, weights: str) -> None:
    model = make_sparse(family, tmp_path) if family == "gpt-oss" else tiny(family)
    assert_executors_agree(model.folder, weights, [token % 50 for token in TOKENS], "KV8")


@KINDS
def test_kv8_is_near_what_it_rounds(tiny: Tiny, kind: str) -> None:
    exact = load(tiny("gemma3").folder, kind, "W32A32", "KV32").run(TOKENS)
    seen = load(tiny("gemma3").folder, kind, "W32A32", "KV8").run(TOKENS)
    assert 1e-5 < relative_error(seen, exact) < 0.05


@pytest.mark.parametrize("head_dim", [6, 64])
def test_bytes_of_a_token(head_dim: int) -> None:
    group = MemoryGroup("full", (0, 1), 3, head_dim)
    for kv_format, value_bytes, scale_bytes in (("KV8", 1, 4), ("KV16", 2, 0), ("KV32", 4, 0)):
        each = 2 * 3 * (value_bytes * head_dim + scale_bytes)
        assert slot_bytes(group, kv_format) == each
        assert page_bytes(group, kv_format) == 2 * 16 * each


@KINDS
def test_entries_of_pages_given_back_are_never_read(tiny: Tiny, kind: str) -> None:
    """Window groups keep the table's length: what stands where pages were is not even a page."""
    loaded = load(tiny("gemma3").folder, kind, "W32A32", "KV32")
    loaded.run(TOKENS[:60])
    expected = loaded.run(TOKENS[60:62], 60)
    tables = []
    for group in loaded.program.groups:
        gone = 0 if group.window is None else (60 - group.window) // 16
        tables.append((*[PAGES + 1000] * gone, *range(gone, PAGES)))
    assert PAGES + 1000 in {table[1] for table in tables}
    rows = SequenceRows(TOKENS[60:62], 60, (Segment(tuple(tables), 62),), (0, 1))
    np.testing.assert_array_equal(loaded.logits(rows), expected)
    loaded.executor.close()


@KINDS
@pytest.mark.parametrize("weights", ["W8A8-g32", "W16A16"])
def test_steps_without_outputs_only_write(tiny: Tiny, weights: str, kind: str) -> None:
    loaded = load(tiny("llama").folder, kind, weights)
    expected = loaded.run(TOKENS[:40])[-1:]
    silent = loaded.logits(loaded.rows(TOKENS[:39], pages=[7, 8, 9], outputs=False))
    assert silent.shape == (0, VOCABULARY)
    error = relative_error(loaded.run(TOKENS[39:40], 39, pages=[7, 8, 9]), expected)
    assert error == 0 if kind != "reference" else error < 0.05
    loaded.executor.close()


# ---------------------------------------------------------------------------------------- segments


def over_segments(loaded: Loaded, bias: float, causal: bool) -> np.ndarray:
    """Rows that stand at position 24 and see two prompts that were run on their own before."""
    tables = [tuple((page, page + 1) for _ in loaded.program.groups) for page in (0, 2, 4)]
    loaded.run(TOKENS[:20], pages=[0, 1])
    loaded.run(TOKENS[20:29], pages=[2, 3])
    segments = (
        Segment(tables[0], 20, first_position=3, bias=bias),
        Segment(tables[1], 9, first_position=20, bias=-0.25, causal=causal),
        Segment(tables[2], 4, first_position=24),
    )
    shorter = (*segments[:2], replace(segments[2], length=3))
    first = loaded.logits(SequenceRows(TOKENS[40:43], 0, shorter, (0, 2)))
    company = loaded.rows(TOKENS[50:60], pages=[10])
    second = loaded.logits(company, SequenceRows(TOKENS[43:44], 3, segments, (0,)))
    return np.concatenate([first, second])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_see_every_segment(tiny: Tiny, family: str, causal: bool) -> None:
    loaded = [load(tiny(family).folder, kind, "W32A32", "KV32") for kind in EXECUTORS]
    expected = over_segments(loaded[0], 0.5, causal)
    for other in loaded[1:]:
        assert relative_error(over_segments(other, 0.5, causal), expected) < 1e-4
    for bias, mask in ((0.0, causal), (0.5, not causal)):
        assert relative_error(over_segments(loaded[0], bias, mask), expected) > 1e-3
    for each in loaded:
        each.executor.close()


# ------------------------------------------------------------------------------ sizes and storages


@KINDS
@pytest.mark.parametrize("file", ["folder", "gguf"])
@pytest.mark.parametrize("name", ["odd", "capped"])
def test_odd_sizes_equal_transformers(tiny: Tiny, name: str, file: str, kind: str) -> None:
    model = tiny(name)
    tokens = [token % 50 for token in TOKENS]
    seen = load(getattr(model, file), kind, "W32A32", "KV32").run(tokens)
    assert relative_error(seen, model.logits(tokens)) < 1e-4
    if name == "capped":
        assert 1.5 < np.abs(seen).max() <= 2.0


@pytest.mark.parametrize("weights", ["W8A8-g32", "W4A8-g32", "W16A16"])
def test_odd_sizes_quantise_like_the_reference(tiny: Tiny, weights: str) -> None:
    assert_executors_agree(tiny("odd").folder, weights, [token % 50 for token in TOKENS])


def through(model: TinyModel, storage: gguf.GGMLQuantizationType) -> TinyModel:
    """The model with the matrices that `write_gguf` quantises rounded by the gguf package."""
    rounded = copy.deepcopy(model.torch_model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim == 2 and parameter.shape[1] % 32 == 0:
                blocks = gguf.quants.quantize(parameter.numpy(), storage)
                parameter.copy_(torch.tensor(gguf.quants.dequantize(blocks, storage)))
    return TinyModel(model.name, rounded, model.folder, model.gguf)


@pytest.mark.parametrize("storage", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_storages_of_gguf_files(tiny: Tiny, tmp_path: Path, family: str, storage: str) -> None:
    kind = gguf.GGMLQuantizationType[storage]
    path = tmp_path / "model.gguf"
    write_gguf(tiny(family).torch_model, path, kind)
    expected = through(tiny(family), kind).logits(TOKENS)
    for executor in EXECUTORS:
        assert relative_error(load(path, executor, "W32A32", "KV32").run(TOKENS), expected) < 1e-4
    assert_executors_agree(path, "auto", TOKENS)
