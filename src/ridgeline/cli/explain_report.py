"""What `ridgeline explain` prints: words first, then tables, then what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ridgeline.cli.bench import show_operations
from ridgeline.cli.output import console, milliseconds, size, table

if TYPE_CHECKING:
    from ridgeline.apps.explain.answer import Explanation, Speculation, Targets
    from ridgeline.apps.explain.attach import Served
    from ridgeline.apps.explain.attempt import Attempt
    from ridgeline.apps.explain.run import Finding
    from ridgeline.apps.explain.suggest import Suggestion
    from ridgeline.sampling.drafting.replay import Guesses

_BOUNDS = {
    "weights": "weight bytes",
    "KV cache": "bytes of keys and values",
    "activations": "bytes of activations",
    "arithmetic": "arithmetic",
    "overhead": "overhead",
}
_HELD = {"weights": "weights", "KV cache": "keys and values"}
_OPERATIONS = 8
_HOST_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class RunReport:
    """`tried` is the first suggestion, where that was asked for and there is one."""

    explanation: Explanation
    targets: Targets
    tried: Attempt | None = None

    def to_json(self) -> dict[str, Any]:
        found = self.explanation
        run = found.run
        return {
            "model": run.config.model,
            "weights": {"asked": found.model.choice, "bytes": dict(found.model.weights_bytes)},
            "kv_format": found.model.kv_format,
            "device": run.config.device,
            "threads": run.config.threads,
            "workload": asdict(run.workload),
            "targets": asdict(self.targets),
            "phases": {
                name: {**asdict(one), "error": one.error, "words": _words(one, run.workload.batch)}
                for name, one in found.findings.items()
            },
            "operations": {name: list(rows) for name, rows in found.operations.items()},
            "speculation": None if found.speculation is None else _speculation(found.speculation),
            "suggestions": [_suggested(one, found.findings) for one in found.suggestions],
            "tried": None if self.tried is None else _tried(self.tried),
            "ceilings": run.ceilings.to_json(),
        }

    def show(self) -> None:
        found = self.explanation
        batch = found.run.workload.batch
        for one in found.findings.values():
            _say(_words(one, batch))
            operations = found.operations.get(one.phase, ())
            farthest = _farthest(operations)
            if farthest:
                _say(f"  {farthest}")
        console().print()
        console().print(_parts(found.findings))
        for phase, rows in found.operations.items():
            console().print()
            longest = sorted(rows, key=lambda row: -row["step_s"])[:_OPERATIONS]
            show_operations(f"{phase} step", longest)
        if found.speculation is not None:
            console().print()
            _say(_spoken(found.speculation))
        _show_suggestions(found.suggestions, found.findings)
        if self.tried is not None:
            _show_tried(self.tried)


@dataclass(frozen=True, slots=True)
class ServerReport:
    """`why` says why nothing is suggested."""

    url: str
    served: Served
    suggestions: Sequence[Suggestion]
    why: str | None

    def to_json(self) -> dict[str, Any]:
        from ridgeline.apps.explain.attach import kinds_of

        guesses = self._guesses()
        return {
            "url": self.url,
            "model": self.served.model,
            "device": self.served.device,
            "formats": self.served.formats,
            "steps": len(self.served.steps),
            "kinds": [{**asdict(one), "bound": one.bound} for one in kinds_of(self.served.steps)],
            "speculation": None if guesses is None else {"on": True, "guesses": _guesses(guesses)},
            "suggestions": [_suggested(one, {}) for one in self.suggestions],
            "why_none": self.why,
        }

    def show(self) -> None:
        from ridgeline.apps.explain.attach import kinds_of

        kinds = kinds_of(self.served.steps)
        for one in kinds:
            bound = f", bound by {_BOUNDS.get(one.bound, one.bound)}" if one.bound else ""
            error = "" if one.error is None else f", {one.error:.0%} off what was predicted"
            _say(
                f"{one.kind}: {one.share:.0%} of the time{bound}. {_many(one.steps, 'step')} of "
                f"{_many(one.rows, 'row')} for {_many(one.sequences, 'sequence')}: "
                f"{milliseconds(one.measured_s)} each{error}."
            )
        numbers = ("steps", "rows", "sequences", "a step", "of time", "memory", "arithmetic", "between")
        shown = table("kind", *numbers, "bound by", right=numbers)
        for one in kinds:
            shares = ("" if share is None else f"{share:.0%}" for share in (one.mbu, one.mfu))
            shown.add_row(
                one.kind,
                str(one.steps),
                f"{one.rows:.0f}",
                f"{one.sequences:.0f}",
                milliseconds(one.measured_s),
                f"{one.share:.0%}",
                *shares,
                milliseconds(max(0.0, one.wall_s - one.measured_s)),
                ", ".join(f"{_BOUNDS.get(bound, bound)} ({count})" for bound, count in one.bounds.items()),
            )
        console().print()
        console().print(shown)
        guesses = self._guesses()
        if guesses is not None:
            console().print()
            _say(f"Speculation is on: {_brought(guesses)}.")
        if self.why is not None:
            console().print()
            _say(self.why)
        else:
            _show_suggestions(self.suggestions, {})

    def _guesses(self) -> Guesses | None:
        from ridgeline.apps.explain.guesses import guesses_in

        return guesses_in(self.served.steps)


# -- words


def _say(text: str) -> None:
    console().print(text, soft_wrap=True)


def _words(one: Finding, batch: int) -> str:
    """What bounds a phase, and how far it is from what it should take and from the least."""
    than, expected = "more" if one.error > 0 else "less", milliseconds(one.expected_s)
    text = (
        f"{one.phase} at batch {batch} is bound by {_BOUNDS[one.bound]}: a step takes "
        f"{milliseconds(one.measured_s)}, {abs(one.error):.0%} {than} than the {expected} "
        f"that are expected; at the ceilings {milliseconds(one.least_s)} would do. "
    )
    held = {"weights": one.weight_bytes, "KV cache": one.kv_bytes}.get(one.bound)
    if held is None:
        text += f"It is {one.ops / 1e9:,.1f} G operations on {size(one.bytes)}."
    else:
        text += f"{size(held)} of the {size(one.bytes)} that it moves are {_HELD[one.bound]}."
    if one.host_s > _HOST_SHARE * one.measured_s:
        text += f" {milliseconds(one.host_s)} of a step pass outside of the executor."
    return text


def _many(number: float, thing: str) -> str:
    return f"{number:,.0f} {thing}{'' if round(number) == 1 else 's'}"


def _guesses(one: Guesses) -> dict[str, Any]:
    return {**asdict(one), "share": one.share}


def _speculation(one: Speculation) -> dict[str, Any]:
    return {**asdict(one), "guesses": None if one.guesses is None else _guesses(one.guesses)}


def _spoken(one: Speculation) -> str:
    texts = f"{_many(one.texts, 'answer')}, {_many(one.tokens, 'token')}"
    if one.guesses is None:
        found = "nothing was guessed" if one.on else "there would have been nothing to guess"
        return f"Speculation is {'on' if one.on else 'off'}, and in {texts}, {found}."
    if one.on:
        return f"Speculation is on: in {texts}, {_brought(one.guesses)}."
    return (
        f"Speculation is off: replayed over {texts}, {one.guesses.share:.0%} of {one.guesses.drafted:,} "
        f"guesses are right, which predicts {one.guesses.gain:.2f}x the tokens/s of decoding."
    )


def _brought(one: Guesses) -> str:
    return (
        f"{one.share:.0%} of {one.drafted:,} guesses were right; a pass gives {one.tokens_per_pass:.2f} "
        f"tokens a sequence and takes {one.slowdown:.2f} times as long as is predicted without guesses: "
        f"{one.gain:.2f}x the tokens/s of decoding"
    )


def _farthest(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The operation that would win most at its ceiling."""
    lost = {row["operation"]: row["step_s"] * (1 - min(1, _reached(row))) for row in rows if row["bound"]}
    if not lost:
        return None
    row = next(row for row in rows if row["operation"] == max(lost, key=lambda name: lost[name]))
    return (
        f"most is to be won in {row['operation']}: {row['share']:.0%} of the step, at {_reached(row):.0%} of "
        f"the {row['bound']} ceiling"
    )


