"""What a family is: how metadata becomes a spec, and where each weight lies in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.spec import AttentionSpec, LayerSpec, ModelSpec
from ridgeline.precision.storage import Tensor, float32_tensor


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring rows: parts of them are slices, which tensors give without a copy."""

    start: int
    stop: int

    def __getitem__(self, part: slice) -> slice:
        start, stop, _ = part.indices(self.stop - self.start)
        return slice(self.start + start, self.start + stop)


_Order = _Run | NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a canonical weight lies in a checkpoint, and how to turn what lies there into our orientation.

    A weight of `experts`, or of as many heads, is one tensor with a dimension for them in front, or a tensor
    of each where the name holds `{e}`; what follows is done to each of them. In this order: transpose, take
    `rows` (start, stop) of a tensor that fuses `fused_rows`, or of each of its `row_groups` groups of equal
    size, undo the interleaving of rotary pairs within each of `interleaved_heads` heads, add `offset`,
    multiply by `factor`, put a dimension of 1 in front where the file leaves it out (`squeezed`).
    """

    tensor: str
    transposed: bool = False
    rows: tuple[int, int] | None = None
    fused_rows: int | None = None
    row_groups: int = 1
    interleaved_heads: int | None = None
    offset: float = 0.0
    factor: float = 1.0
    squeezed: bool = False
    experts: int | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the file's tensors."""
        if self.experts is None or "{e}" not in self.tensor:
            return (self.tensor,)
        return tuple(self.tensor.replace("{e}", str(expert)) for expert in range(self.experts))

    @property
    def decodes(self) -> bool:
        """Whether the weight comes out in float32 whatever the file's storage; rows are picked undecoded."""
        return self.transposed or self.offset != 0.0 or self.factor != 1.0

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that each of the file's tensors must have to give a weight of the canonical `shape`."""
        if self.experts is not None:
            one = replace(self, experts=None).stored_shape(shape[1:])
            return one if "{e}" in self.tensor else (self.experts, *one)
        if self.squeezed:
            return replace(self, squeezed=False).stored_shape(shape[1:])
        stored = (self.fused_rows or shape[0], *shape[1:])
        return stored[::-1] if self.transposed else stored

    def apply(self, tensors: Sequence[Tensor]) -> Tensor:
        """The weight, from the file's tensors."""
        if self.experts is None:
            return self._apply_to_one(tensors[0])
        if "{e}" not in self.tensor:
            if replace(self, experts=None) == Source(self.tensor):
                return tensors[0]
            tensors = [_entry(tensors[0], expert) for expert in range(self.experts)]
        return _stacked([self._apply_to_one(tensor) for tensor in tensors])

    def entries(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What `rows_of` takes rows from: a matrix of each expert, or one, with its outputs in front."""
        if self.experts is not None and "{e}" not in self.tensor:
            tensors = [_entry(tensors[0], expert) for expert in range(self.experts)]
        return [_transposed(tensor) for tensor in tensors] if self.transposed else list(tensors)

    def rows_of(self, entry: Tensor, part: slice) -> Tensor:
        """`part` of the rows of the weight, or of one of its experts, from what `entries` gave for it."""
        return self._adjusted(entry.rows(self._order(entry.shape[0])[part]))

    def _apply_to_one(self, tensor: Tensor) -> Tensor:
        if len(tensor.shape) == 1:  # entries of a vector can only be picked once they are decoded
            tensor = float32_tensor(tensor.dequantise())
        if self.transposed:
            tensor = _transposed(tensor)
        if self.rows or self.interleaved_heads:
            tensor = tensor.rows(self._order(tensor.shape[0])[:])
        tensor = self._adjusted(tensor)
        return Tensor(tensor.storage, (1, *tensor.shape), tensor.data) if self.squeezed else tensor

    def _order(self, rows: int) -> _Order:
        """Which rows of a tensor with so many are the weight's, and in which order."""
        if not (self.rows or self.interleaved_heads):
            return _Run(0, rows)
        one = slice(*self.rows) if self.rows else slice(0, rows // self.row_groups)
        if self.row_groups == 1 and not self.interleaved_heads:
            return _Run(one.start, one.stop)
        order = _of_each(rows, self.row_groups, one)
        heads = self.interleaved_heads
        return order[_halves_from_pairs(len(order), heads)] if heads else order

    def _adjusted(self, tensor: Tensor) -> Tensor:
        if self.offset:
            tensor = float32_tensor(tensor.dequantise() + np.float32(self.offset))
        if self.factor != 1.0:
            tensor = float32_tensor(tensor.dequantise() * np.float32(self.factor))
        return tensor


def _transposed(tensor: Tensor) -> Tensor:
    """A matrix with its dimensions swapped; decoded if its storage keeps rows in blocks."""
    if tensor.storage.block_values != 1:
        return float32_tensor(np.ascontiguousarray(tensor.dequantise().T))
    width = tensor.storage.block_bytes
    turned = np.ascontiguousarray(tensor.data.view(f"V{width}").T)
    return Tensor(tensor.storage, tensor.shape[::-1], turned.view(np.uint8))


def _entry(tensor: Tensor, index: int) -> Tensor:
    """One entry of the first dimension, without it."""
    entry = tensor.rows(slice(index, index + 1))
    return Tensor(entry.storage, entry.shape[1:], entry.data)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first dimension, in float32 if their storages differ."""
    if len({tensor.storage.name for tensor in tensors}) > 1:
        tensors = [float32_tensor(tensor.dequantise()) for tensor in tensors]
    first = tensors[0]
    return Tensor(
        first.storage, (len(tensors), *first.shape), np.concatenate([tensor.data for tensor in tensors])
    )


def _of_each(rows: int, groups: int, part: slice) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Row order that takes `part` of every group and leaves the others out."""
    return np.arange(rows).reshape(groups, -1)[:, part].reshape(-1)


def _halves_from_pairs(rows: int, heads: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Row order that brings rotary pairs (2i, 2i + 1) of each head to (i, i + half)."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class Family:
    """A mapping of metadata to a spec and of weight names to tensors; nothing here computes.

    `names` gives the GGUF and Hugging Face stem of each canonical weight, with `{i}` for the layer; biases
    add `.bias` where weights add `.weight`. `source` adjusts a plain source where the file names or holds
    something else. `prefixes` are module paths that a safetensors file may put before its names. Tensors
    that match `ignored` carry no information.
    """

    name: str
    architectures: tuple[str, ...]  # GGUF general.architecture
    model_types: tuple[str, ...]  # config.json model_type
    from_gguf: Callable[[Checkpoint], ModelSpec]
    from_config: Callable[[Checkpoint], ModelSpec]
    names: Mapping[str, tuple[str, str]]
    source: Callable[[ModelSpec, Checkpoint, str, Source], Source] = lambda spec, checkpoint, name, it: it
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedFamily:
    """A family whose sizes are known, but that no executor runs."""

    name: str
    model_types: tuple[str, ...]  # config.json model_type
    from_config: Callable[[Checkpoint], ModelSpec]


def fused_heads(plain: Source, attention: AttentionSpec, part: str, by_group: bool) -> Source:
    """Queries ("q"), keys ("k") or values ("v") of a projection that holds all three.

    They follow one another whole; `by_group`, once for each key head: its query heads, itself, its value.
    """
    groups = attention.kv_heads if by_group else 1
    keys = attention.kv_heads // groups * attention.head_dim
    queries = attention.heads // groups * attention.head_dim
    start, size = {"q": (0, queries), "k": (queries, keys), "v": (queries + keys, keys)}[part]
    fused = groups * (queries + 2 * keys)
    return replace(plain, rows=(start, start + size), fused_rows=fused, row_groups=groups)


def layer_of(spec: ModelSpec, name: str) -> LayerSpec:
    """The layer that a canonical weight name such as `layers.3.q` belongs to."""
    return spec.layers[int(name.split(".")[1])]
