"""Each kernel in the shapes of a model, as the executor launches it, beside the GPU's measured ceilings.

The launches are those of a compiled program, on the executor's own buffers. Launches of one kind in all
layers take turns, so that weights and pages come from memory; activations lie where the kernel before left
them, often in the L2, so that kernels which move little else may be faster than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from gpu_models import (
    GREEDY,
    KV_FORMAT,
    Model,
    Ready,
    Rows,
    make_ready,
    make_step,
    page_nbytes,
    pages_of,
    random_matrix,
    with_layers,
)
from gpu_timing import Timer, turns_for

from ridgeline.execution.base import Limits
from ridgeline.execution.cuda.device import Device
from ridgeline.execution.cuda.inputs import StepSize
from ridgeline.execution.cuda.launches import (
    ActivateLaunch,
    AttentionLaunch,
    CudaLaunch,
    EmbedLaunch,
    LinearLaunch,
    NormLaunch,
    QuantiseLaunch,
    RopeStoreLaunch,
    SampleLaunch,
)
from ridgeline.execution.lowering import borders, launch_work
from ridgeline.model.program import StepLoad
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.roofline import arithmetic_s, mbu, memory_s, mfu
from ridgeline.types import Draw, Work

SAMPLED = Draw(temperature=0.8, top_p=0.95, seed=1)
_SHORT_CONTEXT = 64
"""Context of decode rows where attention is not what is measured."""
_MOST_LAYERS = 128
_MEMORY_SHARE = 3
"""A measurement takes at most one part in so many of the free memory for weights, and as much for pages."""


@dataclass(frozen=True)
class Bench:
    """What measuring needs: the device and how to time it, what it can do, and how much memory is free."""

    device: Device
    timer: Timer
    ceilings: Ceilings
    free_bytes: Callable[[], int]


@dataclass(frozen=True)
class KernelLine:
    """One kernel at one size. `torch_s` is PyTorch's bfloat16 product of the same shape. `cached` says that
    weights or pages were too few to keep the L2 from holding some of them."""

    model: str
    format: str
    kernel: str
    rows: int
    context: int
    seconds: float
    work: Work
    bandwidth_share: float
    arithmetic_share: float
    bound: str
    cached: bool
    torch_s: float | None = None


def launch_label(launch: CudaLaunch) -> str:
    """What a launch does, the same in all layers."""
    match launch:
        case LinearLaunch():
            return "+".join(op.out.name.rpartition(".")[2] for op in launch.linears)
        case NormLaunch():
            added = "add" if launch.norm is None else "residual norm"
            return "norm, picked" if launch.gather else "norm" if launch.residual is None else added
        case EmbedLaunch():
            return "embed"
        case QuantiseLaunch():
            return "quantise"
        case RopeStoreLaunch():
            return "rope, store"
        case AttentionLaunch():
            return "attention"
        case ActivateLaunch():
            return "activate"
        case SampleLaunch():
            return "draw"
    return "softcap"


def bound_of(work: Work, ceilings: Ceilings) -> str:
    """What keeps the work from being done faster: memory, arithmetic, or the launch itself."""
    times = {
        "memory": memory_s(work, ceilings),
        "arithmetic": arithmetic_s(work, ceilings),
        "launch": ceilings.graph_launch_s,
    }
    return max(times, key=lambda name: times[name])


# ------------------------------------------------------------------------------- measuring launches


@dataclass(frozen=True)
class _Turns:
    """The launches of one kind in all layers, each with the same work."""

    launch: CudaLaunch
    runs: list[Callable[[StepSize], None]]
    work: Work


class KernelBench:
    """Measures the kernels of models. Remembers PyTorch's products, which formats have in common."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._torch_s: dict[tuple[int, int, int], float] = {}

    # -- products, and all that works on rows

    def rows_ready(self, model: Model, most_rows: int, most_sequences: int) -> Ready:
        """The model with as many layers as it takes to get its smallest product out of the caches."""
        sizes = _linear_nbytes(model)
        wanted = turns_for(self._bench.timer, min(sizes), _MOST_LAYERS)
        room = self._bench.free_bytes() // _MEMORY_SHARE // sum(sizes)
        layers = max(min(wanted, room), 1)
        pages = max(pages_of([Rows(1, _SHORT_CONTEXT - 1, most_sequences)]), pages_of([Rows(most_rows, 0)]))
        limits = Limits(most_rows, (pages,), KV_FORMAT, most_sequences)
        deep = Model.of(model.name, with_layers(model.spec, layers), model.format)
        return make_ready(deep, self._bench.device, limits, graphs=False)

    def row_lines(self, ready: Ready, rows: int, decode: bool) -> Iterator[KernelLine]:
        """Everything but attention, for that many sequences of one row, or for one sequence of that many."""
        shape = Rows(1, _SHORT_CONTEXT - 1, rows) if decode else Rows(rows, 0)
        for draw in (GREEDY, SAMPLED):
            size, turns = self._turns(ready, shape, draw)
            for label, one in turns.items():
                drawing = isinstance(one.launch, SampleLaunch)
                if isinstance(one.launch, AttentionLaunch) or (draw is SAMPLED and not drawing):
                    continue
                name = f"draw, {'greedy' if draw.greedy else 'top_p'}" if drawing else label
                cached = isinstance(one.launch, LinearLaunch) and self._cached(one)
                line = self._line(ready, name, shape, size, one, cached)
                if isinstance(one.launch, LinearLaunch):
                    count = size.outputs if one.launch.linears[0].out.selected else size.rows
                    line = replace(line, rows=count, torch_s=self._torch(one.launch, count))
                yield line

    def _torch(self, launch: LinearLaunch, rows: int) -> float:
        inputs, outputs = launch.x.width, sum(op.out.width for op in launch.linears)
        key = (outputs, inputs, rows)
        if key not in self._torch_s:
            random = torch.Generator(self._bench.device.where).manual_seed(2)
            count = turns_for(self._bench.timer, 2 * outputs * inputs, _MOST_LAYERS)
            spread = inputs**-0.5
            weights = [random_matrix(outputs, inputs, 16, spread, random).codes for _ in range(count)]
            x = random_matrix(rows, inputs, 16, 1.0, random).codes
            out = torch.empty((rows, outputs), dtype=torch.bfloat16, device=x.device)
            self._torch_s[key] = self._bench.timer.seconds(
                [partial(torch.mm, x, w.t(), out=out) for w in weights]
            )
        return self._torch_s[key]

    # -- attention

    def attention_ready(self, model: Model, shapes: list[Rows]) -> tuple[Ready, list[Rows]]:
        """Layers and random contexts for attention, and those of `shapes` for which there is memory."""
        one_layer = Model.of(model.name, with_layers(model.spec, 1), model.format)
        room = self._bench.free_bytes() // _MEMORY_SHARE // page_nbytes(one_layer)
        fitting = [shape for shape in shapes if shape.pages <= room]
        pages = max(shape.pages for shape in fitting)
        least = min(shape.pages for shape in fitting) * page_nbytes(one_layer)
        wanted = turns_for(self._bench.timer, least, len(model.spec.layers))
        deep = Model.of(model.name, with_layers(model.spec, max(min(wanted, room // pages), 1)), model.format)
        rows = max(shape.rows * shape.count for shape in fitting)
        limits = Limits(rows, (pages,), KV_FORMAT, max(shape.count for shape in fitting))
        return make_ready(deep, self._bench.device, limits, graphs=False), fitting

    def attention_line(self, ready: Ready, shape: Rows) -> KernelLine:
        size, turns = self._turns(ready, shape, GREEDY)
        return self._line(
            ready, "attention", shape, size, turns["attention"], self._cached(turns["attention"])
        )

    # -- what both do

    def _turns(self, ready: Ready, shape: Rows, draw: Draw) -> tuple[StepSize, dict[str, _Turns]]:
        """Run a step, which fills every buffer, and gather its launches by what they do."""
        program, handle = ready.model.program, ready.handle
        step = make_step([shape], ready.model.spec, ready.limits.pages[0], draw)
        ready.executor.run(handle, step).result()
        load, footprint = StepLoad.of(step, program.groups), ready.executor.footprint(program)
        turns: dict[str, _Turns] = {}
        crossing = borders(program, handle.launches)
        for launch, border, (run, _) in zip(handle.launches, crossing, handle.runs, strict=True):
            label = launch_label(launch)
            if label not in turns:
                turns[label] = _Turns(launch, [], launch_work(launch, border, load, footprint))
            turns[label].runs.append(run)
        return StepSize(step.rows, step.outputs, step.rows == len(step.sequences)), turns

    def _line(
        self, ready: Ready, kernel: str, shape: Rows, size: StepSize, turns: _Turns, cached: bool
    ) -> KernelLine:
        seconds = self._bench.timer.seconds([partial(run, size) for run in turns.runs])
        ceilings = self._bench.ceilings
        return KernelLine(
            model=ready.model.name,
            format=ready.model.format,
            kernel=kernel,
            rows=size.rows,
            context=shape.start + shape.rows,
            seconds=seconds,
            work=turns.work,
            bandwidth_share=mbu(turns.work, seconds, ceilings),
            arithmetic_share=mfu(turns.work, seconds, ceilings),
            bound=bound_of(turns.work, ceilings),
            cached=cached,
        )

    def _cached(self, turns: _Turns) -> bool:
        return turns.work.read_bytes * len(turns.runs) < self._bench.timer.working_set_bytes


def _linear_nbytes(model: Model) -> list[int]:
    """Bytes of the products of one layer, about: without scales."""
    attention, hidden = model.spec.layers[0].attention, model.spec.hidden
    width = model.spec.layers[0].feed_forward.width
    outputs = (attention.heads + 2 * attention.kv_heads) * attention.head_dim
    sizes = (
        outputs * hidden,
        attention.heads * attention.head_dim * hidden,
        2 * width * hidden,
        width * hidden,
    )
    return [size * model.bits // 8 for size in sizes]