def _reached(row: Mapping[str, Any]) -> float:
    return float(max(row["mbu"], row["mfu"]))


# -- tables


def _parts(findings: Mapping[str, Finding]) -> Any:
    """Seconds of a step at the ceilings, beside what is expected and was measured."""
    kinds = list(next(iter(findings.values())).parts_s)
    columns = (*kinds, "at best", "expected", "measured")
    shown = table("a step, at the ceilings", *columns, right=columns)
    for one in findings.values():
        times = [*one.parts_s.values(), one.least_s, one.expected_s, one.measured_s]
        shown.add_row(one.phase, *map(milliseconds, times))
    return shown


def _show_suggestions(suggestions: Sequence[Suggestion], findings: Mapping[str, Finding]) -> None:
    console().print()
    if not suggestions:
        _say("No change of one flag is predicted to gain 5%.")
        return
    _say("What to change, by its predicted effect:")
    for number, one in enumerate(suggestions, 1):
        _say(f"{number}. {one.text}: {_gain(one, findings)}")
        _say(f"   {one.command}")
        if one.caveat:
            console().print(f"   {one.caveat}", style="dim", soft_wrap=True)


def _show_tried(one: Attempt) -> None:
    """Measured beside predicted."""
    gains, (least, most) = one.measured, one.between
    console().print()
    _say(
        f"The first one tried, in turns with the settings as they are: {gains.run:.2f}x {one.suggestion.of} "
        f"(prefill {gains.prefill:.2f}x, decode {gains.decode:.2f}x), {least:.2f}x to {most:.2f}x in "
        f"{_many(one.rounds, 'round')}; {one.suggestion.gains.run:.2f}x was predicted, {one.error:+.0%}."
    )


def _tried(one: Attempt) -> dict[str, Any]:
    return {
        "command": one.suggestion.command,
        "predicted": asdict(one.suggestion.gains),
        "measured": asdict(one.measured),
        "between": list(one.between),
        "rounds": one.rounds,
        "error": one.error,
    }


def _gain(one: Suggestion, findings: Mapping[str, Finding]) -> str:
    gains = one.gains
    text = f"{gains.run:.2f}x {one.of} (prefill {gains.prefill:.2f}x, decode {gains.decode:.2f}x"
    if findings:
        text += f", to {_after(one, findings)['decode']:,.0f} tokens/s"
    return text + ")"


def _after(one: Suggestion, findings: Mapping[str, Finding]) -> dict[str, float]:
    """The speeds to expect: those measured, times the gains."""
    factors = {"prefill": one.gains.prefill, "decode": one.gains.decode}
    return {name: found.tokens_per_s * factors[name] for name, found in findings.items()}


def _suggested(one: Suggestion, findings: Mapping[str, Finding]) -> dict[str, Any]:
    after = {f"{name}_tokens_per_s": value for name, value in _after(one, findings).items()}
    return {**asdict(one), "predicted": after}
