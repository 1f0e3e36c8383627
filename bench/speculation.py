"""What speculation gives, on the default model: `python -m bench.speculation`.

    python -m bench.speculation --model smollm2 --rounds 7 --tokens 96 --json out.json
    python -m bench.speculation --cells copy:0:1 json:0.8:16

Each cell is a kind of work, a temperature and a batch. Its requests are answered twice a round by one
engine, with speculation and without, in turns that change; both must give the same tokens, which is
checked. Timed is decoding alone, while the batch is whole: from the step after which every sequence has a
token to the end of the first that ends. Before every run the engine forgets all texts that it has seen, so
that nothing is won by having given the answer before. The ratio of a round is that of its two rates of
tokens; told are the median, the least and the most, and the 95% interval of the mean of the logarithms
(Student's t).

- copy: a file, and the request to give it back with one name changed; the answer's first lines are given.
- quote: a text, and a summary that quotes it at length, likewise begun.
- json: an array of records by a JSON schema with long fixed keys (the form constrains the answer).
- chat: open questions. code: functions to be written. Neither repeats much.

Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import heapq
import http.client
import inspect
import json
import logging
import math
import socketserver
import statistics
import subprocess
import tempfile
import textwrap
import time
import timeit
import unittest
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ridgeline.config import EngineConfig
from ridgeline.loading import LoadedModel, load_engine
from ridgeline.types import Request, SamplingParams, StructuredOutputsParams

BATCHES = (1, 4, 16, 64)
TEMPERATURES = (0.0, 0.8)
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 12: 2.20, 15: 2.14}
"""Student's t for 95%, by the number of rounds."""

_KEYS = (
    "name_of_the_measuring_station",
    "temperature_of_the_outside_air_in_degrees_celsius",
    "relative_humidity_of_the_outside_air_in_percent",
    "mean_wind_speed_over_ten_minutes_in_metres_per_second",
    "atmospheric_pressure_at_sea_level_in_hectopascal",
    "total_precipitation_of_the_last_hour_in_millimetres",
)
_SCHEMA = {
    "type": "array",
    "minItems": 40,
    "items": {
        "type": "object",
        "properties": {
            _KEYS[0]: {"type": "string", "maxLength": 12},
            **{key: {"type": "integer", "minimum": 0, "maximum": 1100} for key in _KEYS[1:]},
        },
        "required": list(_KEYS),
        "additionalProperties": False,
    },
}
_SUBJECTS = (
    "the tides", "bread", "glaciers", "the printing press", "owls", "sailing ships", "volcanoes", "chess",
    "the moon", "beavers", "railways", "honey", "earthquakes", "the violin", "deserts", "lighthouses",
)  # fmt: skip
_TASKS = (
    "reverses a linked list", "finds the longest common prefix of strings", "merges sorted intervals",
    "parses a date", "counts words in a file", "checks whether a number is prime", "rotates a matrix",
    "computes a moving average", "validates an e-mail address", "sorts by several keys", "flattens a list",
    "finds cycles in a graph", "formats bytes for people", "caches results on disk", "splits a bill",
    "draws a histogram in text",
)  # fmt: skip
_SOURCES: Sequence[Callable[..., Any]] = (
    textwrap.TextWrapper._split, textwrap.TextWrapper._wrap_chunks, textwrap.dedent, statistics.quantiles,
    json.JSONEncoder.iterencode, argparse.ArgumentParser._get_option_tuples, inspect.getcallargs,
    statistics.correlation,
)  # fmt: skip


