"""The flags that several verbs share. A flag's environment twin and its name come from one rule."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def flag(name: str, text: str, *short: str, also: str | None = None, **more: Any) -> Any:
    """A typer option `--name` with the environment twin RIDGELINE_NAME, and after it `also`. A name may be
    followed by `/--` and what switches it off."""
    variable = "RIDGELINE_" + name.partition("/")[0].upper().replace("-", "_")
    variables = [variable, also] if also else variable
    return typer.Option(f"--{name}", *short, envvar=variables, show_envvar=False, help=text, **more)


Model = Annotated[
    str | None,
    flag("model", "Catalog name, path, or hf.co/<org>/<repo>[:<file or quant>] (default: smollm2).", "-m"),
]
Device = Annotated[str | None, flag("device", "Where to run: auto, cpu, cuda or reference.")]
Threads = Annotated[int | None, flag("threads", "CPU threads (default: one per usable core).", "-t")]
WeightFormat = Annotated[
    str | None,
    flag("weights", "Format of linear layers: auto, W4A8-g32, W8A8-g32, W32A32; on a GPU also W4A16-g32 …"),
]
NoPackedCache = Annotated[
    bool, flag("no-packed-cache", "Pack weights at every start, and keep none packed on disk.")
]
KVFormat = Annotated[
    str | None, flag("kv-format", "Format of stored keys and values: auto, KV8, KV16, KV32.")
]
MaxModelLen = Annotated[
    int | None,
    flag("max-model-len", "Most tokens of prompt and answer (default: the model's)."),
]
MaxTokens = Annotated[
    int | None, flag("max-tokens", "Most tokens to answer with (default: to the end of the context).", "-n")
]
System = Annotated[str | None, flag("system", "System prompt.")]
Temperature = Annotated[
    float | None, flag("temperature", "0 takes the likeliest token (default: the model's).")
]
TopP = Annotated[float | None, flag("top-p", "Sample from the likeliest tokens of this total probability.")]
TopK = Annotated[int | None, flag("top-k", "Sample from this many of the likeliest tokens; 0 is off.")]
MinP = Annotated[float | None, flag("min-p", "Drop tokens below this share of the best probability.")]
Seed = Annotated[int | None, flag("seed", "Makes the answer repeatable.")]
Plot = Annotated[Path | None, flag("plot", "File for the roofline plot, as PNG; needs ridgeline[plot].")]
Trace = Annotated[
    Path | None, flag("trace", "File for a timeline of steps and requests, for ui.perfetto.dev.")
]
Speculation = Annotated[
    str | None, flag("speculation", "How tokens are guessed ahead: auto, grammar, ngram, suffix or off.")
]
Json = Annotated[bool, flag("json", "Print JSON.")]


def packed_cache(refused: bool) -> bool | None:
    """The engine's setting: its default unless the flag refuses it."""
    return False if refused else None


def trace_file(path: Path | None) -> str | None:
    """The engine's setting. Raises ConfigError where nothing can be written, before anything is loaded."""
    if path is None:
        return None
    from ridgeline.trace import check_path

    check_path(str(path))
    return str(path)


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave a value."""
    return {name: value for name, value in options.items() if value is not None}
