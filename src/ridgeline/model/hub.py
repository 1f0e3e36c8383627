"""Models from the Hugging Face hub, by `hf.co/<org>/<repo>[:<file or quant>]`.

Files stay in the hub's own cache (`HF_HOME`), where other tools find them too; a small record in ours says
what was pulled. `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are honoured by the library that fetches.
"""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ridgeline.model.download import (
    FetchError,
    Progress,
    RefusedError,
    disk_errors,
    full_disk,
    require_space,
    sha256_of,
    watched,
)
from ridgeline.resources.paths import cache_dir, write_atomic
from ridgeline.types import CapacityError, CheckpointError

_PREFIX = re.compile(r"(?:https?://)?(?:hf\.co|huggingface\.co)/", re.IGNORECASE)
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ /+-]{0,199}")
_TIMEOUT_S = 20.0
_SETTING = "HF_HOME"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)

# What a model of safetensors is made of, beside the weights. Pickles and code are never fetched.
_FOLDER_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "quantize_config.json",
        "quant_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    }
)
_TEMPLATES = "additional_chat_templates/"


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, and which of its files: the name of one, a quantisation such as Q4_K_M, or None."""

    repo: str
    target: str | None = None

    def __str__(self) -> str:
        return f"hf.co/{self.repo}" + (f":{self.target}" if self.target else "")

    @staticmethod
    def parse(text: str) -> HubName | None:
        """None for what does not name the hub. CheckpointError for what does, but not a model on it."""
        prefix = _PREFIX.match(text)
        if prefix is None:
            return None
        repo, _, target = text[prefix.end() :].rstrip("/").partition(":")
        parts = repo.split("/")
        ok = len(parts) == 2 and all(_PART.fullmatch(part) and ".." not in part for part in parts)
        if not ok or (target and (not _TARGET.fullmatch(target) or ".." in target)) or text.endswith(":"):
            raise CheckpointError(f"{text!r} is not a model on the hub; accepted: {FORM}")
        return HubName(repo, target or None)


FORM = "hf.co/<org>/<repo>[:<file or quant>]"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository; `sha256` is None for small files, which the hub identifies otherwise."""

    name: str
    size_bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class HubRecord:
    """What was pulled: the path to open, and every file that came for it."""

    name: str
    path: Path
    files: tuple[Path, ...]

    @property
    def complete(self) -> bool:
        return all(file.is_file() for file in self.files)


# -------------------------------------------------------------------------------------------- choice


def choose_files(name: HubName, files: Sequence[HubFile]) -> tuple[list[HubFile], str]:
    """The files to fetch for a name, and which of them to open: a GGUF, the first part of one that is split,
    or "" for the folder.

    Raises CheckpointError when nothing fits the name, or more than one thing does.
    """
    from ridgeline.model.checkpoint.gguf_split import first_parts

    models = [file for file in files if file.name.endswith(".gguf") and _is_model(file.name)]
    if name.target is not None:
        models = [file for file in models if _fits(file.name, name.target)]
        if not models:
            there = [file.name for file in files if file.name.endswith(".gguf")]
            raise CheckpointError(f"{name} names no GGUF there; accepted: {_listed(there)}")
    choices = first_parts(file.name for file in models)
    if len(choices) == 1:
        return models, next(iter(choices))
    if choices:
        raise CheckpointError(
            f"{name} could be {len(choices)} files; add :<file or quant> for {_listed([*choices])}"
        )
    weights = [file for file in files if file.name.endswith(".safetensors") and "/" not in file.name]
    if not weights or not any(file.name == "config.json" for file in files):
        raise CheckpointError(
            f"{name} has no GGUF, and no config.json with safetensors; accepted: one of these"
        )
    return [*weights, *(file for file in files if _is_folder_file(file.name))], ""


def _is_folder_file(file: str) -> bool:
    return file in _FOLDER_FILES or (file.startswith(_TEMPLATES) and file.endswith(".jinja"))


