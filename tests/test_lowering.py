"""The CPU lowering: covers every operation once on every family and format, and its work adds up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from conftest import FAMILIES
from running import load, load_program
from tiny_models import TinyModel

from ridgeline.execution.cpu.lower import lower
from ridgeline.execution.lowering import Footprint, Launch, WorkModel, borders, check_lowering, launch_work
from ridgeline.model.program import Attention, Program, StepLoad, StoreKV
from ridgeline.precision.formats import DEVICE_FORMATS
from ridgeline.types import Work

Tiny = Callable[[str], TinyModel]
FOOTPRINT = Footprint(
    weight_bytes=lambda name: 1000 + len(name),
    weight_row_bytes=lambda name: 10 + len(name),
    value_row_bytes=lambda value: 3 * value.width,
    slot_bytes=lambda group: 7 + group,
)


@pytest.mark.parametrize("weights", DEVICE_FORMATS["cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_operation_is_covered_once(tiny: Tiny, family: str, weights: str) -> None:
    program, store = load_program(tiny(family).folder, weights)
    store.close()
    launches = lower(program)
    covered = [op.out.name for launch in launches for op in launch.covers]
    assert sorted(covered) == sorted(op.out.name for op in program.operations)
    check_lowering(program, launches)


@pytest.mark.parametrize("weights", ["W8A8-g32", "W16A16"])
def test_a_llama_layer_is_eight_launches(tiny: Tiny, weights: str) -> None:
    program, store = load_program(tiny("llama3").folder, weights)
    store.close()
    layers = sum(len(group.layers) for group in program.groups)
    assert len(lower(program)) == 8 * layers + 4  # and embedding, final norm, head, sample


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_last_layer_only_keys_and_values_are_of_every_row(tiny: Tiny, family: str) -> None:
    """And what they are made of: its projections and their norms. Of the other layers, all is."""
    program, launches = launches_of(tiny, family)
    last = f"layers.{max(max(group.layers) for group in program.groups)}."
    inputs = ("q", "k", "v", "attention_norm", "feed_forward_norm")
    for launch in launches:
        names = [op.out.name for op in launch.covers]
        if launch.only_outputs:
            assert all(name.startswith(last) for name in names)
            assert not any(isinstance(op, StoreKV) for op in launch.covers)
        elif names[0].startswith(last):
            makes_memory = any(isinstance(op, StoreKV) for op in launch.covers)
            assert makes_memory or names[0].removeprefix(last).split(".")[0].startswith(inputs)
    attention = next(one for one in launches[::-1] if isinstance(one.covers[0], Attention))
    assert attention.only_outputs


def launches_of(tiny: Tiny, family: str = "llama") -> tuple[Program, list[Launch]]:
    program, store = load_program(tiny(family).folder, "W8A8-g32")
    store.close()
    return program, list(lower(program))


def test_checker_finds_what_is_wrong(tiny: Tiny) -> None:
    program, launches = launches_of(tiny)
    with pytest.raises(ValueError, match="covered by no launch"):
        check_lowering(program, launches[:-1])
    with pytest.raises(ValueError, match="covered twice"):
        check_lowering(program, [*launches, launches[3]])
    with pytest.raises(ValueError, match="is read early"):
        check_lowering(program, [launches[1], launches[0], *launches[2:]])
    stream = launches[0].covers[0].out
    early = replace(launches[2], overwrites=((launches[2].covers[0].out, stream),))
    with pytest.raises(ValueError, match="does not read and rewrite"):
        check_lowering(program, [*launches[:2], early, *launches[3:]])


def total_work(program: Program, launches: list[Launch], load: StepLoad) -> Work:
    crossed = zip(launches, borders(program, launches), strict=True)
    return sum((launch_work(launch, border, load, FOOTPRINT) for launch, border in crossed), Work())


@pytest.mark.parametrize("family", FAMILIES)
def test_work_is_linear_and_keeps_the_arithmetic(tiny: Tiny, family: str) -> None:
    program, launches = launches_of(tiny, family)
    model = WorkModel.of(program, launches, FOOTPRINT)
    random = np.random.default_rng(3)
    for outputs in (0, 1, 5):
        rows = int(random.integers(5, 50))
        pairs, slots = (tuple(random.integers(1, 999, len(program.groups)).tolist()) for _ in range(2))
        seen = [tuple(n // 3 for n in counts) for counts in (pairs, slots)]
        load_ = StepLoad(rows, outputs, pairs, slots, 3, *seen)
        summed = total_work(program, launches, load_)
        assert model.at(load_) == summed
        parts = model.parts(load_)
        attending = [one for one in launches if any(isinstance(op, Attention) for op in one.covers)]
        crossed = dict(zip(map(id, launches), borders(program, launches), strict=True))
        attention = Work.total(launch_work(one, crossed[id(one)], load_, FOOTPRINT) for one in attending)
        assert (parts.attention, parts.total) == (attention, summed)
        assert (parts.rows, parts.outputs, parts.sequences) == (rows, outputs, 3)
        spared = sum(launch.only_outputs for launch in launches)
        assert len(launches) - parts.launches - (0 if outputs else spared) in ((0,) if outputs else (3, 4))
        groups, layers = range(len(program.groups)), [len(group.layers) for group in program.groups]
        stored = sum(layers[g] * (rows + slots[g]) * FOOTPRINT.slot_bytes(g) for g in groups)
        for one in launches:
            for op in one.covers:
                if isinstance(op, Attention) and one.only_outputs:
                    unseen = slots[op.group] - load_.of_outputs.slots[op.group]
                    stored -= unseen * FOOTPRINT.slot_bytes(op.group)
        assert parts.kv_bytes == stored
        counted = [
            (op, load_.of_outputs if one.only_outputs else load_) for one in launches for op in one.covers
        ]
        assert summed.ops == sum(op.work(seen).ops for op, seen in counted)


def test_figures_beyond_64_bits_are_exact(tiny: Tiny) -> None:
    program, launches = launches_of(tiny)
    model = WorkModel.of(program, launches, FOOTPRINT)
    load_ = StepLoad(2**20, 1, (2**60,), (2**20,))
    assert model.at(load_) == total_work(program, launches, load_)
    assert model.at(load_).ops > 2**64


def test_fusion_moves_fewer_bytes(tiny: Tiny) -> None:
    program, launches = launches_of(tiny)
    unfused = [Launch((op,), ()) for op in program.operations]
    load_ = StepLoad(16, 16, (136,), (16,))
    moved = [total_work(program, some, load_).bytes for some in (launches, unfused)]
    assert moved[0] < moved[1]


@pytest.mark.parametrize(("weights", "bytes_each"), [("W8A8-g32", 34 / 32), ("W16A16", 2)])
def test_weights_are_read_once_a_step(tiny: Tiny, weights: str, bytes_each: float) -> None:
    """A decode step's traffic is the packed weights, plus what its rows and slots add."""
    loaded = load(tiny("llama3").gguf, "portable", weights)
    model = loaded.handle.work
    held = sum(
        w.shape[0] * w.shape[1] for w in loaded.program.weights() if len(w.shape) == 2 and w.name != "embed"
    )
    assert model.parts(StepLoad(1, 1, (1,), (1,))).weight_bytes == pytest.approx(held * bytes_each, rel=0.1)
