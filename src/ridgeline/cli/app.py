"""The command `ridgeline`: its verbs and its help."""

from __future__ import annotations

from typing import Annotated

import typer

from ridgeline.cli import (
    bench,
    bench_serve,
    budget,
    chat,
    doctor,
    explain,
    perplexity,
    plan,
    probe,
    pull,
    rm,
    run,
    serve,
    show,
    simulate,
)
from ridgeline.cli import list as list_verb

app = typer.Typer(
    name="ridgeline",
    help="Run open-weight language models on your own hardware, at the speed that it can reach.",
    epilog="Every flag has an environment twin: --max-tokens is RIDGELINE_MAX_TOKENS. The flag wins.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run.run)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(pull.pull)
app.command("list")(list_verb.list_models)
app.command()(show.show)
app.command()(rm.rm)
app.command()(perplexity.perplexity)
app.command()(probe.probe)
_bench = typer.Typer(rich_markup_mode=None)
_bench.callback(invoke_without_command=True)(bench.bench)
_bench.command("serve")(bench_serve.bench_serve)
app.add_typer(_bench, name="bench")
app.command()(plan.plan)
app.command()(simulate.simulate)
app.command()(explain.explain)
app.command()(budget.budget)
app.command()(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ridgeline.resources.installation import package_version

        found = package_version()
        print(f"ridgeline {found}" if found else "ridgeline, from a source tree that is not installed")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