_QUOTED: Sequence[Any] = (
    subprocess.Popen, tempfile, logging.Logger, statistics, zipfile.ZipFile, http.client, unittest.TestCase,
    dataclasses.dataclass, functools.lru_cache, heapq, timeit, socketserver,
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a request says: the user's part, how the answer begins, and its form."""

    asked: str
    begun: str = ""
    form: StructuredOutputsParams | None = None


def copy(index: int) -> Work:
    """A function of the standard library, with a name of its own changed in every line that has it."""
    source = textwrap.dedent(inspect.getsource(_SOURCES[index % len(_SOURCES)]))[:2400]
    changed = source.replace("self", f"this{index}")
    lines = changed.splitlines(keepends=True)
    return Work(
        f"Repeat this file exactly, but with `self` renamed to `this{index}`:\n```python\n{source}\n```",
        "```python\n" + "".join(lines[:4]),
    )


def quote(index: int) -> Work:
    """A documentation, to be quoted sentence by sentence; the answer has begun to."""
    text = " ".join(inspect.cleandoc(inspect.getdoc(_QUOTED[index % len(_QUOTED)]) or "").split())
    sentences = [sentence.strip() + "." for sentence in text.split(". ") if len(sentence) > 20][:12]
    listed = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))
    begun = "\n".join(f"Point {n} says: “{sentence}”" for n, sentence in enumerate(sentences[:3], 1))
    return Work(
        f"These are the points of text {index}:\n\n{listed}\n\nQuote every point in full, one by one.",
        f"{begun}\nPoint 4 says: “",
    )


def records(index: int) -> Work:
    """Measurements by a schema."""
    form = StructuredOutputsParams(json=_SCHEMA, disable_any_whitespace=True)
    return Work(f"Give the measurements of {40 + index} weather stations as JSON.", form=form)


def chat(index: int) -> Work:
    """A question that has no text to look the answer up in."""
    subject = _SUBJECTS[index % len(_SUBJECTS)]
    return Work(f"Tell me something that I would not know about {subject}, in {3 + index // 16} paragraphs.")


def code(index: int) -> Work:
    """A function to be written."""
    task = _TASKS[index % len(_TASKS)]
    return Work(f"Write a Python function that {task}, and {1 + index // 16} tests of it.")


