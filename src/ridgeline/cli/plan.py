"""`ridgeline plan`: what a model will do on a machine, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from ridgeline.cli import options
from ridgeline.cli.hosts import Device, Machine, Threads, device_here, host_of
from ridgeline.cli.options import flag
from ridgeline.cli.output import print_json

if TYPE_CHECKING:
    from ridgeline.config import EngineConfig

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Catalog name, path, config.json alone, or hf.co/<org>/<repo> (only headers are fetched).",
    ),
]
Prompt = Annotated[int, flag("prompt", "Tokens of each prompt.", "-p")]
Output = Annotated[int, flag("output", "Tokens of each answer.", "-n")]
Users = Annotated[int, flag("users", "Sequences at once.", "-u")]
Ttft = Annotated[float | None, flag("ttft", "Target: at most so many ms to the first token.")]
Itl = Annotated[float | None, flag("itl", "Target: at most so many ms from a token to the next.")]
Price = Annotated[
    float | None, flag("price", "US dollars per device and hour (default: the machine's, if known).")
]
Power = Annotated[float | None, flag("power", "Watts of each device (default: the machine's, if known).")]
Check = Annotated[
    bool, flag("check", "Run steps here, and show predictions beside measurements. Takes a minute or more.")
]
Cells = Annotated[
    str | None, flag("cells", "Of the check: only steps with this in their names, as prefill or 'batch 8'.")
]
Sweep = Annotated[bool, flag("sweep", "Also: batches of 1 to 64 sequences.")]


def plan(
    model: Model,
    machine: Machine = None,
    prompt: Prompt = 512,
    output: Output = 128,
    users: Users = 1,
    ttft: Ttft = None,
    itl: Itl = None,
    weights: options.WeightFormat = None,
    kv_format: options.KVFormat = None,
    device: Device = None,
    threads: Threads = None,
    price: Price = None,
    power: Power = None,
    sweep: Sweep = False,
    check: Check = False,
    cells: Cells = None,
    json: options.Json = False,
) -> None:
    """Say what fits a machine, how fast it can be and likely will be, what bounds it, and what to change."""
    from ridgeline.apps.plan.answer import Question, answer
    from ridgeline.apps.plan.model import open_model
    from ridgeline.apps.plan.serving import Workload
    from ridgeline.cli.plan_report import Report
    from ridgeline.config import EngineConfig
    from ridgeline.loading import kv_format_of
    from ridgeline.model.catalog import resolve_metadata
    from ridgeline.types import ConfigError

    for name, value in {"price": price, "power": power}.items():
        _check_positive(name, value)
    wanted = EngineConfig(
        **options.given(weights=weights, kv_format=kv_format, device=device, threads=threads)
    )
    if check:
        _run_check(model, wanted, machine, cells, json)
        return
    if cells is not None:
        raise ConfigError(f"cells is {cells!r} without a check; accepted: with --check")
    workload = Workload(prompt, output, users, _seconds(ttft), _seconds(itl))
    with open_model(resolve_metadata(model)) as source:
        host, more = host_of(machine, wanted, device, power, price)
        narrower = "KV8" if wanted.kv_format == "auto" else None
        question = Question(workload, host, wanted.weights, kv_format_of(wanted), narrower, more)
        report = Report(model, source, answer(source, question, sweep))
    if json:
        print_json(report.to_json())
    else:
        report.show()


def _run_check(model: str, wanted: EngineConfig, machine: str | None, named: str | None, json: bool) -> None:
    """Predictions beside what this machine does; raises ConfigError where another one is meant."""
    from ridgeline.apps.plan.check import cells_named, check
    from ridgeline.cli.plan_report import show_check
    from ridgeline.cli.progress import fetch
    from ridgeline.model.catalog import resolve
    from ridgeline.types import ConfigError

    if machine is not None:
        raise ConfigError(f"machine is {machine!r} with --check; accepted: this machine, without --machine")
    chosen = cells_named(named or "")
    fetch(model)
    config = replace(wanted, model=model, device=device_here(wanted))
    found = check(resolve(model), config, cells=chosen)
    if json:
        print_json([{**asdict(one), "error": one.error} for one in found])
    else:
        show_check(found)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _check_positive(name: str, value: float | None) -> None:
    """Raise ConfigError unless a number that was given is above zero and finite."""
    from ridgeline.types import ConfigError

    if value is not None and not 0 < value <= 1e9:
        raise ConfigError(f"{name} is {value}; accepted: more than 0, at most 1e9")
