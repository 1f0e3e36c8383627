"""Compare Ridgeline with other systems on one machine, side by side: `python -m bench.compare`.

    python -m bench.compare --model smollm2 --peers llama=VENV/bin/python vllm=VENV/bin/python \\
        --peer-model vllm=FOLDER --work prefill-512 decode-1 batch-32 --json out.json --plot out.png

Each system is a driver (`bench/peers/`) run by the Python that has it, which loads its model once. Rounds
take turns, A B A B …, so that all see the same drift of the machine, and between rounds the machine's read
bandwidth and arithmetic peaks are measured: Ridgeline's shares are of those around the same round. While one
system runs, all others are stopped (SIGSTOP), so that nothing of theirs spins. Prompts are random ids, the
same for each system in a round and others in the next. Every system takes the likeliest token with the same
number of threads; an answer with fewer tokens than were asked for is refused. The first round warms up and
does not count. Figures are medians with the least and the most.

A peer's name begins with its driver (ridgeline, llama, vllm, openvino, transformers) and may go on as one
likes, so that one system can run several times: llama-q4_0=PYTHON with --peer-model llama-q4_0=FILE. A peer
that is not installed or does not load its model is named as absent, and the others go on. The exit status is
1 where a system that is there failed in a cell, or where Ridgeline is absent.

`cold` starts a new process for one token, to its end: `ridgeline run`, and for a peer the command line given
by --cold NAME='COMMAND with {model}, {threads} and {prompt}', or else its driver for one token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers import cells, report
from bench.peers.arguments import absolute, check_names, pairs, program, settings
from bench.peers.cells import Cell
from bench.peers.figures import OURS, Measured, Result
from bench.peers.system import (
    AbsentError,
    FailedError,
    Launch,
    System,
    close_all,
    cold_start,
    kind_of,
)
from bench.server_runs import leave_on_sigterm
from ridgeline.apps.png import check_png
from ridgeline.resources import probe
from ridgeline.types import RidgelineError

MIN_ROUNDS = 5
"""Fewer rounds have no median worth reporting; the output then says so."""

MIN_CONTEXT = 64
"""Tokens that every system has room for: a cold start's prompt fits."""


@dataclass
class Comparison:
    """Systems under comparison, ours first. A system that ends while it is measured joins the absent."""

    systems: list[System]
    rounds: int
    threads: int
    timeout_s: float
    absent: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Load the models, one after the other."""
        for system in self.systems:
            try:
                system.start()
            except AbsentError as error:
                self._drop(system, str(error))

    def run(self, cell: Cell) -> Result:
        """Warm up, then the rounds, with the ceilings around each."""
        result = Result(cell)
        for system in self._present():
            result.systems[system.name] = Measured()
            self._once(system, cell.shortened(), 0, result)
        for measured in result.systems.values():
            measured.rounds.clear()
        for number in range(1, self.rounds + 1):
            result.probes.append(self._probe())
            for system in self._present():
                if result.systems[system.name].failed is None:
                    self._once(system, cell, number, result)
        result.probes.append(self._probe())
        return result

    def _once(self, system: System, cell: Cell, seed: int, result: Result) -> None:
        measured = result.systems[system.name]
        try:
            if cell.kind == "cold":
                answer: dict[str, Any] = {"seconds": cold_start(system.launch, self.timeout_s)}
            else:
                answer = system.measure(cell, seed)
        except FailedError as error:
            measured.failed = str(error)
        except AbsentError as error:
            measured.failed = str(error)
            if cell.kind != "cold" or not system.facts:  # a loaded driver outlives its missing command line
                self._drop(system, str(error))
        else:
            measured.rounds.append(answer)

    def _probe(self) -> Any:
        return probe.measure(self.threads, seconds=probe.BESIDE_PROBE_S)

    def _present(self) -> list[System]:
        return [system for system in self.systems if system.name not in self.absent]

    def _drop(self, system: System, why: str) -> None:
        system.close()
        self.absent[system.name] = why
        print(f"{system.name} is absent: {why}", flush=True)


def compare(comparison: Comparison, work: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Measure and show each cell; its JSON by its name. The systems have ended afterwards."""
    shown = {}
    try:
        if any(cell.kind != "cold" for cell in work):
            comparison.start()
        for cell in work:
            shown[cell.name] = comparison.run(cell).to_json()
            print("\n".join(["", *report.lines(cell.name, shown[cell.name])]), flush=True)
    finally:
        close_all(comparison.systems)
    return shown


