"""What is asked: prompts of random words, lines of JSON, or ShareGPT's conversations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ridgeline.apps.json_lines import json_lines
from ridgeline.types import ConfigError

MAX_FILE_BYTES = 2 << 30
DEFAULT_OUTPUT_TOKENS = 128
CHARACTERS_PER_TOKEN = 4  # of English, roughly: no tokenizer is at hand
SHAREGPT_PROMPT_TOKENS = 1024  # vLLM's limits on what of ShareGPT is asked
SHAREGPT_TOTAL_TOKENS = 2048

# Words that are one token each in most vocabularies, so that a prompt of n words has about n tokens.
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an "
    "they which one you were all her she there would their we him been has when who will no more if out so "
    "up said what its about than into them can only other time new some could these two may first then do "
    "any like my now over such our man me even most made after also did many off before must well back "
    "through years where much your way down should because long each just state those people too good very "
    "make world still see own work men day get here old life both between being under three never know same "
    "last another while us might great year since against go came right used take use house high part water "
    "place small number far found hand few city night room line city light road river north second power"
)
WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: a prompt or messages, and how many tokens its answer should have, where that is known."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    output_tokens: int | None = None

    def body(self, endpoint: str) -> dict[str, Any]:
        """The fields that say what is asked. Raises ConfigError for messages on `completions`."""
        if endpoint == "completions":
            if self.prompt is None:
                raise ConfigError("the dataset has messages; accepted with completions: prompt")
            return {"prompt": self.prompt}
        return {"messages": self.messages or [{"role": "user", "content": self.prompt}]}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of random prompts and their answers, in tokens: uniform within `spread`, a share of the length."""

    prompt_tokens: int = 128
    output_tokens: int = DEFAULT_OUTPUT_TOKENS
    spread: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens"):
            if not 0 < getattr(self, name) <= 1 << 20:
                raise ConfigError(f"{name} is {getattr(self, name)}; accepted: 1 to {1 << 20}")
        if not 0 <= self.spread < 1:
            raise ConfigError(f"spread is {self.spread:g}; accepted: 0 up to less than 1")


def random_samples(lengths: Lengths, seed: int) -> Iterator[Sample]:
    """Prompts without end, no two of which begin alike for long."""
    draw = random.Random(seed)

    def near(length: int) -> int:
        return max(1, round(length * draw.uniform(1 - lengths.spread, 1 + lengths.spread)))

    while True:
        words = draw.choices(WORDS, k=near(lengths.prompt_tokens))
        yield Sample(" ".join(words), output_tokens=near(lengths.output_tokens))


def file_samples(
    path: Path, limit: int, output_tokens: int | None = None, endpoint: str = "chat"
) -> Iterator[Sample]:
    """The requests of a file as `read_samples` gives them, from the start again when they run out, without
    end."""
    return itertools.cycle(read_samples(path, limit, output_tokens, endpoint))


def read_samples(
    path: Path, limit: int, output_tokens: int | None = None, endpoint: str = "chat"
) -> list[Sample]:
    """The requests of a file in its order.

    A file that begins with "[" is ShareGPT's; any other has a JSON object on each line. At most `limit` are
    read. `output_tokens` overrides what the file says. Raises OSError, and ConfigError for what cannot be
    read, or cannot be asked at the endpoint.
    """
    size_bytes = path.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has {size_bytes} bytes; accepted: at most {MAX_FILE_BYTES}")
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    found = list(itertools.islice(_sharegpt(path) if start == b"[" else _lines(path), limit))
    if not found:
        raise ConfigError(f"{path} has no prompts; accepted: JSON lines with prompt or messages, or ShareGPT")
    for sample in found:
        sample.body(endpoint)
    if output_tokens is not None:
        found = [replace(sample, output_tokens=output_tokens) for sample in found]
    return found


# --------------------------------------------------------------------------------------------- our lines


class _Line(msgspec.Struct):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    output_tokens: int | None = None


_LINE = msgspec.json.Decoder(_Line)
_ACCEPTED = 'accepted: {"prompt": …} or {"messages": […]}, with "max_tokens" if wished'


def _lines(path: Path) -> Iterator[Sample]:
    for number, text in json_lines(path):
        yield _sample(text, f"{path}, line {number}")


def _sample(text: bytes, where: str) -> Sample:
    try:
        line = _LINE.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}; {_ACCEPTED}") from None
    if bool(line.prompt) == bool(line.messages):
        raise ConfigError(f"{where} should have either prompt or messages; {_ACCEPTED}")
    tokens = line.max_tokens if line.output_tokens is None else line.output_tokens
    if tokens is not None and not 0 < tokens <= 1 << 20:
        raise ConfigError(f"{where}: {tokens} output tokens; accepted: 1 to {1 << 20}")
    return Sample(line.prompt, line.messages, tokens)


# ---------------------------------------------------------------------------------------------- ShareGPT


class _Turn(msgspec.Struct):
    value: str | None = None


class _Conversation(msgspec.Struct):
    conversations: list[_Turn] | None = None


def _sharegpt(path: Path) -> Iterator[Sample]:
    """The first turn of each conversation, with about as many output tokens as its second has."""
    try:
        read = msgspec.json.decode(path.read_bytes(), type=list[_Conversation])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; accepted: ShareGPT's JSON, with conversations[].value") from None
    for one in read:
        turns = [turn.value for turn in (one.conversations or ())[:2] if turn.value]
        if len(turns) == 2:
            prompt_tokens, output_tokens = (-(-len(text) // CHARACTERS_PER_TOKEN) for text in turns)
            total_tokens = prompt_tokens + output_tokens
            if prompt_tokens <= SHAREGPT_PROMPT_TOKENS and total_tokens <= SHAREGPT_TOTAL_TOKENS:
                yield Sample(turns[0], output_tokens=output_tokens)
