"""What to change: each candidate's effect by the same prediction as the run's own, and the largest of them.

A change that makes every request faster is ranked by the time of one request; more sequences at once make
nobody's faster, and are told by the tokens per second of all.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ridgeline.apps.explain.gains import Gains
from ridgeline.apps.explain.guesses import Guessing
from ridgeline.apps.explain.run import Case, RunTimes, run_times
from ridgeline.apps.plan.answer import BATCHES, NOTABLY
from ridgeline.apps.plan.host import Host, host_of_fleet
from ridgeline.apps.plan.ledger import sequences
from ridgeline.apps.plan.model import FormattedModel, PlannedModel
from ridgeline.precision.formats import DEVICE_FORMATS, FORMATS
from ridgeline.resources.fleet import Fleet
from ridgeline.resources.presets import presets

MOST = 3
_NOTABLE = 1.05
"""Gains below this are within what runs differ by, and not told."""
_MOST_SLOWER = 2.0
"""By how much one sequence's tokens may slow down where more sequences are suggested."""
_KV_BITS = {"KV32": 32, "KV16": 16, "KV8": 8}


@dataclass(frozen=True, slots=True)
class Command:
    """A command line: a verb, a model if it takes one, and the flags that were given, by their names."""

    verb: str
    model: str | None
    flags: Mapping[str, object] = field(default_factory=dict)

    def but(self, **changes: object) -> str:
        """The line with some flags changed, where `_` stands for `-`; one that is None is left out."""
        flags = {**self.flags, **{name.replace("_", "-"): value for name, value in changes.items()}}
        words = ["ridgeline", *self.verb.split(), *([] if self.model is None else [self.model])]
        for name, value in flags.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None and value is not False:
                words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
        return shlex.join(words)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change by one flag. The gains are of `of`: each request's speed, or the tokens per second of all.
    `changes` are those of the engine's settings or of the workload, none where this machine cannot try it."""

    kind: str
    text: str
    of: str
    gains: Gains
    command: str
    caveat: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """What suggestions are asked for: a case as it is, and how others like it are made.

    `wider` is this machine with more threads, and how many, None where it has none to spare. `at_once` is the
    command that runs so many sequences. Targets are None where there are none; `missed` says whether the run
    misses them. `guessing` is what guesses would bring, where they are off and that is known.
    """

    source: PlannedModel
    case: Case
    weights: str
    command: Command
    at_once: Callable[[int], str]
    wider: tuple[int, Host] | None = None
    ttft_s: float | None = None
    itl_s: float | None = None
    missed: bool = False
    guessing: Guessing | None = None


def suggestions(subject: Subject) -> list[Suggestion]:
    """The changes with the largest predicted effects, at most MOST of them, first those to try first."""
    now = run_times(subject.case)
    faster = [*_formats(subject, now), *_kv_format(subject, now), *_threads(subject, now)]
    faster += _speculation(subject)
    faster.sort(key=lambda one: -one.gains.run)
    kinds: dict[str, Suggestion] = {}
    for one in faster:
        if one.gains.run >= _NOTABLE:
            kinds.setdefault(one.kind, one)
    return [*kinds.values(), *_machine(subject, now), *_batch(subject, now)][:MOST]


def _gains(now: RunTimes, then: RunTimes, more: float = 1.0) -> Gains:
    """`more` is by how many times there are more sequences then."""
    return Gains(
        more * now.total_s / then.total_s,
        more * now.prefill_s / then.prefill_s,
        more * now.decode.expected_s / then.decode.expected_s,
    )


def _formats(subject: Subject, now: RunTimes) -> Iterator[Suggestion]:
    """Fewer bits of weights."""
    case, held = subject.case, subject.case.model
    for name in DEVICE_FORMATS[case.host.device]:
        if FORMATS[name].weight_bits >= held.weight_bits:
            continue
        model = subject.source.in_format(name, case.host.device, held.kv_format)
        if model.nbytes >= NOTABLY * held.nbytes:
            continue
        then = run_times(replace(case, model=model))
        yield Suggestion(
            "weights",
            f"{name} holds the weights in {model.nbytes / 1e6:,.0f} MB in place of "
            f"{held.nbytes / 1e6:,.0f} MB",
            "each request",
            _gains(now, then),
            subject.command.but(weights=name),
            caveat="fewer bits cost quality: `ridgeline perplexity` says how much",
            changes={"weights": name},
        )


