"""The server as clients see it: the real `openai` package against `ridgeline serve` on a tiny model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from jsonschema import ValidationError
from openai_schemas import checked, events, validate
from serving import ServerProcess, server_process

from ridgeline import LLM, SamplingParams
from ridgeline.model.tokenizer import Tokenizer
from ridgeline.server.wire import responses
from ridgeline.types import RequestOutput

QUESTION = [{"role": "user", "content": "What is the ridge?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[ServerProcess]:
    options = ("--served-model-name", "tiny,alias", "--max-num-seqs", 8, "--max-num-batched-tokens", 64)
    with server_process(tiny_llama, *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    checking = openai.DefaultHttpxClient(event_hooks={"response": [checked]})
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=checking
    ) as made:
        yield made


@pytest.fixture(scope="module")
def web(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, event_hooks={"response": [checked]}) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.from_file(tiny_llama)


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> dict[str, int]:
    """A bias with which the model draws no special token: those are tokens of an answer without a text."""
    return {str(token): -100 for token in tokenizer.special_ids}


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=QUESTION, **{**GREEDY, **options})  # type: ignore[call-overload]


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **{**GREEDY, **options})


# --------------------------------------------------------------------------------------------- answers


def test_answers_are_the_engines(client: openai.OpenAI, tiny_llama: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(tiny_llama), threads=1) as llm:
        (expected,) = llm.chat(QUESTION, params)
        (continued,) = llm.generate(["The ridge"], params)
    answer = chat(client)
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == 12
    assert complete(client, "The ridge").choices[0].text == continued.outputs[0].text
    tokens = list(continued.prompt_token_ids)
    assert complete(client, tokens).choices[0].text == continued.outputs[0].text


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI, plain: dict[str, int]) -> None:
    whole = chat(client, logit_bias=plain)
    told = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"speculation": False}}
    chunks = list(chat(client, logit_bias=plain, **told))  # without guesses, a token at a time
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    *answer, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert "".join(c.choices[0].delta.content or "" for c in answer) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in answer][-1] == "length"
    assert all(c.choices[0].finish_reason is None for c in answer[:-1])
    assert len(answer) >= 8  # a piece of text may take more than one token
    texts = [chunk.choices[0].text for chunk in complete(client, "The ridge", stream=True)]
    assert "".join(texts) == complete(client, "The ridge").choices[0].text


def test_many_async_clients_get_the_same(server: ServerProcess, client: openai.OpenAI) -> None:
    expected = chat(client).choices[0].message.content

    async def one(asking: openai.AsyncOpenAI) -> str:
        stream: Any = await asking.chat.completions.create(
            model="alias",
            messages=QUESTION,  # type: ignore[arg-type]
            stream=True,
            **GREEDY,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as asking:
            return await asyncio.gather(*(one(asking) for _ in range(16)))

    assert set(asyncio.run(run())) == {expected}


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    prompts = ["one", "two", "three"]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    together = complete(client, prompts, n=2)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]
    streamed = [""] * 6
    for chunk in complete(client, prompts, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in together.choices]
    drawn = chat(client, n=3, temperature=1.5, seed=3)
    again = chat(client, n=3, temperature=1.5, seed=3)
    texts = [choice.message.content for choice in drawn.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3


def test_echo_stops_and_limits(client: openai.OpenAI) -> None:
    text = complete(client, "The ridge").choices[0].text
    assert complete(client, "The ridge", echo=True).choices[0].text == "The ridge" + text
    silent = complete(client, "The ridge", echo=True, max_tokens=0)
    assert (silent.choices[0].text, silent.usage.completion_tokens) == ("The ridge", 0)
    stop = text[3:5]
    stopped = complete(client, "The ridge", stop=[stop]).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    limited = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,  # type: ignore[arg-type]
        max_completion_tokens=3,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert limited.usage is not None
    assert limited.usage.completion_tokens == 3
    token = chat(client, extra_body={"ignore_eos": True, "stop_token_ids": list(range(288))})
    assert token.usage.completion_tokens == 1
    assert token.choices[0].finish_reason == "stop"


def test_a_prompt_is_scored_by_echo_with_logprobs(client: openai.OpenAI) -> None:
    """As a completion of its beginning scores the same tokens; without an answer too, as evaluations ask."""
    whole = complete(client, "The ridge", echo=True, logprobs=2).choices[0]
    text = complete(client, "The ridge").choices[0].text
    assert whole.text == "The ridge" + text
    scores = whole.logprobs
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    assert "".join(scores.tokens).startswith("The ridge")
    assert scores.text_offset[:3] == sorted(scores.text_offset[:3])
    silent = complete(client, "The ridge", echo=True, logprobs=2, max_tokens=0).choices[0]
    count = len(silent.logprobs.tokens)
    assert (silent.text, silent.finish_reason) == ("The ridge", "length")
    assert silent.logprobs.token_logprobs == scores.token_logprobs[:count]
    answered = complete(client, "The ridge", logprobs=2).choices[0].logprobs
    assert answered.token_logprobs == scores.token_logprobs[count:]
    assert scores.text_offset[count] == len("The ridge")


def test_a_stream_of_scored_prompts_adds_up_to_the_answer(client: openai.OpenAI) -> None:
    extra = {**GREEDY["extra_body"], "prompt_logprobs": 1}
    for options in (
        {"echo": True, "logprobs": 2},
        {"echo": True, "logprobs": 2, "extra_body": extra, "n": 2},
        {"extra_body": extra},
        {"echo": True, "logprobs": 0, "max_tokens": 0, "extra_body": extra},
        {"echo": True, "max_tokens": 0, "extra_body": extra},
    ):
        whole = complete(client, ["The ridge", "of"], **options)
        streamed: list[dict[str, Any]] = [{} for _ in whole.choices]
        for chunk in complete(client, ["The ridge", "of"], **options, stream=True):
            for part in chunk.to_dict()["choices"]:
                choice = streamed[part["index"]]
                choice["text"] = choice.get("text", "") + part["text"]
                assert not (choice.keys() & part.keys() & {"prompt_logprobs"})
                choice.update({k: v for k, v in part.items() if k not in ("text", "logprobs")})
                for name, values in (part["logprobs"] or {}).items():
                    lists = choice.setdefault("logprobs", {})
                    lists[name] = lists.get(name, []) + values
                choice.setdefault("logprobs", None)
        assert streamed == [choice.to_dict() for choice in whole.choices]


def test_prompt_logprobs_are_the_engines(client: openai.OpenAI, web: httpx.Client, tiny_llama: Path) -> None:
    """In vLLM's form: at the top of a chat, and in each choice of a completion."""
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3, ignore_eos=True)
    with LLM(str(tiny_llama), threads=1) as llm:
        (chatted,) = llm.chat(QUESTION, params)
        (continued,) = llm.generate(["The ridge"], params)
    base = {"temperature": 0, "ignore_eos": True, "prompt_logprobs": 3}
    body = {"messages": QUESTION, **base}
    for maximum in (2, 0):
        answer = web.post("/v1/chat/completions", json={**body, "max_tokens": maximum}).json()
        assert_scores(answer["prompt_logprobs"], chatted)
        assert answer["usage"]["completion_tokens"] == maximum
        text = {"prompt": "The ridge", **base, "max_tokens": maximum}
        (choice,) = web.post("/v1/completions", json=text).json()["choices"]
        assert_scores(choice["prompt_logprobs"], continued)
        assert choice["text"] == (continued.outputs[0].text if maximum else "")
    sent = events(web.post("/v1/chat/completions", json={**body, "max_tokens": 2, "stream": True}).text)
    assert_scores(sent[0]["prompt_logprobs"], chatted)
    assert not any("prompt_logprobs" in chunk for chunk in sent[1:])
    # Asked for with fewer, beside an echo with more.
    echo = {"prompt": "The ridge", **base, "prompt_logprobs": 0, "echo": True, "logprobs": 3, "max_tokens": 1}
    (choice,) = web.post("/v1/completions", json=echo).json()["choices"]
    assert [len(scores) for scores in choice["prompt_logprobs"][1:]] == [1] * (
        len(continued.prompt_token_ids) - 1
    )
    assert all(len(top) >= 3 for top in choice["logprobs"]["top_logprobs"][1:])


