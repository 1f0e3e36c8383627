"""The recent steps of a server that runs, from its stream `GET /v1/steps`: what kinds there were, and what
bounds each."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec

from ridgeline.apps.load.connections import Connections
from ridgeline.apps.load.events import EventParser
from ridgeline.apps.load.failures import FailureError
from ridgeline.records import RECENT_STEPS, StepRecord
from ridgeline.types import RequestError

_WAIT_S = 2.0
"""After this long the recent steps have come, also from a server whose stream goes on."""
_MODELS_BYTES = 1 << 20
_ENOUGH = "enough"
_DECODE = msgspec.json.Decoder(StepRecord).decode


def parse_step(data: bytes) -> StepRecord:
    """Raises RequestError for what is no step."""
    try:
        step = _DECODE(data)
    except (msgspec.DecodeError, RecursionError):
        step = None
    if step is None or not _is_sound(step):
        raise RequestError(f"the server's step is {data[:80]!r}; accepted: those of ridgeline's /v1/steps")
    return step


def _is_sound(step: StepRecord) -> bool:
    """Whether what is computed with is in its range."""
    tokens = step.rows, step.sequences, step.prompt_tokens, step.decoded_tokens, step.accepted_tokens
    sizes = step.weight_bytes, step.kv_bytes, step.elapsed_s
    return min(*tokens, *sizes) >= 0 and step.accepted_tokens <= step.drafted_tokens


@dataclass(frozen=True, slots=True)
class Served:
    """A server's model, as it calls it, the device, how many matrices run in each number format, and the
    recent steps."""

    model: str
    device: str | None
    formats: dict[str, int]
    steps: tuple[StepRecord, ...]


def recent_steps(url: str, count: int, api_key: str | None = None) -> Served:
    """The last steps of a server, at most `count` and all that it remembers.

    Raises RequestError with one line for a server that cannot be reached, or is not one of ours.
    """
    if not 1 <= count <= RECENT_STEPS:
        raise RequestError(f"recent is {count}; accepted: 1 to {RECENT_STEPS}")
    return asyncio.run(_ask(url, count, api_key))


async def _ask(url: str, count: int, api_key: str | None) -> Served:
    connections = Connections(url, api_key)
    try:
        model = await _model(connections)
        steps = await _steps(connections, count)
    except FailureError as error:
        raise RequestError(f"{url}: {error}") from None
    finally:
        await connections.close()
    if not steps:
        raise RequestError(f"{url} has run no step yet; accepted: a server that has answered something")
    formats = model.get("formats")
    return Served(
        str(model.get("id", ""))[:200],
        model["device"] if isinstance(model.get("device"), str) else None,
        dict(formats) if isinstance(formats, dict) else {},
        tuple(steps),
    )


async def _model(connections: Connections) -> dict[str, Any]:
    body = bytearray()

    def receive(status: int, data: bytes, _: float) -> None:
        if len(body) + len(data) > _MODELS_BYTES:
            raise FailureError(_ENOUGH, f"more than {_MODELS_BYTES} bytes of models")
        body.extend(data)

    status = await connections.exchange("GET", "/v1/models", b"", receive, _WAIT_S)
    try:
        found = json.loads(bytes(body))["data"][0] if status == 200 else None
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"{connections.url}/v1/models answered {status}; accepted: a server with a model")
    return found


async def _steps(connections: Connections, count: int) -> list[StepRecord]:
    parser, steps = EventParser(), list[StepRecord]()

    def receive(status: int, data: bytes, _: float) -> None:
        if status != 200:
            raise FailureError(str(status), "accepted: a server with /v1/steps, and its key in --api-key")
        steps.extend(parse_step(event.data) for event in parser.feed(data) if event.data and not event.name)
        if len(steps) >= count:
            raise FailureError(_ENOUGH, "")

    try:
        status = await connections.exchange(
            "GET", f"/v1/steps?recent={count}&follow=false", b"", receive, _WAIT_S
        )
        receive(status, b"", 0.0)  # an answer may have no body
    except FailureError as error:
        if error.cause not in (_ENOUGH, "timeout"):
            raise
    return steps[:count]


@dataclass(frozen=True, slots=True)
class KindOfStep:
    """Steps of one kind together: their number, medians, and how many were bound by what."""

    kind: str
    steps: int
    rows: float
    sequences: float
    measured_s: float
    wall_s: float
    share: float
    error: float | None
    mbu: float | None
    mfu: float | None
    bounds: dict[str, int]
    weight_bytes: float
    kv_bytes: float

    @property
    def bound(self) -> str | None:
        """What bounds most of them."""
        return max(self.bounds, key=lambda bound: self.bounds[bound]) if self.bounds else None


def kinds_of(steps: Sequence[StepRecord]) -> list[KindOfStep]:
    """The steps by kind, those that took most of the time first. `share` is that of all steps' time."""
    whole_s = sum(step.elapsed_s for step in steps) or 1.0
    found = []
    for kind in dict.fromkeys(step.kind for step in steps):
        some = [step for step in steps if step.kind == kind]
        errors = [
            abs(step.elapsed_s / step.predicted_s - 1) for step in some if step.predicted_s and step.elapsed_s
        ]
        found.append(
            KindOfStep(
                kind=kind,
                steps=len(some),
                rows=median(step.rows for step in some),
                sequences=median(step.sequences for step in some),
                measured_s=median(step.elapsed_s for step in some),
                wall_s=median(step.wall_s for step in some),
                share=sum(step.elapsed_s for step in some) / whole_s,
                error=median(errors) if errors else None,
                mbu=_median([step.mbu for step in some]),
                mfu=_median([step.mfu for step in some]),
                bounds=dict(Counter(step.bound for step in some if step.bound).most_common()),
                weight_bytes=median(step.weight_bytes for step in some),
                kv_bytes=median(step.kv_bytes for step in some),
            )
        )
    return sorted(found, key=lambda one: -one.share)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