def _is_model(file: str) -> bool:
    """Leaves out vision projectors and calibration data, which lie beside models."""
    stem = PurePosixPath(file).name.lower()
    return not stem.startswith("mmproj") and "imatrix" not in stem


def _fits(file: str, target: str) -> bool:
    """The whole name, its last part, or a part of that between separators, in any case."""
    path, wanted = file.lower(), target.lower()
    if wanted in (path, PurePosixPath(path).name):
        return True
    stem = PurePosixPath(path).name.removesuffix(".gguf")
    return re.search(rf"(?<![a-z0-9_]){re.escape(wanted)}(?![a-z0-9_])", stem) is not None


def _listed(names: Sequence[str]) -> str:
    shorter = ", ".join(sorted(names)[:12])
    return (shorter or "no GGUF at all") + (f" and {len(names) - 12} more" if len(names) > 12 else "")


# --------------------------------------------------------------------------------------------- fetch


def fetch(name: HubName, progress: Progress) -> HubRecord:
    """Download what a name stands for into the hub's cache and record it.

    Raises CheckpointError when there is no such model, CapacityError for a full disk, FetchError when the hub
    does not answer.
    """
    files, revision = repo_files(name.repo)
    chosen, opened = choose_files(name, files)
    total = sum(file.size_bytes for file in chosen)
    with _hub_errors(name.repo) as folder:
        from huggingface_hub import hf_hub_download

        require_space(folder, total, _SETTING)
        with disk_errors(folder, _SETTING):
            folder.mkdir(parents=True, exist_ok=True)
        with watched(folder, total, progress):
            paths = [Path(hf_hub_download(name.repo, file.name, revision=revision)) for file in chosen]
    for file, path in zip(chosen, paths, strict=True):
        _check(name, file, path, progress)
    main = paths[[file.name for file in chosen].index(opened)] if opened else paths[0].parent
    record = HubRecord(str(name), main, tuple(paths))
    _write_record(name, record)
    return record


def fetch_config(name: HubName) -> Path:
    """Download nothing but a model's `config.json` into the hub's cache. Nothing is recorded of it.

    Raises CheckpointError where there is none, as beside GGUF files; and as `fetch` does.
    """
    files, revision = repo_files(name.repo)
    if name.target is not None or not any(file.name == "config.json" for file in files):
        raise CheckpointError(
            f"{name} names no config.json, which alone would be fetched; accepted: a repository with one, or "
            f"a model that is here: ridgeline pull {name}"
        )
    with _hub_errors(name.repo) as folder:
        from huggingface_hub import hf_hub_download

        with disk_errors(folder, _SETTING):
            folder.mkdir(parents=True, exist_ok=True)
        return Path(hf_hub_download(name.repo, "config.json", revision=revision))


def repo_files(repo: str, revision: str | None = None) -> tuple[list[HubFile], str | None]:
    """What a repository has, and the commit that this is true of. FetchError when the hub does not say."""
    with _hub_errors(repo):
        from huggingface_hub import HfApi

        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
    files = [_hub_file(sibling) for sibling in info.siblings or []]
    return files, info.sha


def _hub_file(sibling: Any) -> HubFile:
    stored = sibling.lfs
    return HubFile(sibling.rfilename, sibling.size or 0, stored.sha256 if stored is not None else None)


def read_range(repo: str, file: str, revision: str | None, start: int, end: int) -> bytes:
    """The bytes `start` to `end` of a file, of which nothing else is fetched.

    FetchError when the hub does not give them.
    """
    with _hub_errors(repo):
        from huggingface_hub import HfFileSystem

        # Without a cache of its own it asks for exactly these.
        found = HfFileSystem().cat_file(
            f"{repo}/{file}", revision=revision, start=start, end=end, cache_type="none"
        )
        if len(found) != end - start:
            raise FetchError(f"hub: it gave {len(found)} bytes of {file}, where {end - start} were asked for")
        return bytes(found)


