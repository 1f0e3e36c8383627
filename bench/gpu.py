"""Measure the CUDA executor on this machine's GPU: one call, no network, within a given time.

    python bench/gpu.py --json gpu.json --plot gpu.png

From a checkout that is not installed: PYTHONPATH=src python bench/gpu.py. Models have real shapes and random
weights. First everything is checked, then each kernel and the engine are measured beside the GPU's measured
ceilings, the most telling formats first; what there is no time for is named. The exit code is 1 where an
error was beyond its limit or something failed.

While the checks run, other processes compile the kernels that the measurements will need: Triton keeps them
on disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ridgeline.resources.cuda import cuda_device, cuda_free_memory_bytes, cuda_unavailable
from ridgeline.resources.machine import usable_cores

if TYPE_CHECKING:
    from gpu_report import Report
    from gpu_timing import Session

STAGES = ("machine", "checks", "kernels", "engine")
_WARMER_BYTES = 6 << 30
"""Device memory that a process which only compiles may take."""
_MOST_WARMERS = 12
_WARM_SHARE = 0.35
"""The share of the time after which they are no longer waited for."""
_ENDING_S = 10.0
"""What the files and the summary may take at the end."""


class Warmers:
    """Processes of this very script that compile. What they say does not matter: what they leave out is
    compiled when it is needed."""

    def __init__(self, count: int, options: Sequence[str]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), *options]
        quiet = subprocess.DEVNULL
        self._processes = [
            subprocess.Popen([*command, f"--warm-up={index}/{count}"], stdout=quiet, stderr=quiet)
            for index in range(count)
        ]

    def wait(self, until_s: float) -> int:
        """Wait for them until `until_s` on the monotonic clock; how many did not make it, and are ended."""
        late = 0
        for process in self._processes:
            try:
                process.wait(max(until_s - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                late += 1
        return late


def warmer_count(free_bytes: int) -> int:
    """As many as cores and memory allow beside this process; none on a small machine."""
    return max(min(usable_cores() - 2, free_bytes // _WARMER_BYTES - 2, _MOST_WARMERS), 0)


def names_of(text: str, known: Sequence[str], option: str) -> list[str]:
    """The names in a list with commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SystemExit(f"error: {option} is {text!r}; accepted: {', '.join(known)}")
    return names


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Measure the CUDA executor on this machine's GPU.")
    made.add_argument("--only", default=",".join(STAGES), help="stages, with commas: %(default)s")
    made.add_argument("--models", default="", help="models, with commas (all)")
    made.add_argument("--formats", default="", help="number formats, with commas (all)")
    made.add_argument("--minutes", type=float, default=7.5, help="time for everything (%(default)s)")
    made.add_argument("--json", type=Path, help="file for all figures")
    made.add_argument("--plot", type=Path, help="file for the roofline, PNG")
    made.add_argument("--warm-up", help=argparse.SUPPRESS)
    return made


def main() -> int:
    chosen = parser().parse_args()
    begun_s = time.monotonic()
    reason = cuda_unavailable()
    if reason is not None:
        raise SystemExit(f"error: no GPU to measure: {reason}")
    from gpu_models import FORMATS, model_specs

    stages = names_of(chosen.only, STAGES, "--only")
    specs = model_specs()
    models = names_of(chosen.models or ",".join(specs), tuple(specs), "--models")
    formats = names_of(chosen.formats or ",".join(FORMATS), FORMATS, "--formats")
    if chosen.warm_up:
        _warm(chosen.warm_up, models, formats)
        return 0
    from gpu_report import Report
    from gpu_timing import DeviceDeadError, GpuTimer, Session

    report = Report()
    seconds = 60 * chosen.minutes - _ENDING_S - (time.monotonic() - begun_s)
    session = Session(GpuTimer(cuda_device()), seconds)
    try:
        _measure(report, session, stages, models, formats)
    except DeviceDeadError as error:
        session.failed.append(str(error))
        report.say(f"stopped: {error}")
    finally:
        _finish(report, session, chosen.json, chosen.plot)
    return 1 if report.beyond or session.failed else 0


def _warm(part: str, models: Sequence[str], formats: Sequence[str]) -> None:
    """Compile every so many-th unit."""
    from gpu_models import model_specs
    from gpu_stages import Cases, warm_units, warm_up

    from ridgeline.execution.cuda.device import Gpu

    index, count = map(int, part.split("/"))
    specs, device, cases = model_specs(), Gpu(), Cases()
    for unit in warm_units(models, formats, cases)[index::count]:
        warm_up(unit, specs[unit.model], device, cases)


def _measure(
    report: Report, session: Session, stages: Sequence[str], models: Sequence[str], formats: Sequence[str]
) -> None:
    from gpu_engine import Workload
    from gpu_kernels import Bench
    from gpu_models import Model, model_specs
    from gpu_report import machine_facts
    from gpu_stages import ATTENTION_FORMATS, Cases, Measurement

    from ridgeline.execution.cuda.device import Gpu
    from ridgeline.resources.cuda_probe import measure_gpu

    report.machine(machine_facts())
    ceilings = measure_gpu()  # alone on the device, before anything else runs there
    report.measured(ceilings)
    specs = {name: spec for name, spec in model_specs().items() if name in models}
    if not set(stages) & {"checks", "kernels", "engine"}:
        return
    options = [f"--models={','.join(models)}", f"--formats={','.join(formats)}"]
    warmers = Warmers(warmer_count(cuda_free_memory_bytes()), options)
    until_s = time.monotonic() + _WARM_SHARE * session.seconds
    try:
        bench = Bench(Gpu(), session.timer, ceilings, cuda_free_memory_bytes)
        measurement = Measurement(bench, session, report, specs)
        if "checks" in stages:
            measurement.check(formats, Cases())
    except BaseException:
        warmers.wait(0.0)
        raise
    late = warmers.wait(until_s)
    report.say(f"\nkernels compiled after {session.elapsed_s:.0f} s" + (f"; {late} too late" if late else ""))
    for name in formats:
        for model in (Model.of(model, spec, name) for model, spec in specs.items()):
            if "engine" in stages:
                measurement.engine(model, Workload())
            if "kernels" in stages:
                measurement.kernels(model, Cases(), attention=name in ATTENTION_FORMATS)


def _finish(report: Report, session: Session, json_path: Path | None, plot_path: Path | None) -> None:
    passed = len(report.checks) - len(report.beyond)
    report.say(f"\n{passed} of {len(report.checks)} checks within their limits; {session.elapsed_s:.0f} s")
    for title, names in (
        ("beyond their limits", report.beyond),
        ("failed", session.failed),
        ("skipped for lack of time or memory", session.skipped),
    ):
        if names:
            report.say(f"{title}: " + "; ".join(names))
    if json_path is not None:
        report.write_json(
            json_path, skipped=session.skipped, failed=session.failed, elapsed_s=session.elapsed_s
        )
    if plot_path is not None:
        report.write_plot(plot_path)


if __name__ == "__main__":
    sys.exit(main())