def assert_scores(sent: list[dict[str, Any] | None], output: RequestOutput) -> None:
    assert output.prompt_logprobs is not None
    assert len(sent) == len(output.prompt_logprobs)
    assert sent[0] is output.prompt_logprobs[0] is None
    for entry, token, score in zip(
        sent[1:], output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
    ):
        assert entry is not None
        assert score is not None
        assert next(iter(entry)) == str(token)
        assert entry[str(token)]["logprob"] == pytest.approx(score.logprob)
        assert {int(each): value["logprob"] for each, value in entry.items()} == pytest.approx(
            {token: score.logprob, **dict(score.top)}
        )
        by_rank = sorted(entry.values(), key=lambda value: -value["logprob"])
        assert [value["rank"] for value in by_rank[:3]] == [1, 2, 3]
        assert all(set(value) == {"logprob", "rank", "decoded_token"} for value in entry.values())


def test_prompts_are_scored_as_evaluation_harnesses_ask(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """They take the scores between the context and the one token that they do not want, whatever that is."""
    (end,) = tokenizer.encode("<|im_end|>", parse_special=True)
    prompts = [tokenizer.encode(text) for text in ("The ridge of", "a roof", "x")]
    ask: dict[str, Any] = {"model": "tiny", "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1}
    for bias in ({}, {str(end): 100}):
        choices = client.completions.create(**ask, temperature=0, seed=1234, logit_bias=bias).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        for choice, prompt in zip(choices, prompts, strict=True):
            scores: Any = choice.logprobs
            assert len(scores.token_logprobs) == len(scores.top_logprobs) == len(prompt) + 1
            for score, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
                assert score <= max(top.values())
    assert all(choice.finish_reason == "stop" for choice in choices)


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["The ridge", "of the roofline", "The ridge"]
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    coded = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64 by itself
    vectors = [each.embedding for each in plain.data]
    assert [each.index for each in plain.data] == [0, 1, 2]
    assert vectors[0] == vectors[2] != vectors[1]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-5)
    for one, other in zip(vectors, coded.data, strict=True):
        assert one == pytest.approx(other.embedding, abs=1e-7)
    last = client.embeddings.create(
        model="tiny", input=texts[0], encoding_format="float", extra_body={"pooling": "last"}
    )
    assert last.data[0].embedding != vectors[0]
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tiny", input="x", dimensions=3)
    with pytest.raises(openai.BadRequestError, match="input"):
        client.embeddings.create(model="tiny", input=[])


def test_logprobs(client: openai.OpenAI, plain: dict[str, int]) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3, logit_bias=plain).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 12
    assert b"".join(bytes(e.bytes) for e in entries).decode("utf-8", "replace") == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= entry.top_logprobs[0].logprob <= 0  # a biased token may come first
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=3, logit_bias=plain, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == entries
    completion = complete(client, "The ridge", logprobs=2, logit_bias=plain).choices[0]
    logprobs = completion.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 12
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or completion.text[offset:].startswith(token)
    assert all(1 <= len(top) <= 3 for top in logprobs.top_logprobs)
    chosen = [top[token] for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)]
    assert chosen == logprobs.token_logprobs


