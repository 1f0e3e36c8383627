"""Pages of sequence memory on their way between the device's pools and host memory.

Many go at once: gathered on the device, through one piece of pinned memory, in the order of the stream. A
page outside of the pools is the bytes of all its layers' values and, with KV8, then those of their scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ridgeline.execution.cuda.arrays import KVPool
from ridgeline.execution.cuda.device import Device, Event
from ridgeline.types import ByteArray, PageFill, PageSpill


def page_bytes_of(pool: KVPool) -> int:
    """Bytes of a page outside of its pool."""
    return sum(_part_bytes(held) for held in pool.tensors)


def spill_pages(pool: KVPool, moves: Sequence[PageSpill], device: Device) -> None:
    """Launch copies of pages to pinned memory, whence each is copied when it is taken."""
    where = torch.tensor([move.source for move in moves], dtype=torch.int32).to(device.where)
    parts = [
        held.index_select(1, where).transpose(0, 1).contiguous().flatten(1).view(torch.uint8)
        for held in pool.tensors
    ]
    pinned = device.host(len(moves) * page_bytes_of(pool), torch.uint8).view(len(moves), -1)
    pinned.copy_(torch.cat(parts, dim=1), non_blocking=True)
    done = device.event()
    done.record()
    for move, page in zip(moves, pinned, strict=True):
        move.target.put(partial(_taken, page, done))


def fill_pages(pool: KVPool, moves: Sequence[PageFill], device: Device) -> None:
    """Launch copies of pages from host memory. Of several into one page, the last counts."""
    sources = {move.target: move.source for move in moves}
    pinned = device.host(len(sources) * page_bytes_of(pool), torch.uint8).view(len(sources), -1)
    for page, source in zip(pinned, sources.values(), strict=True):
        page.copy_(torch.from_numpy(source))
    pages = pinned.to(device.where, non_blocking=True)
    where = torch.tensor(list(sources), dtype=torch.int64).to(device.where)
    begin = 0
    for held in pool.tensors:
        end = begin + _part_bytes(held)
        values = pages[:, begin:end].contiguous().view(held.dtype)
        held.index_copy_(1, where, values.view(len(sources), held.shape[0], *held.shape[2:]).transpose(0, 1))
        begin = end


def _taken(page: Tensor, done: Event) -> ByteArray:
    done.synchronize()
    held: ByteArray = page.numpy().copy()  # the pinned memory is the executor's
    return held


def _part_bytes(held: Tensor) -> int:
    return math.prod(held.shape) // held.shape[1] * held.element_size()
