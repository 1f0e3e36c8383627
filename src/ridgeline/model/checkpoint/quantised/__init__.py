"""Quantised safetensors folders: one module for each scheme, and the choice between them.

A scheme checks the tensors of a file and says which logical tensors they are parts of (`Found`). A new one is
a module with `read`, and a row of `_SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Callable

from ridgeline.model.checkpoint.files import Checkpoint, MappedCheckpoint, parse_json_object, shown
from ridgeline.model.checkpoint.quantised import awq, bitsandbytes, compressed, floats, gptq, mxfp4
from ridgeline.model.checkpoint.quantised.logical import Found, QuantisedCheckpoint
from ridgeline.model.checkpoint.quantised.parts import Parts
from ridgeline.model.checkpoint.quantised.settings import Settings
from ridgeline.types import CheckpointError

_SCHEMES: dict[str, Callable[[Parts, Settings], Found]] = {
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed.read,
    "fp8": floats.read,
    "fbgemm_fp8": floats.read,
    "bitsandbytes": bitsandbytes.read,
    "mxfp4": mxfp4.read,
}
# Where config.json has the settings, or a file beside it; and the method where the settings name none.
_KEYS = {"quantization_config": None, "compression_config": "compressed-tensors"}
_SIDECARS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_TRANSPOSED = ("gpt2",)
"""Families whose layers lie with inputs first, which schemes and their writers treat in different ways."""


def logical_checkpoint(files: MappedCheckpoint) -> Checkpoint:
    """The checkpoint of a folder's logical tensors; `files` itself where nothing is quantised.

    Reads scales and zeros, a few percent of a file, to know what is handed over. Raises CheckpointError for
    methods and settings that are not supported, and for parts that are missing or of another type or shape.
    """
    settings = _settings(files)
    if settings is None:
        return files
    method = settings.choice("quant_method", tuple(_SCHEMES))
    family = files.metadata.get("model_type")
    if family in _TRANSPOSED:
        raise CheckpointError(
            f"{files.path}: model_type is {shown(family)} and quantised with {method}; "
            "accepted: other families, or its GGUF files"
        )
    found = _SCHEMES[method](Parts(files), settings)
    for name in found.tensors:
        for part in found.tensors[name].parts:
            files.release(part)
    return QuantisedCheckpoint(files, found, repr(settings.values))


def _settings(files: MappedCheckpoint) -> Settings | None:
    top = Settings(files.path, "config.json", files.metadata)
    for key, method in _KEYS.items():
        section = top.section(key)
        if section.values:
            if method is None and any(str(name).startswith("load_in_") for name in section.values):
                method = "bitsandbytes"
            return Settings(files.path, key, {"quant_method": method, **section.values})
    if any(name.endswith(".qweight") for name in files.tensors):
        for sidecar, method in _SIDECARS.items():
            content = files.sidecar(sidecar)
            if content is not None:
                values = parse_json_object(content, files.path / sidecar, "the settings")
                return Settings(files.path, sidecar, {"quant_method": method, **values})
    return None
