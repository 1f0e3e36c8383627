"""The CUDA executor: weights and sequence memory on the device, programs as launches of kernels.

`run` only launches: it returns before the step is done, and drawn tokens stay on the device for the step
behind it. Host memory that the device writes to or reads from is used in turns, so that two steps may be
under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.base import KV_STORAGES, Limits, check_memory_kinds, slot_bytes
from ridgeline.execution.cuda.arrays import KVPool
from ridgeline.execution.cuda.binding import MAX_PARTIALS, DeviceBinding, value_row_bytes
from ridgeline.execution.cuda.device import Device, Event
from ridgeline.execution.cuda.graphs import GraphBook
from ridgeline.execution.cuda.host_pages import fill_pages, page_bytes_of, spill_pages
from ridgeline.execution.cuda.inputs import StepInputs, StepSize
from ridgeline.execution.cuda.kernels.pages import copy_pages, independent_runs
from ridgeline.execution.cuda.launches import CudaLaunch, Run
from ridgeline.execution.cuda.lower import lower
from ridgeline.execution.cuda.slots import copy_slots
from ridgeline.execution.cuda.weights import DeviceWeights
from ridgeline.execution.cuda.work_list import attention_work, branch_paths
from ridgeline.execution.draw import NOT_DRAWN, Drawer, RowDrawer
from ridgeline.execution.lowering import Footprint, WorkModel
from ridgeline.execution.step_arrays import StepArrays
from ridgeline.model.program import MemoryGroup, Program, StepLoad
from ridgeline.model.weights import Weights
from ridgeline.resources.machine import choose_isa, usable_cores
from ridgeline.types import (
    CapacityError,
    Draw,
    Move,
    PageFill,
    PageSpill,
    SlotCopy,
    Step,
    StepResult,
    StepWork,
)

_DRAWING_THREADS = 8
"""Threads of the host that draw from logits which have come there, where there are as many cores."""

_KV_DTYPES = {"KV8": torch.int8, "KV16": torch.bfloat16, "KV32": torch.float32}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CudaHandle:
    """A program as launches that are bound to their buffers, and the graphs recorded of them."""

    program: Program
    launches: tuple[CudaLaunch, ...]
    binding: DeviceBinding
    runs: tuple[tuple[Run, bool], ...]  # and whether the launch is for outputs only
    graphs: GraphBook
    work: WorkModel

    def launch(self, size: StepSize) -> None:
        """Start every kernel of a step of this size; one without outputs spares what only they need."""
        self.binding.fill_ropes(size)
        for run, for_outputs in self.runs:
            if size.outputs or not for_outputs:
                run(size)


@dataclass(slots=True)
class CudaFuture:
    """A step that was launched. Its host memory is the executor's; the second step after uses it again."""

    started: Event
    done: Event
    tokens: Tensor
    logits: Tensor
    work: StepWork

    def result(self) -> StepResult:
        self.done.synchronize()
        elapsed_s = self.started.elapsed_time(self.done) / 1e3
        return StepResult(self.logits.numpy(), self.tokens.numpy().copy(), elapsed_s, self.work)


class _Turn:
    """Host memory for the results of a step, and the events around it."""

    def __init__(self, device: Device, max_outputs: int) -> None:
        self._device = device
        self.started, self.done = device.event(), device.event()
        self.tokens = device.host(max_outputs, torch.int32)
        self._logits = device.host(0, torch.float32)

    def logits(self, rows: int, width: int) -> Tensor:
        if self._logits.numel() < rows * width:
            self._logits = self._device.host(rows * width, torch.float32)
        return self._logits[: rows * width].view(rows, width)


