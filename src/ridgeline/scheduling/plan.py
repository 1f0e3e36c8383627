"""What the scheduler hands to the engine: a step, and whose rows it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from msgspec import structs

from ridgeline.sampling.drafting.tree import DraftTree
from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import Draw, Move, Segment, SequenceRows, Step

Chunk = tuple[Sequence, int, list[int]]
"""A sequence, how many of its next rows run, and which have an output."""


class Drafted(msgspec.Struct, frozen=True):
    """A decode that runs with guesses behind its row, which is in slot `start`. Its row's is the `output`-th
    of the step's outputs, that of the tree's node i comes 1 + i after it. It was planned after so many
    `preemptions` of the sequence: after another, its slots are somebody else's."""

    sequence: Sequence
    tree: DraftTree
    start: int
    output: int
    preemptions: int


class Plan(msgspec.Struct, frozen=True):
    """A step and the sequences whose rows it holds, in its order. For each output, `sampled` has its sequence
    and `positions` the position of the token behind its row: one that is to be sampled, or one of the prompt.
    What comes behind a guess of those that are `drafted` counts only where the guess was right.

    A `pooled` step is the encoder's, and its outputs are hidden states. `moves` are made before it runs.
    """

    step: Step
    sequences: tuple[Sequence, ...]
    sampled: tuple[Sequence, ...]
    positions: tuple[int, ...]
    planned_s: float
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
            structs.replace(rows, tokens=rows.tokens[:1], outputs=_FIRST, parents=())
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
) -> Plan:
    """The step for what a budget was spent on; `drafts` has guesses for decodes, by their arrival."""
    planned, steps, sampled, positions = [], [], [], []
    draws: list[Draw | None] = []
    drafted = []
    for sequence, count, outputs in chunks:
        start = sequence.computed
        end = start + count
        chooser = sequence.chooser
        for row in outputs:
            sampled.append(sequence)
            positions.append(row + 1)
            on_host = chooser.needs_logits or row < sequence.prompt_length - 1
            draws.append(None if on_host else chooser.draw(row + 1))
        planned.append(sequence)
        if drafts and sequence.arrival in drafts:
            tree = drafts[sequence.arrival]
            each = Drafted(sequence, tree, start, len(sampled) - 1, sequence.preemptions)
            drafted.append(each)
            behind = [start + 1 + depth for depth in each.tree.depths()]
            sampled += [sequence] * len(behind)
            positions += behind
            draws += [None if chooser.needs_logits else chooser.draw(position) for position in behind]
            steps.append(_rows_of(each))
            continue
        wanted = _FIRST if count == 1 and outputs else [row - start for row in outputs]
        segments = (Segment(sequence.pages.tables, end),)
        tokens, state = sequence.tokens(start, end), sequence.pages.planned
        steps.append(SequenceRows(tokens, start, segments, wanted, state=state))
    step = Step(tuple(steps), () if pooled else tuple(draws))
    return Plan(step, tuple(planned), tuple(sampled), tuple(positions), now_s, pooled, moves, tuple(drafted))


_FIRST = (0,)


def _rows_of(drafted: Drafted) -> SequenceRows:
    """The rows of a decode and its guesses, all of which have an output."""
    sequence, tree, start = drafted.sequence, drafted.tree, drafted.start
    rows = 1 + len(tree)
    parents = () if tree.is_chain else (-1, *[1 + parent for parent in tree.parents])
    segments = (Segment(sequence.pages.tables, start + rows),)
    return SequenceRows((sequence.token_ids[start], *tree.tokens), start, segments, range(rows), parents)
