"""Programs with experts on the CPU: equal to the reference, alone and in any batch, lowered whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from native_oracles import LEVELS
from running import MAX_ROWS, PAGES, Loaded, assert_agree, make_executor, relative_error

from ridgeline.execution.base import Limits
from ridgeline.execution.cpu.executor import CpuExecutor
from ridgeline.execution.cpu.launches import ActivateLaunch, CombineLaunch, ExpertLaunch, RouteLaunch
from ridgeline.execution.cpu.lower import lower
from ridgeline.execution.lowering import WorkModel, borders, launch_work
from ridgeline.model.build import decoder
from ridgeline.model.matrix_reader import MatrixReader
from ridgeline.model.program import (
    Embed,
    ExpertLinear,
    Linear,
    Program,
    StepLoad,
)
from ridgeline.model.rewrite import with_precision
from ridgeline.model.spec import (
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)
from ridgeline.precision.formats import FORMATS, Format
from ridgeline.precision.quantise import quantise_tensor
from ridgeline.precision.storage import Tensor, float32_tensor
from ridgeline.types import Float32Array

TOKENS = np.random.default_rng(0).integers(0, 60, 30).tolist()
ATTENTION = AttentionSpec(4, 2, 32, 32**-0.5, RopeSpec(tuple(10000.0 ** -(np.arange(16) / 16))))
SHARED = FeedForwardSpec(40, "silu", gated=True)


class HeldMatrix(MatrixReader):
    """Reads from memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.storage, self._tensor = tensor.shape, tensor.storage, tensor

    def read(self, expert: int, rows: slice) -> Tensor:
        data = self._tensor.data.reshape(self.experts, self.rows, -1)[expert, rows]
        return Tensor(self.storage, (len(data), self.cols), data)

    def prefetch(self, expert: int, rows: slice) -> None: ...

    def release(self, expert: int, rows: slice) -> None: ...

    def close(self) -> None: ...


class RandomWeights:
    """Stands in for `model.weights.Weights`: normal values, so scaled that every part of a model counts."""

    def __init__(self, program: Program, formats: Mapping[str, str]) -> None:
        """`formats` are by the last part of a matrix's name; "" is for the others."""
        random = np.random.default_rng(1)
        matrices = {op.weight.name for op in program.operations if isinstance(op, Linear | ExpertLinear)}
        matrices |= {op.table.name for op in program.operations if isinstance(op, Embed)}
        self.formats: dict[str, Format] = {
            name: FORMATS[formats.get(name.split(".")[-1], formats[""])] for name in sorted(matrices)
        }
        self._values: dict[str, Float32Array] = {}
        for weight in program.weights():
            scale = 2.0 / np.sqrt(weight.shape[-1]) if len(weight.shape) > 1 else 1.0
            values = random.standard_normal(weight.shape, dtype=np.float32) * np.float32(scale)
            self._values[weight.name] = values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def reader(self, name: str) -> MatrixReader:
        return HeldMatrix(self.matrix(name))

    def matrix(self, name: str) -> Tensor:
        return quantise_tensor(float32_tensor(self._values[name]), self.formats[name], name)

    def vector(self, name: str) -> Float32Array:
        return self._values[name].copy()

    def release(self, name: str) -> None:
        """Nothing is mapped."""


def model(experts: ExpertsSpec, layers: int = 2, **changes: Any) -> ModelSpec:
    attention = replace(ATTENTION, sinks=experts.router_bias, window=12 if experts.router_bias else None)
    layer = replace(LayerSpec(attention, experts), **changes)
    norm = NormSpec("rms", 1e-5)
    return ModelSpec("test", 64, 60, 512, norm, (layer,) * layers, tied_head=True)


def experts(activation: Any = "silu", **changes: Any) -> ExpertsSpec:
    return replace(ExpertsSpec(9, 3, FeedForwardSpec(40, activation, gated=True)), **changes)


SPECS = {
    "plain": model(experts()),
    "shared": model(experts(renormalise=False, shared=SHARED)),
    "biases": model(experts("clamped_silu", expert=FeedForwardSpec(40, "clamped_silu", True, True),
                            router_bias=True)),
    "sandwich": model(experts(chosen=1), post_norms=True),
    "parallel": model(experts("gelu_tanh", count=70), parallel=True, one_norm=True),
}  # fmt: skip


