"""What `ridgeline budget` prints: the plans side by side, and under them what they rest on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ridgeline.cli.figures import rate
from ridgeline.cli.output import console, count, facts, size, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ridgeline.apps.budget.answer import Plan
    from ridgeline.apps.budget.machines import Run, Workers
    from ridgeline.apps.budget.scaling import Law
    from ridgeline.apps.budget.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Report:
    plans: Sequence[Plan]
    laws: Sequence[Law]
    workers: Workers | None
    sizes: Sizes

    def to_json(self) -> dict[str, Any]:
        machine = None
        if self.workers is not None:
            machine = {
                **asdict(self.workers),
                "preset": self.workers.preset.to_json(),
                "mfu": self.workers.mfu,
            }
        return {
            "plans": [asdict(plan) for plan in self.plans],
            "laws": [asdict(law) for law in self.laws],
            "machine": machine,
            "sizes": asdict(self.sizes),
        }

    def show(self) -> None:
        if self.plans:
            rows = [self._row(plan) for plan in self.plans]
            names = list(dict.fromkeys(name for row in rows for name in row))
            shown = table("", *names[1:], right=tuple(names[1:]))
            for row in rows:
                shown.add_row(*(row.get(name, "") for name in names))
            console().print(shown)
        below = self._basis()
        if below:
            facts(below)

    def _row(self, plan: Plan) -> dict[str, str]:
        row = {
            "plan": plan.kind if plan.law is None else f"{plan.kind}, {plan.law}",
            "parameters": count(plan.parameters),
            "tokens": count(plan.tokens),
            "per parameter": figure(plan.tokens / plan.parameters),
            "training flop": flop(plan.training_flops),
        }
        if plan.serving_flops is not None:
            row["serving flop"] = flop(plan.serving_flops)
            row["together"] = flop(plan.training_flops + plan.serving_flops)
        row |= {f"loss, {law}": f"{loss:.3f}" for law, loss in plan.losses.items()}
        return row | (self._run(plan.run) if plan.run is not None else {})

    def _run(self, run: Run) -> dict[str, str]:
        pue = self.workers.pue if self.workers is not None else 1.0
        row = {"devices": f"{run.devices:,}", "time": duration(run.seconds)}
        if run.equipment_kwh is not None and run.facility_kwh is not None and run.co2_kg is not None:
            row["energy"] = energy(run.equipment_kwh)
            row[f"at PUE {pue:g}"] = energy(run.facility_kwh)
            row["CO2"] = mass(run.co2_kg)
        if run.usd is not None:
            row["USD"] = f"{run.usd:,.0f}"
        return row

    def _basis(self) -> dict[str, str]:
        """What the plans rest on, and the sizes that were asked for."""
        rows = {}
        sizes, workers = self.sizes, self.workers
        if sizes.weights_bytes is not None:
            rows["weights"] = f"{size(sizes.weights_bytes)} in {sizes.weights_bits:g} bits"
        if sizes.decode is not None and workers is not None:
            hold = f"{sizes.decode.devices} × {workers.preset.name}"
            rows["decoding"] = f"at most {figure(sizes.decode.steps_per_s)} steps/s, read from {hold}"
        if sizes.embedding_bytes is not None:
            each, million = sizes.embedding_bytes, size(sizes.embedding_bytes * 1e6)
            floats = f"{sizes.embedding_floats:,} floats of 32 bits"
            rows["embedding"] = f"{each:,} bytes for {floats}, {million} for a million of them"
        for law in self.laws if self.plans else ():
            constants = f"E {law.E:g}, A {law.A:g}, B {law.B:g}, α {law.alpha:g}, β {law.beta:g}"
            rows[law.name] = f"{constants} ({law.source})"
        if workers is not None and self.plans:
            rows |= _machine(workers)
        return rows


def _machine(workers: Workers) -> dict[str, str]:
    preset = workers.preset
    peak = rate(preset.peaks[workers.peak_format], "flop")
    parts = [f"{rate(workers.flops_per_s, 'flop')} each, {workers.mfu:.0%} of {peak} {workers.peak_format}"]
    parts.append(
        f"{preset.power_w:g} W by its datasheet" if preset.power_w is not None else "power not known"
    )
    grid = workers.grid
    rows = {
        preset.name: "; ".join(parts),
        "source": preset.source,
        "electricity": f"{grid.g_per_kwh:g} g CO2 per kWh ({grid.source}); PUE {workers.pue:g}",
    }
    if workers.usd_per_hour is None:
        rows["price"] = "not known; --price gives one"
    else:
        listed = workers.usd_per_hour == preset.usd_per_hour and preset.price_source
        rows["price"] = f"{workers.usd_per_hour:g} USD per device and hour ({listed or 'as given'})"
    return rows


def figure(number: float) -> str:
    """Three digits, and no fewer than stand before the point: 0.123, 76.3, 1,875."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def flop(number: float) -> str:
    """3.14e23."""
    return f"{number:.2e}".replace("e+", "e")


def duration(seconds: float) -> str:
    """A time for people: 13.0 days."""
    for name, length_s in (("years", 365.25 * 86_400), ("days", 86_400.0), ("hours", 3600.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:,.1f} {name}"
    return f"{seconds:.3g} s"


def energy(kwh: float) -> str:
    """936 MWh."""
    return f"{kwh / 1000:,.0f} MWh" if kwh >= 10_000 else f"{kwh:,.4g} kWh"


def mass(kg: float) -> str:
    """677 t."""
    return f"{kg / 1000:,.0f} t" if kg >= 10_000 else f"{kg:,.4g} kg"
