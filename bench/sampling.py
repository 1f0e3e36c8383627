"""What choosing tokens costs, on the default model: `python -m bench.sampling`.

    python -m bench.sampling --model smollm2 --seconds 20

*Chains*: the share of a decode step of 64 sequences that drawing their tokens takes, with top-p and with
other chains, timed around the executor's drawer inside real steps, on the model's own logits.

*Constraints*: tokens/s of a batch of 16 whose answers are held to JSON schemas of 1, 10 and 50 properties,
against those of the same batch without one, which draws by the same chain. Steps in which exactly that batch
decodes are counted and nothing else. The cases take turns, so that what else the machine does falls on all of
them; the cost is that of a round's median steps, and the median round is told.

Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from ridgeline import LLM, SamplingParams, StructuredOutputsParams
from ridgeline.execution.draw import Adjustment, RowDrawer
from ridgeline.types import Draw, Float32Array, Int32Array

ROWS = (64, 16)
PROPERTIES = (1, 10, 50)
CHAINS: Mapping[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k, top_p, min_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    "top_p and penalties": {
        "temperature": 0.8,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.2,
    },
}
_KINDS: Sequence[dict[str, Any]] = (
    {"type": "string"},
    {"type": "integer"},
    {"type": "boolean"},
    {"type": "number"},
    {"enum": ["red", "green", "blue"]},
    {"type": "array", "items": {"type": "string"}, "maxItems": 4},
)
_TOPICS = ("a river", "a town", "a recipe", "a machine", "a bird", "a journey", "a song", "a market")


class TimedDrawer:
    """A drawer that adds up the time of its calls."""

    def __init__(self, drawer: RowDrawer) -> None:
        self._drawer = drawer
        self.seconds = 0.0

    def rows(
        self,
        logits: Float32Array,
        draws: Sequence[Draw | None],
        adjustments: Sequence[Adjustment | None] = (),
    ) -> Int32Array:
        started_s = time.perf_counter()
        tokens = self._drawer.rows(logits, draws, adjustments)
        self.seconds += time.perf_counter() - started_s
        return tokens


def schema_of(properties: int) -> dict[str, Any]:
    """An object that needs all of so many properties, of kinds in turn."""
    named = {f"field_{i}": _KINDS[i % len(_KINDS)] for i in range(properties)}
    return {"type": "object", "properties": named, "required": [*named], "additionalProperties": False}


@contextmanager
def recorded(llm: LLM, rows: int) -> Iterator[list[tuple[float, float]]]:
    """Collects (seconds, seconds in the drawer) of each step of so many decoding rows."""
    engine = llm._loaded.engine
    timed, run, step = TimedDrawer(engine.executor.drawer), engine.executor.run, engine.step
    found: list[tuple[float, float]] = []
    rows_of_step = [0]

    def counting_run(handle: Any, planned: Any) -> Any:
        rows_of_step[0] = planned.rows if planned.rows == len(planned.sequences) else 0
        return run(handle, planned)

    def timed_step() -> Any:
        before_s, started_s = timed.seconds, time.perf_counter()
        outputs = step()
        if rows_of_step[0] == rows:
            found.append((time.perf_counter() - started_s, timed.seconds - before_s))
        return outputs

    sampler: Any = engine._sampler
    changes: list[tuple[Any, str, Any]] = [
        (engine.executor, "run", counting_run),
        (engine.executor, "drawer", timed),
        (sampler, "_drawer", timed),
        (engine, "step", timed_step),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield found
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def steps_of(llm: LLM, rows: int, tokens: int, **settings: Any) -> list[tuple[float, float]]:
    """The decode steps of `rows` answers."""
    prompts = [f"{i}. Write about {_TOPICS[i % len(_TOPICS)]}:\n" for i in range(rows)]
    params = [
        SamplingParams(**{"max_tokens": tokens, "seed": i, "speculation": False, **settings})
        for i in range(rows)
    ]
    with recorded(llm, rows) as found:
        llm.generate(prompts, params)
    return found[1:]


def measure_chains(llm: LLM, rows: int, until_s: float) -> dict[str, dict[str, float]]:
    """By chain: the median step, the median time of its draws, and the share of all draws in all steps."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    while time.perf_counter() < until_s or not found:
        for name, settings in CHAINS.items():
            found[name] += steps_of(llm, rows, 12, ignore_eos=True, **settings)
    return {
        name: {
            "steps": len(steps),
            "step_ms": 1e3 * median(step for step, _ in steps),
            "draw_ms": 1e3 * median(drawn for _, drawn in steps),
            "share": sum(drawn for _, drawn in steps) / sum(step for step, _ in steps),
        }
        for name, steps in found.items()
    }


def measure_constraints(llm: LLM, rows: int, until_s: float) -> dict[str, dict[str, float]]:
    """By schema: the median step with and without it, and the share of tokens/s that it costs."""
    forms = {str(n): StructuredOutputsParams(json=schema_of(n)) for n in PROPERTIES}
    costs: dict[str, list[float]] = defaultdict(list)
    medians: dict[str, list[float]] = defaultdict(list)
    while time.perf_counter() < until_s or not costs:
        took = {}
        for name in ("free", *forms, "free again"):
            form = {"structured_outputs": forms[name]} if name in forms else {"ignore_eos": True}
            steps = steps_of(llm, rows, 24, temperature=1.0, **form)
            took[name] = median(step for step, _ in steps) if steps else 0.0
        free_s = (took["free"] + took["free again"]) / 2
        for name in forms:
            if took[name]:
                costs[name].append(1 - free_s / took[name])
                medians[name].append(took[name])
                medians["free " + name].append(free_s)
    return {
        name: {
            "rounds": len(costs[name]),
            "step_ms": 1e3 * median(medians[name]),
            "free_step_ms": 1e3 * median(medians["free " + name]),
            "cost": median(costs[name]),
        }
        for name in forms
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model's name or file (default: smollm2)")
    parser.add_argument("--seconds", type=float, default=20.0, help="about, for each part (default: 20)")
    parser.add_argument("--part", choices=("chains", "constraints"), help="only this part")
    parser.add_argument("--rows", type=int, nargs=2, default=ROWS, help="sequences of each part (64 16)")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {}
    many, fewer = args.rows
    with LLM(args.model, max_num_seqs=max(many, fewer)) as llm:
        if args.part != "constraints":
            steps_of(llm, many, 4)
            report["chains"] = measure_chains(llm, many, time.perf_counter() + args.seconds)
        if args.part != "chains":
            for properties in PROPERTIES:
                form = StructuredOutputsParams(json=schema_of(properties))
                steps_of(llm, fewer, 4, structured_outputs=form)
            report["constraints"] = measure_constraints(llm, fewer, time.perf_counter() + args.seconds)
    for part, cases in report.items():
        for name, figures in cases.items():
            print(f"{part:12} {name:22}", *(f"{key} {value:.4g}" for key, value in figures.items()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
