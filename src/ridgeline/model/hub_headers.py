"""Of a model on the hub, what says which tensors it has: its configuration and the beginnings of its files.

They are kept in our own cache, by the revision that they are of; nothing of them is recorded as a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ridgeline.model import hub
from ridgeline.model.checkpoint.config_only import read_config
from ridgeline.model.checkpoint.files import Checkpoint, MappedCheckpoint
from ridgeline.model.checkpoint.headers import SIZES_NAME, has_headers, open_headers, piece_path
from ridgeline.model.checkpoint.safetensors import HEADER_LIMIT_BYTES, INDEX_LIMIT_BYTES, INDEX_NAME
from ridgeline.model.families import planned_family_of
from ridgeline.model.families.rope import FACTORS, LONG_FACTORS, SHORT_FACTORS
from ridgeline.model.hub import HubFile, HubName
from ridgeline.resources.paths import cache_dir, write_atomic
from ridgeline.types import CheckpointError

_FIRST_BYTES = 128 << 10  # holds the header of most shards
_GGUF_BYTES = (1 << 20, 8 << 20, 64 << 20)  # a vocabulary is in it, of some MB
_MOST_PIECE_BYTES = 1 << 20
_AT_ONCE = 8
_SETTINGS = ("config.json", "quantize_config.json", "quant_config.json", INDEX_NAME)


def fetch_metadata(name: HubName) -> Path:
    """What `apps.plan.model.open_model` takes: a folder with the beginnings of a model's files, or only its
    `config.json` where it has no files that we read, several to choose from, or a family that nothing runs.

    Raises CheckpointError where there is neither, CapacityError for a full disk, FetchError when the hub does
    not answer.
    """
    files, revision = hub.repo_files(name.repo)
    configured = name.target is None and any(file.name == "config.json" for file in files)
    try:
        chosen, _ = hub.choose_files(name, files)
    except CheckpointError:
        if configured:
            return hub.fetch_config(name)
        raise
    if configured and not chosen[0].name.endswith(".gguf"):
        config = hub.fetch_config(name)
        if planned_family_of(read_config(config)) is not None:
            return config
    target = (name.target or "default").replace("/", "_")
    folder = cache_dir() / "headers" / name.repo / (revision or "latest") / target
    if not has_headers(folder):
        _Fetch(name.repo, revision, folder).all(chosen)
    return folder


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Fills a folder. The list of sizes is written when all else is there and was understood."""

    repo: str
    revision: str | None
    folder: Path

    def all(self, chosen: Sequence[HubFile]) -> None:
        ggufs = [file for file in chosen if file.name.endswith(".gguf")]
        weights = ggufs or [file for file in chosen if file.name.endswith(".safetensors")]
        sizes = {PurePosixPath(file.name).name: file.size_bytes for file in weights}
        with closing(self._ggufs(weights, sizes) if ggufs else self._safetensors(chosen, sizes)):
            pass
        write_atomic(self.folder / SIZES_NAME, json.dumps(sizes).encode())

    def _begin(self, file: HubFile, least_bytes: int) -> Path:
        """The first bytes of a file, at least so many or all."""
        path = self.folder / PurePosixPath(file.name).name
        end = min(least_bytes, file.size_bytes)
        write_atomic(path, hub.read_range(self.repo, file.name, self.revision, 0, end))
        return path

    def _safetensors(self, chosen: Sequence[HubFile], sizes: dict[str, int]) -> Checkpoint:
        for file in chosen:
            if file.name in _SETTINGS:
                if file.size_bytes > INDEX_LIMIT_BYTES:
                    raise CheckpointError(
                        f"{file.name} has {file.size_bytes} bytes; accepted: up to {INDEX_LIMIT_BYTES}"
                    )
                self._begin(file, file.size_bytes)

        def begin(file: HubFile) -> None:
            path = self._begin(file, _FIRST_BYTES)
            wanted = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            if _FIRST_BYTES < wanted <= HEADER_LIMIT_BYTES:
                self._begin(file, wanted)

        with ThreadPoolExecutor(_AT_ONCE, "headers") as pool:
            list(pool.map(begin, [file for file in chosen if file.name in sizes]))
        return open_headers(self.folder, sizes)

    def _ggufs(self, weights: Sequence[HubFile], sizes: dict[str, int]) -> Checkpoint:
        """How long a GGUF's header is shows where it ends: of the first part, which has the vocabulary, more
        is fetched until it does."""
        for file in weights[1:]:
            self._begin(file, _GGUF_BYTES[0])
        for least_bytes in _GGUF_BYTES:
            self._begin(weights[0], least_bytes)
            try:
                checkpoint = open_headers(self.folder, sizes)
            except CheckpointError:
                if least_bytes >= min(_GGUF_BYTES[-1], weights[0].size_bytes):
                    raise
                continue
            assert isinstance(checkpoint, MappedCheckpoint)
            try:
                self._tables(checkpoint, weights)
            except BaseException:
                checkpoint.close()
                raise
            return checkpoint
        raise AssertionError("unreachable")

    def _tables(self, checkpoint: MappedCheckpoint, weights: Sequence[HubFile]) -> None:
        """Factors of rotary frequencies, which a spec is made of."""
        names = {PurePosixPath(file.name).name: file.name for file in weights}
        for table in (FACTORS, LONG_FACTORS, SHORT_FACTORS):
            if table in checkpoint.tensors and checkpoint.tensors[table].nbytes <= _MOST_PIECE_BYTES:
                path, start, nbytes = checkpoint.place(table)
                piece = hub.read_range(self.repo, names[path.name], self.revision, start, start + nbytes)
                write_atomic(piece_path(path, start), piece)
