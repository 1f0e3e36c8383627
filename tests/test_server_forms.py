"""Answers of a given form over HTTP: OpenAI's fields by their own client, and vLLM's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
from openai_schemas import checked, events
from serving import ServerProcess, server_process
from worded_models import make_worded

from ridgeline.server.messages import COMMANDS, Add, frame
from ridgeline.server.parsers import ForcedCalls, PlainParser, thinking_marks
from ridgeline.types import (
    RequestError,
    SamplingParams,
    SpeculationParams,
    StructuredOutputsParams,
    Thinking,
)

ASKED = [{"role": "user", "content": "Who?"}]
POINT: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "at": {"$ref": "#/$defs/side"}},
    "required": ["x", "at"],
    "additionalProperties": False,
    "$defs": {"side": {"enum": ["left", "right"]}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "go", "parameters": POINT}},
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = make_worded(tmp_path_factory.mktemp("worded"))
    with server_process(model, "--kv-cache-memory", "8M", "--served-model-name", "tiny") as server:
        yield server


@pytest.fixture(scope="module")
def web(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, event_hooks={"response": [checked]}) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    hooked = httpx.Client(timeout=60, event_hooks={"response": [checked]})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, http_client=hooked) as client:
        yield client


def chat(web: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"messages": ASKED, "max_tokens": 400, "seed": 1, **fields}
    answer = web.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


class Point(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    x: int = pydantic.Field(ge=0, le=99)
    side: Literal["left", "right"]


def test_the_openai_client_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    for seed in range(5):
        answer = client.chat.completions.parse(
            model="tiny", messages=ASKED, response_format=Point, max_tokens=300, seed=seed
        )
        assert isinstance(answer.choices[0].message.parsed, Point)
    with client.chat.completions.stream(
        model="tiny", messages=ASKED, response_format=Point, max_tokens=300, seed=2
    ) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Point)


def test_json_objects_and_schemas(web: httpx.Client) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}
    choice = chat(web, response_format=schema)
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), POINT)
    for kind in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "any"}}):
        choice = chat(web, response_format=kind, max_tokens=400)
        assert choice["finish_reason"] != "stop" or json.loads(choice["message"]["content"]) is not None
    body = {"prompt": "x", "max_tokens": 150, "response_format": schema, "n": 2, "logprobs": 1, "seed": 3}
    for each in web.post("/v1/completions", json=body).json()["choices"]:
        jsonschema.validate(json.loads(each["text"]), POINT)


def test_vllms_names(web: httpx.Client) -> None:
    assert chat(web, structured_outputs={"choice": ["yes", "no"]})["message"]["content"] in ("yes", "no")
    assert chat(web, structured_outputs={"regex": "a{3}"})["message"]["content"] == "aaa"
    assert chat(web, structured_outputs={"grammar": 'root ::= "ab"'})["message"]["content"] == "ab"
    said = chat(web, structured_outputs={"json": json.dumps(POINT), "disable_any_whitespace": True})
    jsonschema.validate(json.loads(said["message"]["content"]), POINT)
    assert chat(web, structured_outputs=None)["finish_reason"] in ("stop", "length")


def arguments_of(call: Any) -> Any:
    arguments = json.loads(call["function"]["arguments"])
    jsonschema.validate(arguments, POINT if call["function"]["name"] == "go" else {"maxProperties": 0})
    return arguments


def test_a_required_call_is_made(web: httpx.Client) -> None:
    names = set()
    for seed in range(8):
        choice = chat(web, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed)
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert not choice["message"].get("content")
        arguments_of(call)
        names.add(call["function"]["name"])
    assert names == {"go", "stop"}
    several = chat(web, tools=TOOLS, tool_choice="required")
    for call in several["message"]["tool_calls"]:
        if several["finish_reason"] == "tool_calls":
            arguments_of(call)


def test_a_named_tool_is_called_streamed_or_not(web: httpx.Client) -> None:
    named = {"type": "function", "function": {"name": "go"}}
    choice = chat(web, tools=TOOLS, tool_choice=named)
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], choice["finish_reason"]) == ("go", "stop")
    whole = arguments_of(call)
    body = {"messages": ASKED, "max_tokens": 400, "seed": 1, "tools": TOOLS, "tool_choice": named}
    text = web.post("/v1/chat/completions", json={**body, "stream": True}).text
    parts = [
        part["function"]
        for event in events(text)
        for part in event["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert [part["name"] for part in parts if "name" in part] == ["go"]
    assert json.loads("".join(part.get("arguments", "") for part in parts)) == whole


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tools"),
        ({"tools": [{"function": {"name": "f", "parameters": 5}}], "tool_choice": "required"}, "tools"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"guided_json": {}}, "guided_json"),
    ],
    ids=str,
)
def test_forms_that_make_no_sense_are_a_400(web: httpx.Client, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        body = {"messages": ASKED, "max_tokens": 5, "stream": stream, **fields}
        answer = web.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param, answer.text


# --------------------------------------------------------------------------------- the rarer samplers


def complete(web: httpx.Client, **fields: Any) -> httpx.Response:
    return web.post("/v1/completions", json={"prompt": "the sky", "max_tokens": 12, "seed": 7, **fields})


RARER: list[dict[str, Any]] = [
    {"typical_p": 0.5},
    {"top_n_sigma": 1.0},
    {"xtc_probability": 0.5, "xtc_threshold": 0.02},
    {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
    {"dry_multiplier": 2.0, "dry_base": 2.0, "dry_allowed_length": 1, "dry_penalty_last_n": 64},
    {"dry_multiplier": 1.0, "dry_sequence_breakers": ["\n"]},
    {"bad_words": ["a", "the sky"]},
]


@pytest.mark.parametrize("fields", RARER, ids=str)
def test_the_rarer_samplers_are_taken_and_repeat(web: httpx.Client, fields: dict[str, Any]) -> None:
    first, second = (complete(web, **fields).json()["choices"] for _ in range(2))
    assert first == second
    body = {"messages": ASKED, "max_tokens": 4, **fields}
    assert web.post("/v1/chat/completions", json=body).status_code == 200


def test_bad_words_are_not_said(web: httpx.Client) -> None:
    (token,) = web.post("/tokenize", json={"prompt": "a"}).json()["tokens"]
    wanted = {"logit_bias": {str(token): 100}}
    assert complete(web, **wanted).json()["choices"][0]["text"] == "a" * 12
    assert "aaa" not in complete(web, **wanted, bad_words=["a"]).json()["choices"][0]["text"]


def test_best_of_gives_n_of_more(web: httpx.Client) -> None:
    def mean(choice: dict[str, Any]) -> float:
        scores = choice["logprobs"]["token_logprobs"]
        return sum(scores) / len(scores)

    every = complete(web, n=5, logprobs=0).json()["choices"]
    best = complete(web, n=2, best_of=5, logprobs=0).json()["choices"]
    ranked = sorted(every, key=mean, reverse=True)
    assert [each["text"] for each in best] == [each["text"] for each in ranked[:2]]
    assert [each["index"] for each in best] == [0, 1]
    assert complete(web, n=2, best_of=5, stream=True).status_code == 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("typical_p", 0),
        ("mirostat", 1),
        ("xtc_probability", 2),
        ("dry_base", 0.5),
        ("dry_allowed_length", 0),
        ("bad_words", ["x"] * 300),
        ("best_of", 1000),
        ("top_n_sigma", "x"),
    ],
)
def test_values_out_of_range_are_named(web: httpx.Client, name: str, value: Any) -> None:
    answer = complete(web, **{name: value})
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == name


# ---------------------------------------------------------------------------------------- reasoning


def test_marks_of_reasoning_are_found_in_the_template_and_the_prompt() -> None:
    qwen = "{% if add_generation_prompt %}assistant\n{% endif %}<think> </think>"
    assert thinking_marks(qwen, "assistant\n") == ("<think>", "</think>", False)
    assert thinking_marks(qwen, "assistant\n<think>\n") == ("<think>", "</think>", True)
    assert thinking_marks("{{ messages }}", "x") is None
    assert thinking_marks(None, "x") is None
    with pytest.raises(RequestError, match="completions"):
        thinking_marks("<|channel|> <|message|>", "x")


def test_forms_reach_the_engine_as_they_are() -> None:
    form = StructuredOutputsParams(json={"type": "null"}, thinking=Thinking(5, 6, True))
    speculation = SpeculationParams("ngram", 4)
    params = SamplingParams(structured_outputs=form, bad_words=["x"], best_of=3, speculation=speculation)
    add = Add(1, (1,), params)
    assert COMMANDS.decode(frame(add)[4:]) == add


def test_calls_are_read_whatever_stands_around_them() -> None:
    parser = ForcedCalls(PlainParser())
    text = '[{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]'
    deltas = [delta for letter in text for delta in parser.feed(letter, ())] + parser.finish()
    calls = [part for delta in deltas for part in delta.tool_calls]
    assert [call.name for call in calls if call.name] == ["f", "g"]
    assert "".join(call.arguments for call in calls if call.index == 0) == '{"a": [1]}'
    assert not any(delta.content for delta in deltas)
    cut = ForcedCalls(PlainParser())
    assert not cut.feed('[{"na', ())
    assert [delta.content for delta in cut.finish()] == ['[{"na']


def test_speculation_is_asked_for_in_the_body(server: ServerProcess) -> None:
    """The answer is the same whatever is asked."""
    body = {"model": "tiny", "prompt": "one two one two one two", "max_tokens": 24, "seed": 5}
    texts = set()
    for asked in (None, True, False, {"drafter": "ngram", "max_tokens": 3}, {"drafter": "suffix"}, {}):
        answer = httpx.post(f"{server.url}/v1/completions", json={**body, "speculation": asked}, timeout=60)
        assert answer.status_code == 200, answer.text
        texts.add(answer.json()["choices"][0]["text"])
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"drafter": "medusa"}, "medusa"),
        ({"drafter": "m" * 100_000}, "drafter"),
        ({"drafter": ["ngram"]}, "drafter"),
        ({"max_tokens": 0}, "1 to 64"),
        ({"max_tokens": 65}, "1 to 64"),
        ({"max_tokens": "4"}, "valid integer"),
        ({"max_tokens": True}, "valid integer"),
        ({"tokens": 3}, "tokens"),
        ("ngram", "an object"),
        (["ngram"], "an object"),
        (1, "an object"),
    ],
)
def test_what_is_no_way_to_guess_is_refused(web: httpx.Client, wrong: Any, told: str) -> None:
    answer = complete(web, speculation=wrong)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "speculation"
    assert error["message"].startswith("speculation") or "'speculation." in error["message"]
    assert told in error["message"]
    assert len(error["message"]) < 200