KINDS: dict[str, Callable[[int], Work]] = {
    "copy": copy, "quote": quote, "json": records, "chat": chat, "code": code
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One kind of work at one temperature and batch."""

    kind: str
    temperature: float
    batch: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        kind, temperature, batch = text.split(":")
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of work; accepted: {', '.join(KINDS)}")
        return cls(kind, float(temperature), int(batch))

    def __str__(self) -> str:
        return f"{self.kind}:{self.temperature:g}:{self.batch}"


@dataclass
class Measured:
    """A cell's rounds: seconds a token with speculation and without, and what drafting did in all of them."""

    on_s: list[float] = field(default_factory=list)
    off_s: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    @property
    def ratios(self) -> list[float]:
        return [off / on for on, off in zip(self.on_s, self.off_s, strict=True)]

    @property
    def interval(self) -> tuple[float, float]:
        """95%, of the mean of the ratios' logarithms."""
        logs = [math.log(ratio) for ratio in self.ratios]
        if len(logs) < 2:
            return math.nan, math.nan
        near = min(_T95, key=lambda rounds: (abs(rounds - len(logs)), rounds))
        half = _T95[near] * statistics.stdev(logs) / math.sqrt(len(logs))
        middle = statistics.mean(logs)
        return math.exp(middle - half), math.exp(middle + half)

    def told(self) -> dict[str, Any]:
        ratios, (low, high) = self.ratios, self.interval
        return {
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "low_95": low,
            "high_95": high,
            "off_tokens_per_s": 1 / statistics.median(self.off_s),
            "drafted": self.drafted,
            "accepted": self.accepted,
        }


class Bench:
    """One engine, which answers each cell with speculation and without."""

    def __init__(self, loaded: LoadedModel, tokens: int) -> None:
        self._loaded, self._engine = loaded, loaded.engine
        self._tokens = tokens
        self._names = 0

    def round(self, cell: Cell, seed: int, measured: Measured | None) -> None:
        """Answer the cell's requests twice; the second way is the first of the next round."""
        answers = {}
        order = (True, False) if seed % 2 else (False, True)
        for speculated in order:
            begin = self._engine.steps.recent.count
            answers[speculated], token_s = self._answer(cell, seed, speculated)
            if measured is None:
                continue
            (measured.on_s if speculated else measured.off_s).append(token_s)
            if speculated:
                records = self._engine.steps.recent.since(begin)
                measured.drafted += sum(record.drafted_tokens for record in records)
                measured.accepted += sum(record.accepted_tokens for record in records)
        if answers[True] != answers[False]:
            raise SystemExit(f"error: {cell} says something else with speculation")

    def _answer(self, cell: Cell, seed: int, speculated: bool) -> tuple[list[tuple[int, ...]], float, int]:
        """All answers of a cell, the seconds of their decoding, and the tokens that it gave."""
        engine = self._engine
        if engine.scheduler.drafting is None:
            raise SystemExit("error: nothing is known of this machine's speed; first run `ridgeline probe`")
        engine.scheduler.drafting.restart()
        names = []
        for index in range(cell.batch):
            self._names += 1
            names.append(str(self._names))
            engine.add(self._request(cell, index, seed, names[-1], None if speculated else False))
        said: dict[str, tuple[int, ...]] = {}
        begun_s = ended_s = 0.0
        tokens = ended = 0
        while engine.has_work:
            for output in engine.step():
                said[output.request_id] = output.outputs[0].token_ids
                ended += output.finished
            if not begun_s and len(said) == cell.batch:
                begun_s, tokens = time.perf_counter(), -sum(map(len, said.values()))
            if begun_s and ended and not ended_s:
                ended_s = time.perf_counter()
                tokens += sum(map(len, said.values()))
        return [said[name] for name in names], (ended_s - begun_s) / tokens

    def _request(self, cell: Cell, index: int, seed: int, name: str, speculation: bool | None) -> Request:
        work = KINDS[cell.kind](index)
        messages = [{"role": "user", "content": work.asked}]
        if work.begun:
            messages.append({"role": "assistant", "content": work.begun})
        prompt = self._loaded.chat_tokens(
            messages, add_generation_prompt=not work.begun, continue_final_message=bool(work.begun)
        )
        params = SamplingParams(
            temperature=cell.temperature,
            seed=1000 * seed + index,
            max_tokens=self._tokens,
            ignore_eos=work.form is None,
            structured_outputs=work.form,
            speculation=speculation,
        )
        return Request(name, prompt, params)


def report(cell: Cell, measured: Measured) -> str:
    told = measured.told()
    share = told["accepted"] / told["drafted"] if told["drafted"] else 0.0
    return (
        f"{cell!s:14} {told['ratio']:6.2f}×  {told['least']:.2f} to {told['most']:.2f}  "
        f"95%: {told['low_95']:.2f} to {told['high_95']:.2f}  "
        f"off {told['off_tokens_per_s']:7.1f} tokens/s  {told['drafted']:6} guesses, {share:4.0%} right"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What speculation gives.")
    parser.add_argument("--model", default=EngineConfig().model)
    parser.add_argument("--cells", nargs="*", default=None, help="kind:temperature:batch (default: all)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96, help="of each answer, at most")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    everything = [Cell(*each) for each in product(KINDS, TEMPERATURES, BATCHES)]
    cells = everything if args.cells is None else [Cell.parse(text) for text in args.cells]
    loaded = load_engine(EngineConfig(model=args.model, threads=args.threads, max_num_seqs=max(BATCHES)))
    bench = Bench(loaded, args.tokens)
    results: dict[str, Any] = {}
    try:
        for cell in cells:
            measured = Measured()
            bench.round(cell, 0, None)  # warms up, and leaves the prompts in the prefix cache
            for number in range(args.rounds):
                bench.round(cell, number + 1, measured)
            results[str(cell)] = measured.told()
            print(report(cell, measured), flush=True)
    finally:
        loaded.engine.close()
    line = json.dumps({"model": args.model, "rounds": args.rounds, "tokens": args.tokens, "cells": results})
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
