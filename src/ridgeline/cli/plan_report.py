"""What `ridgeline plan` prints: where the memory goes, what users will see, and what to change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ridgeline.cli.output import console, count, facts, size, table
from ridgeline.cli.output import figure as _figure
from ridgeline.cli.output import milliseconds as _ms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ridgeline.apps.plan.answer import Change, Choice, Plan
    from ridgeline.apps.plan.check import Checked
    from ridgeline.apps.plan.model import PlannedModel
    from ridgeline.apps.plan.serving import Forecast


@dataclass(frozen=True, slots=True)
class Report:
    """`name` is what the model was asked for by."""

    name: str
    source: PlannedModel
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """`cells` are the predictions by name: a measurement of each can stand beside it."""
        plan = self.plan
        return {
            "model": {
                "name": self.name,
                "path": str(self.source.path),
                "family": self.source.spec.family,
                "parameters": self.source.parameters,
                "formats": dict(plan.model.weights_bytes),
                "kv_format": plan.model.kv_format,
            },
            "machine": asdict(plan.question.host),
            "workload": asdict(plan.question.workload),
            "memory": asdict(plan.ledger),
            "fits": plan.fits,
            "meets_targets": plan.meets,
            "forecast": asdict(plan.forecast),
            "ridge_batch": plan.ridge_batch,
            "ridge_batch_at_context": plan.ridge_batch_at_context,
            "sweep": [{**asdict(forecast), "fits": fits} for forecast, fits in plan.sweep],
            "best": None if plan.best is None else asdict(plan.best),
            "change": None if plan.change is None else asdict(plan.change),
            "cells": self._cells(),
            "notes": self._notes(),
        }

    def show(self) -> None:
        console().print(self._memory())
        console().print()
        console().print(self._times())
        if self.plan.sweep:
            console().print()
            console().print(self._sweep())
        console().print()
        facts(self._facts())
        for line in self._notes():
            console().print(line, style="dim", soft_wrap=True)

    # -- tables

    def _memory(self) -> Any:
        ledger = self.plan.ledger
        shown = table("memory", "bytes", "", right=("bytes",))
        for name, nbytes in sorted(ledger.weights.items(), key=lambda item: -item[1]):
            shown.add_row(f"weights, {name}", size(nbytes), "")
        shown.add_row("activations", size(ledger.activation_bytes), "most that a step's buffers take")
        shown.add_row("overhead", size(ledger.reserve_bytes), "left to the process and the system")
        for group in ledger.kv:
            kept = "all tokens" if group.window is None else f"the last {group.window} tokens"
            about = f"per token, {ledger.kv_format}: {group.layers} layers that keep {kept}"
            shown.add_row("KV cache", f"{group.bytes_per_token:,} B", about)
        tokens = self.plan.question.workload.tokens
        shown.add_row("", size(ledger.sequence_bytes), f"per sequence of {tokens:,} tokens")
        shown.add_row("memory", size(ledger.memory_bytes), f"holds {_fitting({tokens: ledger.sequences})}")
        shown.add_row("", "", f"or {_fitting(ledger.fitting)}")
        return shown

    def _times(self) -> Any:
        forecast, plan = self.plan.forecast, self.plan
        users, workload = forecast.users, plan.question.workload
        heading = f"{users} × ({workload.prompt:,} + {workload.output:,} tokens)"
        numbers = ("at best", "expected", "target")
        shown = table(heading, *numbers, "bound by", right=numbers)
        prefill, decode = forecast.prefill_step.bound, forecast.decode_step.bound
        for name, time, target, bound in (
            ("first token", forecast.ttft, workload.ttft_s, prefill),
            ("between tokens", forecast.itl, workload.itl_s, decode),
            ("while a prompt is read", forecast.itl_prefill, None, ""),
        ):
            wanted = "" if target is None else _ms(target)
            shown.add_row(name, _ms(time.least_s), _ms(time.expected_s), wanted, bound)
        for name, rate in (
            ("decode tokens/s", forecast.decode),
            ("tokens/s with prompts", forecast.throughput),
        ):
            shown.add_row(name, _figure(rate.most_per_s), _figure(rate.expected_per_s), "", "")
        if forecast.joules_per_token is not None:
            shown.add_row("J per token", "", _figure(forecast.joules_per_token), "", "")
        if forecast.usd_per_million_tokens is not None:
            shown.add_row("USD per M tokens", "", _figure(forecast.usd_per_million_tokens), "", "")
        return shown

    def _sweep(self) -> Any:
        numbers = ("first token", "between tokens", "decode tokens/s", "tokens/s", "J/token", "USD/M")
        shown = table("batch", *numbers, "bound by", "fits", right=("batch", *numbers))
        for forecast, fits in self.plan.sweep:
            joules, usd = forecast.joules_per_token, forecast.usd_per_million_tokens
            shown.add_row(
                str(forecast.users),
                _ms(forecast.ttft.expected_s),
                _ms(forecast.itl.expected_s),
                _figure(forecast.decode.expected_per_s),
                _figure(forecast.throughput.expected_per_s),
                "" if joules is None else _figure(joules),
                "" if usd is None else _figure(usd),
                forecast.decode_step.bound,
                "yes" if fits else "no",
            )
        return shown

    # -- what stands below them

    def _facts(self) -> dict[str, str]:
        plan = self.plan
        host, ridge = plan.question.host, plan.ridge_batch
        rows = {
            "model": f"{self.name}: {count(self.source.parameters)} parameters, {self.source.spec.family}",
            "machine": f"{host.name}{f' × {host.count}' if host.count > 1 else ''} ({host.source})",
            "ridge batch": _ridge(ridge)
            + f" without KV cache, {_ridge(plan.ridge_batch_at_context)} with it at this length",
        }
        if plan.best is not None:
            rows["best"] = _choice(plan.best)
            if plan.best.weights != "auto":
                rows["best"] += " (fewer bits cost quality: `ridgeline perplexity` says how much)"
        rows["verdict"] = _verdict(plan)
        share = host.costs_of(plan.model.main_format)
        rows["expected"] = (
            f"{share.memory:.0%} of the memory bandwidth and {share.arithmetic:.0%} of the arithmetic, "
            f"{share.attention_memory:.0%} and {share.attention_arithmetic:.0%} in attention ({share.source})"
        )
        return rows

    def _notes(self) -> list[str]:
        """What the figures leave out."""
        host, found = self.plan.question.host, []
        if host.count > 1:
            found.append(
                f"{host.count} devices are counted as one of their size: communication between them is not "
                "counted, memory and work are split evenly"
            )
        if self.source.quantised_config:
            found.append(
                "the config.json has quantised weights, which are counted as floats; --weights says else"
            )
        if host.power_w is None:
            found.append("the power is not known, so neither is the energy; --power gives it in W")
        if host.usd_per_hour is None:
            found.append("the price is not known; --price gives it in USD per device and hour")
        return found

    def _cells(self) -> list[dict[str, Any]]:
        forecast, ledger = self.plan.forecast, self.plan.ledger
        cells = {
            "weights": (ledger.weights_bytes, "B"),
            "ttft": (forecast.ttft.expected_s, "s"),
            "itl": (forecast.itl.expected_s, "s"),
            "decode_throughput": (forecast.decode.expected_per_s, "tokens/s"),
            "throughput": (forecast.throughput.expected_per_s, "tokens/s"),
        }
        return [{"name": name, "predicted": value, "unit": unit} for name, (value, unit) in cells.items()]


def show_check(cells: Sequence[Checked]) -> None:
    """Predictions beside measurements, with their errors."""
    numbers = ("predicted", "measured", "error")
    shown = table("", *numbers, right=numbers)
    for cell in cells:
        figure = size if cell.unit == "B" else _ms
        predicted, measured = (figure(value) for value in (cell.predicted, cell.measured))
        shown.add_row(cell.name, predicted, measured, f"{cell.error:+.1%}")
    console().print(shown)


def _verdict(plan: Plan) -> str:
    workload = plan.question.workload
    aimed = workload.ttft_s is not None or workload.itl_s is not None
    if plan.fits and plan.meets:
        fitting = "it fits" if workload.users == 1 else f"all {workload.users} fit"
        return fitting + (", and the targets are met" if aimed else "")
    if not plan.ledger.has_room_for_weights:
        failing = "the weights do not fit"
    elif not plan.fits:
        failing = f"{workload.users} at once do not fit, {plan.ledger.sequences:,} do"
    else:
        failing = "the targets are not met"
    return f"{failing}; " + (_change(plan.change) if plan.change else "no single flag changes that")


def _change(change: Change) -> str:
    weights = size(change.weights_bytes)
    return f"{change.flag} {change.value} changes that: {weights} of weights, {_seen(change.forecast)}"


def _choice(choice: Choice) -> str:
    flags = "" if choice.weights == "auto" else f" --weights {choice.weights}"
    return f"--users {choice.forecast.users}{flags}: {_seen(choice.forecast)}"


def _seen(forecast: Forecast) -> str:
    rate, first = _figure(forecast.throughput.expected_per_s), _ms(forecast.ttft.expected_s)
    return f"{rate} tokens/s, first token {first}, then {_ms(forecast.itl.expected_s)} each"


def _fitting(sequences: Mapping[int, int]) -> str:
    return ", ".join(f"{number:,} × {tokens:,}" for tokens, number in sequences.items()) + " tokens"


def _ridge(batch: int | None) -> str:
    return "none" if batch is None else f"{batch:,}"
