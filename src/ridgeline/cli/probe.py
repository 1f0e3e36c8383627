"""`ridgeline probe`: measure what this machine can do at most."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

from ridgeline.cli.options import Json, Threads, flag
from ridgeline.cli.output import facts, print_json

if TYPE_CHECKING:
    from ridgeline.resources.ceilings import Ceilings

Device = Annotated[
    str,
    flag("device", "What to measure: cpu, cuda, or auto: a GPU that can be used, unless --threads is given."),
]
Force = Annotated[bool, flag("force", "Measure again even if this machine is known.", "-f")]

DEVICES = ("auto", "cpu", "cuda")


def probe(device: Device = "auto", force: Force = False, threads: Threads = None, json: Json = False) -> None:
    """Measure the read bandwidth and the arithmetic peaks of a CPU or GPU. Takes some seconds, once."""
    from ridgeline.resources.machine import usable_cores
    from ridgeline.resources.probe import full_ceilings

    threads = check_threads(threads)
    chosen = check_device(device, threads)
    if not json and sys.stderr.isatty():
        print("measuring…", end="\r", file=sys.stderr, flush=True)
    found = full_ceilings(threads or usable_cores(), force=force, device=chosen)
    if json:
        print_json(found.to_json())
    else:
        facts(_rows(found))


def _rows(found: Ceilings) -> dict[str, Any]:
    from ridgeline.cli.figures import parallel_units, peaks

    gpu = {
        "kernel launch": f"{found.launch_s * 1e6:.1f} µs, {found.graph_launch_s * 1e6:.1f} µs in a graph",
        "host to device": f"{found.host_to_device_bytes_per_s / 1e9:.1f} GB/s",
        "device to host": f"{found.device_to_host_bytes_per_s / 1e9:.1f} GB/s",
    }
    formats = ("int8", "fp8", "bf16", "fp32") if found.device == "cuda" else ("int8", "bf16", "fp32")
    return {
        "machine": found.machine,
        parallel_units(found): found.threads,
        "instruction level": found.isa,
        "memory read": f"{found.read_bytes_per_s / 1e9:.1f} GB/s",
        **(dict.fromkeys(formats, "not at this level") | peaks(found)),
        **(gpu if found.device == "cuda" else {}),
        "measured": found.measured_at,
    }


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