def load(spec: ModelSpec, kind: str, formats: Mapping[str, str], threads: int = 2) -> Loaded:
    program = decoder(spec)
    weights = RandomWeights(program, formats)
    program = with_precision(program, weights.formats)
    executor = make_executor(kind, Limits(MAX_ROWS, (PAGES,) * len(program.groups), "KV32"), threads)
    executor.load(weights)  # type: ignore[arg-type]
    return Loaded(executor, executor.compile(program), program)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", SPECS)
def test_float32_logits_equal_the_reference(name: str, isa: str) -> None:
    expected = load(SPECS[name], "reference", {"": "W32A32"}).run(TOKENS)
    seen = load(SPECS[name], isa, {"": "W32A32"}).run(TOKENS)
    assert expected.std() > 0.3
    assert relative_error(seen, expected) < 1e-5


@pytest.mark.parametrize("formats", [{"": "W8A8-g32"}, {"": "W4A8-g32", "up": "W8A8-g32"}], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_quantised_logits_equal_the_reference(name: str, formats: Mapping[str, str]) -> None:
    assert_agree(lambda kind: load(SPECS[name], kind, formats), TOKENS[:18])


@pytest.mark.parametrize("name", ["shared", "biases"])
def test_bfloat16_logits_equal_the_reference(name: str) -> None:
    assert_agree(lambda kind: load(SPECS[name], kind, {"": "W16A16"}), TOKENS[:12], sixteen=True)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("weights", ["W4A8-g32", "W16A16", "W32A32"])
@pytest.mark.parametrize("name", ["shared", "biases"])
def test_logits_do_not_depend_on_the_batch(name: str, weights: str, isa: str) -> None:
    whole = load(SPECS[name], isa, {"": weights}).run(TOKENS)
    loaded = load(SPECS[name], isa, {"": weights}, threads=1)
    parts = [loaded.run(TOKENS[at:end], at) for at, end in ((0, 1), (1, 12), (12, 29), (29, 30))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    beside = loaded.logits(loaded.rows(TOKENS[::-1], pages=range(10, 20)), loaded.rows(TOKENS))
    np.testing.assert_array_equal(beside[len(TOKENS) :], whole)


# --------------------------------------------------------------------------------------- lowering

LOWERED = {name: load(spec, "portable", {"": "W8A8-g32"}) for name, spec in SPECS.items()}


@pytest.mark.parametrize("name", SPECS)
def test_experts_are_four_launches(name: str) -> None:
    launches = lower(LOWERED[name].program)
    kinds = [type(launch) for launch in launches]
    layers = len(SPECS[name].layers)
    assert kinds.count(RouteLaunch) == kinds.count(CombineLaunch) == layers
    assert kinds.count(ExpertLaunch) == 2 * layers
    pair = next(launch for launch in launches if isinstance(launch, ExpertLaunch))
    assert [type(op).__name__ for op in pair.covers] == [
        "ExpertLinear",
        "ExpertLinear",
        "Activate",
        "Quantise",
    ]
    sums = [launch for launch in launches if isinstance(launch, CombineLaunch)]
    assert {launch.accumulate for launch in sums} == {name != "sandwich"}


@pytest.mark.parametrize("name", SPECS)
def test_work_adds_up(name: str) -> None:
    loaded = LOWERED[name]
    launches = loaded.handle.launches
    assert isinstance(loaded.executor, CpuExecutor)
    footprint = loaded.executor._footprint(loaded.program)
    crossed = list(zip(launches, borders(loaded.program, launches), strict=True))
    model_ = WorkModel.of(loaded.program, launches, footprint)
    groups = (0,) * len(loaded.program.groups)
    for rows in (1, 7, 150):
        load_ = StepLoad(rows, 1, groups, groups)
        summed = sum((launch_work(launch, border, load_, footprint).ops for launch, border in crossed), 0)
        assert model_.at(load_).ops == summed
        spared = [op for one in launches if one.only_outputs for op in one.covers]
        unneeded = sum(op.work(load_).ops - op.work(load_.of_outputs).ops for op in spared)
        assert summed == loaded.program.work(load_).ops - unneeded


def test_activations_of_experts_may_stand_alone() -> None:
    """Where gate and up read their input in different formats."""
    spec, formats = SPECS["plain"], {"": "W8A8-g32", "gate": "W32A32"}
    launches = load(spec, "portable", formats).handle.launches
    assert [launch.out.experts for launch in launches if isinstance(launch, ActivateLaunch)] == [3, 3]
    assert_agree(lambda kind: load(spec, kind, formats), TOKENS[:18])
