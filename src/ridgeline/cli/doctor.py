"""`ridgeline doctor`: what is installed, what the engine makes of this machine, and what is in its way."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from ridgeline.cli.options import Device, Json, Threads
from ridgeline.cli.output import console, facts, print_json, size

if TYPE_CHECKING:
    from ridgeline.apps.doctor import Cache, Cuda, Report


def doctor(
    context: typer.Context, device: Device = None, threads: Threads = None, json: Json = False
) -> None:
    """Say what is installed and what is in the way. Exit code 1 when no model can be run."""
    from ridgeline.apps.doctor import examine
    from ridgeline.cli.probe import check_threads

    report = examine(check_threads(threads), device, _settings(context))
    if json:
        print_json({**asdict(report), "runs": report.runs})
    else:
        facts(_rows(report))
        for problem in report.problems:
            console().print(f"problem: {problem.found}; {problem.remedy}", soft_wrap=True, markup=False)
        print("a model can be run" if report.runs else "no model can be run")
    raise typer.Exit(0 if report.runs else 1)


def _settings(context: typer.Context) -> set[str]:
    """The environment twins of every verb's flags."""
    verbs: Any = context.find_root().command
    return {str(flag.envvar) for verb in verbs.commands.values() for flag in verb.params if flag.envvar}


def _rows(report: Report) -> dict[str, str]:
    cores, memory = report.cores, report.memory
    limits = [f"{cores.allowed} in the affinity mask"] if cores.allowed < cores.physical else []
    limits += [f"quota of {cores.quota:.3g}"] if cores.quota is not None else []
    limit = f", the cgroup's limit {size(memory.limit_bytes)}" if memory.limit_bytes is not None else ""
    return {
        "ridgeline": report.version or "from a source tree that is not installed",
        "Python": report.python,
        "platform": report.platform,
        "processor": report.processor,
        "instruction level": _levels(report),
        "cores": ", ".join(
            [f"{cores.logical} logical, {cores.physical} physical", *limits, f"{cores.usable} usable"]
        ),
        "threads": str(report.threads),
        "memory": f"{size(memory.available_bytes)} free of {size(memory.total_bytes)}{limit}",
        "huge pages": memory.huge_pages or "unknown",
        "GPU": _gpus(report.cuda),
        "device": report.device or "none",
        "energy": str(report.energy),
        **_cache(report.cache),
        **_packages(report),
        **report.environment,
    }


def _levels(report: Report) -> str:
    levels = report.levels
    if not levels.built:
        return "none"
    missing = [name for name in levels.built if name not in levels.usable]
    lacking = f"; built, but not on this machine: {', '.join(missing)}" if missing else ""
    return f"{levels.chosen or 'none'} of {', '.join(levels.usable)}{lacking}"


def _gpus(cuda: Cuda) -> str:
    driver = "" if cuda.driver is None else f"driver {cuda.driver or 'of unknown version'}"
    if cuda.unavailable is not None:
        return "; ".join(filter(None, (f"none: {cuda.unavailable}", driver)))
    return "; ".join([*(f"{gpu.name}, {size(gpu.memory_bytes)}, {gpu.isa}" for gpu in cuda.gpus), driver])


def _cache(cache: Cache) -> dict[str, str]:
    return {
        "cache": f"{cache.path}, {size(cache.free_bytes)} free",
        "models": f"{cache.models}, {size(cache.models_bytes)}",
        "packed weights": f"{cache.packed}, {size(cache.packed_bytes)} of at most "
        f"{size(cache.packed_bound_bytes)} in {cache.packed_path}",
        "ceilings": _measured(cache.ceilings_age_days),
    }


def _measured(age_days: float | None) -> str:
    if age_days is None:
        return "not measured; `ridgeline probe` does"
    days = round(age_days)
    return "measured today" if days < 1 else f"measured {days} day{'' if days == 1 else 's'} ago"


def _packages(report: Report) -> dict[str, str]:
    """For each extra what there is of it; all of a long one that is whole would say little."""
    shown = {}
    for extra in dict.fromkeys(package.extra for package in report.packages if package.extra):
        of = [package for package in report.packages if package.extra == extra]
        missing = [p.name if p.version is None else f"{p.name} {p.version}" for p in of if not p.fits]
        there = [f"{p.name} {p.version}" for p in of if p.fits] if len(of) <= 3 else [f"{len(of)} packages"]
        absent = f"missing {', '.join(missing)}" if missing else ""
        listed = ", ".join(there) if len(missing) < len(of) and (len(of) <= 3 or not missing) else ""
        shown[f"extra {extra}"] = "; ".join(filter(None, (listed, absent)))
    return shown
