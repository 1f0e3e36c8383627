"""What the scheduler hands to the engine: a step, and whose rows it holds."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import Draw, Move, Segment, SequenceRows, Step

Chunk = tuple[Sequence, int, list[int]]
"""A sequence, how many of its next rows run, and which have an output."""


class Plan(msgspec.Struct, frozen=True):
    """A step and the sequences whose rows it holds, in its order. For each output, `sampled` has its sequence
    and `positions` the position of the token behind its row: one that is to be sampled, or one of the prompt.

    A `pooled` step is the encoder's, and its outputs are hidden states. `moves` are made before it runs.
    """

    step: Step
    sequences: tuple[Sequence, ...]
    sampled: tuple[Sequence, ...]
    positions: tuple[int, ...]
    planned_s: float
    pooled: bool = False
    moves: tuple[Move, ...] = ()


def plan_of(chunks: Iterable[Chunk], pooled: bool, now_s: float, moves: tuple[Move, ...]) -> Plan:
    """The step for what a budget was spent on."""
    planned, steps, sampled, positions = [], [], [], []
    draws: list[Draw | None] = []
    for sequence, count, outputs in chunks:
        start = sequence.computed
        end = start + count
        chooser = sequence.chooser
        for row in outputs:
            sampled.append(sequence)
            positions.append(row + 1)
            on_host = chooser.needs_logits or row < sequence.prompt_length - 1
            draws.append(None if on_host else chooser.draw(row + 1))
        wanted = _FIRST if count == 1 and outputs else [row - start for row in outputs]
        segments = (Segment(sequence.pages.tables, end),)
        planned.append(sequence)
        tokens, state = sequence.tokens(start, end), sequence.pages.planned
        steps.append(SequenceRows(tokens, start, segments, wanted, state))
    step = Step(tuple(steps), () if pooled else tuple(draws))
    return Plan(step, tuple(planned), tuple(sampled), tuple(positions), now_s, pooled, moves)


_FIRST = (0,)
