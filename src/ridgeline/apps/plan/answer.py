"""A whole plan: the ledger, the forecast, what would be better, and which flag to change where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ridgeline.apps.plan.host import Host
from ridgeline.apps.plan.ledger import Ledger, ledger_of, sequences
from ridgeline.apps.plan.model import FormattedModel, PlannedModel
from ridgeline.apps.plan.serving import Forecast, Workload, forecast
from ridgeline.apps.plan.steps import ridge_batch
from ridgeline.precision.formats import DEVICE_FORMATS, FORMATS, check_device_format
from ridgeline.types import ConfigError

BATCHES = (1, 2, 4, 8, 16, 32, 64)
_MOST_DEVICES = 64
NOTABLY = 0.8
"""A format that keeps more than this of the bytes is not worth what it loses."""


@dataclass(frozen=True, slots=True)
class Question:
    """`weights` is "auto" or a format, `kv_format` that of keys and values, and `narrower_kv` one to suggest
    in its place, if any. `more_hosts` gives the same host with that many devices, None where they cannot be
    more."""

    workload: Workload
    host: Host
    weights: str = "auto"
    kv_format: str = "KV16"
    narrower_kv: str | None = None
    more_hosts: Callable[[int], Host] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A format and a number of users at once, with what they will see."""

    weights: str
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class Change:
    """The one flag that makes a plan possible that is not."""

    flag: str
    value: str
    weights_bytes: int
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class Plan:
    """`ridge_batch` leaves the KV cache out, `ridge_batch_at_context` counts it; None is never. `sweep` has
    BATCHES, as far as asked for. `best` has the highest throughput of all that fits and meets the targets,
    None where nothing does. `change` is None where nothing need, or nothing alone can, be changed."""

    model: FormattedModel
    question: Question
    ledger: Ledger
    forecast: Forecast
    fits: bool
    meets: bool
    ridge_batch: int | None
    ridge_batch_at_context: int | None
    sweep: Sequence[tuple[Forecast, bool]]
    best: Choice | None
    change: Change | None


def answer(source: PlannedModel, question: Question, sweep: bool = False) -> Plan:
    """Raises ConfigError for a format that the host does not run, and for more tokens than the model's
    context."""
    workload, host = question.workload, question.host
    check_device_format(question.weights, host.device)
    longest = min(source.spec.context, source.spec.learned_positions or source.spec.context)
    if workload.tokens > longest:
        raise ConfigError(
            f"prompt and output are {workload.tokens} tokens; accepted: up to {longest}, the model's context"
        )
    formatted = _formats(source, question)
    model = formatted[0]
    asked = forecast(model, host, workload)
    fits = _fits(model, host, workload, workload.users)
    meets = asked.meets(workload)
    return Plan(
        model=model,
        question=question,
        ledger=ledger_of(model, host, workload.tokens, workload.users),
        forecast=asked,
        fits=fits,
        meets=meets,
        ridge_batch=ridge_batch(model, host),
        ridge_batch_at_context=ridge_batch(model, host, workload.tokens),
        sweep=[
            (forecast(model, host, workload, batch), _fits(model, host, workload, batch)) for batch in BATCHES
        ]
        if sweep
        else (),
        best=_best(formatted, question),
        change=None if fits and meets else next(_changes(source, formatted, question), None),
    )


def _formats(source: PlannedModel, question: Question) -> list[FormattedModel]:
    """The model as asked for, and where the choice is ours in those with notably fewer bits, most bits first.

    A file whose embedding alone has more bits than its layers gains next to nothing from one format for all.
    """
    device = question.host.device
    first = source.in_format(question.weights, device, question.kv_format)
    if question.weights != "auto":
        return [first]
    bits = first.weight_bits
    others = [name for name in DEVICE_FORMATS[device] if FORMATS[name].weight_bits < bits]
    # Of equal bits, more bits of activations lose less.
    others.sort(key=lambda name: (-FORMATS[name].weight_bits, -FORMATS[name].activation_bits))
    narrower = [source.in_format(name, device, question.kv_format) for name in others]
    return [first, *(model for model in narrower if model.nbytes < NOTABLY * first.nbytes)]


def _fits(model: FormattedModel, host: Host, workload: Workload, users: int) -> bool:
    return sequences(model, host, workload.tokens, users) >= users


def _best(formatted: Sequence[FormattedModel], question: Question) -> Choice | None:
    workload, host = question.workload, question.host
    choices = [
        Choice(model.choice, seen)
        for model in formatted
        for batch in sorted({*BATCHES, workload.users})
        if _fits(model, host, workload, batch)
        and (seen := forecast(model, host, workload, batch)).meets(workload)
    ]
    return max(choices, key=lambda choice: choice.forecast.throughput.expected_per_s, default=None)


def _changes(
    source: PlannedModel, formatted: Sequence[FormattedModel], question: Question
) -> Iterator[Change]:
    """Changes of one flag after which the workload fits and meets its targets, first those to try first:
    fewer bits of weights, or of keys and values where these are the matter; more machines; fewer users."""
    workload, host, model = question.workload, question.host, formatted[0]
    users = workload.users
    tried = [("--weights", other.choice, other, host, users) for other in formatted[1:]]
    if question.narrower_kv is not None:
        kv = source.in_format(question.weights, host.device, question.narrower_kv)
        change = ("--kv-format", question.narrower_kv, kv, host, users)
        tried.insert(0 if _kv_is_the_matter(model, question) else len(tried), change)
    if question.more_hosts is not None:
        for count in _doublings(host.count, _MOST_DEVICES):
            tried.append(("--machine", f"{host.name}x{count}", model, question.more_hosts(count), users))
    room = sequences(model, host, workload.tokens, users)
    fewer = {batch for batch in (*BATCHES, room) if 0 < batch < users}
    tried += [("--users", str(few), model, host, few) for few in sorted(fewer, reverse=True)]
    for flag, value, other, there, number in tried:
        if _fits(other, there, workload, number):
            seen = forecast(other, there, workload, number)
            if seen.meets(workload):
                yield Change(flag, value, other.nbytes, seen)


def _kv_is_the_matter(model: FormattedModel, question: Question) -> bool:
    """Whether one sequence would do where all of them do not fit, or are bound by their KV cache."""
    workload, host = question.workload, question.host
    if not _fits(model, host, workload, workload.users):
        return _fits(model, host, workload, 1)
    return forecast(model, host, workload).decode_step.bound == "KV cache"


def _doublings(count: int, most: int) -> Iterator[int]:
    while count <= most // 2:
        count *= 2
        yield count
