"""Bodies and fields that are wrong, on every route that takes a body, streamed and not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from faults.house import House, error_of, short
from faults.routes import Route, described, routes

NOT_JSON: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "not JSON"),
    ("cut off", b"{", "not JSON"),
    ("open brackets", b"[" * 10_000, "nested"),
    ("deep", b"[" * 10_000 + b"]" * 10_000, "nested"),
    ("a string without end", b'"' + b'\\"' * 100_000 + b"[" * 100, "not JSON"),
    ("two values", b"{} {}", "not JSON"),
    ("a comma too many", b'{"model": null,}', "not JSON"),
    ("no UTF-8", b'{"model": "\xff"}', "UTF-8"),
    ("UTF-16", '{"model": "x"}'.encode("utf-16"), "UTF-8"),
    ("a byte order mark", b"\xef\xbb\xbf{}", "JSON"),
    ("thousands of digits", b"1" * 10_000, "number"),
    ("a line break in a string", b'{"model": "\n"}', "not JSON"),
    ("an array", b"[]", "an array"),
    ("null", b"null", "null"),
    ("a string", b'"x"', "a string"),
    ("a number", b"3", "a number"),
    ("a truth value", b"true", "a truth value"),
]
WRONG_INSIDE: list[tuple[str, str, str]] = [
    ("deep object", '"metadata": ' + '{"a":' * 10_000 + "1" + "}" * 10_000 + ", ", "nested"),
    ("deep enough", '"metadata": ' + "[" * 64 + "]" * 64 + ", ", "nested"),
    ("NaN", '"temperature": NaN, ', "NaN"),
    ("infinity", '"temperature": -Infinity, ', "-Infinity"),
    ("a number over all", '"temperature": 1e999, ', "too large"),
    ("more than 64 bits", '"max_tokens": 18446744073709551616, ', "too large"),
    ("more than 64 bits, below zero", '"max_tokens": -9223372036854775809, ', "too large"),
    ("digits without end", '"seed": ' + "9" * 10_000 + ", ", "too"),
    ("a key twice", '"model": null, "model": null, ', "twice"),
    ("a key twice, escaped", '"model": null, "\\u006dodel": null, ', "twice"),
    ("a key twice, inside", '"metadata": {"b": {"a": 1, "a": 1}}, ', "twice"),
    ("a lone surrogate", '"user": "\\ud800", ', "surrogate"),
    ("a key with a lone surrogate", '"\\udc00x": 1, ', "surrogate"),
]


def test_row_13_what_is_not_json(house: House) -> None:
    with house.web() as web:
        for route in routes(house):
            for name, content, told in NOT_JSON:
                error = error_of(web.post(route.path, content=content), 400)
                assert told in error["message"], (route.path, name, error)
                assert error["type"] == "invalid_request_error"
            for name, first, told in WRONG_INSIDE:
                error = error_of(web.post(route.path, content=route.text(first)), 400)
                assert told in error["message"], (route.path, name, error)
            assert web.post(route.path, content=route.text('"model": null, ')).status_code == 200


# ----------------------------------------------------------------------------------------------- types

VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    7,
    1.5,
    -(2**63),
    2**64 - 1,
    1e300,
    "",
    "text",
    "\x00\n\x1b[31m",
    [],
    [None],
    [1],
    [[1]],
    ["x"],
    [{}],
    {},
    {"a": 1},
    {"1": "x"},
    {"a\nb": "x"},
    {"role": [1]},
]


def fits(schema: Mapping[str, Any], value: Any, schemas: Mapping[str, Any]) -> bool:
    """Whether a value has one of the types that a schema allows; its bounds are another matter."""
    if "$ref" in schema:
        return fits(schemas[schema["$ref"].rsplit("/", 1)[1]], value, schemas)
    if "anyOf" in schema:
        return any(fits(each, value, schemas) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = schema.get("type")
    if kind == "array" and type(value) is list:
        return all(fits(schema["items"], each, schemas) for each in value)
    if kind == "object" and type(value) is dict:
        more, known = schema.get("additionalProperties", True), schema.get("properties", {})
        if any(name not in value for name in schema.get("required", ())):
            return False
        return all(
            fits(known[name], each, schemas) if name in known else _fits_more(more, each, schemas)
            for name, each in value.items()
        )
    types: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "boolean": (bool,),
        "integer": (int,),
        "number": (int, float),
        "null": (type(None),),
    }
    return kind is None or type(value) in types.get(str(kind), ())


def _fits_more(more: Any, value: Any, schemas: Mapping[str, Any]) -> bool:
    return fits(more, value, schemas) if isinstance(more, dict) else bool(more)


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.full)])
def test_row_14_wrong_types_in_any_field(house: House, share: int) -> None:
    """Each field with each value, or with every fourth, which are others for the next field."""
    schemas = described(house)["components"]["schemas"]
    tried = 0
    with house.web() as web:
        for route in routes(house):
            for number, (field, schema) in enumerate(route.fields.items()):
                for value in VALUES[number % share :: share]:
                    brief = {"stop_token_ids": list(range(288))} if route.has("stop_token_ids") else {}
                    answer = web.post(route.path, json=route.with_(**{**brief, field: value}))
                    known = fits(schema, value, schemas) or (value is None and field not in route.required)
                    assert answer.status_code < 500, (route.path, field, value, answer.text)
                    if not known:
                        error = error_of(answer, 400)
                        assert error["param"] == field, (route.path, field, value, error)
                        tried += 1
                    elif answer.status_code != 200:
                        error_of(answer, 400, 404)
    assert tried > 400


def parts(value: Any) -> dict[str, list[Any]]:
    """A wrong value at each place inside the fields that have an inside."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    function = call["function"]
    assert isinstance(function, dict)
    calls: list[Any] = [
        value,
        [value],
        [{**call, "function": value}],
        [{**call, "function": {**function, "arguments": value}}],
        [{**call, "function": {**function, "name": value}}],
    ]
    messages: list[Any] = [
        {"role": value, "content": "x"},
        {"role": "user", "content": value},
        {"role": "user", "content": [value]},
        {"role": "user", "content": [{"type": value, "text": "x"}]},
        {"role": "user", "content": [{"type": "text", "text": value}]},
        {"role": "tool", "tool_call_id": value, "content": "x"},
        {"role": "user", "content": "x", "name": value},
        {"role": "assistant", "content": None, "reasoning_content": value},
        {"content": "x", "more": value},
        *({"role": "assistant", "content": None, "tool_calls": each} for each in calls),
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    return {
        "messages": [[each] for each in messages],
        "tools": [
            [{**tool, "type": value}],
            [{**tool, "function": value}],
            [{"type": "function", "function": {"name": value, "parameters": value}}],
        ],
        "documents": [[{"title": value, "text": value}]],
        "chat_template_kwargs": [{"x": value}, {"enable_thinking": value}],
        "stream_options": [{"include_usage": value}, {"include_obfuscation": value}, {"more": value}],
        "tool_choice": [{"type": value}, {"type": "function", "function": value}],
        "logit_bias": [{"5": value}],
        "response_format": [{"type": value}, {"type": "json_schema", "json_schema": value}],
        "structured_outputs": [{"json": value}, {"choice": value}, {"regex": value}],
    }


@pytest.mark.parametrize("value", VALUES, ids=short)
def test_row_14_wrong_types_inside_fields(house: House, value: Any) -> None:
    with house.web() as web:
        for route in routes(house):
            for field, wrong in parts(value).items():
                for each in wrong if route.has(field) else ():
                    body = route.with_(**{field: each})
                    if field == "messages":
                        body.pop("prompt", None)
                    answer = web.post(route.path, json=body)
                    if answer.status_code != 200:
                        error_of(answer, 400)


WRONG_PARTS: list[tuple[str, Any]] = [
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("stream_options", {"unknown": True}),
    *[("chat_template_kwargs", {name: []}) for name in ("messages", "self", "tools")],
]


@pytest.mark.parametrize(("field", "value"), WRONG_PARTS, ids=short)
def test_row_14_wrong_parts_of_fields(house: House, field: str, value: Any) -> None:
    with house.web() as web:
        for route in routes(house):
            if route.has(field):
                body = {name: given for name, given in route.body.items() if name != "prompt"}
                messages = [{"role": "user", "content": "x"}]
                body = {**body, "messages": messages, field: value}
                error = error_of(web.post(route.path, json=body), 400)
                assert error["param"] == field, error


UNKNOWN = ("something_new", "guided_json", "prompt_embeds", "__class__", "")


def test_row_14_fields_that_nobody_knows(house: House) -> None:
    with house.web() as web:
        for route in routes(house):
            for field in UNKNOWN:
                for value in (1, "x", [1], {"a": 1}):
                    error = error_of(web.post(route.path, json=route.with_(**{field: value})), 400)
                    assert error["param"] == field
                    assert repr(field) in error["message"]


# ------------------------------------------------------------------------------------------------ text


def texts(route: Route, text: str) -> list[dict[str, Any]]:
    """Bodies that have a text at each place that takes one."""
    made = [route.with_(**{name: text}) for name in ("prompt", "input", "model", "stop") if route.has(name)]
    made += [route.with_(**{name: [text]}) for name in ("prompt", "input", "stop") if route.has(name)]
    if route.has("messages"):
        body = {name: value for name, value in route.body.items() if name != "prompt"}
        contents = (text, [{"type": "text", "text": text}])
        made += [{**body, "messages": [{"role": "user", "content": content}]} for content in contents]
        made += [{**body, "messages": [{"role": text, "content": "x"}]}]
    return made


@pytest.mark.parametrize("text", ["", "\x00", "a\x00b", "\ufffe\uffff", "\u202e\x1b[2J", "\U0010ffff" * 50])
def test_row_15_odd_texts(house: House, text: str) -> None:
    with house.web() as web:
        for route in routes(house):
            for body in texts(route, text):
                answer = web.post(route.path, json=body)
                if answer.status_code != 200:
                    error_of(answer, 400, 404)
                elif not body.get("stream"):
                    assert answer.json()


def test_row_15_nothing_to_answer(house: House) -> None:
    empty: dict[str, list[Any]] = {
        "messages": [[], None, [{}]],
        "prompt": [[], [[]], None],
        "input": [[], [[]], None],
        "tokens": [None],
    }
    with house.web() as web:
        for route in routes(house):
            for name in route.required:
                for value in empty[name]:
                    error = error_of(web.post(route.path, json=route.with_(**{name: value})), 400)
                    assert error["param"] == name


def test_row_15_lone_surrogates(house: House) -> None:
    """As escapes and as bytes, which no JSON library would send."""
    with house.web() as web:
        for route in routes(house):
            for body in texts(route, "@@"):
                content = json.dumps(body).encode()
                for lone in (b"\\ud800", b"\\udfff\\ud800", b"\xed\xa0\x80", b"x\\uDBFFy"):
                    error_of(web.post(route.path, content=content.replace(b"@@", lone)), 400)
                pair = web.post(route.path, content=content.replace(b"@@", b"\\ud83d\\ude00"))
                assert pair.status_code in (200, 400, 404)


# -------------------------------------------------------------------------------------------- the model


def test_row_16_unknown_models(house: House) -> None:
    names = ("gpt-5", "llam", "LLAMA", "llama ", " llama", "llama/x", "", "x" * 100_000, "/etc/passwd")
    with house.web() as web:
        for name in names:
            for route in routes(house):
                answer = web.post(route.path, json=route.with_(model=name))
                error = error_of(answer, 404)
                assert (error["code"], error["param"]) == ("model_not_found", "model")
                assert len(error["message"]) < 400
        for path in ("gpt-5", "llama/", "llama/x", "%20llama"):
            assert error_of(web.get(f"/v1/models/{path}"), 404)["code"] == "model_not_found"
        assert web.get("/v1/models/llama").status_code == 200


# ------------------------------------------------------------------------------------------- token ids

NO_TOKENS = [-1, -(2**31), 288, 2**31, 2**32 + 5, 2**63 - 1, 2**64 - 1]


@pytest.mark.parametrize("token", NO_TOKENS)
def test_row_17_token_ids_that_are_none(house: House, token: int) -> None:
    with house.web() as web:
        last = 288 - 1
        for route in routes(house):
            wrong: dict[str, list[Any]] = {
                "prompt": [[token], [5, token], [[5], [token, 5]]],
                "input": [[token], [5, token], [[5], [token, 5]]],
                "tokens": [[token], [5, token]],
                "stop_token_ids": [[token], [last, token]],
                "logit_bias": [{str(token): 1}, {"5": 1, str(token): 0}],
            }
            for field, values in wrong.items():
                for value in values if route.has(field) and (route.path, field) != TEXT_ONLY else ():
                    error = error_of(web.post(route.path, json=route.with_(**{field: value})), 400)
                    assert error["param"] == field, error
            for field, value in (("stop_token_ids", [last]), ("logit_bias", {str(last): 1})):
                if route.has(field):
                    assert web.post(route.path, json=route.with_(**{field: value})).status_code == 200


TEXT_ONLY = ("/tokenize", "prompt")
"""Takes no token ids."""


# ---------------------------------------------------------------------------------------------- numbers

OUT_OF_RANGE: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-1, -1e-9, 101, 1e308)],
    *[("top_p", value) for value in (0, -0.1, 1.0001, 2)],
    *[("top_k", value) for value in (-2, -(2**63))],
    *[("min_p", value) for value in (-0.1, 1.1)],
    *[("n", value) for value in (0, -1, 129)],
    *[("repetition_penalty", value) for value in (0, -1, 5e-324, 101)],
    *[("presence_penalty", value) for value in (-2.1, 3)],
    *[("frequency_penalty", value) for value in (-2.1, 3)],
    *[("logit_bias", value) for value in ({"5": 101}, {"5": -1e9}, {"x": 1}, {"5.0": 1}, {" 5": 1}, {"": 1})],
    *[("max_tokens", value) for value in (0, -1)],
    *[("max_completion_tokens", value) for value in (0, -1)],
    *[("min_tokens", value) for value in (-1, 3, 2**63)],
    *[("seed", value) for value in (-(2**63) - 1, 2**64)],
    *[("top_logprobs", value) for value in (-1, 21)],
    *[("stop", value) for value in ([""], ["x"] * 65, ["x", ""], "x" * 4097)],
]


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE, ids=short)
def test_row_18_numbers_out_of_range(house: House, field: str, value: Any) -> None:
    with house.web() as web:
        takers = [route for route in routes(house) if route.has(field)]
        assert takers
        for route in takers:
            body = route.with_(**{field: value})
            if field == "top_logprobs":
                body["logprobs"] = True
            error_of(web.post(route.path, json=body), 400)


def test_row_18_no_number_is_infinite(house: House) -> None:
    """Whatever field it stands in: JSON has no such number."""
    with house.web() as web:
        for route in routes(house):
            for text in ("Infinity", "-Infinity", "NaN", "1e400", "-1e400"):
                for field in ("temperature", "top_p", "model", "max_tokens", "unheard_of"):
                    error_of(web.post(route.path, content=route.text(f'"{field}": {text}, ')), 400)


def test_row_18_the_ends_of_the_ranges(house: House) -> None:
    ends: list[dict[str, Any]] = [
        {"temperature": 100, "seed": 2**64 - 1},
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 1},
        {"temperature": 1e-30, "top_k": 2**63 - 1, "top_p": 5e-324, "seed": -(2**63)},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 100},
        {"repetition_penalty": 0.01, "logit_bias": {"5": -100, "287": 100}},
        {"max_tokens": 2, "min_tokens": 2, "stop": "x" * 4096},
        {"max_tokens": 2**64 - 1, "stop_token_ids": list(range(288))},
    ]
    with house.web() as web:
        for route in routes(house):
            for body in ends if route.has("temperature") else ():
                answer = web.post(route.path, json=route.with_(**body))
                assert answer.status_code == 200, (body, answer.text)
