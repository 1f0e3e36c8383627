"""From the form that a request asks for to a grammar as llguidance reads it.

Everything here runs on text that a stranger sent. The library bounds the work that it does itself; what is
done in Python is bounded here.
"""

from __future__ import annotations

import json
from typing import Any

from ridgeline.types import RequestError, StructuredOutputsParams

MAX_GBNF = 2**15
MAX_GBNF_RULES = 500
"""The translation of GBNF takes time that grows with the square of both, about half a second at the
limits."""
MAX_CHOICES = 4096
WHITESPACE = r"[ \t\n\r]{1,32}"
"""What may stand between JSON's tokens. Without a bound, a model that likes blanks never comes to an end."""
_MAX_CAUSE = 200


def grammar_of(form: StructuredOutputsParams) -> str:
    """The grammar, not yet compiled. Raises RequestError for what cannot be one."""
    from llguidance import LLMatcher

    try:
        if form.json_object:
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_json_options(form))
        if form.json is not None:
            return LLMatcher.grammar_from_json_schema(_schema(form), overrides=_json_options(form))
        if form.regex is not None:
            return LLMatcher.grammar_from_regex(form.regex)
        if form.choice is not None:
            return LLMatcher.grammar_from_lark(_choices(form.choice))
        assert form.grammar is not None
        return LLMatcher.grammar_from_lark(_lark(form.grammar))
    except ValueError as error:
        raise unusable(str(error)) from None


def unusable(cause: str) -> RequestError:
    """What a request is told of a form that cannot be compiled."""
    line = " ".join(cause.removesuffix("<non-verbose/>").split())
    return RequestError(f"structured_outputs cannot be used: {line[:_MAX_CAUSE]}")


def _json_options(form: StructuredOutputsParams) -> dict[str, Any]:
    options: dict[str, Any] = {"lenient": False}  # what is not understood is refused, never ignored
    if form.disable_any_whitespace:
        return {**options, "whitespace_flexible": False}
    return {**options, "whitespace_pattern": form.whitespace_pattern or WHITESPACE}


def _schema(form: StructuredOutputsParams) -> str:
    assert isinstance(form.json, str)
    if not form.disable_additional_properties:
        return form.json
    try:
        return json.dumps(_closed(json.loads(form.json)), ensure_ascii=False)
    except RecursionError:
        raise RequestError("structured_outputs json is nested too deeply") from None


_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_OF_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")


def _closed(schema: Any) -> Any:
    """The schema, in which objects have no properties but those that it names."""
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _OF_SCHEMAS and isinstance(value, dict):
            closed[key] = {name: _closed(each) for name, each in value.items()}
        elif key in _OF_LISTS and isinstance(value, list):
            closed[key] = [_closed(each) for each in value]
        else:
            closed[key] = _closed(value) if key in ("items", "additionalProperties") else value
    if ("properties" in schema or "patternProperties" in schema) and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


def _choices(choices: Any) -> str:
    if len(choices) > MAX_CHOICES:
        raise RequestError(f"choice has {len(choices)} texts; accepted: up to {MAX_CHOICES}")
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices)


def _lark(grammar: str) -> str:
    """A grammar in Lark, translated where it is GBNF."""
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if "::=" not in grammar or is_lark_syntax(grammar):
        return grammar
    rules = grammar.count("::=")
    if len(grammar) > MAX_GBNF or rules > MAX_GBNF_RULES:
        seen = f"grammar has {rules} rules in {len(grammar)} characters of GBNF"
        raise RequestError(f"{seen}; accepted: up to {MAX_GBNF_RULES} in {MAX_GBNF}, or Lark")
    try:
        return gbnf_to_lark(grammar)
    except RecursionError:
        raise RequestError("grammar is nested too deeply") from None
    except Exception as error:  # its own kinds of error, and those of text that ends too soon
        raise unusable(f"{error}") from None