def _kv_format(subject: Subject, now: RunTimes) -> Iterator[Suggestion]:
    """Fewer bits of keys and values, which long contexts read more of than of weights."""
    case, held = subject.case, subject.case.model
    if _KV_BITS[held.kv_format] <= 8:
        return
    model = subject.source.in_format(subject.weights, case.host.device, "KV8")
    then = run_times(replace(case, model=model))
    context = case.workload.prompt_tokens + case.workload.output_tokens
    share = sum(model.kv_bytes_per_token) / sum(held.kv_bytes_per_token)
    yield Suggestion(
        "KV cache",
        f"KV8 keeps keys and values in {share:.0%} of the bytes, at a context of {context:,} tokens",
        "each request",
        _gains(now, then),
        subject.command.but(kv_format="KV8"),
        changes={"kv_format": "KV8"},
    )


def _threads(subject: Subject, now: RunTimes) -> Iterator[Suggestion]:
    """Cores that are not used yet."""
    if subject.wider is None:
        return
    more, host = subject.wider
    then = run_times(replace(subject.case, host=host))
    yield Suggestion(
        "threads",
        f"the machine has {more} more cores that the process may use",
        "each request",
        _gains(now, then),
        subject.command.but(threads=None),
        changes={"threads": None},
    )


def _speculation(subject: Subject) -> Iterator[Suggestion]:
    """Guesses, where they are off. Of the texts that they were replayed on."""
    known = subject.guessing
    if known is None:
        return
    found = known.guesses
    yield Suggestion(
        "speculation",
        f"speculation at the measured {found.share:.0%} acceptance gives {found.tokens_per_pass:.2f} tokens "
        "a pass",
        "each request",
        known.gains,
        subject.command.but(speculation=known.setting),
        caveat="by these texts, answered greedily: others repeat more, or less",
        changes={"speculation": known.setting},
    )


def _batch(subject: Subject, now: RunTimes) -> Iterator[Suggestion]:
    """The most sequences at once that slow nobody down by more than a factor."""
    case, found = subject.case, None
    work = case.workload
    tokens = work.prompt_tokens + work.output_tokens
    for batch in BATCHES:
        if batch <= work.batch or sequences(case.model, case.host, tokens, batch) < batch:
            continue
        then = run_times(replace(case, workload=replace(work, batch=batch)))
        slower = then.decode.expected_s / now.decode.expected_s
        target = subject.itl_s
        if slower > _MOST_SLOWER or (target is not None and then.decode.expected_s > target):
            break
        gains = _gains(now, then, batch / work.batch)
        text = f"{batch} at once decode {gains.decode:.1f}x the tokens/s at {slower:.1f}x the time per token"
        command = subject.at_once(batch)
        found = Suggestion("batch", text, "all tokens/s", gains, command, changes={"batch": batch})
    if found is not None and found.gains.decode >= _NOTABLE:
        yield found


def _machine(subject: Subject, now: RunTimes) -> Iterator[Suggestion]:
    """The least machine, by its bandwidth, that meets the targets which are missed."""
    if not subject.missed:
        return
    case, work = subject.case, subject.case.workload
    tokens = work.prompt_tokens + work.output_tokens
    models: dict[str, FormattedModel] = {}
    for preset in sorted(presets().values(), key=lambda preset: preset.read_bytes_per_s):
        host = host_of_fleet(Fleet(preset))
        if subject.weights not in ("auto", *DEVICE_FORMATS[host.device]):
            continue
        if host.device not in models:
            models[host.device] = subject.source.in_format(subject.weights, host.device, case.model.kv_format)
        model = models[host.device]
        then = run_times(replace(case, model=model, host=host))
        first = subject.ttft_s is None or then.prefill_s <= subject.ttft_s
        if not first or (subject.itl_s is not None and then.decode.expected_s > subject.itl_s):
            continue
        if sequences(model, host, tokens, work.batch) < work.batch:
            continue
        plan = {"prompt": work.prompt_tokens, "output": work.output_tokens, "users": work.batch}
        targets = {"ttft": subject.ttft_s, "itl": subject.itl_s}
        aims = {name: round(1e3 * value, 3) for name, value in targets.items() if value is not None}
        formats = {"weights": None if subject.weights == "auto" else subject.weights}
        command = Command("plan", subject.command.model, {**plan, **formats, **aims})
        yield Suggestion(
            "machine",
            f"{preset.name} is the least machine by its bandwidth that meets the targets",
            "each request",
            _gains(now, then),
            command.but(machine=preset.name),
            caveat=f"by its datasheet: {host.costs.source}",
        )
        return
