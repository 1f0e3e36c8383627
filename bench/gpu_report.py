"""What was found: lines on standard output as soon as they are known, one JSON file, a roofline picture."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_checks import Check
from gpu_engine import EngineLine, Identity
from gpu_kernels import KernelLine
from msgspec import structs

from ridgeline.apps.roofline_plot import Point, Roofline, write_png
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.machine import machine, usable_cores
from ridgeline.types import ConfigError

_QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def machine_facts() -> dict[str, Any]:
    """Versions, the processor, and the GPU as PyTorch and the driver's own tool describe it."""
    import torch

    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda,
        "host": machine().name,
        "cores": usable_cores(),
    }
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "gpu": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
            "free_bytes": torch.cuda.mem_get_info()[0],
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
        }
        facts |= _driver_facts(found)
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver_facts(device: object) -> dict[str, str]:
    """What nvidia-smi says of this GPU; nothing where it is missing or slow."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    uuid = getattr(device, "uuid", None)
    for more in ([f"--id=GPU-{uuid}"] if uuid else []), []:  # some containers know the GPU by another name
        try:
            done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=15, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        values = (done.stdout.splitlines() or [""])[0].split(", ")
        named = dict(zip(_QUERY.split(","), values, strict=False))
        return {"driver" if name == "driver_version" else name: value for name, value in named.items()}
    return {"driver": "unknown: nvidia-smi does not answer"}


@dataclass
class Report:
    """Collects and prints. Everything that is recorded ends up in the JSON."""

    facts: dict[str, Any] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    checks: list[tuple[str, Check]] = field(default_factory=list)
    kernels: list[KernelLine] = field(default_factory=list)
    engine: list[EngineLine] = field(default_factory=list)
    identity: list[Identity] = field(default_factory=list)
    _section: str = ""

    # -- lines

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def machine(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        for name, value in facts.items():
            shown = f"{value / 2**30:.1f} GiB" if name in ("memory_bytes", "free_bytes") else value
            shown = f"{value / 2**20:.0f} MiB" if name == "l2_bytes" else shown
            self.say(f"{name.removesuffix('_bytes'):<16}{shown}")

    def measured(self, ceilings: Ceilings) -> None:
        self.ceilings = ceilings
        self.say("\nceilings, measured")
        for name, value in ceilings.to_json().items():
            if name.endswith("_bytes_per_s"):
                self.say(f"  {name.removesuffix('_bytes_per_s'):<18}{value / 1e9:>10.1f} GB/s")
            elif name.endswith("_per_s"):
                self.say(f"  {name.removesuffix('_per_s'):<18}{value / 1e12:>10.1f} T/s")
            elif name in ("launch_s", "graph_launch_s"):
                self.say(f"  {name.removesuffix('_s'):<18}{value * 1e6:>10.2f} µs")

    def check(self, subject: str, check: Check) -> None:
        self.checks.append((subject, check))
        self._head("checks", f"  {'':<72}{'error':>10}{'limit':>10}")
        verdict = "ok" if check.passed else "BEYOND ITS LIMIT"
        self.say(f"  {f'{subject}: {check.name}':<72}{check.error:>10.2g}{check.limit:>10.2g}  {verdict}")

    def kernel(self, line: KernelLine) -> None:
        self.kernels.append(line)
        head = f"{'kernel':<18}{'rows':>6}{'context':>9}{'µs':>10}{'GB/s':>8}{'read':>7}"
        head += f"{'T/s':>8}{'peak':>7}  {'bound':<11}{'torch µs':>9}"
        self._head(f"kernels, {line.model} {line.format}", "  " + head)
        shown = f"{line.kernel:<18}{line.rows:>6}{line.context:>9}{line.seconds * 1e6:>10.1f}"
        shown += f"{line.work.bytes / line.seconds / 1e9:>8.0f}{line.bandwidth_share:>7.1%}"
        shown += f"{line.work.ops / line.seconds / 1e12:>8.2f}{line.arithmetic_share:>7.1%}  {line.bound:<11}"
        shown += f"{line.torch_s * 1e6:>9.1f}" if line.torch_s else ""
        self.say("  " + shown + ("  (in the L2)" if line.cached else ""))

    def engine_line(self, line: EngineLine) -> None:
        self.engine.append(line)
        head = f"{'load':<30}{'batch':>6}{'rows':>8}{'graphs':>8}{'tokens/s':>11}"
        head += f"{'wall ms':>9}{'device ms':>11}{'predicted':>11}{'read':>7}{'peak':>7}"
        self._head(f"engine, {line.model} {line.format}", "  " + head)
        shown = f"{line.load:<30}{line.batch:>6}{line.rows_per_step:>8.1f}"
        shown += f"{'yes' if line.graphs else 'no':>8}{line.tokens_per_s:>11.1f}"
        shown += f"{line.wall_s * 1e3:>9.3f}{line.device_s * 1e3:>11.3f}{line.predicted_s * 1e3:>11.3f}"
        self.say("  " + shown + f"{line.bandwidth_share:>7.1%}{line.arithmetic_share:>7.1%}")

    def identical(self, found: Identity) -> None:
        self.identity.append(found)
        share = found.identical / found.requests
        self.say(
            f"  alone as in a batch of {found.batch}, {found.drawing}: {found.identical} of {found.requests} "
            f"requests have identical tokens ({share:.0%})"
        )

    def _head(self, section: str, columns: str) -> None:
        if section != self._section:
            self._section = section
            self.say(f"\n{section}\n{columns}")

    # -- files

    @property
    def beyond(self) -> list[str]:
        """The checks whose error is beyond its limit."""
        return [f"{subject}: {check.name}" for subject, check in self.checks if not check.passed]

    def to_json(self, **more: object) -> dict[str, Any]:
        found = {
            "machine": self.facts,
            "ceilings": self.ceilings.to_json() if self.ceilings else None,
            "checks": [{"subject": s, **asdict(c), "passed": c.passed} for s, c in self.checks],
            "kernels": [asdict(line) for line in self.kernels],
            "engine": [asdict(line) for line in self.engine],
            "identity": [asdict(found) for found in self.identity],
            **more,
        }
        plain: dict[str, Any] = _finite(found)
        return plain

    def write_json(self, path: Path, **more: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(self.to_json(**more), indent=1, default=structs.asdict) + "\n", encoding="utf-8"
        )
        self.say(f"figures: {path}")

    def write_plot(self, path: Path) -> None:
        """The roofline picture; says so where it cannot be drawn."""
        if self.ceilings is None or not (self.kernels or self.engine):
            self.say("no picture: nothing was measured beside the ceilings")
            return
        title = f"{self.ceilings.machine}, {self.facts.get('date', self.ceilings.measured_at)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_png(roofline_of(title, self.ceilings, [*self.kernels, *self.engine]), path)
        except ConfigError as error:
            self.say(f"no picture: {error}")
        else:
            self.say(f"picture: {path}")


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def roofline_of(title: str, ceilings: Ceilings, lines: Sequence[KernelLine | EngineLine]) -> Roofline:
    """What was measured below the measured roofs: kernels and engine steps of each format are a series."""
    points = []
    for line in lines:
        seconds, kind = (
            (line.seconds, "kernels") if isinstance(line, KernelLine) else (_step_s(line, ceilings), "steps")
        )
        if line.work.ops and line.work.bytes:
            intensity = line.work.ops / line.work.bytes
            points.append(Point(line.model, intensity, line.work.ops / seconds, f"{line.format}, {kind}"))
    return Roofline(title, ceilings, points=points)


def _step_s(line: EngineLine, ceilings: Ceilings) -> float:
    """The seconds that its shares are of."""
    return line.work.bytes / ceilings.read_bytes_per_s / line.bandwidth_share
