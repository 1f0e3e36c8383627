"""A model that is made up: a Llama of a middling shape with random weights, in any format.

Speed depends on shapes and formats alone, so its steps take the time that those of a real model of its size
would take. Nothing is read from a disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ridgeline.model.build import decoder
from ridgeline.model.checkpoint.config_only import ConfigOnly
from ridgeline.model.checkpoint.files import TensorInfo
from ridgeline.model.families import read_spec
from ridgeline.model.families.decoder import NAMES
from ridgeline.model.weights import matrices_of, weight_bytes
from ridgeline.precision.formats import FORMATS, Format, native_storages
from ridgeline.precision.quantise import quantise_weight, storage_of
from ridgeline.precision.storage import STORAGES, Storage, Tensor, float32_tensor
from ridgeline.types import ByteArray

SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""That of the default model, 135 M parameters: little enough to be quick, in launches of the sizes that small
models have. These reach less of the ceilings than those of large ones."""

_BLOCKS = 1 << 12
"""Blocks of random codes and scales, of which all matrices are made."""

_SMALL = 0x2F
"""Bits that are kept of bytes that nobody can encode: as float16 they are less than a tenth."""


@dataclass(frozen=True, slots=True)
class Synthetic(ConfigOnly):
    """Implements `Checkpoint`: a configuration with tensors in one storage, made when they are asked for."""

    storage: Storage = STORAGES["F32"]
    blocks: ByteArray = field(default_factory=lambda: np.zeros(4, np.uint8))

    def tensor(self, name: str) -> Tensor:
        shape = self.tensors[name].shape
        if len(shape) == 1:
            return float32_tensor(np.ones(shape, np.float32))
        rows, row_bytes = shape[0], self.storage.row_bytes(shape[1])
        return Tensor(self.storage, shape, np.resize(self.blocks, (rows, row_bytes)))


def synthetic(fmt: Format) -> Synthetic:
    """The model in a format, one of those that can be chosen or of those that files have."""
    storage = storage_of(fmt) if fmt.name in FORMATS else STORAGES[native_storages(fmt, "cpu")[0]]
    bare = ConfigOnly(Path("synthetic"), SHAPE)
    program = decoder(read_spec(bare))
    matrices = matrices_of(program)
    tensors = {}
    for weight in program.weights():
        held = storage if weight.name in matrices else None
        name = _tensor_name(weight.name)
        size = weight_bytes(weight.shape, held)
        tensors[name] = TensorInfo(name, weight.shape, held.name if held else "F32", size)
    return Synthetic(bare.path, SHAPE, tensors, storage, _blocks(fmt, storage))


def _blocks(fmt: Format, storage: Storage) -> ByteArray:
    random = np.random.default_rng(0)
    if fmt.name in FORMATS:
        values = random.standard_normal((1, _BLOCKS * storage.block_values), np.float32) / np.float32(32)
        return quantise_weight(values, fmt).data.reshape(-1)
    return random.integers(0, 256, _BLOCKS * storage.block_bytes, np.uint8) & np.uint8(_SMALL)


def _tensor_name(weight: str) -> str:
    """That of a Hugging Face checkpoint."""
    head, _, rest = weight.partition(".")
    if head != "layers":
        return f"{NAMES[weight][1]}.weight"
    index, _, rest = rest.partition(".")
    return NAMES[f"layers.{{i}}.{rest}"][1].replace("{i}", index) + ".weight"
