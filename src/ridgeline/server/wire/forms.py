"""The form that a request wants its answer to have: OpenAI's `response_format` and forced tool calls, and
vLLM's `structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from ridgeline.server.errors import bad_request
from ridgeline.server.wire.base import Accepts, Body, anything, only
from ridgeline.types import SpeculationParams, StructuredOutputsParams


class JsonSchema(Body):
    """`strict` changes nothing: what we answer always has the form."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    unsupported: ClassVar[Mapping[str, Accepts]] = {"strict": only(True, False)}


def _checked(kind: type[Body]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, dict):
            kind.refuse_unsupported(value)
        return value

    return BeforeValidator(check)


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchema, _checked(JsonSchema)] | None = None

    def form(self) -> StructuredOutputsParams | None:
        """Raises RequestError and HttpError."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            message = f"response_format of type {self.type} goes with json_schema or without it"
            raise bad_request(
                f"{message}; accepted: json_schema for the type of this name", "response_format"
            )
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.schema_ is None:
            return StructuredOutputsParams(json_object=True)
        return StructuredOutputsParams(json=self.json_schema.schema_)


class StructuredOutputs(Body):
    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    unsupported: ClassVar[Mapping[str, Accepts]] = {"structural_tag": only(), "disable_fallback": anything}

    def form(self) -> StructuredOutputsParams:
        """Raises RequestError."""
        names = type(self).model_fields
        given = {field.alias or name: getattr(self, name) for name, field in names.items()}
        return StructuredOutputsParams(**given)


class Speculation(Body):
    drafter: Annotated[str, Field(max_length=64)] = "auto"
    max_tokens: int | None = None

    def params(self) -> SpeculationParams:
        """Raises RequestError."""
        return SpeculationParams(self.drafter, self.max_tokens)


ResponseFormatField = Annotated[ResponseFormat, _checked(ResponseFormat)]
StructuredOutputsField = Annotated[StructuredOutputs, _checked(StructuredOutputs)]


def _json_type(value: Any) -> str | None:
    if isinstance(value, bool):
        return "boolean"
    return "object" if isinstance(value, dict | Speculation) else None


# By its type, as what is wrong with an object is no news if all that is told is that it is not a truth value.
SpeculationField = Annotated[
    Annotated[bool, Tag("boolean")] | Annotated[Speculation, _checked(Speculation), Tag("object")],
    Discriminator(_json_type, "speculation_type", "Input should be true, false or an object"),
]


# ------------------------------------------------------------------------------------------ tool calls


def forced_calls(tools: Sequence[Any], named: str | None, parallel: bool) -> StructuredOutputsParams:
    """The form of an answer that calls one of the tools, or several, and says nothing else: a list of objects
    with `name` and `arguments`. With `named` it is one object, of that tool.

    Raises HttpError for tools that are none, and RequestError.
    """
    functions = [_function(tool) for tool in tools]
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for index, function in enumerate(functions):
        if named is None or function["name"] == named:
            place = f"tool_{index}"
            definitions[place] = _moved(_parameters(function), f"#/$defs/{place}")
            calls.append(_call(function["name"], {"$ref": f"#/$defs/{place}"}))
    if not calls:
        known = "the name of one of the tools" if functions else "tools beside it"
        raise bad_request(f"tool_choice wants {named or 'a call'}; accepted: {known}", "tool_choice")
    if named is not None:
        return StructuredOutputsParams(json={**calls[0], "$defs": definitions})
    most = {} if parallel else {"maxItems": 1}
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, "$defs": definitions}
    return StructuredOutputsParams(json=schema)


def _function(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request("tools has an entry that is no function with a name", "tools")
    return function


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    if parameters is None or parameters == {}:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict):
        raise bad_request("parameters of a tool are no JSON Schema; accepted: an object", "tools")
    return {"type": "object", **parameters}


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to its own parts are right when it stands at `place` of another."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
