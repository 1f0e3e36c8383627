"""`ridgeline bench --sweep`: decoding at several batch sizes, as a table and below the roofline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgeline.cli.output import console, plot, print_json, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ridgeline.apps.benchmark import Workload
    from ridgeline.apps.roofline_plot import Roofline
    from ridgeline.loading import LoadedModel
    from ridgeline.resources.ceilings import Ceilings

MOST_BATCHES = 64
_NUMBER = re.compile(r"[0-9]{1,6}")


def check(sweep: str | None, png: Path | None, others: Mapping[str, bool]) -> tuple[int, ...]:
    """The batch sizes that --sweep asks for, none without it. Raises ConfigError for a plot without a sweep,
    for one that cannot be written, and for those of the `others` that were given beside a sweep."""
    from ridgeline.apps.png import check_png
    from ridgeline.types import ConfigError

    if sweep is None:
        if png is not None:
            raise ConfigError(f"plot is {str(png)!r} without a sweep; accepted: with --sweep 1,2,4,...,64")
        return ()
    for name, given in others.items():
        if given:
            raise ConfigError(f"--{name} is given beside --sweep; accepted: one of them")
    if png is not None:
        check_png(png)
    return batches_of(sweep)


def batches_of(text: str) -> tuple[int, ...]:
    """Batch sizes between commas; `...` doubles the one before it up to the one behind it.

    Raises ConfigError for anything but at most MOST_BATCHES numbers that grow.
    """
    from ridgeline.types import ConfigError

    parts = [part.strip() for part in text.split(",")]
    sizes: list[int] = []
    refusal = (
        f"sweep is {text!r}; accepted: at most {MOST_BATCHES} numbers of sequences that grow, as 1,8,64 "
    )
    refusal += "or 1,2,4,...,64"
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        if part in ("...", "…") and sizes and sizes[-1] > 0 and _NUMBER.fullmatch(following):
            while 2 * sizes[-1] < int(following):
                sizes.append(2 * sizes[-1])
        elif _NUMBER.fullmatch(part):
            sizes.append(int(part))
        else:
            raise ConfigError(refusal)
    if len(sizes) > MOST_BATCHES or any(a >= b for a, b in zip([0, *sizes], sizes, strict=False)):
        raise ConfigError(refusal)
    return tuple(sizes)


def run(
    loaded: LoadedModel,
    workload: Workload,
    batches: Sequence[int],
    repeats: int,
    png: Path | None,
    json: bool,
) -> None:
    """Measure, print, and write the plot where one is asked for. Closes the engine."""
    from ridgeline.apps.benchmark import sweep, sweep_summary
    from ridgeline.apps.operations import beside_ceilings
    from ridgeline.apps.roofline_plot import draw, write_png

    settled = loaded.config
    limit = settled.max_num_batched_tokens
    found, ceilings = beside_ceilings(loaded, lambda: sweep(loaded.engine, workload, batches, limit, repeats))
    rows = sweep_summary(found, ceilings)
    result = {
        "model": settled.model,
        "weights": settled.weights,
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.output_tokens,
        "repeats": repeats,
        "sweep": rows,
        "ceilings": ceilings.to_json(),
    }
    picture = _picture(result, ceilings)
    if png is not None:
        write_png(picture, png)
    if json:
        print_json(result)
        return
    _show(result, ceilings)
    plot(lambda columns, unicode: draw(picture, columns, unicode))


def _picture(result: Mapping[str, Any], ceilings: Ceilings) -> Roofline:
    from ridgeline.apps.roofline_plot import Point, Roofline

    model, context = Path(result["model"]).name, result["prompt_tokens"]
    weights = "" if result["weights"] == "auto" else f" {result['weights']}"
    return Roofline(
        f"{model}{weights}, decoding after {context} tokens: {ceilings.machine}",
        ceilings,
        points=[
            Point(f"batch {row['batch']}", row["ops_per_byte"], row["ops_per_s"]) for row in result["sweep"]
        ],
    )


def _show(result: Mapping[str, Any], ceilings: Ceilings) -> None:
    from ridgeline.cli.figures import limits, rate

    columns = ("batch", "tokens/s", "spread", "step", "ops/byte", "ops", "memory", "arithmetic")
    shown = table(*columns, right=columns)
    for row in result["sweep"]:
        low, high = row["spread"]
        shown.add_row(
            str(row["batch"]),
            f"{row['tokens_per_s']:.1f}",
            f"{low:.1f}–{high:.1f}",
            f"{row['step_s'] * 1e3:.2f} ms",
            f"{row['ops_per_byte']:.1f}",
            rate(row["ops_per_s"], "op"),
            f"{row['mbu']:.0%}",
            f"{row['mfu']:.0%}",
        )
    console().print(shown)
    console().print(
        f"{result['output_tokens'] - 1} steps after {result['prompt_tokens']} tokens of prompt, "
        f"median of {result['repeats']}; shares of {limits(ceilings)}",
        style="dim",
        soft_wrap=True,
    )
