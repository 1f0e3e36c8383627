"""`ridgeline run`: one question, one answer on standard output."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ridgeline.cli import options
from ridgeline.cli.options import given

if TYPE_CHECKING:
    from collections.abc import Generator

    from ridgeline.cli.figures import Figures
    from ridgeline.config import EngineConfig
    from ridgeline.llm import LLM
    from ridgeline.types import RequestOutput, SamplingParams

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="What to ask; `-` or a pipe reads it from standard input."),
]
_UNADVISED: dict[str, Any] = {"temperature": 0.2, "top_p": 0.9}
"""Sampling for a person who reads the answer, where the model's makers recommend nothing: the plain
distribution of a small model wanders. The values are those on SmolLM2's model card."""


def run(
    prompt: Prompt = None,
    model: options.Model = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    weights: options.WeightFormat = None,
    kv_format: options.KVFormat = None,
    max_model_len: options.MaxModelLen = None,
    threads: options.Threads = None,
    device: options.Device = None,
    no_packed_cache: options.NoPackedCache = False,
    speculation: options.Speculation = None,
    trace: options.Trace = None,
) -> None:
    """Answer PROMPT, streamed to standard output. A model without a chat template continues it instead."""
    text = read_prompt(prompt)
    sampling = given(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )
    engine = given(
        model=model,
        weights=weights,
        kv_format=kv_format,
        max_model_len=max_model_len,
        threads=threads,
        device=device,
        packed_cache=options.packed_cache(no_packed_cache),
        speculation=speculation,
        trace=options.trace_file(trace),
    )
    from ridgeline.types import SamplingParams

    SamplingParams(**sampling)  # a mistake is told before the model is loaded
    figures, config = _load_and_answer(engine, text, system, sampling)
    # The model is gone by now, so that measuring an unknown machine takes no memory on top of it.
    from ridgeline.cli.figures import known_ceilings
    from ridgeline.cli.output import note

    note(figures.line(known_ceilings(config.threads, measure=True, device=config.device)))


def _load_and_answer(
    engine: dict[str, Any], text: str, system: str | None, sampling: dict[str, Any]
) -> tuple[Figures, EngineConfig]:
    from ridgeline.cli.progress import fetch
    from ridgeline.llm import LLM

    fetch(engine.get("model"))
    with LLM(**engine) as llm:
        return answer(llm, text, system, sampling), llm.config


def answer(llm: LLM, text: str, system: str | None, sampling: dict[str, Any]) -> Figures:
    """Stream one answer to standard output; nothing else is written there."""
    from ridgeline.cli.figures import Figures

    params = sampling_params(llm, sampling)
    before = llm.stats.decode.work
    shown, last = 0, None
    with closing(_outputs(llm, text, system, params)) as outputs:
        for last in outputs:
            grown = last.outputs[0].text
            sys.stdout.write(grown[shown:])
            sys.stdout.flush()
            shown = len(grown)
    sys.stdout.write("\n")
    sys.stdout.flush()
    assert last is not None
    check_answer(last)
    return Figures.of(last, before, llm.stats.decode.work)


def check_answer(output: RequestOutput) -> None:
    """Raise RequestError when the engine could not go on with an answer."""
    from ridgeline.types import RequestError

    choice = output.outputs[0]
    if choice.finish_reason == "error":
        raise RequestError(f"the answer broke off: {choice.stop_reason}")


def sampling_params(llm: LLM, sampling: dict[str, Any]) -> SamplingParams:
    """What the checkpoint recommends, else `_UNADVISED`, changed by what the user gave.

    A chat model answers until it has ended.
    """
    from ridgeline.types import SamplingParams

    defaults = llm.sampling_defaults
    if defaults == SamplingParams():
        defaults = replace(defaults, **_UNADVISED)
    if llm.loaded.chat_template is not None:
        defaults = replace(defaults, max_tokens=None)
    return replace(defaults, **sampling)


def _outputs(
    llm: LLM, text: str, system: str | None, params: SamplingParams
) -> Generator[RequestOutput, None, None]:
    if llm.loaded.chat_template is None and system is None:
        return llm.stream(text, params)
    opening = [{"role": "system", "content": system}] if system else []
    return llm.stream_chat([*opening, {"role": "user", "content": text}], params)


def read_prompt(argument: str | None) -> str:
    """The prompt: the argument, or standard input for `-` and for no argument at all.

    A pipe is not read beside an argument: whoever starts us from a program may hold one open for ever.
    Raises RequestError when there is no prompt.
    """
    from ridgeline.types import RequestError

    if argument not in (None, "-"):
        text = os.fsencode(argument).decode("utf-8", "replace")
    elif argument == "-" or not _is_terminal():
        text = sys.stdin.buffer.read().decode("utf-8", "replace").rstrip("\n") if sys.stdin else ""
    else:
        text = ""
    if not text:
        raise RequestError("prompt is empty; accepted: a text, or `-` and a text on standard input")
    return text


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