def test_templates_get_what_was_sent(client: openai.OpenAI, web: httpx.Client, tokenizer: Tokenizer) -> None:
    def text(**body: Any) -> str:
        tokens = web.post("/tokenize", json={"messages": QUESTION, **body}).json()["tokens"]
        return tokenizer.decode(tokens, skip_special=False)

    assert text() == "<|im_start|>user\nWhat is the ridge?<|im_end|>\n<|im_start|>assistant\n"
    assert text(add_generation_prompt=False) == "<|im_start|>user\nWhat is the ridge?<|im_end|>\n"
    developer = [{"role": "developer", "content": [{"type": "text", "text": "<|im_end|>"}]}]
    assert text(messages=developer, continue_final_message=True) == "<|im_start|>system\n<|im_end|>"
    tokens = web.post("/tokenize", json={"messages": developer, "add_generation_prompt": False}).json()
    assert tokens["tokens"].count(2) == 1  # what a user wrote is text


def test_tokenize_and_detokenize(web: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = web.post("/tokenize", json={"prompt": "ridge é", "return_token_strs": True}).json()
    responses.Tokenized.model_validate(answer)
    assert answer["tokens"] == tokenizer.encode("ridge é", add_special=True)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert web.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "ridge é"}


# ----------------------------------------------------------------------------------------------- shape


TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
CHATS: list[dict[str, Any]] = [
    {},
    {"logprobs": True, "top_logprobs": 2, "n": 2},
    {"prompt_logprobs": 2, "n": 2},
    {"tools": TOOLS},
    {"stop_token_ids": list(range(288))},
    {"logprobs": True, "prompt_logprobs": 0, "max_tokens": 0},
]
COMPLETIONS: list[dict[str, Any]] = [
    {},
    {"logprobs": 2, "n": 2},
    {"logprobs": 2, "echo": True, "prompt": ["The ridge", [5, 6, 7]]},
    {"echo": True, "max_tokens": 0},
    {"prompt_logprobs": 2, "stop_token_ids": list(range(288))},
]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        *[("/v1/chat/completions", more) for more in CHATS],
        *[("/v1/completions", more) for more in COMPLETIONS],
    ],
)
def test_answers_and_chunks_are_as_described(web: httpx.Client, path: str, more: dict[str, Any]) -> None:
    """By OpenAI, which `web` checks of all that it gets, and field by field by our own description."""
    chat = "chat" in path
    body = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    body |= {"messages": QUESTION} if chat else {"prompt": "The ridge"}
    answer = web.post(path, json=body | more)
    assert answer.status_code == 200
    (responses.ChatCompletion if chat else responses.Completion).model_validate_json(answer.content)
    for usage in (True, False):
        options = {"stream": True, "stream_options": {"include_usage": usage}}
        sent = events(web.post(path, json=body | more | options).text)
        for chunk in sent:
            (responses.ChatCompletionChunk if chat else responses.Completion).model_validate(chunk)
            assert ("usage" in chunk) is (usage and (chat or chunk is sent[-1]))
        if usage:
            assert sent[-1]["usage"] == answer.json()["usage"]


def test_the_check_against_openais_description_can_fail() -> None:
    good = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []}
    validate("CreateChatCompletionResponse", good)
    wrong: list[Any] = [
        {name: value for name, value in good.items() if name != "model"},
        {**good, "created": "now"},
        {**good, "object": "chat.completion.chunk"},
        {**good, "choices": [{"index": 0, "message": {"role": "assistant"}}]},
        {**good, "usage": None},
    ]
    for value in wrong:
        with pytest.raises(ValidationError):
            validate("CreateChatCompletionResponse", value)
    with pytest.raises(ValidationError):
        validate("ErrorResponse", {"error": {"message": "x", "type": "y", "param": None}})


def test_embeddings_and_models_are_as_described(web: httpx.Client) -> None:
    for encoding in ("float", "base64"):
        body = {"input": ["a", [5, 6]], "encoding_format": encoding}
        responses.Embeddings.model_validate_json(web.post("/v1/embeddings", json=body).content)
    responses.ModelList.model_validate_json(web.get("/v1/models").content)
    responses.ServedModel.model_validate_json(web.get("/v1/models/alias").content)


