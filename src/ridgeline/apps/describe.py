"""What a model file holds and what a token of it costs, read from its metadata alone."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.base import page_bytes
from ridgeline.model.build import decoder
from ridgeline.model.chat_template import template_source
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.checkpoint.gguf_split import first_parts
from ridgeline.model.families import read_spec
from ridgeline.model.weights import Weights


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """`formats` counts the tensors of each storage; `kv_bytes_per_token` is for all layers in bfloat16."""

    path: str
    family: str
    parameters: int
    formats: dict[str, int]
    layers: int
    hidden: int
    vocabulary: int
    context: int
    kv_bytes_per_token: int
    chat_template: bool
    size_bytes: int


def describe(path: Path) -> ModelDescription:
    """Describe the model at `path` without reading its weights.

    Raises CheckpointError, also when its tensors are not those that its metadata asks for.
    """
    with closing(open_checkpoint(path)) as checkpoint:
        spec = read_spec(checkpoint)
        program = decoder(spec)
        Weights(spec, program, checkpoint)  # refuses missing, left-over and misshapen tensors
        storages = Counter(info.storage for info in checkpoint.tensors.values())
        return ModelDescription(
            path=str(checkpoint.path),
            family=spec.family,
            parameters=sum(prod(weight.shape) for weight in program.weights()),
            formats=dict(storages.most_common()),
            layers=len(spec.layers),
            hidden=spec.hidden,
            vocabulary=spec.vocabulary,
            context=spec.context,
            kv_bytes_per_token=sum(page_bytes(group, "KV16") for group in program.groups) // PAGE_TOKENS,
            chat_template=template_source(checkpoint) is not None,
            size_bytes=_size(checkpoint.path),
        )


def _size(path: Path) -> int:
    if path.is_file():
        together = first_parts(file.name for file in path.parent.glob("*.gguf"))
        parts = next((names for names in together.values() if path.name in names), [path.name])
        return sum((path.parent / name).stat().st_size for name in parts)
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
