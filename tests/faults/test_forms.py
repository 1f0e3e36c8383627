"""Rows 52 to 55: forms of answers that are made to do harm."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from faults.asking import COMPLETIONS, LONG, Asked
from faults.house import House, error_of, short
from ridgeline import LLM
from ridgeline.model.tokenizer import Tokenizer
from ridgeline.sampling import constraints as constraints_module
from ridgeline.sampling.constraints import Constraints
from ridgeline.types import RequestError, SamplingParams, StructuredOutputsParams

EXPLODING: list[dict[str, Any]] = [
    {"regex": "(" * 30_000 + "a" + ")" * 30_000},
    {"regex": "(" * 5_000 + "a" + ")" * 5_000},
    {"regex": "(?=a)b"},
    {"grammar": "start: " + "(" * 7_000 + '"a"' + ")" * 7_000},
    {"grammar": "root ::= " + "(" * 7_000 + '"a"' + ")" * 7_000},
    {"grammar": "start: start"},
    {"grammar": "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(450)) + '\nA450: "x"'},
    {"grammar": "start: A\nA: " + " & ".join(f"/.*{i}.*/" for i in range(1000))},
    {"grammar": "root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1}" for i in range(1000))},
    {"json": {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(300)]}},
    {"json": {"type": "integer", "multipleOf": 1_000_003}},
    {"json": '{"items":' * 5_000 + "{}" + "}" * 5_000},
]
BOUNDED: list[dict[str, Any]] = [
    {"regex": "(a+)+b"},
    {"regex": "(a*)*(a*)*(a*)*b"},
    {"regex": ".{1,100000}"},
    {"regex": ".*a.{1000}"},
    {"regex": "(.{1,1000}){1,1000}"},
    {"regex": "((((((a{1,50}){1,50}){1,50}){1,50}){1,50}){1,50})"},
    {"grammar": 'start: start "a" | "b"'},
    {"grammar": 'start: e\ne: e e e | "a" | "b"'},
]


def ask(house: House, form: dict[str, Any]) -> Any:
    body = {"prompt": "x", "max_tokens": 6, "structured_outputs": form}
    with house.web(timeout=60) as web:
        return web.post(COMPLETIONS, json=body)


@pytest.mark.parametrize("form", EXPLODING, ids=short)
def test_row_52_what_explodes_is_refused(house: House, form: dict[str, Any]) -> None:
    error_of(ask(house, form), 400)


@pytest.mark.parametrize("form", BOUNDED, ids=short)
def test_row_52_what_only_looks_bad_is_served(house: House, form: dict[str, Any]) -> None:
    assert ask(house, form).status_code == 200


def test_row_52_others_are_answered_while_something_is_compiled(house: House) -> None:
    running = Asked(house, {**LONG, "stream": True}).begun()
    slow = [
        Asked(house, {"prompt": "x", "structured_outputs": EXPLODING[8], "max_tokens": 2 + i})
        for i in range(3)
    ]
    seen = len(running.events)
    with house.web() as web:
        assert web.get("/health").status_code == 200
    assert running.ended().last == "[DONE]"
    assert len(running.events) > seen
    assert [each.ended().status for each in slow] == [400] * 3


def test_row_53_many_schemas_leave_little_behind(tiny_llama: Any) -> None:
    tokenizer = Tokenizer.from_file(tiny_llama)
    capacity_bytes = 2 << 20
    constraints = Constraints(tokenizer, 288, tokenizer.eos_ids, capacity_bytes)
    for i in range(1500):
        schema = {"type": "object", "properties": {f"p{i}": {"enum": [i, str(i)]}}}
        constraints.prepare(StructuredOutputsParams(json=schema))
        assert constraints.nbytes <= capacity_bytes
    assert len(constraints) > 5
    constraints.close()


@pytest.mark.full
def test_row_53_a_hundred_thousand_schemas(house: House) -> None:
    import psutil

    engine = house.server.engine
    before = 0
    with house.web(timeout=60) as web:
        for i in range(100_000):
            form = {"json": {"type": "object", "properties": {f"p{i}": {"enum": [i]}}}}
            body = {"prompt": "x", "max_tokens": 1, "structured_outputs": form}
            assert web.post(COMPLETIONS, json=body).status_code == 200
            if i == 5000:
                before = psutil.Process(engine.pid).memory_info().rss
    assert psutil.Process(engine.pid).memory_info().rss < before + (64 << 20)


UNUSABLE: list[Any] = [
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"allOf": [{"$ref": "#"}]},
    {"$ref": "http://127.0.0.1:1/schema.json"},
    {"$ref": "file:///etc/passwd"},
    {"$ref": "#/$defs/nobody"},
    {"enum": [f"value {i} {i * i}" for i in range(100_000)]},
    {"enum": []},
    {"not": {"type": "string"}},
    {"type": "object", "if": {}, "then": {}},
    {"type": "array", "uniqueItems": True},
    {"type": "string", "format": "nonsense"},
    {"type": "strang"},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "^a$", "minLength": 2},
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"x-guidance": {"lenient": True}, "not": {}},
]


@pytest.mark.parametrize("schema", UNUSABLE, ids=short)
def test_row_54_schemas_that_cannot_be_used_are_a_400(house: House, schema: Any) -> None:
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}
    began_s = time.monotonic()
    with house.web(timeout=60) as web:
        error_of(web.post("/v1/chat/completions", json={**chat, "response_format": named}), 400)
        if "$ref" not in str(schema):  # there, it may well be right
            calls = {**chat, "tools": [tool], "tool_choice": "required"}
            assert web.post("/v1/chat/completions", json=calls).status_code in (200, 400)
    error_of(ask(house, {"json": schema}), 400)
    assert time.monotonic() - began_s < 60, "no network was waited for"


def test_row_55_a_dead_end_ends_its_request_with_an_error(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for so few of the lexer's states that it ends in the midst of the answer.
    monkeypatch.setitem(constraints_module._LIMITS, "max_lexer_states", 150)
    dead = StructuredOutputsParams(regex=r"(.{1,500}[0-9]){1,500}")
    plain = SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
    with LLM(str(tiny_llama), threads=1, kv_cache_memory_bytes=2 << 20) as llm:
        alone = llm.generate("x", plain)[0].outputs
        constrained = replace(plain, structured_outputs=dead, max_tokens=400)
        ended, other = llm.generate(["x", "x"], [constrained, plain])
        assert ended.outputs[0].finish_reason == "error"
        assert "cannot go on" in str(ended.outputs[0].stop_reason)
        assert len(ended.outputs[0].token_ids) > 1, "it had begun"
        assert other.outputs == alone


def test_row_55_what_has_no_beginning_is_refused(tiny_llama: Any) -> None:
    tokenizer = Tokenizer.from_file(tiny_llama)
    constraints = Constraints(tokenizer, 288, tokenizer.eos_ids)
    with pytest.raises(RequestError, match="nothing has this form"):
        constraints.prepare(StructuredOutputsParams(regex=r"[^\s\S]"))
    constraints.close()
