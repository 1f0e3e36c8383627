"""Answers that are nothing but tool calls, as `tool_choice` makes them, whatever the model's own form is."""

from __future__ import annotations

from collections.abc import Sequence

from ridgeline.server.parsers.deltas import Delta, Output, OutputParser
from ridgeline.server.parsers.json_calls import JsonCalls


class ForcedCalls:
    """The content that another parser finds, read as JSON calls. What it tells of reasoning stays."""

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser
        self._out = Output()
        self._calls = JsonCalls(self._out, "")

    @property
    def needs_special_tokens(self) -> bool:
        return self._parser.needs_special_tokens

    @property
    def called_tools(self) -> bool:
        return self._out.calls > 0

    def feed(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        return self._read(self._parser.feed(text, token_ids))

    def finish(self) -> list[Delta]:
        deltas = self._read(self._parser.finish())
        self._out.content(self._calls.unread())  # of an answer that was cut short
        return deltas + self._out.take()

    def _read(self, deltas: Sequence[Delta]) -> list[Delta]:
        for delta in deltas:
            self._out.reasoning(delta.reasoning)
            if delta.content and not self._calls.ended:
                self._calls.feed(delta.content)
        return self._out.take()
