"""Models of real shapes with random weights, made on the device: nothing is downloaded and nothing is read.

Weights are scaled so that activations keep about their size from layer to layer and logits have a spread of
a few units, as those of trained models do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ridgeline.config import pages_for
from ridgeline.execution.base import Limits, page_bytes
from ridgeline.execution.cuda.arrays import GROUP, Packed, padded_groups
from ridgeline.execution.cuda.device import Device
from ridgeline.execution.cuda.executor import CudaExecutor, CudaHandle
from ridgeline.execution.lowering import Footprint
from ridgeline.model.build import decoder
from ridgeline.model.families.fields import Fields
from ridgeline.model.families.rope import rope_from_config
from ridgeline.model.program import Embed, Linear, Norm, Program, Weight
from ridgeline.model.rewrite import with_precision
from ridgeline.model.spec import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec, NormSpec
from ridgeline.precision.formats import FORMATS as ALL_FORMATS
from ridgeline.precision.formats import Format
from ridgeline.types import Draw, Segment, SequenceRows, Step

FORMATS = ("W16A16", "W4A16-g32", "W8A16-g32", "W8A8-g32")
"""The formats that are measured, the most telling ones first."""

KV_FORMAT = "KV16"
GREEDY = Draw()

_LOGIT_SPREAD = 3.0
"""Standard deviation of the logits."""


def _llama_3_1_8b() -> ModelSpec:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = rope_from_config(Fields({"rope_scaling": scaling}), 128, theta=500000.0)
    layer = LayerSpec(
        AttentionSpec(32, 8, 128, 128**-0.5, rope),
        FeedForwardSpec(14336, "silu", gated=True),
    )
    return ModelSpec("llama", 4096, 128256, 131072, NormSpec("rms", 1e-5), (layer,) * 32, tied_head=False)


def _qwen3_0_6b() -> ModelSpec:
    layer = LayerSpec(
        AttentionSpec(16, 8, 128, 128**-0.5, rope_from_config(Fields({}), 128, theta=1e6), qk_norm=True),
        FeedForwardSpec(3072, "silu", gated=True),
    )
    return ModelSpec("qwen3", 1024, 151936, 40960, NormSpec("rms", 1e-6), (layer,) * 28, tied_head=True)


def model_specs() -> dict[str, ModelSpec]:
    """The measured models by name: Llama 3.1 8B (arXiv:2407.21783) and Qwen3 0.6B (arXiv:2505.09388)."""
    return {"llama-3.1-8b": _llama_3_1_8b(), "qwen3-0.6b": _qwen3_0_6b()}


def with_layers(spec: ModelSpec, count: int) -> ModelSpec:
    """The spec with `count` layers, its own over and over."""
    return replace(spec, layers=tuple(spec.layers[i % len(spec.layers)] for i in range(count)))


@dataclass(frozen=True)
class Model:
    """A model's shape in one number format: its spec, its program, and the format of each matrix."""

    name: str
    spec: ModelSpec
    format: str
    program: Program = field(repr=False)
    formats: Mapping[str, Format] = field(repr=False)

    @classmethod
    def of(cls, name: str, spec: ModelSpec, format_name: str) -> Model:
        canonical = decoder(spec)
        fmt = ALL_FORMATS[format_name]
        formats = {weight.name: fmt for weight in _matrices(canonical)}
        return cls(name, spec, format_name, with_precision(canonical, formats, KV_FORMAT), formats)

    @property
    def bits(self) -> Literal[4, 8, 16, 32]:
        bits: Literal[4, 8, 16, 32] = ALL_FORMATS[self.format].weight_bits  # type: ignore[assignment]
        return bits

    @property
    def kind(self) -> str:
        """What linears take."""
        return {8: "A8-g32", 16: "bf16", 32: "f32"}[ALL_FORMATS[self.format].activation_bits]

    @property
    def label(self) -> str:
        return f"{self.name} {self.format}"


def _matrices(program: Program) -> Iterator[Weight]:
    for op in program.operations:
        if isinstance(op, Linear):
            yield op.weight
        elif isinstance(op, Embed) and op.ids.kind == "tokens":
            yield op.table


# ------------------------------------------------------------------------------------ random weights


