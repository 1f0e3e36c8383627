"""A `config.json` without weights: enough to know a model's spec, and so the shapes of all of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ridgeline.model.checkpoint.files import Kind, TensorInfo, parse_json_object, read_file, shown
from ridgeline.model.checkpoint.safetensors import CONFIG_LIMIT_BYTES
from ridgeline.precision.storage import Tensor
from ridgeline.types import CheckpointError


@dataclass(frozen=True, slots=True)
class ConfigOnly:
    """Implements `Checkpoint` for metadata alone: it has no tensors, and refuses to read any."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return "safetensors"

    def tensor(self, name: str) -> Tensor:
        raise CheckpointError(f"{self.path} is a configuration without tensors, {shown(name)} is not in it")

    def prefetch(self, name: str, rows: slice) -> None: ...

    def release(self, name: str, rows: slice | None = None) -> None: ...

    def identity(self) -> bytes | None:
        return None

    def sidecar(self, name: str) -> bytes | None:
        return None

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def read_config(path: Path) -> ConfigOnly:
    """The configuration in a `config.json`. Raises CheckpointError for a file that is no JSON object."""
    return ConfigOnly(path, parse_json_object(read_file(path, CONFIG_LIMIT_BYTES), path, "the configuration"))
