"""What parsers make of a model's output: content, reasoning, and tool calls, as they grow."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of the tool call number `index`. Its first part has an id and the function's name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """What an answer has gained, of one kind: content, or reasoning, or a part of one tool call."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class OutputParser(Protocol):
    """Reads one answer as it grows. It never fails: what it does not understand is content."""

    @property
    def needs_special_tokens(self) -> bool:
        """The text must be made with `skip_special_tokens=False`; the parser takes special tokens out of it
        where the request wants that."""
        ...

    @property
    def called_tools(self) -> bool:
        """A tool call has begun."""
        ...

    def feed(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        """What `text` adds. The tokens are those drawn since the last feed; text may lag behind them, as
        where a stop string is looked for or a character is not whole, but never runs ahead."""
        ...

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        ...


class PlainParser:
    """All text is content."""

    needs_special_tokens = False
    called_tools = False

    def feed(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        return [Delta(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


class FirstCall:
    """What another parser reads, without the tool calls after the first: `parallel_tool_calls: false`."""

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser

    @property
    def needs_special_tokens(self) -> bool:
        return self._parser.needs_special_tokens

    @property
    def called_tools(self) -> bool:
        return self._parser.called_tools

    def feed(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        return self._first(self._parser.feed(text, token_ids))

    def finish(self) -> list[Delta]:
        return self._first(self._parser.finish())

    @staticmethod
    def _first(deltas: list[Delta]) -> list[Delta]:
        return [delta for delta in deltas if all(part.index == 0 for part in delta.tool_calls)]


class Output:
    """Gathers what one feed gives; neighbours of one kind become one delta.

    With `short_ids` a call's id is nine letters and digits, as Mistral's templates demand of it when it comes
    back in a message.
    """

    def __init__(self, short_ids: bool = False) -> None:
        self.calls = 0
        self._short_ids = short_ids
        self._deltas: list[Delta] = []
        self._kind = ""
        self._pieces: list[str] = []

    def content(self, text: str) -> None:
        self._add("content", text)

    def reasoning(self, text: str) -> None:
        self._add("reasoning", text)

    def call(self, name: str) -> None:
        """Begin a tool call; arguments are of this one from now on."""
        self._flush()
        part = ToolCallDelta(self.calls, self._new_id(), name)
        self.calls += 1
        self._deltas.append(Delta(tool_calls=(part,)))

    def arguments(self, text: str) -> None:
        self._add("arguments", text)

    def take(self) -> list[Delta]:
        """What was gathered since this was last asked."""
        self._flush()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _add(self, kind: str, text: str) -> None:
        if kind != self._kind:
            self._flush()
            self._kind = kind
        if text:
            self._pieces.append(text)

    def _flush(self) -> None:
        text = "".join(self._pieces)
        self._pieces.clear()
        if not text:
            return
        if self._kind == "content":
            self._deltas.append(Delta(content=text))
        elif self._kind == "reasoning":
            self._deltas.append(Delta(reasoning=text))
        else:
            self._deltas.append(Delta(tool_calls=(ToolCallDelta(self.calls - 1, arguments=text),)))

    def _new_id(self) -> str:
        if self._short_ids:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"
