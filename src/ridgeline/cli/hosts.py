"""The machine that a prediction is for: one by its name, or this one as it was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from ridgeline.cli.options import flag

if TYPE_CHECKING:
    from collections.abc import Callable

    from ridgeline.apps.plan.host import Host
    from ridgeline.config import EngineConfig

Machine = Annotated[
    str | None,
    flag(
        "machine",
        "Machines as H200x8 (default: this one); `ridgeline list --machines` has the names.",
    ),
]
Device = Annotated[
    str | None, flag("device", "Of this machine: cpu or cuda (default: the GPU, if it can be used).")
]
Threads = Annotated[int | None, flag("threads", "CPU threads of this machine (default: all usable cores).")]


def device_here(wanted: EngineConfig) -> str:
    """What runs the model here."""
    from ridgeline.resources.cuda import choose_device
    from ridgeline.types import ConfigError

    chosen = choose_device(wanted.device)
    if chosen not in ("cpu", "cuda"):
        raise ConfigError(f"device is {chosen!r}, which nobody plans for; accepted: auto, cpu, cuda")
    return chosen


def host_of(
    machine: str | None,
    wanted: EngineConfig,
    device: str | None,
    power: float | None = None,
    price: float | None = None,
) -> tuple[Host, Callable[[int], Host] | None]:
    """The machine asked for, and where they can be more, how so many of it are made."""
    from ridgeline.apps.plan.host import host_here, host_of_fleet
    from ridgeline.resources.cuda import cuda_free_memory_bytes
    from ridgeline.resources.fleet import parse_fleet
    from ridgeline.resources.machine import free_memory_bytes
    from ridgeline.resources.probe import quick_ceilings
    from ridgeline.types import ConfigError

    if machine is not None:
        for name, value in {"device": device, "threads": wanted.threads}.items():
            if value is not None:
                raise ConfigError(f"{name} is {value!r} and machine is {machine!r}; accepted: one of them")
        fleet = parse_fleet(machine)
        return (
            host_of_fleet(fleet, power, price),
            lambda count: host_of_fleet(replace(fleet, count=count), power, price),
        )
    chosen = device_here(wanted)
    ceilings = quick_ceilings(wanted.threads, device=chosen)
    free = cuda_free_memory_bytes() if chosen == "cuda" else free_memory_bytes()
    return host_here(ceilings, free, power, price), None
