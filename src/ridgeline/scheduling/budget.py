"""What one step may still take."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Many

from ridgeline.config import MAX_OUTPUT_ROWS, PAGE_TOKENS
from ridgeline.sampling.drafting.tree import DraftTree
from ridgeline.scheduling.pace import StepPace
from ridgeline.scheduling.plan import Chunk
from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import SERVICE_CLASSES

_FIRST = (0,)


class Budget:
    """Tokens, outputs and time of one step; made for one call of `schedule` and thrown away.

    `planned` has the arrivals of sequences that are in the step, or could not be; few steps ask for them, so
    those of `chunks` are noted when one does. `short`: somebody lacks pages, so nobody else gets a seat.
    `closed`: nobody gets one any more. `spent`: prompts of the class that is planned have no time left, or no
    tokens but the `kept` ones of lower classes. `decodes` and `begun` are the sequences with one row to run
    and with more, by class; since there were that many `preemptions`, some may have given way. `drafts` has
    what is guessed behind decodes, by their arrival.
    """

    __slots__ = (
        "_noted", "_planned", "begun", "chunks", "closed", "decodes", "drafts", "first_pages", "kept",
        "outputs", "pace", "pooled", "preemptions", "short", "spent", "tokens",
    )  # fmt: skip

    def __init__(self, tokens: int, pooled: bool) -> None:
        self.tokens = tokens
        self.pooled = pooled
        self.outputs = MAX_OUTPUT_ROWS  # overdrawn by sequences that want only their last row's
        self.chunks: list[Chunk] = []
        self.drafts: dict[int, DraftTree] = {}
        self._planned: set[int] = set()
        self._noted = 0  # of the chunks, those whose sequences are among the planned
        self.first_pages: dict[Hashable, tuple[Sequence, int]] = {}  # of prefills, with their chunks' ends
        self.short = self.closed = self.spent = False
        self.kept = 0
        self.preemptions = 0
        self.pace: StepPace | None = None
        self.decodes: tuple[list[Sequence], ...] = tuple([] for _ in SERVICE_CLASSES)
        self.begun: tuple[list[Sequence], ...] = tuple([] for _ in SERVICE_CLASSES)

    @property
    def planned(self) -> set[int]:
        chunks, noted = self.chunks, self._noted
        if noted < len(chunks):
            self._planned.update([sequence.arrival for sequence, _, _ in chunks[noted:]])
            self._noted = len(chunks)
        return self._planned

    def decode(self, sequences: Many[Sequence]) -> None:
        """Plan the one row that each of these has."""
        chunks, wanted = self.chunks, 0
        for sequence in sequences:
            row = sequence.computed
            outputs = _FIRST if row + 1 == sequence.length else sequence.outputs(row, row + 1)
            wanted += len(outputs)
            chunks.append((sequence, 1, outputs))
        self.tokens -= len(sequences)
        self.outputs -= wanted

    def take(self, sequence: Sequence, tokens: int) -> None:
        """Plan some of a sequence's rows."""
        rows = sequence.outputs(sequence.computed, sequence.computed + tokens)
        self.tokens -= tokens
        self.outputs -= len(rows)
        self.chunks.append((sequence, tokens, rows))

    def draft(self, sequence: Sequence, tree: DraftTree) -> None:
        """Plan guesses behind the row of a decode that is planned already."""
        self.drafts[sequence.arrival] = tree
        self.tokens -= len(tree)
        self.outputs -= len(tree)

    def begin_prefills(self, level: int, kept: int) -> None:
        """Prompts of a class come next; `kept` tokens are left for lower ones."""
        self.kept = kept
        self.spent = False
        # However many decodes there are, who asks for many outputs gets on.
        self.outputs = max(self.outputs, PAGE_TOKENS)
        if self.pace is not None:
            self.pace.begin_prefills(level)

    @property
    def open(self) -> bool:
        """Whether rows of prompts may be planned."""
        return self.tokens > 0 and not self.spent

    def most_rows(self, sequence: Sequence) -> int:
        """How many of the sequence's next rows tokens, outputs and time allow."""
        # Each class gets on, whatever is kept for others.
        rows = min(sequence.remaining, max(self.tokens - self.kept, 1))
        if sequence.asks_many and not self.pooled:  # hidden states are small
            before = max(sequence.first_output - sequence.computed, 0)
            rows = min(rows, before + max(self.outputs, 0))
        if self.pace is not None and rows > 0:
            start = sequence.computed
            fitting = self.pace.rows_that_fit(start, rows, len(sequence.outputs(start, start + rows)))
            self.spent = fitting < rows
            rows = fitting
        if self.tokens - rows <= self.kept:
            self.spent = True
        return rows
