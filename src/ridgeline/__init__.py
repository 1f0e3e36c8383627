"""Ridgeline: run open-weight language models on your own hardware, up to what the hardware can do.

The names below are the public Python API. They are imported when they are first used, so that
`import ridgeline` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline.async_llm import AsyncLLM
    from ridgeline.config import EngineConfig
    from ridgeline.llm import LLM
    from ridgeline.model.tokenizer import Tokenizer
    from ridgeline.types import (
        CapacityError,
        CheckpointError,
        CompletionOutput,
        ConfigError,
        EngineDeadError,
        RequestError,
        RequestOutput,
        RidgelineError,
        SamplingParams,
        StructuredOutputsParams,
    )

__all__ = [
    "LLM",
    "AsyncLLM",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineDeadError",
    "RequestError",
    "RequestOutput",
    "RidgelineError",
    "SamplingParams",
    "StructuredOutputsParams",
    "Tokenizer",
]

_HOMES = {"LLM": "llm", "AsyncLLM": "async_llm", "EngineConfig": "config", "Tokenizer": "model.tokenizer"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        from importlib import metadata

        return metadata.version("ridgeline")
    if name not in __all__:
        raise AttributeError(f"module 'ridgeline' has no attribute {name!r}")
    value = getattr(import_module(f"ridgeline.{_HOMES.get(name, 'types')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
