"""The CPU executor: packs weights, binds launches to a tape, and runs a step in one call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.base import FinishedStep, Limits, check_memory_kinds, page_bytes, slot_bytes
from ridgeline.execution.buffers import assign_buffers
from ridgeline.execution.cpu.buffers import Buffer, new_buffer, value_row_bytes
from ridgeline.execution.cpu.launches import Binding, CpuLaunch
from ridgeline.execution.cpu.load import load_matrices
from ridgeline.execution.cpu.lower import lower
from ridgeline.execution.draw import undrawn
from ridgeline.execution.lowering import Footprint, WorkModel
from ridgeline.execution.profiling import LaunchTime, label_of, launch_works
from ridgeline.execution.rope_cache import RopeCache
from ridgeline.execution.step_arrays import StepArrays
from ridgeline.model.program import MemoryGroup, Program, Rope, StepLoad, Value, Weight
from ridgeline.model.spec import RopeSpec
from ridgeline.model.weights import Weights
from ridgeline.native import (
    Drawer,
    Matrix,
    StepInputs,
    Tape,
    Team,
    allocate,
    copy_page,
    copy_slots,
    pack,
)
from ridgeline.precision.storage import Tensor, float32_tensor
from ridgeline.resources.machine import choose_isa
from ridgeline.types import (
    ByteArray,
    Float32Array,
    Move,
    PageCopy,
    PageFill,
    PageSpill,
    SlotCopy,
    Step,
    StepResult,
)

if TYPE_CHECKING:
    from ridgeline.execution.cpu.packed_cache import PackedCache

_Pool = ByteArray | NDArray[np.uint16] | Float32Array
_KV_DTYPES: dict[str, type[np.uint8 | np.uint16 | np.float32]] = {
    "KV8": np.uint8,
    "KV16": np.uint16,
    "KV32": np.float32,
}

_NO_LOGITS = np.empty((0, 1), np.float32)


@dataclass(frozen=True, slots=True)
class CpuHandle:
    """A program on its tape. The rope tables are buffers that every step fills before it runs; `hidden` is
    the buffer that an encoder leaves its output in, None where that is the step's logits."""

    program: Program
    launches: tuple[CpuLaunch, ...]
    tape: Tape
    ropes: dict[RopeSpec, tuple[Float32Array, Float32Array]]
    work: WorkModel
    hidden: Buffer | None


