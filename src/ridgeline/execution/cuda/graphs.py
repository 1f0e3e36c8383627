"""Which CUDA graph serves a step: the bookkeeping, which knows no CUDA.

A graph is recorded for a bucket: so many rows and outputs, and whether every sequence has a single row. A
step runs in the smallest bucket that holds it, filled up with rows that nobody reads; attention's work list
lies in buffers of fixed size, so a graph knows nothing of sequences and contexts. A step that fits no
bucket, or has paths of a tree's side branches, runs eagerly with the same kernels.

A bucket's first step runs eagerly in the bucket's size, which compiles its kernels; its second records.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from ridgeline.execution.cuda.inputs import StepSize

MAX_GRAPH_ROWS = 512
"""Steps of more rows keep the device busy for longer than it takes to launch their kernels."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]


def single_row_buckets(max_sequences: int) -> list[int]:
    """Sizes of steps in which every sequence has one row: 1, 2, 4, then multiples of 8."""
    return sorted({n for n in (1, 2, 4, *range(8, max_sequences, 8)) if n < max_sequences} | {max_sequences})


def mixed_buckets(max_rows: int) -> list[int]:
    """Sizes of all other steps: powers of two, up to `MAX_GRAPH_ROWS`."""
    top = min(max_rows, MAX_GRAPH_ROWS)
    sizes, size = [], 16
    while size < top:
        sizes.append(size)
        size *= 2
    return [*sizes, top]


class GraphBook:
    """The graphs of one program, by bucket. `capture` records what a function launches.

    There are at most max_sequences / 8 + 4 buckets for steps of single rows, and 12 for others: 6 sizes, with
    outputs and without.
    """

    def __init__(self, max_rows: int, max_sequences: int, capture: Capture) -> None:
        self._single = single_row_buckets(min(max_sequences, max_rows))
        self._mixed = mixed_buckets(max_rows)
        self._capture = capture
        self._graphs: dict[StepSize, Callable[[], None] | None] = {}

    def bucket(self, size: StepSize) -> StepSize | None:
        """The bucket that serves a step of this size; None where it has to run eagerly.

        Steps of single rows have as many outputs in their bucket as rows. Of the others, those that want
        no output at all spare the head.
        """
        sizes = self._single if size.single else self._mixed
        place = bisect_left(sizes, size.rows)
        if place == len(sizes) or size.outputs > self._single[-1] or size.paths:
            return None
        rows = sizes[place]
        outputs = rows if size.single else self._single[-1] if size.outputs else 0
        return StepSize(rows, outputs, size.single)

    def run(self, bucket: StepSize, launch: Callable[[StepSize], None]) -> None:
        """Run a step that was filled up to `bucket`."""
        if bucket not in self._graphs:
            launch(bucket)
            self._graphs[bucket] = None
            return
        replay = self._graphs[bucket]
        if replay is None:
            replay = self._graphs[bucket] = self._capture(lambda: launch(bucket))
        replay()

    def clear(self) -> None:
        """Forget all graphs: the buffers that they read have moved."""
        self._graphs.clear()

    @property
    def recorded(self) -> list[StepSize]:
        """The buckets that have a graph."""
        return [bucket for bucket, replay in self._graphs.items() if replay is not None]