class CudaExecutor:
    """Implements `execution.base.Executor`. Owns the weights, the pools and the buffers on the device."""

    asynchronous = True

    def __init__(self, limits: Limits, device: Device, graphs: bool = True) -> None:
        self._limits = limits
        self._device = device
        self._use_graphs = graphs
        self._weights = DeviceWeights(device.where)
        self._pools: dict[int, KVPool] = {}  # of each group
        self._capacity = max(limits.max_rows, limits.max_sequences)
        self._inputs: StepInputs | None = None
        self._books: list[GraphBook] = []
        self._host = ExitStack()
        self.drawer = _host_drawer(self._host)
        self._turns = [_Turn(device, self._capacity) for _ in range(2)]

    def load(self, weights: Weights) -> None:
        self._within_memory("the weights", lambda: self._weights.load(weights))

    def compile(self, program: Program) -> CudaHandle:
        check_memory_kinds(program, "CUDA")
        return self._within_memory("the KV pools and buffers", lambda: self._compile(program))

    def _compile(self, program: Program) -> CudaHandle:
        groups = program.groups
        for index, (group, pages) in enumerate(zip(groups, self._limits.pages, strict=True)):
            if index not in self._pools:
                self._pools[index] = self._new_pool(group, pages)
        if self._inputs is None:
            items = self._capacity + MAX_PARTIALS
            self._inputs = StepInputs(
                self._device, self._capacity, len(groups), items, 2 * max(self._limits.pages, default=1)
            )
        launches = lower(program)
        binding = DeviceBinding(
            self._device, self._inputs, self._weights, self._pools, program, launches, self._limits
        )
        runs = tuple((launch.bind(binding), _for_outputs(launch)) for launch in launches)
        book = GraphBook(self._limits.max_rows, self._limits.max_sequences, self._device.capture)
        self._books.append(book)
        work = WorkModel.of(program, launches, self._footprint(program))
        return CudaHandle(program, launches, binding, runs, book, work)

    def run(self, handle: CudaHandle, step: Step) -> CudaFuture:
        assert self._inputs is not None
        groups = handle.program.groups
        arrays = StepArrays.of(step, len(groups))
        draws = step.draws or (None,) * step.outputs
        paths = branch_paths(arrays) if len(arrays.parents) else None
        size = StepSize(step.rows, step.outputs, step.rows == len(step.sequences), paths is not None)
        bucket = handle.graphs.bucket(size) if self._use_graphs else None
        target = bucket or size
        rules = [handle.binding.work_rule(group, target) for group in range(len(groups))]
        work = [attention_work(arrays, *rule, paths=paths) for rule in rules]
        self._turns.reverse()
        turn = self._turns[0]
        turn.started.record()
        if self._inputs.fill(arrays, draws, target, work, paths):
            for book in self._books:  # all programs read the same inputs
                book.clear()
        handle.binding.make_room(target)
        if bucket is not None:
            handle.graphs.run(bucket, handle.launch)
        else:
            handle.launch(size)
        return self._results(handle, turn, draws, StepLoad.of(step, groups))

    def _results(
        self, handle: CudaHandle, turn: _Turn, draws: Sequence[Draw | None], load: StepLoad
    ) -> CudaFuture:
        """Send home the tokens that were drawn, and the logits, or hidden states, of the outputs for which
        none was."""
        assert self._inputs is not None
        outputs, left = len(draws), sum(draw is None for draw in draws)
        tokens = turn.tokens[:outputs]
        output = handle.program.output
        logits = turn.logits(left, output.width)
        if output.kind != "logits":
            tokens.fill_(NOT_DRAWN)
        elif outputs:
            tokens.copy_(self._inputs.drawn[:outputs], non_blocking=True)
        if left:
            found = handle.binding.tensor(output, StepSize(load.rows, outputs, False))
            if left < outputs:
                found = found.index_select(0, self._inputs.undrawn[:left])
            logits.copy_(found, non_blocking=True)
        turn.done.record()
        return CudaFuture(turn.started, turn.done, tokens, logits, handle.work.parts(load))

    @property
    def numerics(self) -> str:
        where = self._device.where
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
        return f"cuda {name} {torch.__version__} {triton.__version__}"

    @property
    def host_page_bytes(self) -> tuple[int, ...]:
        return tuple(page_bytes_of(pool) for _, pool in sorted(self._pools.items()))

    def transfer(self, moves: Sequence[Move]) -> None:
        # Groups share no memory, so that each one's moves keep their order among themselves.
        for group, pool in self._pools.items():
            mine = [move for move in moves if move.group == group]
            for kind, alike in groupby(mine, type):
                self._transfer(kind, pool, list(alike))

    def _transfer(self, kind: type[Move], pool: KVPool, moves: Sequence[Any]) -> None:
        """Moves of one kind in one group."""
        if kind is PageSpill:
            spill_pages(pool, moves, self._device)
        elif kind is PageFill:
            fill_pages(pool, moves, self._device)
        elif kind is SlotCopy:
            for move in moves:
                copy_slots(pool, move, self._device)
        else:
            for pairs in independent_runs([(m.source, m.target) for m in moves]):
                where = torch.tensor(pairs, dtype=torch.int32).to(self._device.where)
                for held in pool.tensors:
                    copy_pages(held.flatten(2), where)

    def close(self) -> None:
        self._weights.clear()
        self._pools.clear()
        self._books.clear()
        self._inputs = None
        self._turns.clear()
        self._host.close()
        if self._device.where.type == "cuda":
            torch.cuda.empty_cache()

    def _new_pool(self, group: MemoryGroup, pages: int) -> KVPool:
        kv_format, where = self._limits.kv_format, self._device.where
        shape = (len(group.layers), pages, group.kv_heads, 2, PAGE_TOKENS)
        values = torch.empty((*shape, group.head_dim), dtype=_KV_DTYPES[kv_format], device=where)
        scaled = KV_STORAGES[kv_format].scale_bytes > 0
        return KVPool(values, torch.empty(shape, device=where) if scaled else None)

    def _footprint(self, program: Program) -> Footprint:
        groups = program.groups
        return Footprint(
            weight_bytes=self._weights.nbytes,
            weight_row_bytes=self._weights.row_nbytes,
            value_row_bytes=value_row_bytes,
            slot_bytes=lambda g: slot_bytes(groups[g], self._limits.kv_format),
        )

    def _within_memory(self, what: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except torch.OutOfMemoryError:
            free = torch.cuda.mem_get_info()[0] / 2**30
            raise CapacityError(
                f"the GPU has no room for {what}: {free:.2f} GiB are left; "
                "accepted: a smaller model or format (--weights), or a smaller KV cache"
            ) from None


def _for_outputs(launch: CudaLaunch) -> bool:
    return any(op.out.selected for op in launch.covers)


def _host_drawer(until: ExitStack) -> RowDrawer:
    """Draws on the host's threads; without the built module, as a GPU does not need it, by the rule in NumPy,
    whose tokens are the same."""
    try:
        from ridgeline.native import Drawer as ThreadedDrawer
        from ridgeline.native import Team
    except ImportError:
        return Drawer()
    team = Team(min(usable_cores(), _DRAWING_THREADS))
    until.callback(team.close)
    return ThreadedDrawer(team, choose_isa())
