"""A run as `apps.benchmark` makes it, beside what it should take: prompts are read, then a batch decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from ridgeline.apps.benchmark import Phase, Round, Workload
from ridgeline.apps.plan.host import Host
from ridgeline.apps.plan.model import FormattedModel
from ridgeline.apps.plan.steps import StepTime, load_of, step_time
from ridgeline.model.program import StepLoad
from ridgeline.resources.roofline import memory_s
from ridgeline.types import Work


@dataclass(frozen=True, slots=True)
class Case:
    """A workload with a model on a host. `step_tokens` is the engine's budget for a step."""

    model: FormattedModel
    host: Host
    workload: Workload
    step_tokens: int


@dataclass(frozen=True, slots=True)
class RunTimes:
    """What a run should take: the steps that read all prompts, and a decode step of mean length, of which
    there are `decode_steps`."""

    prefill: tuple[StepTime, ...]
    decode: StepTime
    decode_steps: int

    @property
    def prefill_s(self) -> float:
        return sum(step.expected_s for step in self.prefill)

    @property
    def decode_s(self) -> float:
        return self.decode_steps * self.decode.expected_s

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s


def run_times(case: Case) -> RunTimes:
    model, work = case.model, case.workload
    context = work.prompt_tokens + (work.output_tokens + 1) // 2
    return RunTimes(
        prefill=tuple(step_time(model, load, case.host) for load in _prefill_loads(case)),
        decode=step_time(model, load_of(model, 1, context, work.batch), case.host),
        decode_steps=work.output_tokens - 1,
    )


def _prefill_loads(case: Case) -> list[StepLoad]:
    """Prompts fill one step after the other, in their order."""
    loads: list[StepLoad] = []
    room = 0
    for _ in range(case.workload.batch):
        read = 0
        while read < case.workload.prompt_tokens:
            rows = min(room or case.step_tokens, case.workload.prompt_tokens - read)
            read += rows
            load = load_of(case.model, rows, read)
            if read < case.workload.prompt_tokens:
                load = replace(load, outputs=0)
            if room:
                loads[-1] = loads[-1] + load
            else:
                loads.append(load)
            room = (room or case.step_tokens) - rows
    return loads


@dataclass(frozen=True, slots=True)
class Finding:
    """One phase of a run: what was measured of an average step, and what should have been.

    `least_s` is the roofline's, `expected_s` the prediction, most of it for `bound`. `parts_s` are seconds at
    the ceilings for each thing that a step does; `host_s` is what the engine took beside the executor.
    """

    phase: str
    steps: int
    tokens: int
    tokens_per_s: float
    measured_s: float
    expected_s: float
    least_s: float
    bound: str
    bytes: int
    ops: int
    weight_bytes: int
    kv_bytes: int
    parts_s: dict[str, float]
    host_s: float

    @property
    def error(self) -> float:
        """How much more than expected was measured, as a share."""
        return self.measured_s / self.expected_s - 1


def findings(case: Case, rounds: Sequence[Round]) -> dict[str, Finding]:
    """Prefill and decode of some rounds, in which each phase had the same steps."""
    times = run_times(case)
    return {
        "prefill": _finding("prefill", [one.prefill for one in rounds], times.prefill, case.host),
        "decode": _finding("decode", [one.decode for one in rounds], (times.decode,), case.host),
    }


def _finding(name: str, phases: Sequence[Phase], steps: Sequence[StepTime], host: Host) -> Finding:
    number = len(steps)
    measured = median(phase.elapsed_s / phase.steps for phase in phases)
    work = [step.work for step in steps]
    weights, kv = (sum(getattr(one, f"{kind}_bytes") for one in work) for kind in ("weight", "kv"))
    moved, ops = sum(one.total.bytes for one in work), sum(one.total.ops for one in work)
    kinds = {"weights": weights, "KV cache": kv, "activations": moved - weights - kv}
    parts = {kind: memory_s(Work(read_bytes=size), host.rates) / number for kind, size in kinds.items()}
    parts["arithmetic"] = sum(step.arithmetic_s for step in steps) / number
    parts["overhead"] = sum(step.overhead_s for step in steps) / number
    return Finding(
        phase=name,
        steps=phases[0].steps,
        tokens=phases[0].tokens,
        tokens_per_s=median(phase.tokens_per_s for phase in phases),
        measured_s=measured,
        expected_s=sum(step.expected_s for step in steps) / number,
        least_s=sum(step.bound_s for step in steps) / number,
        bound=max(steps, key=lambda step: step.expected_s).bound,
        bytes=moved // number,
        ops=ops // number,
        weight_bytes=weights // number,
        kv_bytes=kv // number,
        parts_s=parts,
        host_s=median((phase.elapsed_s - phase.executor_s) / phase.steps for phase in phases),
    )
