"""Constrained answers: what may come next, what comes out, and what is shared between requests."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from worded_models import make_worded

from ridgeline import LLM, RequestError, SamplingParams, StructuredOutputsParams
from ridgeline.execution import draw
from ridgeline.model.tokenizer import Tokenizer
from ridgeline.sampling.constraints import Constraint, Constraints, DeadEndError
from ridgeline.sampling.sampler import token_logprobs
from ridgeline.types import RequestOutput, Thinking

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blü"]}, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number", "minimum": -1, "maximum": 1}},
            "additionalProperties": False,
        }
    },
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"const": {"a": [1, 2]}}]},
    {"type": "array", "items": {"type": "integer", "multipleOf": 3}, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"type": "array", "prefixItems": [{"type": "boolean"}], "items": False, "minItems": 1},
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer", "maximum": 9, "minimum": -9}]},
    {"type": "string", "format": "date"},
    {
        "type": "object",
        "properties": {"next": {"$ref": "#"}},
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_worded(tmp_path_factory.mktemp("worded"))


@pytest.fixture(scope="module")
def llm(worded: Path) -> Iterator[LLM]:
    with LLM(str(worded), threads=1, kv_cache_memory_bytes=8 << 20) as llm:
        yield llm


def ask(llm: LLM, form: StructuredOutputsParams, **settings: Any) -> RequestOutput:
    params = SamplingParams(**{"max_tokens": 120, "seed": 5, **settings}, structured_outputs=form)
    return llm.generate("Say: ", params)[0]


def constraints_of(tokenizer: Tokenizer, **options: Any) -> Constraints:
    return Constraints(tokenizer, tokenizer.vocab_size + 5, tokenizer.eos_ids, **options)


@pytest.fixture(scope="module")
def tokenizer(worded: Path) -> Tokenizer:
    return Tokenizer.from_file(worded)


@pytest.fixture
def constraints(tokenizer: Tokenizer) -> Iterator[Constraints]:
    made = constraints_of(tokenizer)
    yield made
    made.close()


def permitted(constraint: Constraint, size: int) -> set[int]:
    row = draw.permitted(np.zeros(size, np.float32), constraint.mask())
    return set(np.flatnonzero(np.isfinite(row)).tolist())


# -------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:30])
def test_every_finished_answer_is_valid(llm: LLM, schema: dict[str, Any]) -> None:
    params = [
        SamplingParams(max_tokens=150, seed=seed, structured_outputs=StructuredOutputsParams(json=schema))
        for seed in range(40)
    ]
    ended = [o.outputs[0] for o in llm.generate(["x"] * len(params), params)]
    finished = [each.text for each in ended if each.finish_reason == "stop"]
    assert {each.finish_reason for each in ended} <= {"stop", "length"}
    assert len(finished) >= 10, "most should come to an end"
    assert len(set(finished)) > 1
    for text in finished:
        jsonschema.validate(json.loads(text), schema)


def test_choices_expressions_and_grammars_hold(llm: LLM) -> None:
    choices = ("yes", "no", 'a "quoted" \\ one\n', "blü")
    for seed in range(12):
        said = ask(llm, StructuredOutputsParams(choice=choices), seed=seed).outputs[0]
        assert said.finish_reason == "stop"
        assert said.text in choices
        said = ask(
            llm, StructuredOutputsParams(regex=r"[ab]{2,4}-[0-9]+é"), seed=seed, max_tokens=400
        ).outputs[0]
        assert said.finish_reason != "stop" or re.fullmatch(r"[ab]{2,4}-[0-9]+é", said.text)
    gbnf = 'root ::= "(" root ")" | "x"'
    lark = 'start: "(" start ")" | "x"'
    for grammar in (gbnf, lark):
        said = ask(llm, StructuredOutputsParams(grammar=grammar)).outputs[0]
        assert said.finish_reason == "stop"
        depth = said.text.count("(")
        assert said.text == "(" * depth + "x" + ")" * depth


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (r'root ::= "\u0041\x42\U0001F600\u00e9"', "AB😀é"),
        (r'root ::= "\x22\x5c\u005B" [\u005D]', '"\\[]'),
        ('root ::= "a"? [^b-z]{1}  # a comment\n', "ac"[:1]),
    ],
)
def test_gbnf_has_characters_by_number(llm: LLM, grammar: str, text: str) -> None:
    said = ask(llm, StructuredOutputsParams(grammar=grammar), logit_bias={69: 100.0}).outputs[0]
    assert said.finish_reason == "stop"
    assert said.text == text or not text.startswith(('"', "A"))


def test_json_object_is_an_object_without_long_runs_of_space(llm: LLM) -> None:
    for seed in range(20):
        said = ask(llm, StructuredOutputsParams(json_object=True), seed=seed, max_tokens=300).outputs[0]
        if said.finish_reason == "stop":
            assert isinstance(json.loads(said.text), dict)
    form = StructuredOutputsParams(json=PERSON, disable_any_whitespace=True)
    said = ask(llm, form, max_tokens=400).outputs[0]
    assert said.finish_reason == "stop"
    assert said.text == json.dumps(json.loads(said.text), separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"top_p": 0.7, "top_k": 5},
        {"min_p": 0.2, "temperature": 2.0},
        {"logit_bias": {40: 100.0}},
        {"logprobs": 4},
        {"ignore_eos": True},
        {"min_tokens": 100},
    ],
    ids=str,
)
def test_other_settings_leave_the_form_alone(llm: LLM, settings: dict[str, Any]) -> None:
    form = StructuredOutputsParams(json=PERSON)
    outputs = ask(llm, form, n=3, max_tokens=150, **settings).outputs
    again = ask(llm, form, n=3, max_tokens=150, **settings).outputs
    assert [each.token_ids for each in outputs] == [each.token_ids for each in again]
    assert all(each.finish_reason in ("stop", "length") for each in outputs)
    for each in outputs:
        if each.finish_reason == "stop":
            jsonschema.validate(json.loads(each.text), PERSON)


def test_a_constrained_answer_is_the_same_alone_and_in_a_batch(llm: LLM) -> None:
    forms = [
        StructuredOutputsParams(json=PERSON),
        None,
        StructuredOutputsParams(regex="[a-z]{1,30}"),
        StructuredOutputsParams(choice=["one", "two"]),
    ]
    params = [
        SamplingParams(seed=i, max_tokens=40, structured_outputs=forms[i % 4], logprobs=2 if i % 3 else None)
        for i in range(16)
    ]
    together = llm.generate(["Say: "] * len(params), params)
    for each, output in zip(params, together, strict=True):
        assert llm.generate("Say: ", each)[0].outputs == output.outputs


def test_stop_strings_and_lengths_cut_a_constrained_answer(llm: LLM) -> None:
    said = ask(llm, StructuredOutputsParams(regex="[a-z]{50}"), max_tokens=7).outputs[0]
    assert said.finish_reason == "length"
    assert re.fullmatch("[a-z]+", said.text)
    said = ask(llm, StructuredOutputsParams(regex="ab(cd)+"), stop=["d"], max_tokens=50).outputs[0]
    assert (said.finish_reason, said.stop_reason, said.text) == ("stop", "d", "abc")


def test_logprobs_are_those_of_what_is_permitted(llm: LLM) -> None:
    form = StructuredOutputsParams(choice=["a", "b"])
    said = ask(llm, form, logprobs=5).outputs[0]
    assert said.logprobs is not None
    first = said.logprobs[0]
    assert sum(np.exp(p) for _, p in first.top) == pytest.approx(1.0, abs=1e-5)
    assert len(first.top) == 2, "what is forbidden is not told of"
    masked = np.array([1.0, -np.inf, 2.0], np.float32)
    assert [token for token, _ in token_logprobs(masked, 2, 3).top] == [2, 0]


def test_errors_of_forms_come_before_anything_is_run(llm: LLM) -> None:
    steps = llm.stats.decode.steps + llm.stats.prefill.steps
    bad = {
        "regex": ["((", "(?=a)b", r"(a)\1"],
        "json": ['{"type":', {"$ref": "#"}, {"not": {}}, {"type": "strang"}, {"$ref": "http://h/x"}],
        "grammar": ["root ::= x", 'root ::= "a', "nothing", "start: start"],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(RequestError, match="structured_outputs"):
                ask(llm, StructuredOutputsParams(**{name: value}))
    with pytest.raises(RequestError, match="one of json"):
        StructuredOutputsParams(regex="a", choice=["b"])
    with pytest.raises(RequestError, match="one of json"):
        StructuredOutputsParams()
    assert llm.stats.decode.steps + llm.stats.prefill.steps == steps


# ---------------------------------------------------------------------------------------------- masks


def test_masks_permit_exactly_what_an_expression_can_go_on_with(
    constraints: Constraints, tokenizer: Tokenizer
) -> None:
    pattern = re.compile(r"(?:the|then|air) [0-9]{2}")
    whole = [f"{word} {number:02}" for word in ("the", "then", "air") for number in range(100)]
    size = tokenizer.vocab_size + 5
    (constraint,) = constraints.start(StructuredOutputsParams(regex=pattern.pattern), 1)
    said = b""
    rng = np.random.default_rng(3)
    while not constraint.ended:
        going_on = {
            token
            for token in range(tokenizer.vocab_size)
            if token not in tokenizer.special_ids and (text := tokenizer.token_bytes(token))
            if any(each.encode().startswith(said + text) for each in whole)
        }
        ends = set(tokenizer.eos_ids) if said.decode() in whole else set()
        seen = permitted(constraint, size)
        assert seen <= going_on | ends
        assert seen, said
        token = int(rng.choice(sorted(seen)))
        constraint.append(token)
        said += b"" if token in ends else tokenizer.token_bytes(token)
    assert pattern.fullmatch(said.decode())


def test_special_tokens_are_no_text(constraints: Constraints, tokenizer: Tokenizer) -> None:
    (constraint,) = constraints.start(StructuredOutputsParams(regex=r"<\|im_start\|>x"), 1)
    start = tokenizer.token_id("<|im_start|>")
    assert start in tokenizer.special_ids
    assert start not in permitted(constraint, tokenizer.vocab_size + 5)


def test_thinking_is_free_and_what_follows_is_not(constraints: Constraints, tokenizer: Tokenizer) -> None:
    start, end = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    size = tokenizer.vocab_size + 5
    one, two = tokenizer.encode("1")[0], tokenizer.encode("x")[0]
    (closed,) = constraints.start(StructuredOutputsParams(regex="1", thinking=Thinking(start, end)), 1)
    assert permitted(closed, size) == {one, start}
    closed.append(start)
    everything = set(range(size)) - set(tokenizer.eos_ids)
    assert permitted(closed, size) == everything
    closed.append(two)
    assert permitted(closed, size) == everything
    closed.append(end)
    assert permitted(closed, size) == {one}
    closed.append(one)
    assert permitted(closed, size) == set(tokenizer.eos_ids)
    thinking = Thinking(start, end, open=True)
    (opened,) = constraints.start(StructuredOutputsParams(regex="1", thinking=thinking), 1)
    assert permitted(opened, size) == everything
    opened.append(end)
    assert permitted(opened, size) == {one}
    assert len(constraints) == 1, "thinking is no part of what is compiled"


def test_a_token_that_was_not_permitted_is_a_dead_end(constraints: Constraints, tokenizer: Tokenizer) -> None:
    (constraint, other) = constraints.start(StructuredOutputsParams(regex="1{5}"), 2)
    constraint.append(tokenizer.encode("x")[0])
    with pytest.raises(DeadEndError):
        constraint.mask()
    assert permitted(other, tokenizer.vocab_size + 5)


# ---------------------------------------------------------------------------------------------- cache


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(tokenizer: Tokenizer) -> None:
    constraints = constraints_of(tokenizer, capacity_bytes=1 << 20)
    forms = [StructuredOutputsParams(choice=[f"answer {i}"]) for i in range(40)]
    for form in forms:
        constraints.prepare(forms[0])
        constraints.prepare(form)
        assert constraints.nbytes <= 1 << 20
    assert 2 < len(constraints) < 20
    assert constraints.has(forms[0])
    assert constraints.has(forms[-1])
    assert not constraints.has(forms[1])
    constraints.close()


def test_what_has_grown_by_use_is_forgotten_too(tokenizer: Tokenizer) -> None:
    constraints = constraints_of(tokenizer, capacity_bytes=1 << 20)
    forms = [StructuredOutputsParams(choice=[f"answer {i}"]) for i in range(3)]
    for form in forms:
        constraints.prepare(form)
    constraints._grammars[forms[0]].mask_s = 0.1  # as if its masks had taken so long
    constraints.prepare(forms[2])
    assert not constraints.has(forms[0])
    assert constraints.has(forms[1])
    constraints.close()


def test_many_threads_compile_and_use_one_form(constraints: Constraints, tokenizer: Tokenizer) -> None:
    found: list[set[int]] = []

    def use() -> None:
        for constraint in constraints.start(StructuredOutputsParams(json=PERSON), 5):
            found.append(permitted(constraint, tokenizer.vocab_size + 5))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(each == found[0] for each in found)


def test_a_vocabulary_without_an_end_cannot_be_constrained(tokenizer: Tokenizer) -> None:
    constraints = Constraints(tokenizer, tokenizer.vocab_size, ())
    with pytest.raises(RequestError, match="no token that ends"):
        constraints.prepare(StructuredOutputsParams(choice=["a"]))


@pytest.mark.full
def test_a_thousand_answers_of_the_default_model_are_valid(default_model_path: Path) -> None:
    finished = 0
    with LLM(str(default_model_path)) as llm:
        for schema in SCHEMAS[:5]:
            form = StructuredOutputsParams(json=schema)
            params = [SamplingParams(max_tokens=200, seed=i, structured_outputs=form) for i in range(250)]
            for output in llm.generate(["An example in JSON:\n"] * len(params), params):
                if output.outputs[0].finish_reason == "stop":
                    finished += 1
                    jsonschema.validate(json.loads(output.outputs[0].text), schema)
    assert finished >= 1000
