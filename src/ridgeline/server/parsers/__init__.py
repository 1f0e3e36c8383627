"""Parsers of models' output: tool calls and reasoning, streaming, for the families that are loaded."""

from ridgeline.server.parsers.deltas import Delta, FirstCall, OutputParser, PlainParser, ToolCallDelta
from ridgeline.server.parsers.families import parser_for, thinking_marks
from ridgeline.server.parsers.forced_calls import ForcedCalls

__all__ = [
    "Delta",
    "FirstCall",
    "ForcedCalls",
    "OutputParser",
    "PlainParser",
    "ToolCallDelta",
    "parser_for",
    "thinking_marks",
]
