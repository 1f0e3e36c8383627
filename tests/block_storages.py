"""Random blocks of every block storage: the gguf package encodes only some of them."""

from __future__ import annotations

import numpy as np

from ridgeline.precision.storage import STORAGES
from ridgeline.types import ByteArray

# Where the float16 fields of a block begin; MXFP4's only scale is an exponent in its first byte.
FLOAT16_AT = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (),
}  # fmt: skip


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> ByteArray:
    """Random bytes of every value, with scales of all signs and magnitudes: uint8 (rows, row_bytes)."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, blocks, STORAGES[name].block_bytes), np.uint8)
    for at in FLOAT16_AT[name]:
        scales = rng.standard_normal((rows, blocks)) * 10.0 ** rng.integers(-8, 5, (rows, blocks))
        data[..., at : at + 2] = np.clip(scales, -65504, 65504).astype("<f2")[..., None].view(np.uint8)
    if name == "MXFP4":
        data[..., 0] = rng.integers(0, 253, (rows, blocks))
    return data.reshape(rows, -1)


def moderate_blocks(name: str, rows: int, cols: int, seed: int = 0, spread: float = 0.05) -> ByteArray:
    """Weights as models have them: random codes and integer scales, under float scales of both signs that
    give the values a root mean square of about `spread`."""
    rng = np.random.default_rng(seed)
    storage, blocks = STORAGES[name], cols // STORAGES[name].block_values
    data = random_blocks(name, rows, blocks, seed).reshape(rows, blocks, -1)
    signs = rng.choice([-1.0, 1.0], (rows, blocks))
    for at in FLOAT16_AT[name]:
        data[..., at : at + 2] = signs.astype("<f2")[..., None].view(np.uint8)
    if name == "MXFP4":
        data[..., 0] = 127
    unit = float(np.sqrt(np.square(storage.dequantise(data.reshape(rows, -1))).mean()))
    for at in FLOAT16_AT[name]:
        scales = signs * rng.uniform(0.5, 1.5, (rows, blocks)) * spread / unit
        data[..., at : at + 2] = scales.astype("<f2")[..., None].view(np.uint8)
    if name == "MXFP4":
        data[..., 0] = 127 + np.round(np.log2(spread / unit)) + rng.integers(-1, 2, (rows, blocks))
    return data.reshape(rows, -1)
