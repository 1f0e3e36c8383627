"""How the makers of a model would have it sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ridgeline.model.tokenizer import TokenizerSource
from ridgeline.model.tokenizer_json import json_sidecar
from ridgeline.types import CheckpointError, RequestError, SamplingParams

_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_GGUF_NAMES = {"temperature": "temp", "repetition_penalty": "penalty_repeat"}


def generation_defaults(checkpoint: TokenizerSource) -> dict[str, Any]:
    """Arguments for SamplingParams that the checkpoint recommends, from `generation_config.json` or a GGUF's
    `general.sampling.*`; empty when it says nothing.

    The tokens that end an answer are the tokenizer's `eos_ids`. Raises CheckpointError for impossible values.
    """
    found = _from_gguf(checkpoint.metadata) if checkpoint.kind == "gguf" else _from_folder(checkpoint)
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise CheckpointError(f"{checkpoint.path}: recommended {error}") from None
    return found


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: metadata.get(f"general.sampling.{_GGUF_NAMES.get(name, name)}") for name in _NAMES}
    # Stored as float32: seven digits bring back the number that was meant.
    rounded = {name: float(f"{v:.7g}") if isinstance(v, float) else v for name, v in values.items()}
    return {name: value for name, value in rounded.items() if value is not None}


def _from_folder(checkpoint: TokenizerSource) -> dict[str, Any]:
    config = json_sidecar(checkpoint.path, checkpoint.sidecar, "generation_config.json")
    found = {name: config[name] for name in _NAMES if config.get(name) is not None}
    if config.get("do_sample") is not False:
        return found
    # Greedy: of the rest, only a penalty makes a difference.
    return {"temperature": 0.0} | {name: found[name] for name in found if name == "repetition_penalty"}