def launches(chosen: argparse.Namespace, work: Sequence[Cell], threads: int) -> list[Launch]:
    """What to run, ours first. Raises ValueError for a name without meaning, RidgelineError for a model."""
    from ridgeline.model.catalog import resolve

    pythons = {OURS: sys.executable, **pairs("--peers", chosen.peers)}
    models = pairs("--peer-model", chosen.peer_model)
    colds = pairs("--cold", chosen.cold)
    options = settings("--peer-option", chosen.peer_option)
    check_names((*models, *colds, *options), pythons)
    common = resolve(chosen.model)
    return [
        Launch(
            name=name,
            kind=kind_of(name),
            python=program(python),
            model=absolute(models.get(name, common)),
            threads=threads,
            max_context=max(MIN_CONTEXT, *(cell.longest for cell in work)),
            max_batch=max(cell.batch for cell in work),
            options=tuple(options.get(name, ())),
            cold=colds.get(name),
        )
        for name, python in pythons.items()
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description="Compare Ridgeline with other systems, side by side."
    )
    many: dict[str, Any] = {"action": "extend", "nargs": "+", "default": []}
    parser.add_argument("--model", default="smollm2", help="a name of the catalog, a GGUF file or a folder")
    parser.add_argument(
        "--peers", metavar="NAME=PYTHON", help="systems, each with a Python that has it", **many
    )
    parser.add_argument("--peer-model", metavar="NAME=FILE", help="another file for one of them", **many)
    parser.add_argument("--peer-option", metavar="NAME:KEY=VALUE", help="a setting of a driver", **many)
    parser.add_argument("--cold", metavar="NAME=COMMAND", help="its command line for one token", **many)
    parser.add_argument("--work", metavar="CELL", help=cells.ACCEPTED.replace("%", "%%"), **many)
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--threads", type=int, help="for every system (default: one per usable core)")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS", help="for one answer")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG")
    return parser.parse_args()


def main() -> int:
    from ridgeline.resources.machine import machine, usable_cores

    chosen = _arguments()
    threads = chosen.threads or usable_cores()
    try:
        work = [cells.parse(name) for name in dict.fromkeys(chosen.work or cells.DEFAULT)]
        wanted = launches(chosen, work, threads)
        if chosen.rounds < 1:
            raise ValueError(f"--rounds is {chosen.rounds}; accepted: at least 1")
        if chosen.plot is not None:
            check_png(chosen.plot)
        if chosen.json is not None and not chosen.json.absolute().parent.is_dir():
            raise ValueError(f"{chosen.json.parent} is not a folder; accepted: one that is there")
    except (ValueError, RidgelineError) as error:
        raise SystemExit(f"error: {error}") from None
    if chosen.rounds < MIN_ROUNDS:
        print(f"{chosen.rounds} rounds are too few for figures; at least {MIN_ROUNDS} are")
    leave_on_sigterm()
    systems = [System(launch, chosen.timeout) for launch in wanted]
    comparison = Comparison(systems, chosen.rounds, threads, chosen.timeout)
    measured = compare(comparison, work)
    result = {
        "model": wanted[0].model,
        "machine": machine().name,
        "threads": threads,
        "rounds": chosen.rounds,
        "systems": {
            system.name: {
                "driver": system.launch.kind,
                "model": system.launch.model,
                "options": list(system.launch.options),
                **system.facts,
                **({"absent": comparison.absent[system.name]} if system.name in comparison.absent else {}),
            }
            for system in systems
        },
        "cells": measured,
    }
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    if chosen.plot is not None:
        report.plot(result, chosen.plot)
    present = [name for cell in measured.values() for name, got in cell["systems"].items() if "failed" in got]
    return 1 if OURS in comparison.absent or set(present) - set(comparison.absent) else 0


if __name__ == "__main__":
    sys.exit(main())
