"""The store of weights: canonical names over a checkpoint's tensors, in the formats that run.

A store owns no weights either: it reads, converts and hands over, and an executor keeps what it packs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.checkpoint.files import held_storage
from ridgeline.model.families import family_of
from ridgeline.model.families.family import Family, Source
from ridgeline.model.matrix_reader import MatrixReader
from ridgeline.model.program import Attention, Embed, ExpertLinear, Linear, Program
from ridgeline.model.spec import ModelSpec
from ridgeline.precision.formats import Format, auto_format, native_storages, parse_format
from ridgeline.precision.quantise import quantise_tensor, storage_of
from ridgeline.precision.recode import recode
from ridgeline.precision.storage import STORAGES, Storage, Tensor, check_finite
from ridgeline.types import CheckpointError, Float32Array


class Weights:
    """The weights that a canonical program names, read from one checkpoint.

    `choice` is the format of matrices: "auto" is what suits `device` (`precision.formats.auto_format`).
    Vectors and tables that are only looked up by position stay float32.

    Raises CheckpointError when a tensor is missing, left over, of a type that is not read, or of another
    shape than the program's.
    """

    def __init__(
        self,
        spec: ModelSpec,
        program: Program,
        checkpoint: Checkpoint,
        choice: str = "auto",
        device: str = "cpu",
    ) -> None:
        self._checkpoint, self._device = checkpoint, device
        self._shapes = {weight.name: weight.shape for weight in program.weights()}
        self._sources = _sources(family_of(checkpoint), spec, checkpoint, self._shapes)
        self._check_stored()
        self.formats: Mapping[str, Format] = {
            name: self._format(name, choice) for name in sorted(matrices_of(program))
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def matrix(self, name: str) -> Tensor:
        """A matrix in the storage of its format; it may be a view of the mapped file."""
        held = self._read(name)
        fmt = self.formats[name]
        if held.storage.name in native_storages(fmt, self._device):
            return held
        return recode(held, fmt) or quantise_tensor(held, fmt, self._sources[name].tensors[0])

    def reader(self, name: str) -> MatrixReader:
        """The same matrix, to be read some rows at a time; it is valid until the store is closed."""
        return MatrixReader(
            self._checkpoint,
            self._sources[name],
            self._shapes[name],
            self.formats[name],
            self._device,
            self._storage(name),
        )

    def identity(self) -> bytes | None:
        """What tells the values of all matrices from others, without reading them: the checkpoint's identity,
        and how each matrix is made of its tensors. None where the checkpoint has none."""
        checkpoint = self._checkpoint.identity()
        if checkpoint is None:
            return None
        made = [
            (name, self._shapes[name], fmt.name, self._storage(name).name, self._sources[name])
            for name, fmt in sorted(self.formats.items())
        ]
        return hashlib.sha256(checkpoint + repr((self._device, made)).encode()).digest()

    def vector(self, name: str) -> Float32Array:
        """A norm's gain, a bias or a table of positions, in float32 and in memory of its own."""
        values = self._read(name).dequantise()
        self.release(name)
        return values

    @property
    def nbytes(self) -> int:
        """Memory that all weights take in their formats, before an executor pads them."""
        return sum(self.nbytes_of(name) for name in self._shapes)

    def release(self, name: str) -> None:
        """The tensor behind `name` has been packed: its pages of the file need not stay in memory."""
        for tensor in self._sources[name].tensors:
            self._checkpoint.release(tensor)

    def close(self) -> None:
        self._checkpoint.close()

    def _read(self, name: str) -> Tensor:
        source = self._sources[name]
        tensors = [self._checkpoint.tensor(tensor) for tensor in source.tensors]
        for tensor, held in zip(source.tensors, tensors, strict=True):
            check_finite(held, tensor)
        return source.apply(tensors)

    def _format(self, name: str, choice: str) -> Format:
        if choice != "auto":
            return parse_format(choice)
        return auto_format(self._held(name), self._device, self._is_decoded(name))

    def _held(self, name: str) -> str:
        """The storage that the file has a weight in; of experts, that of the first."""
        return self._checkpoint.tensors[self._sources[name].tensors[0]].storage

    def _is_decoded(self, name: str) -> bool:
        """Whether a weight's codes do not survive its reading."""
        source = self._sources[name]
        held = [self._checkpoint.tensors[tensor] for tensor in source.tensors]
        return source.decodes or len(held[0].shape) == 1 or len({info.storage for info in held}) > 1

    def nbytes_of(self, name: str) -> int:
        """Memory that one weight takes in its format."""
        return weight_bytes(self._shapes[name], self._storage(name) if name in self.formats else None)

    def _storage(self, name: str) -> Storage:
        """That of a matrix in its format."""
        held = "F32" if self._is_decoded(name) else self._held(name)
        fmt = self.formats[name]
        return STORAGES[held] if held in native_storages(fmt, self._device) else storage_of(fmt)

    def _check_stored(self) -> None:
        for name, source in self._sources.items():
            expected = source.stored_shape(self._shapes[name])
            for tensor in source.tensors:
                info = self._checkpoint.tensors[tensor]
                held_storage(self._checkpoint.path, info)
                if info.shape != expected:
                    raise CheckpointError(
                        f"tensor {tensor!r} has shape {info.shape}; the model's metadata asks for {expected}"
                    )