def test_models_health_and_version(client: openai.OpenAI, web: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    assert web.get("/v1/models/tiny").json()["max_model_len"] == 512
    assert (
        web.get("/live").status_code
        == web.get("/health").status_code
        == web.head("/health").status_code
        == 200
    )
    assert set(web.get("/version").json()) == {"version"}
    described = web.get("/openapi.json").json()
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert referred <= set(described["components"]["schemas"])
    paths = described["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= set(paths)


# ---------------------------------------------------------------------------------------------- errors


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error, whose shape is always the same."""
    assert answer.status_code == status, answer.text
    responses.Error.model_validate_json(answer.content)
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert "/home" not in error["message"]
    assert "Traceback" not in error["message"]
    return error


INERT: dict[str, Any] = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "tools": [],
    "response_format": {"type": "text"},
    "parallel_tool_calls": True,
    "service_tier": "auto",
    "logit_bias": {},
    "stop": [],
    "audio": None,
    "functions": None,
    "seed": None,
    "something_new": None,
    "tool_choice": "auto",
    "best_of": None,
}


def test_fields_that_change_nothing_pass(web: httpx.Client) -> None:
    body = {"messages": QUESTION, "max_tokens": 2, **INERT}
    assert web.post("/v1/chat/completions", json=body).status_code == 200
    body = {"prompt": "x", "max_tokens": 2, "suffix": None, "best_of": 1, "user": "me", "echo": None}
    assert web.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_format", {"type": "xml"}),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("store", True),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("guided_json", {}),
        ("chat_template", "{{ 1 }}"),
        ("reasoning_effort", "high"),
        ("something_new", 1),
        ("service_tier", "fastest"),
        ("max_wait_s", 0),
    ],
)
def test_fields_that_we_do_not_have_are_named(web: httpx.Client, name: str, value: Any) -> None:
    error = error_of(web.post("/v1/chat/completions", json={"messages": QUESTION, name: value}), 400)
    assert error["param"] == name
    assert name in error["message"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("auto", "default"),
        ("default", "default"),
        ("scale", "default"),
        ("flex", "flex"),
        ("priority", "priority"),
        ("keystroke", "priority"),
        ("interactive", "default"),
        ("batch", "flex"),
    ],
)
def test_answers_say_what_class_they_were_served_in(web: httpx.Client, asked: str, told: str) -> None:
    common = {"max_tokens": 2, "service_tier": asked, "max_wait_s": 30}
    body = {"messages": QUESTION, **common}
    assert web.post("/v1/chat/completions", json=body).json()["service_tier"] == told
    streamed = web.post("/v1/chat/completions", json={**body, "stream": True}).text
    assert f'"service_tier":"{told}"' in streamed
    completed = web.post("/v1/completions", json={"prompt": "x", **common}).json()
    assert responses.Completion(**completed).service_tier == told
    vector = {"input": "x", "service_tier": asked}
    assert web.post("/v1/embeddings", json=vector).json()["service_tier"] == told


def test_who_asks_for_no_tier_is_told_none(web: httpx.Client) -> None:
    answer = web.post("/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 2}).json()
    assert "service_tier" not in answer


@pytest.mark.parametrize("value", [-1, 21, True, 1.0])
def test_wrong_prompt_logprobs_are_a_400(web: httpx.Client, value: Any) -> None:
    body = {"messages": QUESTION, "max_tokens": 5, "prompt_logprobs": value}
    error_of(web.post("/v1/chat/completions", json=body), 400)


def test_the_begin_token_stands_for_an_empty_prompt(web: httpx.Client) -> None:
    scored = {"max_tokens": 2, "echo": True, "logprobs": 1, "prompt_logprobs": 1, "ignore_eos": True}
    (choice,) = web.post("/v1/completions", json={"prompt": "", **scored}).json()["choices"]
    assert len(choice["logprobs"]["tokens"]) == 2
    assert choice["prompt_logprobs"] == [None]


def test_a_stream_that_cannot_begin_has_a_status(web: httpx.Client) -> None:
    body = {"messages": QUESTION, "stream": True, "stop_token_ids": [10**6]}
    assert error_of(web.post("/v1/chat/completions", json=body), 400)["param"] == "stop_token_ids"


def test_nothing_of_a_prompt_is_in_the_log(server: ServerProcess, web: httpx.Client) -> None:
    canary = "canary-7b1f"
    body = {"messages": [{"role": "user", "content": canary}], "max_tokens": 2}
    web.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
    web.post("/v1/chat/completions", json={**body, "temperature": -5})
    web.get("/x%0d%0a%1b[31mred")
    server.await_log("id=mine-1", "status=200")
    server.await_log(r"\r\n\x1b[31mred")
    assert not any(canary in line for line in server.log)
    assert all(line.isprintable() for line in server.log)


def test_arguments_of_calls_reach_the_template_as_objects() -> None:
    from ridgeline.server.routes.chat import _as_templates_read

    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": 1})}}
    read = _as_templates_read({"role": "assistant", "tool_calls": [call]}, "")
    assert read["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    broken = {**call, "function": {"name": "f", "arguments": "{"}}
    assert _as_templates_read({"role": "assistant", "tool_calls": [broken]}, "")["tool_calls"] == [broken]