class CpuExecutor:
    """Implements `execution.base.Executor`. Owns the packed weights, the pools and the thread team."""

    asynchronous = False

    def __init__(
        self, limits: Limits, threads: int, isa: str | None = None, cache: PackedCache | None = None
    ) -> None:
        """`cache` keeps packed weights for the next start."""
        self.isa = isa or choose_isa()
        self._limits = limits
        self._team = Team(threads)
        self._cache = cache
        self._matrices: dict[str, Matrix] = {}
        self._vectors: dict[str, Float32Array] = {}
        self._pools: dict[int, _Pool] = {}
        self._groups: dict[int, MemoryGroup] = {}
        self._rotations: dict[RopeSpec, RopeCache] = {}
        self.drawer = Drawer(self._team, self.isa)
        self._drawn = np.empty(0, np.int32)
        # Results stay valid during one more run, so runs take turns with two arrays.
        self._logits = [np.empty((0, 0), np.float32)] * 2

    def load(self, weights: Weights) -> None:
        self._matrices |= load_matrices(weights, self._team, self._cache)
        for name in weights:
            if name not in weights.formats:
                self._vectors[name] = weights.vector(name)

    def compile(self, program: Program) -> CpuHandle:
        check_memory_kinds(program, "CPU")
        self._make_pools(program)
        launches = lower(program)
        rows = self._limits.max_rows
        buffers = assign_buffers(program, launches, lambda values: [new_buffer(v, rows) for v in values])
        specs = {op.spec for op in program.operations if isinstance(op, Rope)}
        ropes = {spec: _rope_buffers(spec, rows) for spec in specs}
        for spec in specs:
            self._rotations.setdefault(spec, RopeCache(spec))
        tape = Tape(self._team, self.isa, rows)
        binding = Binding(
            tape=tape,
            buffer=lambda value: buffers.get(value.name),  # the logits are the step's own
            matrix=self._matrix,
            vector=lambda weight: self._vectors[weight.name] if weight else None,
            pool=lambda layer: self._pools[layer],
            rope=lambda spec: ropes[spec],
        )
        for launch in launches:
            tape.only_outputs(launch.only_outputs)
            launch.bind(binding)
        work = WorkModel.of(program, launches, self._footprint(program))
        return CpuHandle(program, launches, tape, ropes, work, buffers.get(program.output.name))

    def run(self, handle: CpuHandle, step: Step) -> FinishedStep:
        started_s = time.perf_counter()
        inputs, logits = self._prepare(handle, step)
        handle.tape.run(inputs)
        return self._finish(handle, step, logits, started_s)

    def profile(self, handle: CpuHandle, step: Step) -> tuple[FinishedStep, Callable[[], list[LaunchTime]]]:
        """As `run`, with the time of each launch as the team's first thread saw it."""
        started_s = time.perf_counter()
        inputs, logits = self._prepare(handle, step)
        prepared_s = time.perf_counter()
        elapsed = handle.tape.profile(inputs)
        ran_s = time.perf_counter()
        finished = self._finish(handle, step, logits, started_s)
        drawn_s = started_s + finished.step_result.elapsed_s
        elapsed_s = [*elapsed, drawn_s - ran_s]  # the last launch of a decoder draws, outside the tape

        def times() -> list[LaunchTime]:
            load, footprint = StepLoad.of(step, handle.program.groups), self._footprint(handle.program)
            works = launch_works(handle.program, handle.launches, load, footprint)
            parts = zip(handle.launches, elapsed_s, works, strict=False)
            return [
                LaunchTime("inputs", prepared_s - started_s),
                *(LaunchTime(label_of(launch), seconds, work) for launch, seconds, work in parts),
                LaunchTime("wait for the team", ran_s - prepared_s - sum(elapsed)),
            ]

        return finished, times

    def _prepare(self, handle: CpuHandle, step: Step) -> tuple[StepInputs, Float32Array]:
        """What the tape reads in a step, and the logits that it will write. The team wakes up meanwhile."""
        self._team.rouse()
        arrays = StepArrays.of(step, len(handle.program.groups), self._drawn)
        for spec, buffers in handle.ropes.items():
            self._rotations[spec].write(arrays.positions, buffers)
        outputs = len(arrays.output_rows)
        logits = self._logits_for(outputs, handle.program.output) if handle.hidden is None else _NO_LOGITS
        return _inputs(arrays, logits), logits

    def _finish(self, handle: CpuHandle, step: Step, logits: Float32Array, started_s: float) -> FinishedStep:
        if handle.hidden is not None:
            output = handle.hidden[: step.outputs, : handle.program.output.width]
            logits = output.astype(np.float32)  # a copy: the buffer is reused
        self._drawn = self.drawer.rows(logits, step.draws)
        elapsed_s = time.perf_counter() - started_s
        work = handle.work.parts(StepLoad.of(step, handle.program.groups))
        return FinishedStep(StepResult(undrawn(logits, step.draws), self._drawn, elapsed_s, work))

    @property
    def numerics(self) -> str:
        return f"cpu {self.isa}"

    @property
    def host_page_bytes(self) -> tuple[int, ...]:
        return tuple(page_bytes(group, self._limits.kv_format) for _, group in sorted(self._groups.items()))

    def transfer(self, moves: Sequence[Move]) -> None:
        for move in moves:
            if isinstance(move, PageCopy):
                for layer in self._groups[move.group].layers:
                    copy_page(self._pools[layer], move.source, move.target)
            elif isinstance(move, SlotCopy):
                self._copy_slots(move)
            elif isinstance(move, PageFill):
                for page, held in self._layers(move.group, move.target, move.source):
                    page[...] = held
            else:
                self._spill(move)

    def _copy_slots(self, move: SlotCopy) -> None:
        group = self._groups[move.group]
        sources, targets = (np.array(slots, np.int32) for slots in (move.sources, move.targets))
        for layer in group.layers:
            copy_slots(self._pools[layer], group.head_dim, sources, targets)

    def _spill(self, move: PageSpill) -> None:
        spilled = np.empty(self.host_page_bytes[move.group], np.uint8)
        for page, held in self._layers(move.group, move.source, spilled):
            held[...] = page
        move.target.put(lambda: spilled)

    def _layers(self, group: int, page: int, held: ByteArray) -> Iterator[tuple[ByteArray, ByteArray]]:
        """A page of the pools, layer for layer, and where each lies in its bytes outside of them."""
        layers = self._groups[group].layers
        for layer, part in zip(layers, held.reshape(len(layers), -1), strict=True):
            yield self._pools[layer][page].view(np.uint8).reshape(-1), part

    def close(self) -> None:
        self._matrices.clear()
        self._vectors.clear()
        self._pools.clear()
        self._team.close()

    def _pack(self, tensor: Tensor) -> Matrix:
        """A matrix, or one for each expert where there is a dimension for them in front."""
        *leading, rows, cols = tensor.shape
        experts = math.prod(leading)
        data, name = np.ascontiguousarray(tensor.data), tensor.storage.name
        return Matrix(pack(data, name, cols, self._team, experts=experts), name, rows, cols, experts)

    def _matrix(self, weight: Weight) -> Matrix:
        """A packed matrix; a router or a table of positions is packed when a program first asks for it."""
        if weight.name not in self._matrices:
            self._matrices[weight.name] = self._pack(float32_tensor(self._vectors.pop(weight.name)))
        return self._matrices[weight.name]

    def _make_pools(self, program: Program) -> None:
        """Pools are shared by all programs of a model; untouched pages take no memory."""
        for index, (group, pages) in enumerate(zip(program.groups, self._limits.pages, strict=True)):
            self._groups[index] = group
            dtype = np.dtype(_KV_DTYPES[self._limits.kv_format])
            head_bytes = PAGE_TOKENS * slot_bytes(group, self._limits.kv_format) // group.kv_heads
            shape = (pages, group.kv_heads, head_bytes // dtype.itemsize)
            for layer in group.layers:
                if layer not in self._pools:
                    # Small pages: a short prompt touches the start of every layer's pool.
                    memory = allocate(int(np.prod(shape)) * dtype.itemsize, huge_pages=False)
                    self._pools[layer] = memory.view(dtype).reshape(shape)

    def _logits_for(self, outputs: int, logits: Value) -> Float32Array:
        """One of the executor's own arrays, grown when a step wants more rows."""
        self._logits.reverse()
        mine = self._logits[0]
        if len(mine) < outputs or mine.shape[1] != logits.width:
            rows = 1 << (max(outputs, 1) - 1).bit_length()
            mine = self._logits[0] = np.empty((rows, logits.width), np.float32)
        return mine[:outputs]

    def _footprint(self, program: Program) -> Footprint:
        groups = program.groups
        return Footprint(
            weight_bytes=self._weight_bytes,
            weight_row_bytes=lambda name: self._matrices[name].nbytes // self._matrices[name].rows,
            value_row_bytes=value_row_bytes,
            slot_bytes=lambda g: slot_bytes(groups[g], self._limits.kv_format),
        )

    def _weight_bytes(self, name: str) -> int:
        return self._matrices[name].nbytes if name in self._matrices else self._vectors[name].nbytes


def _rope_buffers(spec: RopeSpec, rows: int) -> tuple[Float32Array, Float32Array]:
    cos, sin = (np.empty((rows, spec.dim // 2), np.float32) for _ in range(2))
    return cos, sin


def _inputs(arrays: StepArrays, logits: Float32Array) -> StepInputs:
    return StepInputs(
        arrays.tokens,
        arrays.positions,
        arrays.slots,
        arrays.row_sequence,
        arrays.sequence_row_begin,
        arrays.output_rows,
        arrays.segment_begin,
        arrays.segment_length,
        arrays.segment_first_position,
        arrays.segment_bias,
        arrays.segment_causal,
        arrays.table_begin,
        arrays.tables,
        logits,
        arrays.parents if len(arrays.parents) else None,
    )
