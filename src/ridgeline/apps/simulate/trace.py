"""Traces: which requests come when, how long they are, and which of them begin alike.

A trace is a file of JSON lines, one request each, in any order of arrival:

    {"arrival_s": 1.5, "prompt": 300, "output_tokens": 120}
    {"id": "a1", "arrival_s": 2, "prompt": [["system", 512], ["a-asks-1", 40]], "output_tokens": 80,
     "output": "a-told-1", "class": "interactive", "tenant": "acme"}
    {"id": "a2", "after": "a1", "delay_s": 6.5, "output_tokens": 90,
     "prompt": [["system", 512], ["a-asks-1", 40], ["a-told-1", 80], ["a-asks-2", 25]]}

`prompt` is a number of tokens that no other request has, or a list of parts: a name, and how many tokens. A
part's tokens depend on its name alone, and a shorter part is the start of a longer one of that name, so two
prompts are the same exactly as far as their parts are. `output` names the tokens of the answer, which a later
prompt may hold. A request comes at `arrival_s`, in seconds, or `delay_s` after the end of the one that
`after` names, which stands on a line before it.

Mooncake's traces (Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST 2025) are read too:
`timestamp` in milliseconds, `input_length`, `output_length`, and `hash_ids`, one for each 512 tokens of the
prompt, the last perhaps for fewer. An `output_length` of 0 counts as 1, as an engine draws a token behind
every prompt.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ridgeline.apps.json_lines import json_lines
from ridgeline.types import SERVICE_CLASSES, ConfigError, ServiceClass

MOONCAKE_BLOCK_TOKENS = 512
MOST_REQUESTS = 1_000_000
MOST_TOKENS = 1 << 22
"""Of one prompt, and of one answer."""
MOST_S = 1e8

Part = tuple[str, int]
"""The name of some tokens, and how many of them."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace. It comes at `arrival_s`, or, where that is None, `delay_s` after the end of the
    request called `after`."""

    id: str
    prompt: tuple[Part, ...]
    output_tokens: int
    arrival_s: float | None = 0.0
    after: str | None = None
    delay_s: float = 0.0
    output: str = ""
    service_class: ServiceClass = "interactive"
    tenant: str = ""

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for _, tokens in self.prompt)

    @property
    def answer(self) -> str:
        """The name of the answer's tokens, its own where the trace gives none."""
        return self.output or f"{self.id}/output"


def tokens_of(parts: Iterable[Part], vocabulary: int) -> list[int]:
    """The token ids of some parts, each 0 to `vocabulary` - 1."""
    return list(itertools.chain.from_iterable(_stream(name, count, vocabulary) for name, count in parts))


def _stream(name: str, count: int, vocabulary: int) -> list[int]:
    """The first tokens of a name: splitmix64 (Steele et al., "Fast Splittable Pseudorandom Number
    Generators", OOPSLA 2014) from a hash of it."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    places = np.arange(1, count + 1, dtype=np.uint64)
    mixed = places * np.uint64(0x9E3779B97F4A7C15) + np.uint64(int.from_bytes(digest, "little"))
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    found: list[int] = (mixed % np.uint64(vocabulary)).tolist()
    return found


# ------------------------------------------------------------------------------------------- reading


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    prompt: int | list[tuple[str | int, int]]
    output_tokens: int
    id: str | None = None
    arrival_s: float | None = None
    after: str | None = None
    delay_s: float | None = None
    output: str | None = None
    service_class: str = msgspec.field(default="interactive", name="class")
    tenant: str = ""


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


_OURS = msgspec.json.Decoder(_Line)
_MOONCAKE = msgspec.json.Decoder(_MooncakeLine)
_ACCEPTED = (
    'accepted: {"arrival_s": 0.5, "prompt": 300, "output_tokens": 100} or parts as "prompt": '
    '[["name", 300]], with "id", "after" and "delay_s", "output", "class", "tenant"; or Mooncake\'s '
    "timestamp, input_length, output_length, hash_ids"
)


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a file, in its order. Raises OSError, and ConfigError with the number of a line that is
    no request."""
    found: list[TraceRequest] = []
    known: set[str] = set()
    mooncake = None
    for number, text in json_lines(path):
        where = f"{path}, line {number}"
        if mooncake is None:
            mooncake = b'"input_length"' in text
        request = _mooncake(text, number, where) if mooncake else _ours(text, number, where)
        if request.id in known:
            raise ConfigError(f"{where}: id is {request.id!r} a second time; accepted: one of its own")
        if request.after is not None and request.after not in known:
            raise ConfigError(f"{where}: after is {request.after!r}; accepted: the id of a line before")
        known.add(request.id)
        found.append(request)
        if len(found) > MOST_REQUESTS:
            raise ConfigError(f"{where} is one too many; accepted: up to {MOST_REQUESTS} requests")
    if not found:
        raise ConfigError(f"{path} has no requests; {_ACCEPTED}")
    return found