def fetch_file(
    repo: str, revision: str, file: str, folder: Path, total_bytes: int, progress: Progress
) -> Path:
    """One file of a repository into `folder`, not into the hub's cache. FetchError, CapacityError."""
    # Fails at once without a connection, where a download tries again for half a minute.
    repo_files(repo, revision)
    with _hub_errors(repo):
        from huggingface_hub import hf_hub_download

        with watched(folder, total_bytes, progress):
            return Path(hf_hub_download(repo, file, revision=revision, local_dir=folder))


def _check(name: HubName, file: HubFile, path: Path, progress: Progress) -> None:
    size = path.stat().st_size
    if size == file.size_bytes and (file.sha256 is None or sha256_of(path, progress) == file.sha256):
        return
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    raise CheckpointError(f"{name}: {file.name} came damaged ({size} bytes) and was removed; pull it again")


@contextmanager
def _hub_errors(repo: str) -> Iterator[Path]:
    """One line for whatever the hub's library raises; gives the folder that it keeps the repository in."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    bars, verbosity = not are_progress_bars_disabled(), hub_logging.get_verbosity()
    disable_progress_bars()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield folder
    except (CapacityError, CheckpointError, FetchError):
        raise
    except errors.GatedRepoError:
        raise RefusedError(f"hub: {repo} is gated; accept its terms on its page and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise RefusedError(f"hub: there is no {repo}, or it is private and HF_TOKEN is not its") from None
    except errors.RevisionNotFoundError:
        raise RefusedError(f"hub: {repo} has lost the revision that was asked for") from None
    except errors.OfflineModeIsEnabled:
        raise FetchError("hub: HF_HUB_OFFLINE is set") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise FetchError(f"hub: it answered {status} for {repo}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            with disk_errors(folder, _SETTING):
                raise
        if "No space left" in str(error):
            raise full_disk(folder, _SETTING) from None
        # Which class a broken connection has depends on the library's choice of HTTP client.
        raise FetchError("hub: no connection to it") from None
    finally:
        if bars:
            enable_progress_bars()
        hub_logging.set_verbosity(verbosity)


# ------------------------------------------------------------------------------------------- records


def _records() -> Path:
    return cache_dir() / "models" / "hf.co"


def _record_file(name: HubName) -> Path:
    target = re.sub(r"[^A-Za-z0-9._-]", "_", name.target or "default")
    return _records() / name.repo / f"{target}.json"


def _write_record(name: HubName, record: HubRecord) -> None:
    described = {"name": record.name, "path": str(record.path), "files": [str(file) for file in record.files]}
    write_atomic(_record_file(name), json.dumps(described, indent=1).encode())


def read_record(name: HubName) -> HubRecord | None:
    """What was pulled under a name, if all of it is still there."""
    record = _parse_record(_record_file(name))
    return record if record is not None and record.complete else None


def all_records() -> list[HubRecord]:
    """Every model of the hub that was pulled and is still there, by name."""
    found = [_parse_record(file) for file in sorted(_records().glob("*/*/*.json"))]
    return [record for record in found if record is not None and record.complete]


def _parse_record(file: Path) -> HubRecord | None:
    try:
        described = json.loads(file.read_bytes())
        files = tuple(Path(path) for path in described["files"])
        return HubRecord(str(described["name"]), Path(described["path"]), files)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(name: HubName) -> bool:
    """Delete the files that were pulled under a name, except where another revision or name uses them."""
    record = _parse_record(_record_file(name))
    if record is None:
        return False
    _record_file(name).unlink(missing_ok=True)
    used = {file for other in all_records() for file in other.files}
    folder = f"models--{name.repo.replace('/', '--')}"
    for file in record.files:
        # A record that was tampered with never makes us delete anything outside the repository's folder.
        if file not in used and folder in file.parts:
            blob = file.resolve()
            file.unlink(missing_ok=True)
            if folder in blob.parts and not _linked(blob):
                blob.unlink(missing_ok=True)
    return True


def _linked(blob: Path) -> bool:
    """Whether another revision of the repository still shows a blob."""
    snapshots = blob.parent.parent / "snapshots"
    return any(link.is_symlink() and link.resolve() == blob for link in snapshots.rglob("*"))
