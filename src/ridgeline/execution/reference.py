"""The reference executor: NumPy, unfused, one function for each operation, obviously right.

It keeps every value in float32 and accumulates in float64. It rounds where the program says so: a
`Quantise` rounds exactly as the kernels do, and keys and values are attended to as they were stored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, singledispatchmethod
from itertools import pairwise, starmap

import numpy as np
from numpy.typing import NDArray

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.base import FinishedStep, Limits, check_memory_kinds
from ridgeline.execution.draw import NOT_DRAWN, Drawer, undrawn
from ridgeline.execution.step_arrays import StepArrays, rope_tables
from ridgeline.model.program import (
    Activate,
    Add,
    Attention,
    Combine,
    Embed,
    ExpertLinear,
    GatedRecurrence,
    Linear,
    Norm,
    Operation,
    Program,
    Quantise,
    Rope,
    Route,
    Sample,
    Select,
    Softcap,
    StepLoad,
    StoreKV,
    Weight,
)
from ridgeline.model.weights import Weights
from ridgeline.precision.quantise import (
    dequantise_activations,
    quantise_activations,
    round_bfloat16,
    round_kv8,
)
from ridgeline.types import (
    NO_STATE,
    ByteArray,
    Float32Array,
    Move,
    PageCopy,
    PageFill,
    PageSpill,
    SequenceRows,
    SlotCopy,
    Step,
    StepResult,
)

Float64Array = NDArray[np.float64]


_ROUND: dict[str, Callable[[Float32Array], Float32Array]] = {
    "KV8": round_kv8,
    "KV16": round_bfloat16,
    "KV32": np.asarray,
}
"""What a format of the KV cache keeps of heads, (..., head_dim)."""


@dataclass(slots=True)
class _Run:
    """One pass: the step's sequences and arrays, and the values computed so far, by name: (rows * experts,
    width)."""

    sequences: tuple[SequenceRows, ...]
    arrays: StepArrays
    values: dict[str, Float32Array] = field(default_factory=dict)


class ReferenceExecutor:
    """Implements `execution.base.Executor`. Pages and states that were never written hold NaN."""

    asynchronous = False

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._round = _ROUND[limits.kv_format]
        self._weights: dict[str, Float32Array] = {}
        self._memory: dict[int, Float32Array] = {}  # layer -> (2, pages, PAGE_TOKENS, kv_heads, head_dim)
        self._groups: dict[int, tuple[int, ...]] = {}
        self._states: dict[tuple[int, int], Float32Array] = {}  # group, layer -> (slots, width)
        self.drawer = Drawer()
        self._drawn = np.empty(0, np.int32)

    def load(self, weights: Weights) -> None:
        for name in weights:
            if name not in weights.formats:
                self._weights[name] = weights.vector(name)
                continue
            matrix = weights.matrix(name).dequantise()
            # Beside bfloat16 activations, weights are multiplied as bfloat16 too.
            sixteen = weights.formats[name].activation_bits == 16
            self._weights[name] = round_bfloat16(matrix) if sixteen else matrix

    def compile(self, program: Program) -> Program:
        check_memory_kinds(program, "reference", state=True)
        for index, (group, pages) in enumerate(zip(program.groups, self._limits.pages, strict=True)):
            self._groups[index] = group.layers
            for layer in group.layers:
                shape = (2, pages, PAGE_TOKENS, group.kv_heads, group.head_dim)
                self._memory.setdefault(layer, np.full(shape, np.nan, np.float32))
        for index, state in enumerate(program.states):
            for layer in state.layers:
                slots = np.full((self._limits.states, state.width), np.nan, np.float32)
                self._states.setdefault((index, layer), slots)
        return program

    def run(self, handle: Program, step: Step) -> FinishedStep:
        started = time.perf_counter()
        run = _Run(step.sequences, StepArrays.of(step, len(handle.groups), self._drawn))
        self._drawn = np.full(step.outputs, NOT_DRAWN, np.int32)  # an encoder draws none
        for op in handle.operations:
            if isinstance(op, Sample):
                self._drawn = self.drawer.rows(run.values[op.logits.name], step.draws)
            else:
                run.values[op.out.name] = self._apply(op, run)
        logits = undrawn(run.values[handle.output.name], step.draws)
        work = handle.parts(StepLoad.of(step, handle.groups))
        return FinishedStep(StepResult(logits, self._drawn, time.perf_counter() - started, work))

    @property
    def numerics(self) -> str:
        return f"reference {np.__version__}"

    @property
    def host_page_bytes(self) -> tuple[int, ...]:
        pages = [
            sum(self._memory[layer][:, :1].nbytes for layer in layers)
            for _, layers in sorted(self._groups.items())
        ]
        states = [sum(slots[:1].nbytes for slots in self._states.values())]
        return (*pages, *states) if self._states else tuple(pages)

    def _transfer_state(self, move: Move) -> None:
        """Move one slot, the layers of all groups one behind the other."""
        slots = [self._states[place] for place in sorted(self._states)]
        if isinstance(move, PageCopy):
            for each in slots:
                each[move.target] = each[move.source]
        elif isinstance(move, PageFill):
            ends = np.cumsum([each.shape[1] for each in slots])[:-1]
            for each, values in zip(slots, np.split(move.source.view(np.float32), ends), strict=True):
                each[move.target] = values
        else:
            assert isinstance(move, PageSpill), "states have no slots of tokens to be copied"
            spilled = np.concatenate([each[move.source] for each in slots])
            move.target.put(partial(_bytes_of, spilled))

    def transfer(self, moves: Sequence[Move]) -> None:
        for move in moves:
            if move.group == len(self._groups):
                self._transfer_state(move)
                continue
            layers = self._groups[move.group]
            if isinstance(move, PageCopy):
                for layer in layers:
                    self._memory[layer][:, move.target] = self._memory[layer][:, move.source]
            elif isinstance(move, SlotCopy):
                sources, targets = (
                    divmod(np.array(slots, np.int64), PAGE_TOKENS) for slots in (move.sources, move.targets)
                )
                for layer in layers:
                    self._memory[layer][:, *targets] = self._memory[layer][:, *sources]
            elif isinstance(move, PageFill):
                held = move.source.view(np.float32).reshape(len(layers), 2, PAGE_TOKENS, -1)
                for layer, values in zip(layers, held, strict=True):
                    page = self._memory[layer][:, move.target]
                    page[...] = values.reshape(page.shape)
            else:
                spilled = np.stack([self._memory[layer][:, move.source] for layer in layers])
                move.target.put(partial(_bytes_of, spilled))

    def close(self) -> None:
        self._weights.clear()
        self._memory.clear()
        self._states.clear()

    def _bias(self, weight: Weight | None) -> Float32Array | float:
        return self._weights[weight.name] if weight is not None else 0.0

    @singledispatchmethod
    def _apply(self, op: Operation, run: _Run) -> Float32Array:
        """The operation's value, (rows, width) float32."""
        raise TypeError(f"the reference executor does not know {type(op).__name__}")

    @_apply.register
    def _(self, op: Embed, run: _Run) -> Float32Array:
        ids = run.arrays.tokens if op.ids.kind == "tokens" else run.arrays.positions
        rows: Float32Array = self._weights[op.table.name][ids] * np.float32(op.scale)
        return rows

    @_apply.register
    def _(self, op: Add, run: _Run) -> Float32Array:
        return run.values[op.x.name] + run.values[op.y.name]

    @_apply.register
    def _(self, op: Norm, run: _Run) -> Float32Array:
        x = run.values[op.x.name]
        width = op.head_dim or op.x.width
        grouped = x.reshape(len(x), op.x.width // width, width).astype(np.float64)
        if op.spec.kind == "layer":
            grouped = grouped - grouped.mean(axis=-1, keepdims=True)
        scale = 1 / np.sqrt(np.mean(grouped**2, axis=-1, keepdims=True) + op.spec.eps)
        out = grouped * scale * self._weights[op.weight.name] + self._bias(op.bias)
        normalised: Float32Array = out.reshape(x.shape).astype(np.float32)
        return normalised

    @_apply.register
    def _(self, op: Quantise, run: _Run) -> Float32Array:
        x = run.values[op.x.name]
        if op.out.kind == "bf16":
            return round_bfloat16(x)
        return dequantise_activations(*quantise_activations(x), op.x.width)

    @_apply.register
    def _(self, op: Linear, run: _Run) -> Float32Array:
        x, weight = run.values[op.x.name], self._weights[op.weight.name]
        return (x.astype(np.float64) @ weight.T.astype(np.float64) + self._bias(op.bias)).astype(np.float32)

    @_apply.register
    def _(self, op: Route, run: _Run) -> Float32Array:
        x = run.values[op.x.name].astype(np.float64)
        scores = x @ self._weights[op.router.name].T + self._bias(op.bias)
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, : op.chosen]
        kept = np.take_along_axis(scores, chosen, axis=1)
        if op.renormalise:
            kept /= kept.sum(axis=1, keepdims=True)
        parts = [chosen, kept]
        if op.shared_gate is not None:
            parts.append(1 / (1 + np.exp(-x @ self._weights[op.shared_gate.name].T)))
        routes: Float32Array = np.concatenate(parts, axis=1).astype(np.float32)
        return routes

    @_apply.register
    def _(self, op: ExpertLinear, run: _Run) -> Float32Array:
        x, weights = run.values[op.x.name].astype(np.float64), self._weights[op.weight.name]
        if op.x.experts == 1:
            x = np.repeat(x, op.out.experts, axis=0)
        experts = run.values[op.routes.name][:, : op.out.experts].astype(int).reshape(-1)
        out = np.empty((len(x), op.out.width), np.float32)
        for expert in np.unique(experts):
            mine = experts == expert
            bias = self._weights[op.bias.name][expert] if op.bias else 0.0
            out[mine] = x[mine] @ weights[expert].T.astype(np.float64) + bias
        return out

    @_apply.register
    def _(self, op: Combine, run: _Run) -> Float32Array:
        routes, chosen = run.values[op.routes.name].astype(np.float64), op.x.experts
        each = run.values[op.x.name].reshape(len(routes), chosen, op.x.width)
        out: Float64Array = (routes[:, chosen : 2 * chosen, None] * each).sum(axis=1)
        if op.shared is not None:
            out = out + routes[:, 2 * chosen :] * run.values[op.shared.name]
        return out.astype(np.float32)

    @_apply.register
    def _(self, op: Rope, run: _Run) -> Float32Array:
        x = run.values[op.x.name]
        heads = x.reshape(len(x), -1, op.head_dim).copy()
        cos, sin = (table[:, None, :] for table in rope_tables(op.spec, run.arrays.positions))
        half = op.spec.dim // 2
        first, second = heads[..., :half].copy(), heads[..., half : 2 * half].copy()
        heads[..., :half] = first * cos - second * sin
        heads[..., half : 2 * half] = second * cos + first * sin
        return heads.reshape(x.shape)

    @_apply.register
    def _(self, op: StoreKV, run: _Run) -> Float32Array:
        arrays, memory = run.arrays, self._memory[op.layer]
        pages = arrays.row_pages(op.group)
        for side, value in enumerate((op.key, op.value)):
            heads = run.values[value.name].reshape(len(pages), *memory.shape[3:])
            memory[side, pages, arrays.slots % PAGE_TOKENS] = self._round(heads)
        return np.empty((0, 0), np.float32)

    @_apply.register
    def _(self, op: Attention, run: _Run) -> Float32Array:
        query = run.values[op.query.name]
        out = np.zeros((len(query), op.heads, op.head_dim), np.float32)
        for sequence, begin in enumerate(run.arrays.sequence_row_begin[:-1]):
            end = run.arrays.sequence_row_begin[sequence + 1]
            # Each row of a tree has a context of its own.
            cuts = range(begin, end + 1) if run.arrays.is_tree(sequence) else (begin, end)
            for rows in starmap(slice, pairwise(cuts)):
                q = query[rows].reshape(-1, op.heads, op.head_dim)
                out[rows] = self._attend(op, q, run.arrays, sequence, rows)
        return out.reshape(query.shape)

    def _attend(
        self,
        op: Attention,
        q: Float32Array,
        arrays: StepArrays,
        sequence: int,
        rows: slice,
    ) -> Float32Array:
        """Attention of rows of one sequence over all of its segments: (rows, heads, head_dim). Of a tree, one
        row at a time."""
        keys, values, biases, visible = [], [], [], []
        at = arrays.positions[rows, None]
        for segment in range(arrays.segment_begin[sequence], arrays.segment_begin[sequence + 1]):
            slots = np.arange(arrays.segment_length[segment])
            if arrays.is_tree(sequence) and segment == arrays.segment_begin[sequence + 1] - 1:
                start = arrays.slots[arrays.sequence_row_begin[sequence]]
                slots = np.concatenate([slots[:start], arrays.path_slots(rows.start)])
            pages = arrays.tables[op.group][arrays.table_begin[segment] + slots // PAGE_TOKENS]
            positions = np.arange(len(slots)) + arrays.segment_first_position[segment]
            seen = np.ones((len(at), len(slots)), bool)
            if arrays.segment_causal[segment]:
                seen &= positions <= at
            if op.window is not None:
                seen &= positions > at - op.window
            used = seen.any(axis=0)  # a slot that nobody sees may hold anything, NaN included
            held = self._memory[op.layer][:, pages[used], slots[used] % PAGE_TOKENS].astype(np.float64)
            keys.append(held[0])
            values.append(held[1])
            biases.append(np.full(used.sum(), arrays.segment_bias[segment], np.float64))
            visible.append(seen[:, used])
        mask, bias = np.concatenate(visible, axis=1), np.concatenate(biases)
        share = op.heads // op.kv_heads
        k, v = (np.repeat(np.concatenate(side), share, axis=1) for side in (keys, values))
        scores = np.einsum("rhd,shd->hrs", q.astype(np.float64), k) * op.scale
        if op.softcap is not None:
            scores = op.softcap * np.tanh(scores / op.softcap)
        scores = scores + bias
        scores = np.where(mask, scores, -np.inf)
        sinks = self._weights[op.sinks.name][:, None, None] if op.sinks else np.float64(-np.inf)
        top = np.maximum(np.max(scores, axis=-1, keepdims=True, initial=-1e300), sinks)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(sinks - top)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        mixed: Float32Array = np.einsum("hrs,shd->rhd", weights, v).astype(np.float32)
        return mixed

    @_apply.register
    def _(self, op: GatedRecurrence, run: _Run) -> Float32Array:
        x = run.values[op.x.name].astype(np.float64)
        forget = 1 / (1 + np.exp(-run.values[op.gate.name].astype(np.float64)))
        states, out = self._states[op.group, op.layer], np.empty(x.shape, np.float32)
        begins = run.arrays.sequence_row_begin
        for sequence, begin, end in zip(run.sequences, begins[:-1], begins[1:], strict=True):
            assert sequence.state is not None, "a sequence without a slot for its state"
            read, written = sequence.state
            state = np.zeros(x.shape[1], np.float32) if read == NO_STATE else states[read]
            for row in range(begin, end):
                state = (forget[row] * state + (1 - forget[row]) * x[row]).astype(np.float32)
                out[row] = state
            states[written] = state
        return out

    @_apply.register
    def _(self, op: Activate, run: _Run) -> Float32Array:
        x = run.values[op.x.name].astype(np.float64)
        times = None if op.times is None else run.values[op.times.name]
        if op.activation == "clamped_silu":
            x, times = np.minimum(x, 7.0), None if times is None else np.clip(times, -7.0, 7.0) + 1.0
        y = _ACTIVATIONS[op.activation](x)
        if times is not None:
            y = y * times
        return y.astype(np.float32)

    @_apply.register
    def _(self, op: Select, run: _Run) -> Float32Array:
        return run.values[op.x.name][run.arrays.output_rows]

    @_apply.register
    def _(self, op: Softcap, run: _Run) -> Float32Array:
        capped: Float32Array = np.float32(op.cap) * np.tanh(run.values[op.x.name] / np.float32(op.cap))
        return capped


def _bytes_of(spilled: Float32Array) -> ByteArray:
    return spilled.view(np.uint8).reshape(-1)


def _silu(x: Float64Array) -> Float64Array:
    y: Float64Array = x / (1 + np.exp(-x))
    return y


def _gelu(x: Float64Array) -> Float64Array:
    erf = np.array([math.erf(v) for v in (x / math.sqrt(2)).flat]).reshape(x.shape)
    y: Float64Array = 0.5 * x * (1 + erf)
    return y


def _gelu_tanh(x: Float64Array) -> Float64Array:
    """The tanh approximation of GELU (arXiv:1606.08415, section 2)."""
    y: Float64Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return y


def _swish(x: Float64Array) -> Float64Array:
    y: Float64Array = x / (1 + np.exp(-1.702 * x))
    return y


_ACTIVATIONS: dict[str, Callable[[Float64Array], Float64Array]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "clamped_silu": _swish,
}