def _decoded(decoder: msgspec.json.Decoder[Any], text: bytes, where: str) -> Any:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}; {_ACCEPTED}") from None


def _ours(text: bytes, number: int, where: str) -> TraceRequest:
    line: _Line = _decoded(_OURS, text, where)
    name = f"line {number}" if line.id is None else line.id
    if (line.arrival_s is None) == (line.after is None):
        seen = "neither" if line.after is None else "both"
        raise ConfigError(f"{where} has {seen} of arrival_s and after; accepted: one of them")
    if line.delay_s is not None and line.after is None:
        raise ConfigError(
            f"{where}: delay_s is {line.delay_s:g} without after; accepted: with an id as after"
        )
    for key, seconds in (("arrival_s", line.arrival_s), ("delay_s", line.delay_s)):
        if seconds is not None and not 0 <= seconds <= MOST_S:
            raise ConfigError(f"{where}: {key} is {seconds:g}; accepted: seconds, 0 to {MOST_S:g}")
    if line.service_class not in SERVICE_CLASSES:
        raise ConfigError(f"{where}: class is {line.service_class!r}; accepted: {', '.join(SERVICE_CLASSES)}")
    if isinstance(line.prompt, int):
        parts: tuple[Part, ...] = ((f"{name}/prompt", line.prompt),)
    else:
        parts = tuple((str(part), tokens) for part, tokens in line.prompt)
    _check_tokens(where, "prompt", parts, line.output_tokens)
    return TraceRequest(
        name,
        parts,
        line.output_tokens,
        line.arrival_s,
        line.after,
        line.delay_s or 0.0,
        line.output or "",
        line.service_class,
        line.tenant,
    )


def _mooncake(text: bytes, number: int, where: str) -> TraceRequest:
    line: _MooncakeLine = _decoded(_MOONCAKE, text, where)
    if not 0 <= line.timestamp <= MOST_S * 1e3:
        raise ConfigError(f"{where}: timestamp is {line.timestamp:g}; accepted: milliseconds, 0 or more")
    block = MOONCAKE_BLOCK_TOKENS
    if not 1 <= line.input_length <= MOST_TOKENS:
        raise ConfigError(f"{where}: input_length is {line.input_length}; accepted: 1 to {MOST_TOKENS}")
    wanted = -(-line.input_length // block)
    if len(line.hash_ids) != wanted:
        raise ConfigError(
            f"{where}: {len(line.hash_ids)} hash_ids for an input_length of {line.input_length}; "
            f"accepted: {wanted}, one for each {block} tokens"
        )
    rest = line.input_length - block * (wanted - 1)
    sizes = [*itertools.repeat(block, wanted - 1), rest]
    parts = tuple((str(name), tokens) for name, tokens in zip(line.hash_ids, sizes, strict=True))
    output_tokens = line.output_length or 1
    _check_tokens(where, "input_length", parts, output_tokens)
    return TraceRequest(f"line {number}", parts, output_tokens, line.timestamp / 1e3)


def _check_tokens(where: str, name: str, parts: Sequence[Part], output_tokens: int) -> None:
    """Raise ConfigError unless a prompt and its answer have tokens, and not too many."""
    total = sum(tokens for _, tokens in parts)
    if min((tokens for _, tokens in parts), default=0) < 1 or total > MOST_TOKENS:
        raise ConfigError(
            f"{where}: {name} is {total} tokens in {len(parts)} parts; accepted: 1 to {MOST_TOKENS} in all, "
            "1 at least in each"
        )
    if not 1 <= output_tokens <= MOST_TOKENS:
        raise ConfigError(f"{where}: output_tokens is {output_tokens}; accepted: 1 to {MOST_TOKENS}")


# ------------------------------------------------------------------------------------------- writing


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> None:
    """Write what `read_trace` reads. Raises OSError."""
    encode = msgspec.json.Encoder().encode
    with path.open("wb") as file:
        for request in requests:
            file.write(encode(_line_of(request)) + b"\n")


def _line_of(request: TraceRequest) -> dict[str, Any]:
    line: dict[str, Any] = {"id": request.id}
    if request.after is None:
        line["arrival_s"] = request.arrival_s
    else:
        line |= {"after": request.after, "delay_s": request.delay_s}
    line |= {"prompt": request.prompt, "output_tokens": request.output_tokens}
    if request.output:
        line["output"] = request.output
    if request.service_class != "interactive":
        line["class"] = request.service_class
    if request.tenant:
        line["tenant"] = request.tenant
    return line
