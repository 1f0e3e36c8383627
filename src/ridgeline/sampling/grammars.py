"""From the form that a request asks for to a grammar as llguidance reads it.

Everything here runs on text that a stranger sent. The library bounds the work that it does itself; what is
done in Python is bounded here.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ridgeline.types import RequestError, StructuredOutputsParams

MAX_GRAMMAR = 2**14
"""Characters of a grammar or an expression: those that are the slowest to be refused take two seconds
here."""
MAX_GBNF_RULES = 500
"""The translation of GBNF takes time that grows with their square, about 0.1 s at the limit."""
MAX_INTERSECTIONS = 16
"""Things of which all must hold at once: more than some twenty can take the library for ever."""
MAX_MULTIPLES = 100_000
"""The sum of what a schema's numbers are to be multiples of: each has an automaton of so many states."""
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
            return LLMatcher.grammar_from_regex(_bounded("regex", form.regex))
        if form.choice is not None:
            return LLMatcher.grammar_from_lark(_choices(form.choice))
        assert form.grammar is not None
        return LLMatcher.grammar_from_lark(_lark(_bounded("grammar", form.grammar)))
    except ValueError as error:
        raise unusable(str(error)) from None


def unusable(cause: str) -> RequestError:
    """What a request is told of a form that cannot be compiled."""
    line = " ".join(cause.removesuffix("<non-verbose/>").split())
    return RequestError(f"structured_outputs cannot be used: {line[:_MAX_CAUSE]}")


def _json_options(form: StructuredOutputsParams) -> Any:
    options = {"lenient": False}  # what is not understood is refused, never ignored
    if form.disable_any_whitespace:
        return {**options, "whitespace_flexible": False}
    return {**options, "whitespace_pattern": form.whitespace_pattern or WHITESPACE}


def _bounded(name: str, text: str) -> str:
    if len(text) > MAX_GRAMMAR:
        raise RequestError(
            f"structured_outputs {name} has {len(text)} characters; accepted: up to {MAX_GRAMMAR}"
        )
    return text


def _schema(form: StructuredOutputsParams) -> str:
    assert isinstance(form.json, str)
    try:
        schema = json.loads(form.json)
        _check_cost(schema)
        return json.dumps(_closed(schema)) if form.disable_additional_properties else form.json
    except RecursionError:
        raise RequestError("structured_outputs json is nested too deeply") from None


def _check_cost(schema: Any) -> None:
    """Refuse what is short to write and would take the library long."""
    todo, multiples, intersections = [schema], 0.0, 0
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            todo += part.values()
            intersections += len(part["allOf"]) if isinstance(part.get("allOf"), list) else 0
            multiples += _states(part.get("multipleOf"))
    if intersections > MAX_INTERSECTIONS:
        seen = f"structured_outputs json has {intersections} parts of allOf"
        raise RequestError(f"{seen}; accepted: up to {MAX_INTERSECTIONS}")
    if multiples > MAX_MULTIPLES:
        seen = f"structured_outputs json has multipleOf adding up to {multiples:g}"
        raise RequestError(f"{seen}; accepted: up to {MAX_MULTIPLES}")


def _states(multiple: Any) -> float:
    """A number's significant digits as a whole number."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float):
        return 0.0
    return (
        float(f"{abs(multiple):.17g}".partition("e")[0].replace(".", "")) if multiple % 1 else abs(multiple)
    )


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
        raise RequestError(
            f"structured_outputs choice has {len(choices)} texts; accepted: up to {MAX_CHOICES}"
        )
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices)


def _lark(grammar: str) -> str:
    """A grammar in Lark, translated where it is GBNF."""
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if "::=" not in grammar or is_lark_syntax(grammar):
        return _checked_lark(grammar)
    rules = grammar.count("::=")
    if rules > MAX_GBNF_RULES:
        raise RequestError(
            f"structured_outputs grammar has {rules} rules; accepted: up to {MAX_GBNF_RULES}, or Lark"
        )
    try:
        return gbnf_to_lark(_without_codes(grammar))
    except RecursionError:
        raise RequestError("structured_outputs grammar is nested too deeply") from None
    except Exception as error:  # its own kinds of error, and those of text that ends too soon
        raise unusable(f"{error}") from None


def _checked_lark(grammar: str) -> str:
    if grammar.count("&") > MAX_INTERSECTIONS:
        seen = f"structured_outputs grammar has {grammar.count('&')} times &"
        raise RequestError(f"{seen}; accepted: up to {MAX_INTERSECTIONS}")
    if "%json" in grammar and ("allOf" in grammar or "multipleOf" in grammar):
        raise RequestError("structured_outputs grammar has %json with allOf or multipleOf; accepted: json")
    return grammar


_CODES = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_NAMED = {'"': r"\"", "\\": "\\\\", "]": r"\]", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


def _without_codes(grammar: str) -> str:
    """GBNF with characters in the place of their numbers, which the translation does not get right."""

    def character(found: re.Match[str]) -> str:
        digits = found[1] or found[2] or found[3]
        code = int(digits, 16) if digits else -1
        if not 0 <= code <= 0x10FFFF or 0xD800 <= code < 0xE000:
            return found[0]
        return _NAMED.get(chr(code), chr(code))

    return _CODES.sub(character, grammar)
