"""The kinds of work that speculation is measured on: what a request asks, and how its answer begins.

The texts are the standard library's own sources and documentation, so that nothing has to be fetched.
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
import socketserver
import statistics
import subprocess
import tempfile
import textwrap
import timeit
import unittest
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ridgeline.types import StructuredOutputsParams

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