def weight_bytes(shape: tuple[int, ...], storage: Storage | None) -> int:
    """Memory of a matrix in a storage; of a weight that is no matrix (None), which is kept in float32."""
    if storage is None:
        return 4 * math.prod(shape)
    return math.prod(shape[:-1]) * storage.row_bytes(shape[-1])


def matrices_of(program: Program) -> set[str]:
    """Weights of linears, experts' too, of attention to latent memory, and of token embeddings: those that a
    format is chosen for."""
    linears = {op.weight.name for op in program.operations if isinstance(op, Linear | ExpertLinear)}
    tables = {op.table.name for op in program.operations if isinstance(op, Embed) and op.ids.kind == "tokens"}
    expanding = {op.expand.name for op in program.operations if isinstance(op, Attention) and op.expand}
    return linears | tables | expanding


def _sources(
    family: Family, spec: ModelSpec, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Source]:
    """The source of every weight in `shapes`. Raises CheckpointError for missing and left-over tensors."""
    prefix = next((p for p in family.prefixes if any(n.startswith(p) for n in checkpoint.tensors)), "")
    gguf = checkpoint.kind == "gguf"
    sources = {}
    for name in shapes:
        plain = Source(_tensor_name(family, gguf, prefix, name))
        sources[name] = family.source(spec, checkpoint, name, plain)
    used = {tensor for source in sources.values() for tensor in source.tensors}
    _complain("is missing", sorted(used - set(checkpoint.tensors)))
    if spec.tied_head:  # a file may store the tied matrix twice
        used.add(_tensor_name(family, gguf, prefix, "head"))
    left = [n for n in checkpoint.tensors if n not in used and not any(fnmatch(n, i) for i in family.ignored)]
    _complain("is not known to this family", sorted(left))
    return sources


def _tensor_name(family: Family, gguf: bool, prefix: str, name: str) -> str:
    stem, bias = (name.removesuffix(".bias"), name.endswith(".bias"))
    parts = stem.split(".")
    pattern = ".".join([parts[0], "{i}", *parts[2:]]) if parts[0] == "layers" else stem
    base = family.names[pattern][0 if gguf else 1]
    path = base if gguf or pattern == "head" else prefix + base
    return path.replace("{i}", parts[1] if len(parts) > 1 else "") + (".bias" if bias else ".weight")


def _complain(what: str, names: list[str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(f"tensor {names[0]!r} {what}{more}")
