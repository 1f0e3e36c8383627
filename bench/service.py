"""What a live server keeps to: one line for each figure with its limit, and JSON at the end.

    python bench/service.py [SCENARIO ...] [--model MODEL] [--threads 2]

Scenarios, all where none is named; each starts its own `ridgeline serve` and asks it over HTTP:

- `document`: a second question about a long document, and one after a restart with --cache-dir
- `streams`: 16 streams while four prompts of 6,000 tokens and of class batch come
- `unbounded`: the same with --class-targets off, for comparison
- `keystroke`: requests of class keystroke among 64 of class batch that decode
- `churn`: the same while requests of the batch end, and new ones come
- `keys`: two API keys, one of which has ten times the requests of the other
- `memory`: how full the pages in use are under a mix of lengths like ShareGPT's
- `ends`: requests that end and are aborted at random: pages and memory afterwards
- `host`: time of the engine's own in a step (`scheduler_cost.py`)

`--set scenario.name=value` changes a size of a scenario. Streams and keystrokes want a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, replace
from typing import Any

import prefix_cache
import scheduler_cost
from live_load import Figure
from server_runs import leave_on_sigterm, running
from service_classes import (
    Beside,
    Keys,
    Keystrokes,
    Result,
    keystroke_beside_batch,
    streams_beside_prompts,
    two_keys,
)
from service_memory import Ends, Mix, ends_and_aborts, filled_pages

from ridgeline.types import RidgelineError

KEYS = ("light", "heavy")
PATIENT = ("--queue-timeout", "600")


@dataclass(frozen=True, slots=True)
class Document:
    tokens: int = 4000
    documents: int = 3


@dataclass(frozen=True, slots=True)
class Host:
    sequences: int = 256
    most: int = 2048
    steps: int = 96  # of which one of 16 takes a page


SIZES: dict[str, Any] = {
    "document": Document(),
    "streams": Beside(),
    "unbounded": Beside(),
    "keystroke": Keystrokes(),
    "churn": Keystrokes(batch_output=128),
    "keys": Keys(),
    "memory": Mix(),
    "ends": Ends(),
    "host": Host(),
}


class Bench:
    """Runs scenarios with a command that starts a server."""

    def __init__(self, command: list[str], sizes: dict[str, Any]) -> None:
        self._command, self._sizes = command, sizes

    def run(self, name: str) -> Result:
        found: Result = getattr(self, name)(self._sizes[name])
        return found

    def document(self, sizes: Document) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            command = [*self._command, "--cache-dir", folder]
            found = prefix_cache.measure(command, sizes.tokens, sizes.documents)
        return Result(
            [
                Figure("time to first token, cold", 1e3 * found["cold_ttft_s"], unit="ms"),
                Figure("second question, share of that", found["warm_share_of_cold"], 0.05),
                Figure("after a restart, share of that", found["restarted_share_of_cold"], 0.25),
            ],
            found,
        )

    def streams(self, sizes: Beside) -> Result:
        return self._served(lambda url: streams_beside_prompts(url, sizes), *PATIENT)

    def unbounded(self, sizes: Beside) -> Result:
        found = self._served(
            lambda url: streams_beside_prompts(url, sizes), *PATIENT, "--class-targets", "off"
        )
        return replace(found, figures=[replace(each, limit=None) for each in found.figures])

    def keystroke(self, sizes: Keystrokes) -> Result:
        return self._served(lambda url: keystroke_beside_batch(url, sizes))

    churn = keystroke

    def keys(self, sizes: Keys) -> Result:
        flags = ("--api-key", ",".join(KEYS), "--max-num-seqs", str(sizes.light), *PATIENT)
        return self._served(lambda url: two_keys(url, sizes, *KEYS), *flags)

    def memory(self, sizes: Mix) -> Result:
        return self._served(lambda url: filled_pages(url, sizes), *PATIENT)

    def ends(self, sizes: Ends) -> Result:
        # A small pool has been used whole before memory is looked at.
        with running([*self._command, "--kv-cache-memory", "64M", *PATIENT]) as (url, process):
            return asyncio.run(ends_and_aborts(url, sizes, process.pid))

    def host(self, sizes: Host) -> Result:
        few, many = (scheduler_cost.cost(count, sizes.steps, True) for count in (sizes.sequences, sizes.most))
        growth = (many.step_ms / few.step_ms) / (many.sequences / few.sequences)
        return Result(
            [
                Figure(f"host time of a step, {few.sequences} sequences", few.step_ms, 1.5, "ms"),
                Figure(f"the same, {many.sequences} sequences", many.step_ms, unit="ms"),
                Figure("growth between them, linear as 1", growth, 1.05),
            ],
            {"costs": [asdict(few), asdict(many)]},
        )

    def _served(self, scenario: Callable[[str], Coroutine[Any, Any, Result]], *flags: str) -> Result:
        with running([*self._command, *flags]) as (url, _):
            return asyncio.run(scenario(url))


def changed(sizes: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The sizes with `scenario.name=value` applied to them."""
    sizes = dict(sizes)
    for text in settings:
        where, _, value = text.partition("=")
        name, _, part = where.partition(".")
        known = getattr(sizes.get(name), part, None)
        if known is None:
            raise SystemExit(f"error: {text!r} sets nothing; accepted: as streams.window_s=30")
        sizes[name] = replace(sizes[name], **{part: type(known)(value)})
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SIZES))
    parser.add_argument("--model", default="smollm2", help="a model that ridgeline serves")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="SCENARIO.NAME=VALUE")
    chosen = parser.parse_args()
    unknown = set(chosen.scenarios) - set(SIZES)
    if unknown:
        parser.error(f"no scenario {', '.join(sorted(unknown))}; accepted: {', '.join(SIZES)}")
    leave_on_sigterm()
    command = [sys.executable, "-m", "ridgeline.cli.main", "serve", chosen.model]
    bench = Bench([*command, "--threads", str(chosen.threads)], changed(SIZES, chosen.set))
    report: dict[str, Any] = {}
    for name in chosen.scenarios or SIZES:
        print(name, flush=True)
        try:
            result = bench.run(name)
        except RidgelineError as error:
            raise SystemExit(f"error: {error}") from None
        for figure in result.figures:
            print(figure, flush=True)
        figures = {
            each.name: {"value": each.value, "limit": each.limit, "passes": each.passes}
            for each in result.figures
        }
        report[name] = {"figures": figures, **result.details}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
