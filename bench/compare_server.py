"""Compare `ridgeline serve` with llama-server on one GGUF file, under one load from one generator.

    python bench/compare_server.py --model model.gguf --llama-server /path/to/llama-server

Only one server runs at a time: each measurement starts one, warms it up, loads it and stops it, and the sides
take turns, so that all see the same drift of the machine. First each set of llama-server's flags is measured
once; the best of them by output tokens/s go on against Ridgeline for some rounds. Clients ask in a closed
loop, greedily and past the end token. Prompts are random words from their first word on, the same for each
side in a round and others in the next, so that no prompt cache helps. A figure is the median of its rounds;
ratios are to the best median of llama-server's, figure by figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from server_runs import Sizes, closed_loop, leave_on_sigterm, running

from ridgeline.apps.load.report import figures
from ridgeline.types import RidgelineError

FIGURES = ("output_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
FLAGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "-ub 2048": ("-b", "2048", "-ub", "2048"),
    "-b 512": ("-b", "512", "-ub", "512"),
    "-fa on": ("-fa", "on"),
    "-fa off": ("-fa", "off"),
    "no cache": ("--no-cache-prompt", "--cache-ram", "0"),
    "unified kv": ("--kv-unified",),
}
OURS = "ridgeline"


@dataclass(frozen=True)
class Settings:
    model: str
    threads: int
    sizes: Sizes


@dataclass
class Side:
    """One server's command line, without the port, and what it gave."""

    name: str
    command: list[str]
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def medians(self) -> dict[str, Any]:
        """Of each figure the median of the rounds, the least and the most."""
        columns = {key: [one[key] for one in self.rounds] for key in FIGURES}
        return {key: [median(column), min(column), max(column)] for key, column in columns.items()}


def our_side(settings: Settings, python: str) -> Side:
    command = [python, "-m", "ridgeline.cli.main", "serve", settings.model]
    return Side(OURS, [*command, "--threads", str(settings.threads), "--log-format", "text"])


def their_sides(settings: Settings, program: str, context_tokens: int) -> list[Side]:
    """llama-server with a slot for each client, once for each set of flags."""
    threads = ("--threads", str(settings.threads), "--threads-batch", str(settings.threads))
    slots = ("-np", str(settings.sizes.clients), "-c", str(settings.sizes.clients * context_tokens))
    command = [program, "-m", settings.model, *threads, *slots, "--no-webui"]
    return [Side(f"llama-server {name}", [*command, *flags]) for name, flags in FLAGS.items()]


def measure(side: Side, settings: Settings, seed: int) -> dict[str, Any]:
    """One round of one side. A round in which a request failed or fell short would not be comparable."""
    with running(side.command) as (url, _):
        try:
            found = figures(asyncio.run(closed_loop(url, settings.sizes, seed)))
        except RidgelineError as error:
            raise SystemExit(f"error: {side.name}: {error}") from None
    if found["failed"] or found["short_answers"]:
        raise SystemExit(
            f"error: {side.name}: failed {found['failed']} ({found['examples']}), "
            f"{found['short_answers']} answers are short"
        )
    return {
        "output_tokens_per_s": found["output_tokens_per_s"],
        **{
            f"{name}_{point}_ms": found[f"{name}_ms"][point]
            for name in ("ttft", "itl")
            for point in ("p50", "p99")
        },
        "input_tokens": found["input_tokens"],
        "client_cpu_s": found["client"]["cpu_s"],
        "duration_s": found["duration_s"],
    }


# ----------------------------------------------------------------------------------------- comparison


def screen(sides: Sequence[Side], settings: Settings, keep: int) -> tuple[list[Side], dict[str, Any]]:
    """Measure each set of flags once; the best `keep` by output tokens/s, and what each gave."""
    found = {}
    for side in sides:
        found[side.name] = measure(side, settings, seed=0)
        print(f"{side.name:<28}{found[side.name]['output_tokens_per_s']:>10.1f} tokens/s", file=sys.stderr)
    ranked = sorted(sides, key=lambda side: -found[side.name]["output_tokens_per_s"])
    return ranked[:keep], found


