"""`ridgeline probe`: measure what this machine can do at most."""

from __future__ import annotations

import sys
from typing import Annotated

from ridgeline.cli.options import Json, Threads, flag
from ridgeline.cli.output import facts, print_json

Force = Annotated[bool, flag("force", "Measure again even if this machine is known.", "-f")]


def probe(force: Force = False, threads: Threads = None, json: Json = False) -> None:
    """Measure the machine's read bandwidth and arithmetic peaks. Takes a few seconds, once."""
    from ridgeline.resources.machine import usable_cores
    from ridgeline.resources.probe import full_ceilings

    if not json and sys.stderr.isatty():
        print("measuring…", end="\r", file=sys.stderr, flush=True)
    found = full_ceilings(check_threads(threads) or usable_cores(), force=force)
    if json:
        print_json(found.to_json())
        return
    bf16 = f"{found.bf16_flops_per_s / 1e9:.0f} Gflop/s" if found.bf16_flops_per_s else "not at this level"
    facts(
        {
            "machine": found.machine,
            "threads": found.threads,
            "instruction level": found.isa,
            "memory read": f"{found.read_bytes_per_s / 1e9:.1f} GB/s",
            "int8": f"{found.int8_ops_per_s / 1e9:.0f} Gop/s",
            "bf16": bf16,
            "fp32": f"{found.fp32_flops_per_s / 1e9:.0f} Gflop/s",
            "measured": found.measured_at,
        }
    )


def check_threads(threads: int | None) -> int | None:
    """The number of threads as the engine's configuration accepts it."""
    from ridgeline.config import EngineConfig

    return EngineConfig(threads=threads).threads
