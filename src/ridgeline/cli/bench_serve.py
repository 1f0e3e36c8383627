"""`ridgeline bench serve`: what a server of OpenAI's API gives under load."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ridgeline.cli import options
from ridgeline.cli.options import flag
from ridgeline.cli.output import console, note, print_json, table

if TYPE_CHECKING:
    from ridgeline.apps.load.client import Answer

Url = Annotated[
    str,
    flag(
        "url", "The server, as http://127.0.0.1:8000; any that speaks OpenAI's API.", also="OPENAI_BASE_URL"
    ),
]
Model = Annotated[str | None, flag("model", "Model to ask for (default: the first that it serves).", "-m")]
Endpoint = Annotated[str, flag("endpoint", "chat or completions.")]
Dataset = Annotated[str, flag("dataset", "random, a file of JSON lines, or ShareGPT's JSON.")]
NumPrompts = Annotated[int, flag("num-prompts", "Requests of each run.")]
Rate = Annotated[float, flag("request-rate", "Requests per second, at Poisson's times; inf is all at once.")]
Burstiness = Annotated[float, flag("burstiness", "Shape of the gaps: 1 is Poisson, less is in bursts.")]
Concurrency = Annotated[
    str | None,
    flag(
        "concurrency", "Clients that ask one after the other; 1,4,16 is a sweep. With a rate: most at once."
    ),
]
PromptTokens = Annotated[int, flag("prompt-tokens", "About how long random prompts are.", "-p")]
OutputTokens = Annotated[
    int | None, flag("output-tokens", "Tokens to ask for (default: the file's, or 128).", "-n")
]
Spread = Annotated[float, flag("spread", "How far random lengths differ: 0.5 is half to one and a half.")]
Temperature = Annotated[float, flag("temperature", "0 takes the likeliest token.")]
IgnoreEos = Annotated[bool, flag("ignore-eos", "Ask for answers of full length, where the server can.")]
Tier = Annotated[str | None, flag("service-tier", "Service class to ask for, as keystroke or batch.")]
Seed = Annotated[int, flag("seed", "Of random prompts and arrivals.")]
Warmup = Annotated[int, flag("warmup", "Requests before what is measured, besides a first one.")]
Goodput = Annotated[
    str | None, flag("goodput", "Targets in ms, as ttft=500,itl=50: requests/s that met all of them.")
]
Timeout = Annotated[float, flag("timeout", "Seconds that a whole answer may take.")]
ApiKey = Annotated[str | None, flag("api-key", "Key of the server.", also="OPENAI_API_KEY")]
Save = Annotated[Path | None, flag("save", "File for the JSON, with every request.")]


def bench_serve(
    url: Url = "http://127.0.0.1:8000",
    model: Model = None,
    endpoint: Endpoint = "chat",
    dataset: Dataset = "random",
    num_prompts: NumPrompts = 64,
    concurrency: Concurrency = None,
    request_rate: Rate = float("inf"),
    burstiness: Burstiness = 1.0,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = None,
    spread: Spread = 0.0,
    temperature: Temperature = 0.0,
    ignore_eos: IgnoreEos = False,
    service_tier: Tier = None,
    seed: Seed = 0,
    warmup: Warmup = 1,
    goodput: Goodput = None,
    timeout: Timeout = 600.0,
    api_key: ApiKey = None,
    save: Save = None,
    json: options.Json = False,
) -> None:
    """Measure a server under load. The last line of --json is one JSON object."""
    import asyncio

    from ridgeline.apps.load.bench import Benchmark, Listener, run_benchmark
    from ridgeline.apps.load.client import Asking
    from ridgeline.apps.load.dataset import DEFAULT_OUTPUT_TOKENS, Lengths
    from ridgeline.apps.load.drive import Load
    from ridgeline.apps.load.report import targets_of

    loads = tuple(
        Load(num_prompts, clients, request_rate, burstiness, seed) for clients in clients_of(concurrency)
    )
    wanted_tokens = DEFAULT_OUTPUT_TOKENS if output_tokens is None else output_tokens
    benchmark = Benchmark(
        url=url,
        asking=Asking(
            model or "",
            endpoint,
            temperature,
            ignore_eos,
            timeout_s=timeout,
            service_tier=service_tier,
        ),
        loads=loads,
        dataset=dataset,
        lengths=Lengths(prompt_tokens, wanted_tokens, spread),
        output_tokens=output_tokens,
        seed=seed,
        warmup=warmup,
        targets_ms=None if goodput is None else targets_of(goodput),
        api_key=api_key,
    )
    kept: list[list[dict[str, Any]]] = []
    with _progress(num_prompts * len(loads)) as answered:
        listener = Listener(note=note, answer=answered)
        result = asyncio.run(run_benchmark(benchmark, listener, kept.append if save else None))
    if save is not None:
        runs = [{**run, "each": each} for run, each in zip(result["runs"], kept, strict=True)]
        save.write_text(json_.dumps({**result, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    if json:
        print_json(result)
    else:
        _show(result)


def clients_of(text: str | None) -> tuple[int | None, ...]:
    """Numbers of clients, several between commas; None for no limit. Raises ConfigError."""
    from ridgeline.types import ConfigError

    if text is None:
        return (None,)
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"concurrency is {text!r}; accepted: a number, or several as 1,4,16") from None


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A counter on a terminal's standard error, drawn seldom: the cores may be the server's."""
    if not sys.stderr.isatty():
        yield lambda answer: None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.completed}/{task.total} requests"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=total)

        def answered(answer: Answer) -> None:
            progress.update(task, advance=1)

        yield answered


