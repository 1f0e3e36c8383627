"""A model as a plan sees it: its programs and the bytes of its weights, from metadata alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Self

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.base import page_bytes, slot_bytes
from ridgeline.execution.cpu.buffers import value_row_bytes
from ridgeline.execution.cpu.lower import lower
from ridgeline.execution.lowering import Footprint, WorkModel
from ridgeline.model.build import decoder
from ridgeline.model.checkpoint import Checkpoint, open_checkpoint
from ridgeline.model.checkpoint.config_only import ConfigOnly, read_config
from ridgeline.model.checkpoint.headers import has_headers, open_headers
from ridgeline.model.families import planned_family_of, planned_spec
from ridgeline.model.program import Program
from ridgeline.model.rewrite import with_precision
from ridgeline.model.spec import ModelSpec
from ridgeline.model.weights import Weights, matrices_of, weight_bytes
from ridgeline.precision.formats import Format, auto_format, parse_format
from ridgeline.precision.quantise import storage_of

_UNQUANTISED = "BF16"
"""What a configuration's weights count as: whichever floats they are, they run in the same formats."""


@dataclass(frozen=True, slots=True)
class FormattedModel:
    """A model in the formats in which a device would run it.

    `choice` is what was asked for ("auto" or a format), `kv_format` that of keys and values. `weights_bytes`
    are by number format, vectors as "F32".
    """

    choice: str
    kv_format: str
    spec: ModelSpec
    program: Program
    formats: Mapping[str, Format]
    weights_bytes: Mapping[str, int]
    footprint: Footprint
    work: WorkModel

    @property
    def kv_bytes_per_token(self) -> tuple[int, ...]:
        """Bytes that each memory group keeps of a token, in all of its layers."""
        return tuple(page_bytes(group, self.kv_format) // PAGE_TOKENS for group in self.program.groups)

    @property
    def nbytes(self) -> int:
        """Memory of all weights."""
        return sum(self.weights_bytes.values())

    @property
    def main_format(self) -> str:
        """That of most of the matrices' bytes."""
        return max({fmt.name for fmt in self.formats.values()}, key=lambda name: self.weights_bytes[name])

    @property
    def weight_bits(self) -> int:
        """Those of the widest matrix."""
        return max(fmt.weight_bits for fmt in self.formats.values())


class PlannedModel:
    """A checkpoint, or a bare configuration, of which nothing but metadata is read. Owns the open files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path = checkpoint.path
        self.spec = planned_spec(checkpoint)
        self._canonical = decoder(self.spec)
        self.parameters = sum(prod(weight.shape) for weight in self._canonical.weights())
        self.bare = isinstance(checkpoint, ConfigOnly)

    @property
    def quantised_config(self) -> bool:
        """Whether a bare configuration says that its weights are quantised, which it cannot show."""
        return self.bare and self._checkpoint.metadata.get("quantization_config") is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpoint.close()

    def in_format(self, choice: str, device: str, kv_format: str) -> FormattedModel:
        """The model as `device` runs it. Raises CheckpointError where its tensors are not the spec's."""
        formats, bytes_of = self._weights(choice, device)
        program = with_precision(self._canonical, formats, kv_format)
        by_format: dict[str, int] = {}
        for name, nbytes in bytes_of.items():
            key = formats[name].name if name in formats else "F32"
            by_format[key] = by_format.get(key, 0) + nbytes
        # A GPU's launches move the same weights and KV cache, but more activations: a fifth of all bytes
        # where prompts are read, which arithmetic bounds. Importing them takes PyTorch, so the CPU's lowering
        # stands for both, and a plan is the same everywhere. A GPU runs the last layer for every row.
        launches = lower(program, every_row=device == "cuda")
        footprint = _footprint(program, bytes_of, kv_format)
        return FormattedModel(
            choice=choice,
            kv_format=kv_format,
            spec=self.spec,
            program=program,
            formats=formats,
            weights_bytes=by_format,
            footprint=footprint,
            work=WorkModel.of(program, launches, footprint),
        )

    def _weights(self, choice: str, device: str) -> tuple[Mapping[str, Format], dict[str, int]]:
        """The format of each matrix, and the bytes of each weight."""
        if not self.bare:
            weights = Weights(self.spec, self._canonical, self._checkpoint, choice, device)
            return weights.formats, {name: weights.nbytes_of(name) for name in weights}
        fmt = auto_format(_UNQUANTISED, device) if choice == "auto" else parse_format(choice)
        matrices = matrices_of(self._canonical)
        bytes_of = {
            weight.name: weight_bytes(weight.shape, storage_of(fmt) if weight.name in matrices else None)
            for weight in self._canonical.weights()
        }
        return dict.fromkeys(matrices, fmt), bytes_of


def open_model(path: Path) -> PlannedModel:
    """The model at a path: a GGUF, a folder with weights or nothing but `config.json`, or such a file.

    Raises CheckpointError for anything else.
    """
    with ExitStack() as on_failure:
        checkpoint = on_failure.enter_context(_open(path))
        model = PlannedModel(checkpoint)
        on_failure.pop_all()
    return model


def _open(path: Path) -> Checkpoint:
    if path.suffix == ".json":
        return read_config(path)
    config = path / "config.json"
    if has_headers(path):
        return open_headers(path)
    if not config.is_file():
        return open_checkpoint(path)
    bare = read_config(config)
    weights = any(path.glob("*.safetensors*")) or any(path.glob("*.gguf"))
    # Of a family that nothing runs, names of tensors are not known either.
    return open_checkpoint(path) if weights and planned_family_of(bare) is None else bare


def _footprint(program: Program, bytes_of: Mapping[str, int], kv_format: str) -> Footprint:
    shapes = {weight.name: weight.shape for weight in program.weights()}
    groups = program.groups
    return Footprint(
        weight_bytes=lambda name: bytes_of[name],
        weight_row_bytes=lambda name: bytes_of[name] // prod(shapes[name][:-1]),
        value_row_bytes=value_row_bytes,
        slot_bytes=lambda group: slot_bytes(groups[group], kv_format),
    )
