"""`ridgeline budget`: what training a model costs, and which model to train."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from ridgeline.cli.options import Json, flag
from ridgeline.cli.output import print_json

if TYPE_CHECKING:
    from ridgeline.apps.budget.machines import Workers
    from ridgeline.apps.budget.training import Shape
    from ridgeline.resources.fleet import Fleet

LARGEST = 1e40
"""No quantity here comes near it, and products of a few stay floats."""

SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}

Parameters = Annotated[str | None, flag("parameters", "Parameters of the model: 13e9 or 13B.", "-N")]
Tokens = Annotated[
    str | None, flag("tokens", "Training tokens, repeated ones counted again: 300B, 2T.", "-D")
]
Compute = Annotated[str | None, flag("compute", "Training compute in flop: 3.14e23.", "-C")]
Days = Annotated[float | None, flag("days", "Training time in days, on --machine.")]
Usd = Annotated[float | None, flag("usd", "Money for renting --machine, in US dollars.")]
Machine = Annotated[
    str | None, flag("machine", "Devices as H200x8; `ridgeline list --machines` has the names.")
]
Mfu = Annotated[
    float | None, flag("mfu", "Share of the machine's peak that training reaches, 0 to 1 (default: 0.4).")
]
Rate = Annotated[float | None, flag("rate", "Instead of --mfu: Tflop/s that each device reaches.")]
PeakFormat = Annotated[
    str | None, flag("format", "Format whose peak counts: bf16 (default), fp32, fp8, int8, fp4.")
]
Price = Annotated[
    float | None, flag("price", "US dollars per device and hour (default: the machine's, if known).")
]
Pue = Annotated[
    float | None, flag("pue", "The building's energy for each unit of the machines' (default: 1.56).")
]
Grid = Annotated[
    str | None,
    flag("grid", "Electricity: a country's code (usa, fra …), eu, world (default), or g of CO2 per kWh."),
]
Layers = Annotated[int | None, flag("layers", "For the attention term: layers.")]
Hidden = Annotated[int | None, flag("hidden", "For the attention term: width of all heads.")]
Context = Annotated[int | None, flag("context", "For the attention term: tokens of a training sequence.")]
Served = Annotated[
    str | None, flag("served", "Tokens that the model will serve in its life: finds the model for it.")
]
Laws = Annotated[
    list[str] | None,
    flag("law", "Scaling law: hoffmann, besiroglu, sardana, or E,A,B,alpha,beta; may be repeated."),
]
Bits = Annotated[float, flag("bits", "Bits of each stored parameter.")]
Embedding = Annotated[int | None, flag("embedding", "Also: bytes of a vector of so many 32-bit floats.")]


def budget(
    parameters: Parameters = None,
    tokens: Tokens = None,
    compute: Compute = None,
    days: Days = None,
    usd: Usd = None,
    machine: Machine = None,
    mfu: Mfu = None,
    rate: Rate = None,
    format: PeakFormat = None,
    price: Price = None,
    pue: Pue = None,
    grid: Grid = None,
    layers: Layers = None,
    hidden: Hidden = None,
    context: Context = None,
    served: Served = None,
    law: Laws = None,
    bits: Bits = 16,
    embedding: Embedding = None,
    json: Json = False,
) -> None:
    """Give two of parameters, tokens, compute, time and money, get the third. One alone: its optimum."""
    from ridgeline.apps.budget.answer import Question, answer
    from ridgeline.apps.budget.machines import DAY_S
    from ridgeline.apps.budget.scaling import DEFAULT_LAWS, parse_law
    from ridgeline.apps.budget.sizes import Sizes
    from ridgeline.cli.budget_report import Report
    from ridgeline.resources.fleet import parse_fleet

    fleet = parse_fleet(machine) if machine is not None else None
    if fleet is None:
        _refuse(mfu=mfu, rate=rate, format=format, price=price, pue=pue, grid=grid)
    for name, value in {"days": days, "usd": usd, "bits": bits, "embedding": embedding}.items():
        _check(name, value)
    question = Question(
        parameters=_number("parameters", parameters),
        tokens=_number("tokens", tokens),
        flops=_number("compute", compute),
        seconds=days * DAY_S if days is not None else None,
        usd=usd,
        workers=_workers(fleet, mfu, rate, format, price, pue, grid) if fleet else None,
        shape=_shape(layers, hidden, context),
        served_tokens=_number("served", served),
        laws=tuple({each.name: each for each in map(parse_law, law or DEFAULT_LAWS)}.values()),
    )
    sizes = Sizes.of(question.parameters, bits, embedding, fleet.preset if fleet else None)
    known = (question.parameters, question.tokens, question.flops, days, usd, question.served_tokens)
    plans = answer(question) if embedding is None or any(value is not None for value in known) else []
    report = Report(plans, question.laws, question.workers, sizes)
    if json:
        print_json(report.to_json())
    else:
        report.show()


def _refuse(**of_machines: float | str | None) -> None:
    """Raise ConfigError for a flag that says something of machines where none are given."""
    from ridgeline.types import ConfigError

    for name, value in of_machines.items():
        if value is not None:
            raise ConfigError(f"{name} is {value} and there is no machine; accepted: --machine too")


def _workers(
    fleet: Fleet,
    mfu: float | None,
    rate: float | None,
    format_name: str | None,
    price: float | None,
    pue: float | None,
    grid: str | None,
) -> Workers:
    from ridgeline.apps.budget.machines import DEFAULT_MFU, Workers, training_format
    from ridgeline.resources.footprint import DEFAULT_GRID, DEFAULT_PUE, parse_grid
    from ridgeline.types import ConfigError

    if mfu is not None and rate is not None:
        raise ConfigError(f"mfu is {mfu:g} and rate is {rate:g} Tflop/s; accepted: one of them")
    peak_format = training_format(fleet.preset, format_name)
    peak = fleet.preset.peaks[peak_format]
    _check("rate", rate, peak / 1e12)
    _check("mfu", mfu, 1.0)
    _check("price", price)
    pue = DEFAULT_PUE if pue is None else pue
    if not 1 <= pue <= 10:
        raise ConfigError(f"pue is {pue}; accepted: 1 (no overhead) to 10")
    return Workers(
        preset=fleet.preset,
        count=fleet.count if fleet.counted else None,
        peak_format=peak_format,
        flops_per_s=rate * 1e12 if rate is not None else peak * (DEFAULT_MFU if mfu is None else mfu),
        usd_per_hour=fleet.preset.usd_per_hour if price is None else price,
        pue=pue,
        grid=parse_grid(DEFAULT_GRID if grid is None else grid),
    )


def _shape(layers: int | None, hidden: int | None, context: int | None) -> Shape | None:
    from ridgeline.apps.budget.training import Shape
    from ridgeline.types import ConfigError

    given = {"layers": layers, "hidden": hidden, "context": context}
    for name, value in given.items():
        _check(name, value)
    if layers is not None and hidden is not None and context is not None:
        return Shape(layers, hidden, context)
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) < len(given):
        raise ConfigError(f"the attention term lacks {' and '.join(missing)}; accepted: all three or none")
    return None


def _number(name: str, text: str | None) -> float | None:
    """A count as people write it: 13e9, 13B, 2T. Raises ConfigError."""
    from ridgeline.types import ConfigError

    if text is None:
        return None
    found = re.fullmatch(r"(.+?)([kKMBGT]?)", text.strip())
    try:
        value = float(found[1]) * SUFFIXES[found[2].upper()] if found else -1.0
    except ValueError:
        value = -1.0
    if not 1 <= value <= LARGEST:
        raise ConfigError(f"{name} is {text!r}; accepted: a number such as 13e9 or 13B, 1 to {LARGEST:.0e}")
    return value


def _check(name: str, value: float | None, most: float = LARGEST) -> None:
    """Raise ConfigError unless a number that was given is in (0, most]."""
    from ridgeline.types import ConfigError

    if value is not None and not 0 < value <= most:
        raise ConfigError(f"{name} is {value}; accepted: more than 0, at most {most:g}")