def random_matrix(rows: int, cols: int, bits: int, spread: float, random: torch.Generator) -> Packed:
    """Random codes and scales that stand for values around 0 of standard deviation `spread`."""
    where = random.device
    if bits >= 16:
        dtype = torch.bfloat16 if bits == 16 else torch.float32
        codes = torch.empty((rows, cols), dtype=dtype, device=where)
        codes.normal_(0.0, spread, generator=random)
        return Packed(16 if bits == 16 else 32, cols, codes)
    groups = padded_groups(cols)
    # Scales differ from group to group, or a kernel that takes the wrong one would not be found out.
    step = torch.empty((rows, groups), device=where).uniform_(0.75, 1.25, generator=random) * spread
    if bits == 8:
        codes = torch.empty((rows, groups * GROUP), dtype=torch.int8, device=where)
        codes.random_(-127, 128, generator=random)
        return Packed(8, cols, codes, (step / _uniform_spread(255)).to(torch.float16))
    codes = torch.empty((rows, groups * GROUP // 2), dtype=torch.uint8, device=where)
    codes.random_(0, 256, generator=random)
    step /= _uniform_spread(16)
    return Packed(4, cols, codes, torch.stack((step, -7.5 * step), dim=-1).to(torch.float16))


def _uniform_spread(values: int) -> float:
    """Standard deviation of that many equally likely whole numbers in a row."""
    return math.sqrt((values**2 - 1) / 12)


def _spread(model: Model, weight: Weight) -> float:
    """Products of normalised values keep their size; the head's become logits."""
    head = "embed" if model.spec.tied_head else "head"
    wanted = _LOGIT_SPREAD if weight.name == head else 1.0
    return wanted / math.sqrt(weight.shape[-1])


class BenchExecutor(CudaExecutor):
    """The CUDA executor with random weights and memory, and with what measurements look at."""

    def fill(self, model: Model, seed: int = 0) -> None:
        """Make the model's weights where `load` would read them."""
        random = torch.Generator(self._device.where).manual_seed(seed)
        held = self._weights
        gains = {op.weight.name for op in model.program.operations if isinstance(op, Norm)}
        for weight in model.program.weights():
            if weight.name in model.formats:
                rows, cols = weight.shape
                spread = _spread(model, weight)
                matrix = random_matrix(rows, cols, model.bits, spread, random)
                held.keep_matrix(weight.name, matrix, model.formats[weight.name])
            else:
                vector = torch.empty(weight.shape, device=self._device.where)
                vector.normal_(1.0 if weight.name in gains else 0.0, 0.1, generator=random)
                held.keep_vector(weight.name, vector)

    def fill_memory(self, seed: int = 1) -> None:
        """Random keys and values in all pages: contexts that nobody had to compute."""
        random = torch.Generator(self._device.where).manual_seed(seed)
        for pool in self._pools.values():
            for layer in pool.values:
                layer.normal_(generator=random)

    def footprint(self, program: Program) -> Footprint:
        return self._footprint(program)

    @property
    def graphs(self) -> bool:
        """Whether steps run as CUDA graphs where one serves them."""
        return self._use_graphs

    @graphs.setter
    def graphs(self, wanted: bool) -> None:
        self._use_graphs = wanted

    def matrix(self, name: str) -> Packed:
        return self._weights.matrices[name]

    def vectors(self) -> Mapping[str, Tensor]:
        return self._weights.vectors


@dataclass(frozen=True)
class Ready:
    """A model on an executor, compiled."""

    model: Model
    executor: BenchExecutor
    handle: CudaHandle
    limits: Limits


def make_ready(model: Model, device: Device, limits: Limits, graphs: bool, memory: bool = True) -> Ready:
    """Random weights and, where `memory`, random contexts. Whoever takes it closes the executor."""
    executor = BenchExecutor(limits, device, graphs)
    executor.fill(model)
    handle = executor.compile(model.program)
    if memory:
        executor.fill_memory()
    return Ready(model, executor, handle, limits)


# -------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Rows:
    """Some sequences of a step: `count` of them, each with `rows` rows from slot `start`."""

    rows: int
    start: int
    count: int = 1

    @property
    def pages(self) -> int:
        return self.count * pages_for(self.start + self.rows)


def pages_of(shapes: Iterable[Rows]) -> int:
    return sum(shape.pages for shape in shapes)


def make_step(
    shapes: Sequence[Rows], spec: ModelSpec, pages: int, draw: Draw | None = GREEDY, every_row: bool = False
) -> Step:
    """A step of random tokens over pages in random order, no page in two tables while there are enough.

    Each sequence wants a token drawn for its last row, or for every row; `draw` None leaves them to the host.
    """
    random = np.random.default_rng(0)
    order = np.resize(random.permutation(pages), max(pages_of(shapes), pages))
    taken, sequences = 0, []
    for shape in shapes:
        for _ in range(shape.count):
            end = shape.start + shape.rows
            table = order[taken : taken + pages_for(end)].astype(np.int32)
            taken += len(table)
            tokens = random.integers(0, spec.vocabulary, shape.rows).tolist()
            segment = Segment((table.tolist(),), end)
            outputs = range(shape.rows) if every_row else (shape.rows - 1,)
            sequences.append(SequenceRows(tokens, shape.start, (segment,), outputs))
    step = Step(tuple(sequences))
    return replace(step, draws=(draw,) * step.outputs)


def page_nbytes(model: Model) -> int:
    """Memory of one page, all layers together."""
    return sum(page_bytes(group, KV_FORMAT) for group in model.program.groups)
