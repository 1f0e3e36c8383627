"""Models that are split into several GGUF files, as llama.cpp's gguf-split writes them.

Part n of a model of m parts is `<name>-0000n-of-0000m.gguf`, both from 1 and of five digits, and a whole GGUF
of its own tensors. Every part says which it is (`split.no`, from 0), of how many (`split.count`), and how
many tensors all of them hold (`split.tensors.count`); the model's other metadata stands in the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ridgeline.model.checkpoint.files import Entry, MappedFile, shown
from ridgeline.types import CheckpointError

COUNT, NUMBER, TENSORS = "split.count", "split.no", "split.tensors.count"
MAX_PARTS = 99_999
_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.DOTALL | re.ASCII)


@dataclass(frozen=True, slots=True)
class Part:
    """One GGUF that was read; `file` belongs to whoever opened it."""

    file: MappedFile
    metadata: Mapping[str, Any]
    entries: Mapping[str, Entry]

    @property
    def path(self) -> Path:
        return self.file.path


def first_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Models among file names: what to open, which is the first part of a split one, and all of its files."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        named = _NAME.fullmatch(name)
        first = named["stem"] + _ending(0, int(named["parts"])) if named else name
        models.setdefault(first, []).append(name)
    return models


def part_paths(opened: Part) -> list[Path]:
    """The files of the model that `opened` is a part of, in order; only `opened` when it is a whole one.

    Raises CheckpointError when the part's name contradicts its metadata, or a part is missing.
    """
    parts = opened.metadata.get(COUNT, 0)
    if parts in (0, 1):
        return [opened.path]
    if type(parts) is not int or not 1 < parts <= MAX_PARTS:
        raise CheckpointError(f"{opened.path}: {COUNT} is {shown(parts)}; accepted: 0 to {MAX_PARTS} parts")
    number = _integer(opened, NUMBER, parts - 1)
    named = _NAME.fullmatch(opened.path.name)
    if named is None or (int(named["part"]), int(named["parts"])) != (number + 1, parts):
        raise CheckpointError(
            f"{opened.path} says that it is part {number + 1} of a GGUF split into {parts}; "
            f"accepted: a name that ends in {_ending(number, parts)}"
        )
    paths = []
    for part in range(parts):
        paths.append(opened.path.with_name(named["stem"] + _ending(part, parts)))
        if not paths[-1].exists():
            raise CheckpointError(
                f"{opened.path.parent} has no {shown(paths[-1].name)}, which is part {part + 1} of {parts}; "
                "accepted: all parts in one folder"
            )
    return paths


def joined(parts: Sequence[Part]) -> dict[str, Entry]:
    """The tensors of all parts, in order. Raises CheckpointError that names the part that contradicts."""
    if len(parts) == 1:
        return dict(parts[0].entries)
    total = _integer(parts[0], TENSORS)
    entries: dict[str, Entry] = {}
    for number, part in enumerate(parts):
        for key, expected in ((COUNT, len(parts)), (NUMBER, number), (TENSORS, total)):
            seen = _integer(part, key)
            if seen != expected:
                raise CheckpointError(f"{part.path}: {key} is {seen}; accepted: {expected} in this place")
        for name, entry in part.entries.items():
            if name in entries:
                raise CheckpointError(
                    f"{part.path}: tensor {shown(name)} stands in {shown(entries[name].file.path.name)} too; "
                    "accepted: each tensor in one part"
                )
            entries[name] = entry
    if len(entries) != total:
        raise CheckpointError(
            f"{parts[0].path}: {TENSORS} is {total}; its {len(parts)} parts hold {len(entries)} tensors"
        )
    return entries


def _ending(part: int, parts: int) -> str:
    return f"-{part + 1:05d}-of-{parts:05d}.gguf"


def _integer(part: Part, key: str, most: int | None = None) -> int:
    value = part.metadata.get(key)
    if type(value) is not int or value < 0 or (most is not None and value > most):
        seen = "missing" if value is None else shown(value)
        limit = "a count" if most is None else f"0 to {most}"
        raise CheckpointError(f"{part.path}, a part of a split GGUF: {key} is {seen}; accepted: {limit}")
    return value
