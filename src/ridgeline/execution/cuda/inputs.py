"""A step's arrays on the device: buffers in fixed places, filled through pinned memory in a few copies."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.cuda.arrays import (
    DRAW_FIELDS,
    ITEM_FIELDS,
    MERGE_FIELDS,
    SEGMENT_FIELDS,
    WorkList,
)
from ridgeline.execution.cuda.device import Device
from ridgeline.execution.cuda.work_list import HostWork, Paths, segment_records
from ridgeline.execution.step_arrays import StepArrays
from ridgeline.types import Draw

_IN_FLIGHT = 2
"""Steps whose host memory must stay as it is: one that runs, and one that waits behind it."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """What kernels are launched for: rows, outputs, whether every sequence has a single row, and whether
    there are paths, of rows on side branches of trees."""

    rows: int
    outputs: int
    single: bool
    paths: bool = False


class Mirror:
    """Named arrays in one device buffer, and host memory in turns that they are filled from.

    The host's side of a turn is written only when the copy that last used it is done.
    """

    def __init__(self, device: Device, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> None:
        self._spans: dict[str, tuple[int, tuple[int, ...]]] = {}
        size = 0
        for name, shape in shapes.items():
            self._spans[name] = (size, shape)
            size += -(-math.prod(shape) // 16) * 16  # rows of a kernel's loads begin at whole vectors
        self._device = torch.zeros(size, dtype=dtype, device=device.where)
        self._turns = [(device.host(size, dtype), device.event()) for _ in range(_IN_FLIGHT)]

    def __getitem__(self, name: str) -> Tensor:
        """An array on the device."""
        begin, shape = self._spans[name]
        return self._device[begin : begin + math.prod(shape)].view(shape)

    def begin(self) -> dict[str, NDArray[Any]]:
        """Take the next turn: its arrays on the host."""
        self._turns.append(self._turns.pop(0))
        host, sent = self._turns[0]
        sent.synchronize()
        flat = host.numpy()
        return {
            name: flat[begin : begin + math.prod(shape)].reshape(shape)
            for name, (begin, shape) in self._spans.items()
        }

    def send(self, **used: int) -> None:
        """Copy this turn's arrays to the device, behind what was launched before: all of them, or of each
        that is named so many leading numbers."""
        host, sent = self._turns[0]
        spans = [slice(self._spans[name][0], self._spans[name][0] + count) for name, count in used.items()]
        for span in spans or [slice(None)]:
            self._device[span].copy_(host[span], non_blocking=True)
        sent.record()


class StepInputs:
    """The arrays of the step that is launched next. Tables, segments and paths grow when a step needs more;
    their place then changes, and `fill` says so.

    `drawn` (outputs,) int32 holds the tokens of the step before until this step draws its own.
    """

    def __init__(self, device: Device, max_rows: int, groups: int, max_items: int, max_pages: int) -> None:
        self._device = device
        self._groups = groups
        self.max_items = max_items
        lists = {f"items{g}": (max_items, ITEM_FIELDS) for g in range(groups)}
        lists |= {f"merges{g}": (max_items, MERGE_FIELDS) for g in range(groups)}
        self._rows = Mirror(
            device,
            torch.int32,
            {
                "tokens": (max_rows,),
                "positions": (max_rows,),
                "output_rows": (max_rows,),
                "undrawn": (max_rows,),
                "slots": (groups, max_rows),
                "counts": (groups, 2),
                "row_count": (1,),
                **lists,
            },
        )
        self.tokens, self.positions = self._rows["tokens"], self._rows["positions"]
        self.output_rows, self.undrawn = self._rows["output_rows"], self._rows["undrawn"]
        self.slots, self.row_count = self._rows["slots"], self._rows["row_count"]
        self._draws = Mirror(device, torch.int64, {"draws": (max_rows, DRAW_FIELDS)})
        self.draws = self._draws["draws"]
        self.drawn = torch.full((max_rows,), -1, dtype=torch.int32, device=device.where)
        self._grow(max_pages, 256, 1024)

    def work(self, group: int, paths: bool = False) -> WorkList:
        """Attention's work for a memory group, of a step with paths or without."""
        return WorkList(
            self._rows["counts"][group],
            self._rows[f"items{group}"],
            self._rows[f"merges{group}"],
            self._memory["segments"],
            self._memory[f"tables{group}"],
            self._memory["paths"] if paths else None,
        )

    def fill(
        self,
        arrays: StepArrays,
        draws: Sequence[Draw | None],
        size: StepSize,
        work: Sequence[HostWork],
        paths: Paths | None = None,
    ) -> bool:
        """Send a step to the device, filled up to `size` with rows that nobody reads. Returns whether
        buffers had to move."""
        moved = self._fit(arrays, 0 if paths is None else len(paths.records))
        self._fill_rows(arrays, draws, size, work)
        memory = self._memory.begin()
        segments = segment_records(arrays)
        memory["segments"][: len(segments)] = segments
        used = {"segments": segments.size}
        if paths is not None:
            memory["paths"][: len(paths.records)] = paths.records
            used["paths"] = len(paths.records)
        for group, table in enumerate(arrays.tables):
            memory[f"tables{group}"][: len(table)] = table
            used[f"tables{group}"] = len(table)
        self._memory.send(**used)
        if size.outputs:
            records = self._draws.begin()["draws"]
            records[: size.outputs] = 0
            for output, draw in enumerate(draws):
                records[output] = draw_record(draw)
            self._draws.send(draws=size.outputs * DRAW_FIELDS)
        return moved

    def _fill_rows(
        self, arrays: StepArrays, draws: Sequence[Draw | None], size: StepSize, work: Sequence[HostWork]
    ) -> None:
        host = self._rows.begin()
        rows, outputs = len(arrays.tokens), len(arrays.output_rows)
        for name in ("tokens", "positions"):
            host[name][:rows] = getattr(arrays, name)
            host[name][rows : size.rows] = 0
        host["output_rows"][:outputs] = arrays.output_rows
        host["output_rows"][outputs : size.outputs] = 0
        left = [i for i, draw in enumerate(draws) if draw is None]
        host["undrawn"][: len(left)] = left
        host["row_count"][0] = rows
        for group, mine in enumerate(work):
            slots = arrays.row_pages(group) * PAGE_TOKENS + arrays.slots % PAGE_TOKENS
            host["slots"][group, :rows] = slots
            host["slots"][group, rows : size.rows] = -1  # nothing is stored
            host["counts"][group] = len(mine.items), len(mine.merges)
            host[f"items{group}"][: len(mine.items)] = mine.items
            host[f"merges{group}"][: len(mine.merges)] = mine.merges
        self._rows.send()

    def _fit(self, arrays: StepArrays, paths: int) -> bool:
        wanted = (arrays.tables.shape[1], len(arrays.segment_length), paths)
        if all(count <= room for count, room in zip(wanted, self._room, strict=True)):
            return False
        self._grow(*(max(room, 2 * count) for count, room in zip(wanted, self._room, strict=True)))
        return True

    def _grow(self, pages: int, segments: int, paths: int) -> None:
        shapes: dict[str, tuple[int, ...]] = {f"tables{g}": (pages,) for g in range(self._groups)}
        shapes["segments"] = (segments, SEGMENT_FIELDS)
        shapes["paths"] = (paths,)
        self._memory = Mirror(self._device, torch.int32, shapes)
        self._room = (pages, segments, paths)


def draw_record(draw: Draw | None) -> tuple[int, ...]:
    """A draw as `arrays.DRAW_*` lays it out."""
    if draw is None:
        return (0,) * DRAW_FIELDS
    log_min_p = math.log(draw.min_p) if draw.min_p > 0 else -math.inf
    seed = draw.seed - 2**64 if draw.seed >= 2**63 else draw.seed
    reals = (_bits(draw.temperature), draw.top_k, _bits(draw.top_p), _bits(log_min_p))
    return (1, *reals, seed, draw.choice, draw.position)


def _bits(real: float) -> int:
    """A float64's bits as an int64."""
    return int(struct.unpack("<q", struct.pack("<d", real))[0])
