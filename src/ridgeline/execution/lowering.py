"""What a lowering is: launches that cover a program's operations, and the checker that proves it.

Bytes are counted here and nowhere else: a launch moves the weights and sequence memory of the operations
that it covers, and the values that cross its border. Values that live inside one launch move none.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ridgeline.model.program import (
    Attention,
    Embed,
    ExpertLinear,
    Operation,
    Program,
    Select,
    StepLoad,
    StoreKV,
    Value,
)
from ridgeline.types import StepWork, Work


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel call. `overwrites` pairs a value that is written with the one whose buffer it takes over.

    What a launch writes `side_by_side` lies in the columns of one buffer. One that is for `only_outputs`
    computes the rows whose outputs the step wants, and leaves the others of what it writes as they are.
    """

    side_by_side: ClassVar[bool] = False

    covers: tuple[Operation, ...]
    overwrites: tuple[tuple[Value, Value], ...]
    only_outputs: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Border:
    """What crosses a launch: values that come from outside, and those that somebody outside reads."""

    reads: tuple[Value, ...]
    writes: tuple[Value, ...]


def borders(program: Program, launches: Sequence[Launch]) -> tuple[Border, ...]:
    """The border of each launch. What the host reads leaves the launch that makes it."""
    readers: dict[str, set[int]] = {op.out.name: {0} for op in program.operations if program.leaves(op.out)}
    for op in program.operations:
        for value in op.inputs:
            readers.setdefault(value.name, set()).add(id(op))
    found = []
    for launch in launches:
        inside = {id(op) for op in launch.covers}
        made = {op.out.name for op in launch.covers}
        reads = {v.name: v for op in launch.covers for v in op.inputs if v.name not in made}
        writes = [op.out for op in launch.covers if readers.get(op.out.name, set()) - inside]
        found.append(Border(tuple(reads.values()), tuple(writes)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Footprint:
    """How many bytes an executor's things take: a packed weight, a row of it, a row of a value, and one
    layer's keys and values of a slot of a memory group."""

    weight_bytes: Callable[[str], int]
    weight_row_bytes: Callable[[str], int]
    value_row_bytes: Callable[[Value], int]
    slot_bytes: Callable[[int], int]


def launch_work(launch: Launch, border: Border, load: StepLoad, footprint: Footprint) -> Work:
    """Arithmetic of the covered operations and bytes that the launch moves; of experts' weights, the expected
    ones."""
    experts = sum(held.read_bytes(load) for held in _expert_weights(launch, footprint))
    return _steady_work(launch, border, load, footprint) + Work(read_bytes=experts)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Weights of `count` experts, of which a step reads those that its rows choose."""

    count: int
    chosen: int
    weight_bytes: int

    def read_bytes(self, load: StepLoad) -> int:
        return round(load.experts_used(self.count, self.chosen) * self.weight_bytes)


def _expert_weights(launch: Launch, footprint: Footprint) -> list[ExpertWeights]:
    return [
        ExpertWeights(op.count, op.out.experts, sum(footprint.weight_bytes(w.name) for w in op.weights))
        for op in launch.covers
        if isinstance(op, ExpertLinear)
    ]


def _steady_work(launch: Launch, border: Border, load: StepLoad, footprint: Footprint) -> Work:
    """All but the reading of experts' weights: linear in the load."""
    if launch.only_outputs:
        load = load.of_outputs
    work = Work.total(op.work(load) for op in launch.covers)
    picked = {op.x.name for op in launch.covers if isinstance(op, Select)}  # of these, only the chosen rows
    read = sum(
        (load.outputs if v.name in picked else load.rows_of(v)) * footprint.value_row_bytes(v)
        for v in border.reads
    )
    written = sum(load.rows_of(v) * footprint.value_row_bytes(v) for v in border.writes)
    for op in launch.covers:
        if isinstance(op, Embed):
            read += load.rows * footprint.weight_row_bytes(op.table.name)
        elif load.rows_of(op.out) and not isinstance(op, ExpertLinear):
            read += sum(footprint.weight_bytes(weight.name) for weight in op.weights)
        if isinstance(op, Attention):
            read += load.slots[op.group] * footprint.slot_bytes(op.group)
        if isinstance(op, StoreKV):
            written += load.rows * footprint.slot_bytes(op.group)
    return work + Work(read_bytes=read, written_bytes=written)


@dataclass(frozen=True, slots=True, eq=False)
class WorkModel:
    """The work of a whole lowering as a function of a step's load: cheap to ask in every step.

    Every operation and every launch is linear in rows, outputs, pairs and slots, but for the weights of
    experts, and those of the final norm and the head, which are only read when a step wants outputs at all.
    Only launches over rows with outputs depend on outputs, and only attention on pairs and slots.

    `figures` has a line for each figure of a `StepWork`: what each of the step's counts adds to it, which are
    1, rows, whether it wants outputs, outputs, and each group's pairs, slots, and pairs and slots of the rows
    with outputs. None where nothing does.
    """

    figures: tuple[tuple[int, ...] | None, ...]
    experts: tuple[tuple[ExpertWeights, int], ...]  # each with how often it occurs

    @classmethod
    def of(cls, program: Program, launches: Sequence[Launch], footprint: Footprint) -> WorkModel:
        crossed = tuple(zip(launches, borders(program, launches), strict=True))
        attending = [c for c in crossed if _attends(c[0])]
        others = [c for c in crossed if not _attends(c[0])]
        groups = len(program.groups)
        dense, attention = (_coefficients(some, groups, footprint) for some in (others, attending))
        nothing = [0] * groups
        reads = [d.read_bytes + a.read_bytes for d, a in zip(dense, attention, strict=True)]
        # What is read whatever the rows are is weights.
        weights = [reads[0], 0, reads[2], 0, *4 * nothing]
        slots, output_slots = reads[4 + groups : 4 + 2 * groups], reads[4 + 3 * groups :]
        kv = [0, _stored_bytes(launches, footprint), 0, 0, *nothing, *slots, *nothing, *output_slots]
        selecting = sum(map(_selects, launches))
        calls = [len(launches) - selecting, 0, selecting, 0, *4 * nothing]
        rows = zip(dense, attention, weights, kv, calls, strict=True)
        figures = zip(*([*d.numbers, *a.numbers, *rest] for d, a, *rest in rows), strict=True)
        experts = Counter(held for launch in launches for held in _expert_weights(launch, footprint))
        return cls(tuple(line if any(line) else None for line in figures), tuple(experts.items()))

    def parts(self, load: StepLoad) -> StepWork:
        """The work of a step; a few microseconds, so that every step can be told its own."""
        rows, outputs = load.rows, load.outputs
        seen = load if outputs == rows else load.of_outputs
        counts = (1, rows, min(outputs, 1), outputs, *load.pairs, *load.slots, *seen.pairs, *seen.slots)
        # Not NumPy: a product this small costs less than the way to it, and Python's numbers are exact.
        figures = [0 if line is None else sum(map(operator.mul, line, counts)) for line in self.figures]
        for held, times in self.experts:
            read = times * held.read_bytes(load)
            figures[_DENSE_READ] += read
            figures[_WEIGHTS] += read
        dense, attention, (weights, kv, launches) = Work(*figures[:5]), Work(*figures[5:10]), figures[10:]
        return StepWork(dense, attention, rows, outputs, load.sequences, launches, weights, kv)

    def at(self, load: StepLoad) -> Work:
        return self.parts(load).total


_DENSE_READ, _WEIGHTS = 3, 10
"""Places among the figures: those of the work of dense launches, then of attention, then `weight_bytes`,
`kv_bytes` and `launches`."""


def _attends(launch: Launch) -> bool:
    return any(isinstance(op, Attention) for op in launch.covers)


def _selects(launch: Launch) -> bool:
    return launch.only_outputs or any(op.out.selected for op in launch.covers)


def _stored_bytes(launches: Iterable[Launch], footprint: Footprint) -> int:
    """What a row adds to the sequence memory of all layers."""
    operations = (op for launch in launches for op in launch.covers)
    return sum(footprint.slot_bytes(op.group) for op in operations if isinstance(op, StoreKV))


def _coefficients(some: Sequence[tuple[Launch, Border]], groups: int, footprint: Footprint) -> list[Work]:
    """What launches add for 1 (whatever the step), each row, any outputs at all, each output, each pair and
    slot of every memory group, and each of those of rows with outputs."""
    none = (0,) * groups
    units = [tuple(int(g == h) for h in range(groups)) for g in range(groups)]
    one = StepLoad(1, 0, none, none)
    wanted = StepLoad(2, 1, none, none, output_pairs=none, output_slots=none)
    selecting = [crossed for crossed in some if _selects(crossed[0])]
    attending = [crossed for crossed in some if _attends(crossed[0])]

    def work(chosen: Sequence[tuple[Launch, Border]], load: StepLoad) -> Work:
        return Work.total([Work(), *(_steady_work(*crossed, load, footprint) for crossed in chosen)])

    def added(chosen: Sequence[tuple[Launch, Border]], load: StepLoad, to: StepLoad = one) -> Work:
        return work(chosen, load) - work(chosen, to)

    base = work(some, one)
    per_row = work(some, replace(one, rows=2)) - base
    first, second = replace(one, outputs=1), replace(one, outputs=2)
    per_output = added(selecting, second, to=first)
    return [
        base - per_row,
        per_row,
        added(selecting, first) - per_output,
        per_output,
        *(added(attending, replace(one, pairs=unit)) for unit in units),
        *(added(attending, replace(one, slots=unit)) for unit in units),
        *(added(attending, replace(wanted, output_pairs=unit), to=wanted) for unit in units),
        *(added(attending, replace(wanted, output_slots=unit), to=wanted) for unit in units),
    ]


def check_lowering(program: Program, launches: Sequence[Launch]) -> None:
    """Prove that launches do the program: every operation exactly once, nothing read before it is written,
    nothing read after its buffer was taken over. Raises ValueError that names the operation or value."""
    _covered_once(program.operations, [op for launch in launches for op in launch.covers])
    ready = {"tokens", "positions"}
    gone: set[str] = set()
    for launch, border in zip(launches, borders(program, launches), strict=True):
        reads, writes = ({v.name for v in values} for values in (border.reads, border.writes))
        for name in reads - (ready - gone):
            raise ValueError(f"{name} is read {'after it was overwritten' if name in gone else 'early'}")
        for new, old in launch.overwrites:
            if new.name not in writes or old.name not in reads:
                raise ValueError(
                    f"{new.name} takes over {old.name}, which its launch does not read and rewrite"
                )
            gone.add(old.name)
        ready |= writes


def _covered_once(operations: Iterable[Operation], covered: Sequence[Operation]) -> None:
    wanted = {id(op): op for op in operations}
    seen: set[int] = set()
    for op in covered:
        if id(op) not in wanted or id(op) in seen:
            raise ValueError(
                f"{type(op).__name__} {op.out.name} is covered twice, or belongs to no operation"
            )
        seen.add(id(op))
    for key, op in wanted.items():
        if key not in seen:
            raise ValueError(f"{type(op).__name__} {op.out.name} is covered by no launch")