def alternate(sides: Sequence[Side], settings: Settings, rounds: int) -> None:
    """Each round measures every side, and begins with another one."""
    for number in range(rounds):
        turn = number % len(sides)
        for side in (*sides[turn:], *sides[:turn]):
            side.rounds.append(measure(side, settings, seed=number + 1))
            shown = "  ".join(f"{key} {side.rounds[-1][key]:.1f}" for key in FIGURES)
            print(f"round {number + 1}  {side.name}: {shown}", file=sys.stderr)


def ratios(ours: Side, theirs: Sequence[Side]) -> dict[str, Any]:
    """Ours over the best of theirs, for each figure: of medians, and the least and most of the rounds."""
    found = {}
    for key in FIGURES:
        choose = max if key == "output_tokens_per_s" else min
        best = choose(theirs, key=lambda side: side.medians()[key][0])
        each = [mine[key] / other[key] for mine, other in zip(ours.rounds, best.rounds, strict=True)]
        ratio = ours.medians()[key][0] / best.medians()[key][0]
        found[key] = {"to": best.name, "of_medians": ratio, "least": min(each), "most": max(each)}
    return found


def show(result: dict[str, Any]) -> None:
    print(f"{'':<28}" + "".join(f"{key.removesuffix('_ms'):>28}" for key in FIGURES))
    for name, medians in result["sides"].items():
        cells = [f"{middle:.1f} ({low:.1f}–{high:.1f})" for middle, low, high in medians.values()]
        print(f"{name:<28}" + "".join(f"{cell:>28}" for cell in cells))
    for key, ratio in result["ratios"].items():
        spread = f"{ratio['least']:.2f} to {ratio['most']:.2f}"
        print(f"{key}: {ratio['of_medians']:.2f} times {ratio['to']} ({spread})")
    if result["absent"]:
        print(f"llama-server is absent: {result['absent']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare ridgeline serve with llama-server on one GGUF file."
    )
    parser.add_argument("--model", required=True, help="the GGUF file that both load")
    parser.add_argument("--llama-server", help="the program; without it only Ridgeline is measured")
    parser.add_argument("--ridgeline-python", default=sys.executable, help="a Python with ridgeline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=130)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--context-tokens", type=int, default=512, help="of each of llama-server's slots")
    parser.add_argument("--requests", type=int, help="of a round (default: four for each client)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=int, default=2, help="sets of flags that go on after the sweep")
    parser.add_argument("--flags", choices=sorted(FLAGS), action="append", help="only these sets of flags")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    chosen = parser.parse_args()
    leave_on_sigterm()
    requests = chosen.requests or 4 * chosen.clients
    sizes = Sizes(chosen.clients, chosen.prompt_tokens, chosen.output_tokens, requests)
    if min(*vars(sizes).values(), chosen.threads, chosen.rounds, chosen.keep) < 1:
        raise SystemExit("error: a number is below 1; accepted: at least 1")
    if not Path(chosen.model).is_file():
        raise SystemExit(f"error: {chosen.model} is not a file; accepted: a GGUF that both sides read")
    settings = Settings(chosen.model, chosen.threads, sizes)
    ours = our_side(settings, chosen.ridgeline_python)
    theirs: list[Side] = []
    absent = "no --llama-server was given" if chosen.llama_server is None else None
    if chosen.llama_server is not None and not Path(chosen.llama_server).is_file():
        absent = f"{chosen.llama_server} is not a file"
    swept: dict[str, Any] = {}
    if absent is None:
        sides = their_sides(settings, chosen.llama_server, chosen.context_tokens)
        wanted = [f"llama-server {name}" for name in chosen.flags or FLAGS]
        sides = [side for side in sides if side.name in wanted]
        theirs, swept = screen(sides, settings, chosen.keep) if len(sides) > chosen.keep else (sides, {})
    alternate([ours, *theirs], settings, chosen.rounds)
    result = {
        "model": settings.model,
        "threads": settings.threads,
        **vars(sizes),
        "rounds": chosen.rounds,
        "absent": absent,
        "sides": {side.name: side.medians() for side in (ours, *theirs)},
        "ratios": ratios(ours, theirs) if theirs else {},
        "sweep": swept,
        "each": {side.name: side.rounds for side in (ours, *theirs)},
    }
    if not chosen.json:
        show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
