"""Copying of single slots of sequence memory."""

from __future__ import annotations

import numpy as np
import torch

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.cuda.arrays import KVPool
from ridgeline.execution.cuda.device import Device
from ridgeline.types import SlotCopy


def copy_slots(pool: KVPool, move: SlotCopy, device: Device) -> None:
    """Launch copies of slots of all layers of a memory group; all are read before any is written."""
    places = np.array([move.sources, move.targets], np.int64)
    where = torch.from_numpy(np.stack(divmod(places, PAGE_TOKENS))).to(device.where)
    (pages, targets), (slots, target_slots) = where
    for held in pool.tensors:
        held[:, targets, :, :, target_slots] = held[:, pages, :, :, slots]
