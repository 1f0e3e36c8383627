"""`ridgeline bench`: tokens per second beside what the machine could do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ridgeline.cli import options
from ridgeline.cli.options import flag, given
from ridgeline.cli.output import console, print_json, table
from ridgeline.cli.progress import fetch

if TYPE_CHECKING:
    from ridgeline.apps.operations import Run
    from ridgeline.resources.ceilings import Ceilings

PromptTokens = Annotated[int, flag("prompt-tokens", "Tokens of each prompt.", "-p")]
OutputTokens = Annotated[int, flag("output-tokens", "Tokens to decode for each sequence.", "-n")]
Batch = Annotated[int, flag("batch", "Sequences at once.", "-b")]
Repeats = Annotated[int, flag("repeats", "Rounds; the median counts.", "-r")]
Sweep = Annotated[
    str | None,
    flag("sweep", "Decode with these numbers of sequences in place of --batch, as 1,8,64 or 1,2,4,...,64."),
]
Operations = Annotated[
    bool, flag("ops", "Time each operation of the steps, beside its ceiling; this slows them a little.")
]

_MORE_THAN_MEMORY = 1.05
"""A share of the memory's ceiling that is more than an error of measurement."""


def bench(
    context: typer.Context,
    model: options.Model = None,
    prompt_tokens: PromptTokens = 512,
    output_tokens: OutputTokens = 128,
    batch: Batch = 1,
    repeats: Repeats = 5,
    ops: Operations = False,
    sweep: Sweep = None,
    plot: options.Plot = None,
    weights: options.WeightFormat = None,
    kv_format: options.KVFormat = None,
    threads: options.Threads = None,
    device: options.Device = None,
    no_packed_cache: options.NoPackedCache = False,
    trace: options.Trace = None,
    json: options.Json = False,
) -> None:
    """Measure prefill and decode, as shares of the ceilings. The last line of --json is one JSON object."""
    if context.invoked_subcommand is not None:
        _refuse_flags(context)
        return
    from ridgeline.apps.benchmark import Workload
    from ridgeline.apps.operations import bench_config, run
    from ridgeline.cli import bench_sweep
    from ridgeline.loading import load_engine

    batches = bench_sweep.check(sweep, plot, {"batch": batch != 1, "ops": ops})
    largest = max(batches, default=batch)
    workload = Workload(prompt_tokens, output_tokens, largest)
    config = bench_config(
        largest,
        **given(
            model=model,
            weights=weights,
            kv_format=kv_format,
            threads=threads,
            device=device,
            packed_cache=options.packed_cache(no_packed_cache),
            trace=options.trace_file(trace),
        ),
    )
    fetch(model)
    if batches:
        bench_sweep.run(load_engine(config), workload, batches, repeats, plot, json)
    else:
        _report(run(config, workload, repeats, "all" if ops else "none"), json)


def _report(found: Run, json: bool) -> None:
    """One batch size, prefill and decode."""
    from ridgeline.apps.benchmark import summary
    from ridgeline.apps.operations import by_phase

    result = {
        "model": found.config.model,
        "weights": found.config.weights,
        **summary(found.rounds, found.workload, found.ceilings),
    }
    if found.profiling is not None:
        result["operations"] = by_phase(found.profiling, found.ceilings)
    if json:
        print_json(result)
        return
    _show(result, found.ceilings)
    for phase, rows in result.get("operations", {}).items():
        show_operations(phase, rows)


def _refuse_flags(context: typer.Context) -> None:
    """Flags before the sub-verb are this verb's, and would be lost."""
    verb = context.invoked_subcommand
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            flag_ = parameter.opts[0]
            raise typer.BadParameter(f"{flag_} stands before {verb}; accepted: {verb} {flag_} …", context)


def _show(result: dict[str, Any], ceilings: Ceilings) -> None:
    from ridgeline.cli.figures import limits

    shown = table(
        "", "tokens/s", "spread", "memory", "arithmetic", right=("tokens/s", "memory", "arithmetic")
    )
    shares = {"prefill": ("prefill_mbu", "mfu"), "decode": ("mbu", "decode_mfu")}
    for phase, (memory, arithmetic) in shares.items():
        low, high = result[f"{phase}_spread"]
        speed = f"{result[f'{phase}_tokens_per_s']:.1f}"
        shown.add_row(
            phase, speed, f"{low:.1f}–{high:.1f}", f"{result[memory]:.0%}", f"{result[arithmetic]:.0%}"
        )
    console().print(shown)
    console().print(
        f"{result['batch']} × ({result['prompt_tokens']} prompt + {result['output_tokens']} output tokens), "
        f"median of {result['repeats']}; shares of {limits(ceilings)}",
        style="dim",
        soft_wrap=True,
    )


def show_operations(phase: str, rows: list[dict[str, Any]]) -> None:
    """An average step's operations, the longest first."""
    columns = ("launches", "time", "of step", "bytes", "ops", "memory", "arithmetic")
    shown = table(phase, *columns, right=columns)
    for row in sorted(rows, key=lambda row: -row["step_s"]):
        work = (
            (
                f"{row['bytes'] / 1e6:.2f} MB",
                f"{row['ops'] / 1e9:.3f} G",
                f"{row['mbu']:.0%}",
                f"{row['mfu']:.0%}",
            )
            if row["bound"]
            else ("", "", "", "")
        )
        time = f"{row['step_s'] * 1e3:.3f} ms"
        shown.add_row(row["operation"], f"{row['launches']:.0f}", time, f"{row['share']:.1%}", *work)
    console().print(shown)
    if max((row["mbu"] for row in rows), default=0.0) > _MORE_THAN_MEMORY:
        why = "memory above 100%: some of it lay in a cache, or the machine was slower when it was measured"
        console().print(why, style="dim", soft_wrap=True)
