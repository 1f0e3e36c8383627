"""Which buffer each value of a lowered program lives in: buffers are reused as soon as nobody reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ridgeline.execution.lowering import Launch, borders
from ridgeline.model.program import Program, Value

B = TypeVar("B")

BUFFERED = ("f32", "bf16", "A8-g32", "routes")
"""Kinds of values that live in buffers; logits, drawn tokens and sequence memory have their own places."""


@dataclass(slots=True)
class _Room(Generic[B]):
    """Buffers that were made together, and the values that live in them now."""

    shapes: tuple[tuple[str, int, int], ...]
    buffers: Sequence[B]
    living: set[str]


def assign_buffers(
    program: Program, launches: Sequence[Launch], make: Callable[[tuple[Value, ...]], Sequence[B]]
) -> dict[str, B]:
    """A buffer for each value of a `BUFFERED` kind that crosses launches.

    `make` gives buffers to values that live together: all that a launch writes `side_by_side`, else one.
    A value that overwrites another has the other's buffer. Values whose lives do not overlap share buffers,
    so their number does not grow with the layers.
    """
    crossing = borders(program, launches)
    last_read = {v.name: i for i, border in enumerate(crossing) for v in border.reads}
    buffers: dict[str, B] = {}
    rooms: dict[str, _Room[B]] = {}
    free: dict[tuple[tuple[str, int, int], ...], list[Sequence[B]]] = {}
    for index, (launch, border) in enumerate(zip(launches, crossing, strict=True)):
        for new, old in launch.overwrites:
            if old.name in rooms:
                buffers[new.name], rooms[new.name] = buffers[old.name], rooms.pop(old.name)
                rooms[new.name].living ^= {old.name, new.name}
        made = tuple(v for v in border.writes if v.kind in BUFFERED and v.name not in rooms)
        for values in [made] if launch.side_by_side and made else [(v,) for v in made]:
            shapes = tuple((v.kind, v.width, v.experts) for v in values)
            pool = free.get(shapes)
            room = _Room(shapes, pool.pop() if pool else make(values), {v.name for v in values})
            for value, buffer in zip(values, room.buffers, strict=True):
                buffers[value.name], rooms[value.name] = buffer, room
        for value in border.reads:
            if last_read[value.name] == index and value.name in rooms:
                room = rooms.pop(value.name)
                room.living.discard(value.name)
                if not room.living:
                    free.setdefault(room.shapes, []).append(room.buffers)
    return buffers
