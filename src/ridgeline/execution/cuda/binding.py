"""Where a compiled program's values, weights and memory are, as its launches ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ridgeline.execution.base import Limits
from ridgeline.execution.buffers import assign_buffers
from ridgeline.execution.cuda.arrays import (
    GROUP,
    Activations,
    KVPool,
    Partials,
    Routes,
    empty_activations,
    empty_routes,
    padded_groups,
)
from ridgeline.execution.cuda.device import Device
from ridgeline.execution.cuda.inputs import StepInputs, StepSize
from ridgeline.execution.cuda.kernels.attention import block_rows, padded_head_dim, tile_rows
from ridgeline.execution.cuda.kernels.rope import Rope, rope_table
from ridgeline.execution.cuda.weights import DeviceWeights
from ridgeline.execution.cuda.work_list import WorkLimits
from ridgeline.execution.lowering import Launch
from ridgeline.model.program import Attention, Program, Route, Value
from ridgeline.model.program import Rope as RopeOperation
from ridgeline.model.spec import RopeSpec

MAX_PARTIALS = 256
"""Partial results of attention that there is room for, in tiles of single rows."""
_PROGRAMS_PER_MULTIPROCESSOR = 2


def value_row_bytes(value: Value) -> int:
    """Bytes of one row of a value; sequence memory is counted by its slots."""
    if value.kind == "A8-g32":
        return padded_groups(value.width) * (GROUP + 4)
    return {"f32": 4, "bf16": 2, "routes": 4, "logits": 4, "drawn": 4}.get(value.kind, 0) * value.width


class DeviceBinding:
    """What launches are bound to. Owns the buffers of one program's values."""

    def __init__(
        self,
        device: Device,
        inputs: StepInputs,
        weights: DeviceWeights,
        pools: Mapping[int, KVPool],
        program: Program,
        launches: Sequence[Launch],
        limits: Limits,
    ) -> None:
        self.inputs = inputs
        self.weights = weights
        self._device = device
        self._pools = pools
        self._rows = max(limits.max_rows, limits.max_sequences)
        self._places = {
            layer: (g, i) for g, group in enumerate(program.groups) for i, layer in enumerate(group.layers)
        }
        self._experts = max((op.count for op in program.operations if isinstance(op, Route)), default=0)
        self._values = assign_buffers(program, launches, self._new_buffers)
        self._logits = self._new_logits(limits.max_sequences, program.output.width)
        self._more_logits = self._logits
        self._ropes = {
            op.spec: self._new_rope(op.spec) for op in program.operations if isinstance(op, RopeOperation)
        }
        self._attentions = _attention_of_groups(program)
        self._partials = self._new_partials()

    # -- values

    def value(self, value: Value, size: StepSize) -> Activations:
        """The rows of a value's buffer that a step uses."""
        if value.kind == "logits":
            return self.logits(size.outputs)
        found = self._values[value.name]
        assert not isinstance(found, Routes), value
        return found[: (size.outputs if value.selected else size.rows) * value.experts]

    def routes(self, value: Value, size: StepSize) -> Routes:
        """The experts of a step's rows."""
        found = self._values[value.name]
        assert isinstance(found, Routes), value
        return found[: size.rows]

    def tensor(self, value: Value, size: StepSize) -> Tensor:
        """The same, of a value that is not A8."""
        found = self.value(value, size)
        assert isinstance(found, Tensor), value
        return found

    def logits(self, outputs: int) -> Tensor:
        """The step's logits, (outputs, vocabulary)."""
        return (self._logits if outputs <= len(self._logits) else self._more_logits)[:outputs]

    def make_room(self, size: StepSize) -> None:
        """Take memory for the logits of a step with more outputs than is usual; give it back after it."""
        if size.outputs > len(self._logits):
            self._more_logits = self._new_logits(size.outputs, self._logits.shape[1])
        else:
            self._more_logits = self._logits

    def _new_buffers(self, values: tuple[Value, ...]) -> Sequence[Activations | Routes]:
        rows, where = self._rows * values[0].experts, self._device.where
        if len(values) == 1:
            (value,) = values
            if value.kind == "routes":
                return [empty_routes(rows, value.width, self._experts, where)]
            return [empty_activations(value.kind, rows, value.width, where)]
        assert all((v.kind, v.experts) == ("f32", values[0].experts) for v in values), values
        ends = [*accumulate((v.width for v in values), initial=0)]
        whole = empty_activations("f32", rows, ends[-1], where)
        assert isinstance(whole, Tensor)
        return [whole[:, begin:end] for begin, end in pairwise(ends)]

    def _new_logits(self, outputs: int, width: int) -> Tensor:
        return torch.zeros((outputs, width), dtype=torch.float32, device=self._device.where)

    # -- positions

    def rope(self, spec: RopeSpec) -> Rope:
        """Cosines and sines of the step's rows."""
        return self._ropes[spec][1]

    def fill_ropes(self, size: StepSize) -> None:
        """Compute them, once for all layers."""
        rows = slice(size.rows)
        for spec, (frequencies, rope) in self._ropes.items():
            positions = self.inputs.positions[rows]
            rope_table(positions, frequencies, rope.cos[rows], rope.sin[rows], spec.scale)

    def _new_rope(self, spec: RopeSpec) -> tuple[Tensor, Rope]:
        frequencies = torch.tensor(spec.frequencies, dtype=torch.float32).to(self._device.where)
        tables = torch.zeros((2, self._rows, spec.dim // 2), device=self._device.where)
        return frequencies, Rope(tables[0], tables[1])

    # -- attention

    def pool(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """A layer's keys and values, (pages, kv_heads, 2, PAGE_TOKENS, head_dim), and the scales of codes."""
        group, place = self._places[layer]
        pool = self._pools[group]
        return pool.values[place], pool.scales[place] if pool.scales is not None else None

    def attention_grid(self, attention: Attention, size: StepSize) -> tuple[int, int, Partials]:
        """(rows of a tile, programs per KV head, room for partial results)."""
        block_m = self._tile(attention, size)
        heads, dim = attention.kv_heads, padded_head_dim(attention.head_dim)
        count = self._room(attention, block_m)
        mixed, top, total = self._partials
        rows = count * heads * block_m
        return (
            block_m,
            self._programs(attention),
            Partials(
                mixed[: rows * dim].view(count, heads, block_m, dim),
                top[:rows].view(count, heads, block_m),
                total[:rows].view(count, heads, block_m),
            ),
        )

    def work_rule(self, group: int, size: StepSize) -> tuple[int | None, int, WorkLimits]:
        """(window, rows of a block, limits) for a group's work list."""
        attention = self._attentions[group]
        block_m = self._tile(attention, size)
        limits = WorkLimits(
            items=self.inputs.max_items,
            partials=self._room(attention, block_m),
            programs=self._programs(attention),
        )
        rows = block_rows(attention.heads // attention.kv_heads, block_m)
        return attention.window, rows, limits

    def _tile(self, attention: Attention, size: StepSize) -> int:
        most_rows = 1 if size.single else self._rows
        return tile_rows(attention.heads // attention.kv_heads, most_rows, attention.head_dim)

    def _programs(self, attention: Attention) -> int:
        return -(-_PROGRAMS_PER_MULTIPROCESSOR * self._device.multiprocessors // attention.kv_heads)

    def _room(self, attention: Attention, block_m: int) -> int:
        return MAX_PARTIALS * tile_rows(attention.heads // attention.kv_heads, 1) // block_m

    def _new_partials(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = [
            MAX_PARTIALS * op.kv_heads * tile_rows(op.heads // op.kv_heads, 1)
            for op in self._attentions.values()
        ]
        dims = [padded_head_dim(op.head_dim) for op in self._attentions.values()]
        most = max((r * d for r, d in zip(rows, dims, strict=True)), default=0)
        sizes = (most, max(rows, default=0), max(rows, default=0))
        mixed, top, total = (torch.zeros(size, device=self._device.where) for size in sizes)
        return mixed, top, total


def _attention_of_groups(program: Program) -> dict[int, Attention]:
    """One attention of each memory group; all of a group have as many heads."""
    found: dict[int, Attention] = {}
    for op in program.operations:
        if isinstance(op, Attention):
            first = found.setdefault(op.group, op)
            if (op.heads, op.window) != (first.heads, first.window):
                raise ValueError(f"{op.out.name}: layers of one memory group differ in their query heads")
    return found
