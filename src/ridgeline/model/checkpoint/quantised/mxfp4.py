"""MXFP4 as gpt-oss keeps its experts, to the blocks of the storage MXFP4, without a change to any value.

X_blocks, uint8 (experts, outputs, groups, 16), holds the 32 codes of a group in pairs of neighbours, the
first in the low half of a byte; X_scales, uint8 (experts, outputs, groups), its exponents, as the storage has
them. Together they are the tensor X, (experts, outputs, groups * 32).
"""

from __future__ import annotations

import numpy as np

from ridgeline.model.checkpoint.quantised.logical import Decoder, Found, Logical
from ridgeline.model.checkpoint.quantised.parts import Parts
from ridgeline.model.checkpoint.quantised.settings import Settings
from ridgeline.types import ByteArray

_GROUP_BYTES = 16


def read(parts: Parts, settings: Settings) -> Found:
    return Found({name: _tensor(parts, name) for name in parts.stems("_blocks")})


def _tensor(parts: Parts, name: str) -> Logical:
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    seen = parts.info(blocks).shape
    if not 3 <= len(seen) <= 4 or seen[-1] != _GROUP_BYTES:
        parts.refuse(blocks, f"(experts, outputs, groups, {_GROUP_BYTES})")
    parts.check(blocks, ("U8",), seen)
    parts.check(scales, ("U8",), seen[:-1])
    groups = seen[-2]

    def start() -> Decoder:
        codes = parts.array(blocks).reshape(-1, groups, _GROUP_BYTES)
        exponents = parts.array(scales).reshape(-1, groups, 1)

        def decode(rows: slice) -> ByteArray:
            out = np.empty((rows.stop - rows.start, groups, 1 + _GROUP_BYTES), np.uint8)
            out[..., :1] = exponents[rows]
            first, second = codes[rows, :, :8], codes[rows, :, 8:]
            out[..., 1::2] = first & np.uint8(15) | second << np.uint8(4)
            out[..., 2::2] = first >> np.uint8(4) | second & np.uint8(0xF0)
            return out.reshape(len(out), -1)

        return decode

    return Logical((*seen[:-2], groups * 32), "MXFP4", (blocks, scales), start)
