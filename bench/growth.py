"""How decoding grows with the batch and with the context, beside what is predicted: `python -m bench.growth`.

    python -m bench.growth --model smollm2 --rounds 5 --json growth.json --plot docs/growth.png

Decode steps of 1 to 64 sequences at a context of 256 tokens, and of one sequence at 128 to 8,192 tokens
(less two pages, for the steps themselves), as far as they fit, in rounds that take turns. The machine's
ceilings are measured between the cells. Each timing stands beside two predictions by the ceilings around
it: what `ridgeline plan` expects of the step, and the bare roofline, below which comes only what a last-
level cache holds of it. Of a cell's rounds the one with the median error of the expectation counts. The
last line of the output is one JSON object; the exit status is 1 where an error is beyond 25%.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ridgeline.apps.plan.model import open_model
from ridgeline.apps.plan.timing import Pair, timed_model
from ridgeline.apps.png import Line, Panel, check_png, write_panels
from ridgeline.apps.step_meter import Cell
from ridgeline.config import PAGE_TOKENS, EngineConfig
from ridgeline.model.catalog import resolve
from ridgeline.resources.cuda import choose_device
from ridgeline.types import ConfigError, RidgelineError

BATCHES = (1, 2, 4, 8, 16, 32, 64)
BATCHES_AT = 256
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
ROUNDS = 5
LIMIT = 0.25
_CELL_S = 0.2


@dataclass(frozen=True, slots=True)
class Grown:
    """A cell's rounds."""

    cell: Cell
    pairs: Sequence[Pair]

    @property
    def typical(self) -> Pair:
        """The round with the median error."""
        return sorted(self.pairs, key=lambda pair: pair.error)[len(self.pairs) // 2]

    def to_json(self) -> dict[str, Any]:
        one, errors = self.typical, [pair.error for pair in self.pairs]
        seconds = [pair.measured_s for pair in self.pairs]
        return {
            "batch": self.cell.batch,
            "context": self.cell.context,
            "measured_s": one.measured_s,
            "measured_between_s": [min(seconds), max(seconds)],
            "expected_s": one.expected_s,
            "roofline_s": one.least_s,
            "error": one.error,
            "errors_between": [min(errors), max(errors)],
            "tokens_per_s": self.cell.batch / one.measured_s,
            "read_bytes_per_s": one.limits.read_bytes_per_s,
            "int8_ops_per_s": one.limits.int8_ops_per_s,
        }


def cells_of(batches: Sequence[int], contexts: Sequence[int], longest: int) -> list[Cell]:
    """Those that grow by the batch, and by the context; the last of these leaves room for the steps in a
    context of `longest` tokens. A cell that is in both is one."""
    room = longest - 2 * PAGE_TOKENS
    cells = [Cell(batch, min(BATCHES_AT, room)) for batch in batches]
    return list(dict.fromkeys([*cells, *(Cell(1, min(context, room)) for context in contexts)]))


def shown(grown: Mapping[Cell, Grown]) -> list[str]:
    """A table: a line for each cell."""
    head = f"{'batch':>5}{'context':>9}{'measured':>12}{'least to most':>20}{'expected':>12}{'error':>9}"
    lines = [head + f"{'of rounds':>18}{'roofline':>12}{'of measured':>13}"]
    for cell, one in grown.items():
        found = one.to_json()
        low, high = found["measured_between_s"]
        least, most = found["errors_between"]
        lines.append(
            f"{cell.batch:>5}{cell.context:>9,}{_ms(found['measured_s']):>12}"
            f"{f'{1e3 * low:.2f} to {_ms(high)}':>20}{_ms(found['expected_s']):>12}{found['error']:>+9.1%}"
            f"{f'{least:+.1%} to {most:+.1%}':>18}{_ms(found['roofline_s']):>12}"
            f"{found['roofline_s'] / found['measured_s']:>13.0%}"
        )
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def picture(figures: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Milliseconds of a step over the batch, and over the context, from what `Grown.to_json` gives."""
    by_batch = [one for one in figures if one["context"] == min(BATCHES_AT, _longest(figures))]
    by_context = sorted((one for one in figures if one["batch"] == 1), key=lambda one: one["context"])
    return [
        _panel(f"decoding, context {by_batch[0]['context']:,}", "batch", by_batch),
        _panel("decoding, batch 1", "context", by_context),
    ]


def _longest(figures: Sequence[Mapping[str, Any]]) -> int:
    return max(int(one["context"]) for one in figures)


def _panel(title: str, over: str, found: Sequence[Mapping[str, Any]]) -> Panel:
    def ms(key: str) -> list[float]:
        return [1e3 * one[key] for one in found]

    between = [(1e3 * low, 1e3 * high) for low, high in (one["measured_between_s"] for one in found)]
    lines = (
        Line("the roofline, all bytes from memory", ms("roofline_s")),
        Line("expected", ms("expected_s")),
        Line("measured, least to most", ms("measured_s"), between),
    )
    return Panel(title, over, [one[over] for one in found], "a step, ms", lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.growth", description=(__doc__ or "").split(":", 1)[0] + "."
    )
    parser.add_argument("--model", default="smollm2", help="a file, a folder or a name of the catalog")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write the last line there, too")
    parser.add_argument("--plot", type=Path, help="a PNG")
    parser.add_argument("--smoke", action="store_true", help="a few cells, once: does it run?")
    return parser.parse_args()


def main() -> int:
    chosen = _arguments()
    try:
        if chosen.rounds < 1:
            raise ConfigError(f"--rounds is {chosen.rounds}; accepted: at least 1")
        if chosen.plot is not None:
            check_png(chosen.plot)
        found = run(chosen)
        if chosen.plot is not None:
            title = f"{found['model']} {found['weights']}: {found['machine']}"
            write_panels(title, picture(found["cells"]), chosen.plot)
    except RidgelineError as error:
        raise SystemExit(f"error: {error}") from None
    line = json.dumps(found)
    if chosen.json is not None:
        chosen.json.write_text(line + "\n")
    print(line)
    return 1 if found["beyond_limit"] and not chosen.smoke else 0


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the table; what was found, ready for JSON."""
    device = choose_device(chosen.device)
    config = EngineConfig(device=device, weights=chosen.weights, threads=chosen.threads)
    path = resolve(chosen.model)
    with open_model(path) as source:
        longest = source.spec.context
    batches, contexts = (BATCHES[:2], CONTEXTS[:2]) if chosen.smoke else (BATCHES, CONTEXTS)
    with timed_model(path, config, cells_of(batches, contexts, longest)) as timed:
        timed.meter.warm()
        timed.meter.keep(timed.cells)
        rounds = 1 if chosen.smoke else chosen.rounds
        grown = {cell: Grown(cell, pairs) for cell, pairs in timed.pairs(rounds, _CELL_S).items()}
        costs = timed.host.costs_of(timed.model.main_format)
    print("\n".join(shown(grown)), flush=True)
    figures = [one.to_json() for one in grown.values()]
    return {
        "model": Path(chosen.model).name,
        "machine": timed.host.name,
        "weights": timed.model.main_format,
        "rounds": rounds,
        "costs": asdict(costs),
        "cells": figures,
        "worst_error": max((abs(one["error"]) for one in figures), default=None),
        "beyond_limit": [one for one in figures if abs(one["error"]) > LIMIT],
    }


if __name__ == "__main__":
    sys.exit(main())
