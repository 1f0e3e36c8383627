"""`ridgeline probe`: measure what this machine can do at most."""

from __future__ import annotations

import sys
from typing import Annotated

from ridgeline.cli.options import Json, Plot, Threads, flag
from ridgeline.cli.output import print_json

Device = Annotated[
    str,
    flag("device", "What to measure: cpu, cuda, or auto: a GPU that can be used, unless --threads is given."),
]
Force = Annotated[bool, flag("force", "Measure again even if this machine is known.", "-f")]

DEVICES = ("auto", "cpu", "cuda")


def probe(
    device: Device = "auto",
    force: Force = False,
    threads: Threads = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Measure the bandwidths, arithmetic peaks and fixed costs of a CPU or GPU. Takes some seconds, once."""
    from ridgeline.apps.png import check_png
    from ridgeline.resources.probe import survey

    threads = check_threads(threads)
    chosen = check_device(device, threads)
    if plot is not None:
        check_png(plot)
    if not json and sys.stderr.isatty():
        print("measuring…", end="\r", file=sys.stderr, flush=True)
    found = survey(threads, force=force, device=chosen)
    if plot is not None:
        from ridgeline.cli.probe_report import write_plot

        write_plot(found, plot)
    if json:
        print_json(found.to_json())
    else:
        from ridgeline.cli.probe_report import show

        show(found)


def check_device(asked: str, threads: int | None) -> str:
    """The device to measure, "cpu" or "cuda". Raises ConfigError."""
    from ridgeline.resources.cuda import choose_device
    from ridgeline.types import ConfigError

    if asked not in DEVICES:
        raise ConfigError(f"device is {asked!r}; accepted: {', '.join(DEVICES)}")
    if threads is None:
        return choose_device(asked)
    if asked == "cuda":
        raise ConfigError(f"threads is {threads}; accepted for a GPU: none, it is measured as a whole")
    return "cpu"


def check_threads(threads: int | None) -> int | None:
    """The number of threads as the engine's configuration accepts it."""
    from ridgeline.config import EngineConfig

    return EngineConfig(threads=threads).threads
