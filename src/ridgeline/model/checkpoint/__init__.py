"""Model files: GGUF, and Hugging Face folders with safetensors, behind one face."""

from __future__ import annotations

from pathlib import Path

from ridgeline.model.checkpoint.files import Checkpoint, TensorInfo, contained, reading, shown
from ridgeline.model.checkpoint.gguf import read_gguf
from ridgeline.model.checkpoint.gguf_split import first_parts
from ridgeline.model.checkpoint.safetensors import INDEX_NAME, read_safetensors
from ridgeline.types import CheckpointError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

_ACCEPTED = "only safetensors and GGUF are read"
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.gguf` file, a folder with `config.json` and safetensors, or a folder with exactly one GGUF.

    Raises CheckpointError, of one line, for anything that is missing, damaged or of another kind; then
    nothing stays open.
    """
    with reading(path):
        if not path.is_dir():
            path.stat()
            return _open_file(path)
        files = sorted(entry for entry in path.iterdir() if entry.is_file())
    if any(file.suffix == ".safetensors" or file.name == INDEX_NAME for file in files):
        if (path / "config.json").exists():
            return read_safetensors(path)
        raise CheckpointError(f"{path} has safetensors but no config.json; accepted: a folder with both")
    models = [*first_parts(file.name for file in files if file.suffix == ".gguf")]
    if len(models) == 1:
        return read_gguf(contained(path, models[0]))
    raise CheckpointError(f"{path} {_why_no_model(files, models)}")


def _open_file(path: Path) -> Checkpoint:
    if path.suffix in _PICKLES:
        raise CheckpointError(f"{path} looks like a pickle, which can run code; {_ACCEPTED}")
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is one file of a model; accepted: the folder with it and its config.json"
        )
    return read_gguf(path)


def _why_no_model(files: list[Path], models: list[str]) -> str:
    if models:
        names = ", ".join(map(shown, models[:4]))
        return f"has {len(models)} GGUF files ({names}{', ...' if len(models) > 4 else ''}); name one of them"
    pickle = next((file for file in files if file.suffix in _PICKLES), None)
    if pickle is not None:
        return f"has only pickled weights ({shown(pickle.name)}), which can run code; {_ACCEPTED}"
    return "has no model in it; accepted: a GGUF file, or a folder with config.json and safetensors"
