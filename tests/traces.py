"""The rules of the Trace Event Format, as far as a viewer trips over them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]
KINDS = {"decode", "prefill", "mixed", "embed"}


def events_of(path: Path, whole: bool = True) -> list[Event]:
    """The events of a trace that is in order. One that was cut short may lack the array's end."""
    text = path.read_text()
    if not whole and not text.endswith("\n]\n"):
        text += "\n]"
    events = json.loads(text)
    check(events, whole)
    return events


def check(events: list[Event], whole: bool) -> None:
    for event in events:
        assert {"name", "ph", "pid", "tid"} <= event.keys()
        assert event["ph"] in ("M", "X", "C", "b", "e"), event
        assert isinstance(event["name"], str)
        assert event["ph"] == "M" or event["ts"] > 0
    assert len({event["pid"] for event in events}) == 1
    named = {event["name"] for event in events if event["ph"] == "M"}
    assert {"process_name", "thread_name"} <= named
    _check_slices([event for event in events if event["ph"] == "X"])
    for event in events:
        if event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(value, int | float) for value in event["args"].values())
    _check_nesting([event for event in events if event["ph"] in "be"], whole)


def _check_slices(slices: list[Event]) -> None:
    """Slices of one track that overlap without one being inside the other are drawn wrongly."""
    end = 0.0
    for event in sorted(slices, key=lambda event: event["ts"]):
        assert event["name"] in KINDS
        assert event["dur"] >= 0
        assert event["ts"] >= end - 0.002, "two steps overlap"
        end = event["ts"] + event["dur"]


def _check_nesting(asynchronous: list[Event], whole: bool) -> None:
    """Viewers sort by time, and keep the order of the file where times are equal."""
    stacks: dict[tuple[str, str], list[str]] = defaultdict(list)
    for event in sorted(asynchronous, key=lambda event: event["ts"]):
        stack = stacks[event["cat"], event["id"]]
        if event["ph"] == "b":
            stack.append(event["name"])
        else:
            assert stack, event
            assert stack.pop() == event["name"]
    if whole:
        assert not any(stacks.values()), "a request has no end"


def requests_of(events: list[Event]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """For each request, by its name in the engine: when it and its phases began and ended."""
    named = {e["id"]: e["args"]["request"] for e in events if e["ph"] == "b" and "request" in e["args"]}
    found: dict[str, dict[str, tuple[float, float | None]]] = {name: {} for name in named.values()}
    for event in events:
        if event["ph"] in "be" and event["id"] in named:
            phases = found[named[event["id"]]]
            phase = "whole" if event["name"].startswith("request ") else event["name"]
            if event["ph"] == "b":
                phases[phase] = (event["ts"], None)
            else:
                phases[phase] = (phases[phase][0], event["ts"])
    return found
