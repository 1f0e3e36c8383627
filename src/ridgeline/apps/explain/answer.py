"""A whole explanation: of a run here, or of a server's recent steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

from ridgeline.apps.benchmark import Workload
from ridgeline.apps.explain.attach import Served
from ridgeline.apps.explain.guesses import Guessing, guesses_in, guessing_of
from ridgeline.apps.explain.run import Case, Finding, findings
from ridgeline.apps.explain.suggest import Command, Subject, Suggestion, suggestions
from ridgeline.apps.explain.texts import Answered
from ridgeline.apps.operations import Run, by_phase
from ridgeline.apps.plan.host import Host, host_here
from ridgeline.apps.plan.model import FormattedModel, PlannedModel
from ridgeline.config import EngineConfig
from ridgeline.precision.formats import DEVICE_FORMATS
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.cuda import cuda_free_memory_bytes
from ridgeline.resources.machine import free_memory_bytes, usable_cores
from ridgeline.resources.probe import quick_ceilings
from ridgeline.sampling.drafting.replay import Guesses
from ridgeline.types import CapacityError, ConfigError


@dataclass(frozen=True, slots=True)
class Targets:
    """What users want at most, in seconds; None is no target."""

    ttft_s: float | None = None
    itl_s: float | None = None

    def __post_init__(self) -> None:
        for name, target in (("ttft", self.ttft_s), ("itl", self.itl_s)):
            if target is not None and not 0 < target < 1e6:
                raise ConfigError(f"{name} is {target * 1e3:g} ms; accepted: more than 0, less than 1e9")

    def missed(self, ttft_s: float, itl_s: float) -> bool:
        first = self.ttft_s is not None and ttft_s > self.ttft_s
        return first or (self.itl_s is not None and itl_s > self.itl_s)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of a run: its phases, each operation's shares where the device can time them, what guesses bring to the
    texts that were answered beside it, where there were any, and what to change."""

    run: Run
    model: FormattedModel
    findings: Mapping[str, Finding]
    operations: Mapping[str, Sequence[dict[str, Any]]]
    suggestions: Sequence[Suggestion]
    speculation: Speculation | None = None


@dataclass(frozen=True, slots=True)
class Speculation:
    """What guesses did in so many texts, where they are `on`, or are predicted to do, where they are not; of
    so many answered tokens. No `guesses`: there was nothing to guess."""

    on: bool
    texts: int
    tokens: int
    guesses: Guesses | None


def explain(
    source: PlannedModel,
    run: Run,
    asked: EngineConfig,
    targets: Targets,
    command: Command,
    answered: Answered | None = None,
) -> Explanation:
    """Explain a run of `source` by the settings that were `asked` for; `command` is the line that made it,
    and `answered` the texts that were written beside it."""
    settled = run.config
    model = source.in_format(asked.weights, settled.device, settled.kv_format)
    host = _here(run.ceilings)
    case = Case(model, host, run.workload, settled.max_num_batched_tokens)
    found = findings(case, run.rounds)
    guessing = None if answered is None else guessing_of(answered, case)
    ttft_s = found["prefill"].measured_s * found["prefill"].steps / run.workload.batch
    subject = Subject(
        source=source,
        case=case,
        weights=asked.weights,
        command=command,
        at_once=lambda batch: command.but(batch=batch),
        wider=_wider(settled),
        ttft_s=targets.ttft_s,
        itl_s=targets.itl_s,
        missed=targets.missed(ttft_s, found["decode"].measured_s),
        guessing=guessing,
    )
    operations = {} if run.profiling is None else by_phase(run.profiling, run.ceilings)
    spoken = None if answered is None else _speculation(answered, guessing)
    return Explanation(run, model, found, operations, suggestions(subject), spoken)


def _speculation(answered: Answered, guessing: Guessing | None) -> Speculation | None:
    """None where they are off and cannot be on."""
    if not answered.on and answered.setting is None:
        return None
    guesses = None if guessing is None else guessing.guesses
    if answered.on:
        guesses = guesses_in(answered.steps)
    return Speculation(answered.on, len(answered.texts), answered.tokens, guesses)


def suggestions_of_server(
    source: PlannedModel, served: Served, ceilings: Ceilings, command: Command, url: str, kv_format: str
) -> Sequence[Suggestion]:
    """What to change of a server on this machine, for the mix of steps that it ran. More at once are its
    clients': the command loads the server at `url`.

    Raises ConfigError when the model is not the one that it serves.
    """
    device = ceilings.device
    weights, model = _served_format(source, served, device, kv_format)
    host = _here(ceilings)
    mix = mix_of(served, model)
    case = Case(model, host, mix, EngineConfig().max_num_batched_tokens)
    load = {"url": url, "prompt-tokens": mix.prompt_tokens, "output-tokens": mix.output_tokens}

    def at_once(batch: int) -> str:
        return Command("bench serve", None, load).but(concurrency=batch)

    return suggestions(Subject(source, case, weights, command, at_once))


def _served_format(
    source: PlannedModel, served: Served, device: str, kv_format: str
) -> tuple[str, FormattedModel]:
    """The choice of a format that gives as many matrices in each as the server has."""
    for choice in ("auto", *DEVICE_FORMATS[device]):
        model = source.in_format(choice, device, kv_format)
        if Counter(fmt.name for fmt in model.formats.values()) == served.formats:
            return choice, model
    held = ", ".join(f"{count} {name}" for name, count in served.formats.items()) or "nothing that it tells"
    raise ConfigError(f"the server runs matrices in {held}; accepted: the model that it serves")


def mix_of(served: Served, model: FormattedModel) -> Workload:
    """The workload that gives such steps: the sequences at once, and lengths by what decode steps read of
    keys and values, and by how many rows were prompts'."""
    decode = [step for step in served.steps if step.kind == "decode"]
    if not decode:
        raise ConfigError("the server's recent steps have no decode step; accepted: a server that is in use")
    batch = max(1, round(median(step.sequences for step in decode)))
    held = median(step.kv_bytes / max(step.sequences, 1) for step in decode)
    context = max(2.0, held / sum(model.kv_bytes_per_token))
    prompts = sum(step.prompt_tokens for step in served.steps)
    answers = sum(step.decoded_tokens for step in served.steps)
    ratio = answers / prompts if prompts else 1.0
    prompt = max(1, round(context / (1 + ratio / 2)))
    return Workload(prompt, max(2, round(ratio * prompt)), batch)


def _here(ceilings: Ceilings) -> Host:
    free = cuda_free_memory_bytes() if ceilings.device == "cuda" else free_memory_bytes()
    return host_here(ceilings, free)


def _wider(config: EngineConfig) -> tuple[int, Host] | None:
    """Cores beyond those that a config takes, and the machine with them, measured."""
    cores, taken = usable_cores(), config.threads
    if config.device != "cpu" or taken is None or taken >= cores:
        return None
    with suppress(CapacityError):  # too little memory to measure with
        return cores - taken, _here(quick_ceilings(cores))
    return None
