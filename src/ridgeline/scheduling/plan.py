"""What the scheduler hands to the engine: a step, and whose rows it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many

import msgspec
from msgspec import structs

from ridgeline.sampling.drafting.tree import DraftTree
from ridgeline.sampling.sampler import Chooser
from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import Draw, Move, Segment, SequenceRows, Step

Chunk = tuple[Sequence, int, Many[int]]
"""A sequence, how many of its next rows run, and which of those, counted from 0, have an output."""


class Drafted(msgspec.Struct, frozen=True):
    """A decode that runs with guesses behind its row, which is in slot `start`. Its row's is the `output`-th
    of the step's outputs, that of the tree's node i comes 1 + i after it. It was planned after so many
    `preemptions` of the sequence: after another, its slots are somebody else's."""

    sequence: Sequence
    tree: DraftTree
    start: int
    output: int
    preemptions: int


class Plan(msgspec.Struct, frozen=True, weakref=True):
    """A step and the sequences whose rows it holds, in its order. For each output, `sampled` has its sequence
    and `positions` the position of the token behind its row: one that is to be sampled, or one of the prompt.
    What comes behind a guess of those that are `drafted` counts only where the guess was right.

    Of its `rows`, so many are prompts' (`prompt_rows`). A `pooled` step is the encoder's, and its outputs are
    hidden states. `moves` are made before it runs.
    """

    step: Step
    sequences: tuple[Sequence, ...]
    sampled: tuple[Sequence, ...]
    positions: tuple[int, ...]
    planned_s: float
    rows: int
    prompt_rows: int
    pooled: bool = False
    moves: tuple[Move, ...] = ()
    drafted: tuple[Drafted, ...] = ()

    @property
    def guesses(self) -> int:
        """Rows of tokens that are only guessed."""
        return sum([len(each.tree) for each in self.drafted])

    @property
    def unguessed(self) -> Step:
        """The step without its guesses, to count what it would ask for."""
        arrivals = {each.sequence.arrival for each in self.drafted}
        pairs = zip(self.sequences, self.step.sequences, strict=True)
        alone = [
            structs.replace(rows, tokens=rows.tokens[:1], outputs=(0,), parents=())
            if sequence.arrival in arrivals
            else rows
            for sequence, rows in pairs
        ]
        return Step(tuple(alone))

    @property
    def certain(self) -> Iterable[int]:
        """The outputs that are not behind guesses."""
        if not self.drafted:
            return range(len(self.sampled))
        guesses = {each.output + 1 + node for each in self.drafted for node in range(len(each.tree))}
        return [output for output in range(len(self.sampled)) if output not in guesses]


def plan_of(
    chunks: Iterable[Chunk],
    pooled: bool,
    now_s: float,
    moves: tuple[Move, ...],
    drafts: Mapping[int, DraftTree],
    recurrent: bool = False,
) -> Plan:
    """The step for what a budget was spent on; `drafts` has guesses for decodes, by their arrival. Where the
    model is `recurrent`, sequences have slots of state."""
    planned, steps, sampled, positions = [], [], [], []
    draws: list[Draw | None] = []
    drafted = []
    rows = prompt_rows = 0
    for sequence, count, outputs in chunks:
        start, begun = sequence.computed, sequence.prompt_length
        end = start + count
        for row in outputs:
            position = end if count == 1 else start + row + 1  # the same number, for the memory that it takes
            sampled.append(sequence)
            positions.append(position)
            draws.append(None if position < begun else sequence.draw or _draw_of(sequence.chooser, position))
        planned.append(sequence)
        rows += count
        if start < begun:
            prompt_rows += min(begun - start, count)
        if drafts and sequence.arrival in drafts:
            tree = drafts[sequence.arrival]
            each = Drafted(sequence, tree, start, len(sampled) - 1, sequence.preemptions)
            drafted.append(each)
            behind = [start + 1 + depth for depth in each.tree.depths()]
            rows += len(behind)
            sampled += [sequence] * len(behind)
            positions += behind
            draws += [sequence.draw or _draw_of(sequence.chooser, position) for position in behind]
            steps.append(_rows_of(each))
            continue
        segments = (Segment(sequence.tables, end),)
        state = sequence.pages.planned if recurrent else None
        steps.append(SequenceRows(sequence.tokens(start, end), start, segments, outputs, (), state))
    step = Step(tuple(steps), () if pooled else tuple(draws))
    whose = tuple(planned), tuple(sampled), tuple(positions)
    return Plan(step, *whose, now_s, rows, prompt_rows, pooled, moves, tuple(drafted))


def _draw_of(chooser: Chooser, position: int) -> Draw | None:
    return None if chooser.needs_logits else chooser.draw(position)


def _rows_of(drafted: Drafted) -> SequenceRows:
    """The rows of a decode and its guesses, all of which have an output."""
    sequence, tree, start = drafted.sequence, drafted.tree, drafted.start
    rows = 1 + len(tree)
    parents = () if tree.is_chain else (-1, *[1 + parent for parent in tree.parents])
    segments = (Segment(sequence.tables, start + rows),)
    return SequenceRows((sequence.token_ids[start], *tree.tokens), start, segments, range(rows), parents)
