"""Weights on their way into memory: one region of huge pages, packed by all threads as the file is read.

Blocks of rows are packed in order, each by one thread. While a block is packed the system reads ahead those
that follow, and its pages of the file are released at once, so that besides the packed weights little more
than a block for each thread is in memory: the peak is about the size of the packed weights, whatever is
converted on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Lock, local

from ridgeline.model.matrix_reader import MatrixReader
from ridgeline.model.weights import Weights
from ridgeline.native import Matrix, Team, allocate, pack_rows, packed_bytes
from ridgeline.types import ByteArray

TILE_ROWS = 16
"""Rows that are packed together: blocks are whole tiles."""

_LINE_BYTES = 64
_BLOCK_BYTES = 2 << 20
# Blocks that the system reads ahead for each thread: enough to keep a disk busy.
_BLOCKS_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Where a packed matrix, or those of its experts, lies in the region."""

    name: str
    reader: MatrixReader
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where all matrices of a store of weights lie: the same for the same store."""

    places: tuple[Place, ...]
    nbytes: int

    @staticmethod
    def of(weights: Weights) -> Layout:
        places, end = [], 0
        for name in weights:
            if name in weights.formats:
                reader = weights.reader(name)
                size = reader.experts * packed_bytes(reader.storage.name, reader.rows, reader.cols)
                places.append(Place(name, reader, end, size))
                end += -(-size // _LINE_BYTES) * _LINE_BYTES
        return Layout(tuple(places), end)

    def allocate(self) -> ByteArray:
        """A region for all matrices, which takes memory where it is written."""
        return allocate(self.nbytes)

    def matrices(self, region: ByteArray) -> dict[str, Matrix]:
        """The matrices of a region that has been filled; each keeps it alive."""
        return {
            place.name: Matrix(
                region[place.start : place.start + place.nbytes],
                place.reader.storage.name,
                place.reader.rows,
                place.reader.cols,
                place.reader.experts,
            )
            for place in self.places
        }


def pack_all(layout: Layout, region: ByteArray, threads: int) -> None:
    """Fill the region from the checkpoint.

    Raises CheckpointError that names a tensor whose values are not finite or do not fit its format.
    """
    blocks = [block for place in layout.places for block in _blocks(place)]
    packer = _Packer(blocks, region, threads)
    try:
        if threads == 1:
            for index in range(len(blocks)):
                packer.pack(index)
            return
        with ThreadPoolExecutor(threads, "pack") as pool:
            try:
                for _ in pool.map(packer.pack, range(len(blocks))):
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        for place in layout.places:
            place.reader.close()


@dataclass(frozen=True, slots=True)
class _Block:
    place: Place
    expert: int
    rows: slice
    out: slice
    last: bool


def _blocks(place: Place) -> Iterator[_Block]:
    reader = place.reader
    storage, cols = reader.storage, reader.cols
    step = max(1, _BLOCK_BYTES // (storage.row_bytes(cols) * TILE_ROWS)) * TILE_ROWS
    each = place.nbytes // reader.experts
    tile_bytes = packed_bytes(storage.name, TILE_ROWS, cols)
    for expert in range(reader.experts):
        for first in range(0, reader.rows, step):
            end = min(first + step, reader.rows)
            start = place.start + expert * each + first // TILE_ROWS * tile_bytes
            out = slice(start, start + packed_bytes(storage.name, end - first, cols))
            last = expert == reader.experts - 1 and end == reader.rows
            yield _Block(place, expert, slice(first, end), out, last)


class _Packer:
    """What the threads share. Each packs its block alone, so that none waits for another."""

    def __init__(self, blocks: Sequence[_Block], region: ByteArray, threads: int) -> None:
        self._blocks, self._region = blocks, region
        self._window = _BLOCKS_AHEAD * threads
        self._ahead, self._lock = iter(range(len(blocks))), Lock()
        self._reached = 0
        self._own = local()
        self._left = {id(block.place): 0 for block in blocks}
        for block in blocks:
            self._left[id(block.place)] += 1

    def pack(self, index: int) -> None:
        block = self._blocks[index]
        reader = block.place.reader
        for ahead in self._next_ahead(index + self._window):
            following = self._blocks[ahead]
            following.place.reader.prefetch(following.expert, following.rows)
        part = reader.read(block.expert, block.rows)
        out = self._region[block.out]
        if not pack_rows(part.data, part.storage.name, reader.cols, self._team(), out):
            reader.check(part)
        del part
        reader.release(block.expert, block.rows)
        if self._is_last(block.place):
            reader.close()

    def _next_ahead(self, end: int) -> list[int]:
        """The blocks before `end` that nobody has asked the system for yet."""
        with self._lock:
            count = max(0, end - self._reached)
            self._reached += count
            return list(islice(self._ahead, count))

    def _is_last(self, place: Place) -> bool:
        with self._lock:
            self._left[id(place)] -= 1
            return self._left[id(place)] == 0

    def _team(self) -> Team:
        """A team of the calling thread alone."""
        team: Team | None = getattr(self._own, "team", None)
        if team is None:
            team = self._own.team = Team(1)
        return team
