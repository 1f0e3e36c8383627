"""The command `ridgeline`: its verbs, and what a user sees when something goes wrong."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from ridgeline.cli import bench, chat, perplexity, probe, pull, rm, run, show
from ridgeline.cli import list as list_verb
from ridgeline.cli.errors import user_message

app = typer.Typer(
    name="ridgeline",
    help="Run open-weight language models on your own hardware, at the speed that it can reach.",
    epilog="Every flag has an environment twin: --max-tokens is RIDGELINE_MAX_TOKENS. The flag wins.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    run.run,
    chat.chat,
    pull.pull,
    show.show,
    rm.rm,
    perplexity.perplexity,
    probe.probe,
    bench.bench,
):
    app.command()(verb)
app.command("list")(list_verb.list_models)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"ridgeline {version('ridgeline')}")
        except PackageNotFoundError:
            print("ridgeline, from a source tree that is not installed")
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


def main() -> NoReturn:
    """Run the command line and leave with its exit code: 0, 1 for an error, 130 for Ctrl-C."""
    try:
        code = app(standalone_mode=False, prog_name="ridgeline")
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