# ---------------------------------------------------------------------------------------------- tables

_TIMES = {"TTFT": "ttft_ms", "ITL": "itl_ms", "TPOT": "tpot_ms", "E2E": "e2e_ms"}


def _show(result: dict[str, Any]) -> None:
    runs = result["runs"]
    if len(runs) == 1:
        _show_one(runs[0])
    else:
        _show_sweep(runs)
    for run in runs:
        for line in _remarks(run):
            console().print(line, soft_wrap=True)
    console().print(
        f"{result['model']} at {result['url']}, {result['endpoint']}, dataset {result['dataset']}",
        style="dim",
        soft_wrap=True,
    )


def _show_one(run: dict[str, Any]) -> None:
    columns = ("mean", "p50", "p90", "p99", "max")
    shown = table("ms", *columns, right=columns)
    for name, key in _TIMES.items():
        shown.add_row(name, *(_number((run[key] or {}).get(column)) for column in columns))
    console().print(shown)
    console().print(
        f"{run['ok']} of {run['requests']} requests in {run['duration_s']:.2f} s: "
        f"{run['requests_per_s']:.2f} requests/s, {run['input_tokens_per_s']:.1f} input and "
        f"{run['output_tokens_per_s']:.1f} output tokens/s",
        soft_wrap=True,
    )
    if run["goodput"]:
        console().print(f"goodput {run['goodput']['requests_per_s']:.2f} requests/s", soft_wrap=True)


def _show_sweep(runs: list[dict[str, Any]]) -> None:
    times = tuple(f"{name} {column}" for name in ("TTFT", "ITL", "E2E") for column in ("p50", "p99"))
    with_goodput = ("goodput",) if runs[0]["goodput"] else ()
    columns = ("ok", "requests/s", "output tokens/s", *times, *with_goodput)
    shown = table("clients", *columns, right=("clients", *columns))
    for run in runs:
        row = [str(run["concurrency"]), f"{run['ok']}/{run['requests']}", _number(run["requests_per_s"])]
        row.append(_number(run["output_tokens_per_s"]))
        for name in times:
            key, column = name.split()
            row.append(_number((run[_TIMES[key]] or {}).get(column)))
        if with_goodput:
            row.append(_number(run["goodput"]["requests_per_s"]))
        shown.add_row(*row)
    console().print(shown)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _remarks(run: dict[str, Any]) -> list[str]:
    """What went wrong, and what makes a figure mean less."""
    at = "" if run["concurrency"] is None else f" ({run['concurrency']} clients)"
    lines = [
        f"failed{at}: {count} × {cause}: {run['examples'][cause]}" for cause, count in run["failed"].items()
    ]
    if run["short_answers"]:
        lines.append(f"{run['short_answers']} answers{at} are shorter than was asked")
    if run["tokens_counted_by"] in ("chunks", "mixed"):
        lines.append(f"the server gave no usage{at}: output tokens are chunks")
    return lines
