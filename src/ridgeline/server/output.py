"""What a model's text means: content, reasoning, tool calls. Parsers of families implement OutputParser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of the tool call number `index`. Its first part has an id and the function's name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """What an answer has gained."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class OutputParser(Protocol):
    """Reads one answer as it grows. It never fails: what it does not understand is content."""

    @property
    def needs_special_tokens(self) -> bool:
        """The text must be made with `skip_special_tokens=False`; the parser then takes them out."""
        ...

    @property
    def called_tools(self) -> bool:
        """A tool call has begun."""
        ...

    def feed(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        """What `text` adds. The tokens are those that were drawn meanwhile; text may lag behind them."""
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
