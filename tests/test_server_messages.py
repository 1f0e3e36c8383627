"""How the parts of an answer, as parsers find them, reach a client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai_schemas import events, validate
from serving import CHAT, FakeEngine, FakeServer, fake_server, with_server

from ridgeline.server.messages import Piece, Pieces
from ridgeline.server.parsers import Delta, ToolCallDelta
from ridgeline.server.text import TextSide
from ridgeline.server.wire import responses
from ridgeline.types import TokenLogprobs

# --------------------------------------------------------------------------------------------- parsers


class Shouting:
    """Reads capitals as reasoning, and what stands between brackets as a call."""

    needs_special_tokens = True

    def __init__(self) -> None:
        self.called_tools = False

    def feed(self, text: str, token_ids: Any) -> list[Delta]:
        if text == "[":
            self.called_tools = True
            return [Delta(tool_calls=(ToolCallDelta(0, "call_1", "find"),))]
        if self.called_tools:
            return [Delta(tool_calls=(ToolCallDelta(0, arguments=text),))]
        return [Delta(reasoning=text) if text.isupper() else Delta(text)]

    def finish(self) -> list[Delta]:
        return [Delta(tool_calls=(ToolCallDelta(0, arguments="}"),))] if self.called_tools else []


def test_what_a_parser_finds_reaches_the_client(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def parser(self: TextSide, prompt: Any, tools: bool, skip_special_tokens: bool) -> Shouting:
        seen.append((tools, skip_special_tokens))
        return Shouting()

    monkeypatch.setattr(TextSide, "new_parser", parser)

    async def scenario(server: FakeServer) -> None:
        server.engine.script = tuple((text, 3) for text in ("HM", "hi", "[", "{", '"a": 1'))
        server.engine.reason = "stop"
        tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            for stream in (False, True):
                ask: dict[str, Any] = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 5}
                answer: Any = await client.chat.completions.create(**ask, tools=tools, stream=stream)
                if not stream:
                    message = answer.choices[0].message
                    assert (message.reasoning_content, message.content) == ("HM", "hi")
                    (call,) = message.tool_calls
                    assert (call.id, call.function.name) == ("call_1", "find")
                    assert json.loads(call.function.arguments) == {"a": 1}
                    assert answer.choices[0].finish_reason == "tool_calls"
                    continue
                chunks = [chunk async for chunk in answer]
                deltas = [chunk.choices[0].delta for chunk in chunks]
                parts = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
                assert (parts[0].id, parts[0].function.name) == ("call_1", "find")
                assert json.loads("".join(part.function.arguments for part in parts)) == {"a": 1}
                assert [delta.reasoning_content for delta in deltas if "reasoning_content" in delta.to_dict()]
                assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert seen == [(True, True), (True, True)]
        assert not any(add.params.skip_special_tokens for add in server.engine.adds.values())

    with_server(tiny_llama, scenario)


def test_calls_and_reasoning_are_parsed_as_the_template_tells(tiny_llama: Path) -> None:
    template = "{{ messages[0].content }}{% if tools %}<tool_call>{% endif %}{# <think></think> #}"
    call = '{"name": "find", "arguments": {"a": 1}}'
    script = tuple(
        (text, 100) for text in ("<think>", "hm", "</think>", "<tool_", f"call>{call}", "</tool_call>")
    )

    async def scenario(server: FakeServer) -> None:
        server.engine.script, server.engine.reason = script, "stop"
        tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
        async with server.client() as client:
            body = {**CHAT, "max_tokens": len(script)}
            answer = await _post(client, {**body, "tools": tools})
            responses.ChatCompletion.model_validate_json(answer.content)
            (choice,) = answer.json()["choices"]
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["reasoning_content"] == "hm"
            assert choice["message"]["content"] is None
            function = choice["message"]["tool_calls"][0]["function"]
            assert (function["name"], json.loads(function["arguments"])) == ("find", {"a": 1})
            streamed = events((await _post(client, {**body, "tools": tools, "stream": True})).text)
            assert [c for c in streamed if c["choices"][0]["delta"].get("tool_calls")]
            for chunk in streamed:
                validate("CreateChatCompletionStreamResponse", chunk)
                responses.ChatCompletionChunk.model_validate(chunk)
            without = {**body, "tools": tools, "tool_choice": "none"}
            (choice,) = (await _post(client, without)).json()["choices"]
            assert choice["finish_reason"] == "stop"
            assert call in choice["message"]["content"]
        with_tools, _, without_tools = server.engine.adds.values()
        assert len(with_tools.tokens) > len(without_tools.tokens)

    with_server(tiny_llama, scenario, chat_template=template)


def test_one_call_at_most_where_parallel_ones_are_not_wanted(tiny_llama: Path) -> None:
    template = "{{ messages[0].content }}{% if tools %}<tool_call>{% endif %}"
    calls = [f'<tool_call>{{"name": "find", "arguments": {{"a": {a}}}}}</tool_call>' for a in (1, 2)]
    script = tuple((text, 100) for text in ("So: ", calls[0], "\n", calls[1]))

    async def scenario(server: FakeServer) -> None:
        server.engine.script, server.engine.reason = script, "stop"
        tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
        ask: dict[str, Any] = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 4, "tools": tools}
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            for parallel, expected in ((True, [1, 2]), (False, [1])):
                answer: Any = await client.chat.completions.create(**ask, parallel_tool_calls=parallel)
                message = answer.choices[0].message
                assert [json.loads(c.function.arguments)["a"] for c in message.tool_calls] == expected
                assert answer.choices[0].finish_reason == "tool_calls"
                chunks: Any = await client.chat.completions.create(
                    **ask, parallel_tool_calls=parallel, stream=True
                )
                deltas = [chunk.choices[0].delta async for chunk in chunks]
                named = [part.index for d in deltas for part in d.tool_calls or () if part.function.name]
                assert named == list(range(len(expected)))

    with_server(tiny_llama, scenario, chat_template=template)


async def _post(client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=body)


# -------------------------------------------------------------------------------------------- prompts


class Racing(FakeEngine):
    """Its second choice is done before the first has begun, which brings the prompt's scores or fails."""

    fails = False

    def _pieces(self, number: int) -> Pieces:
        self.given[number] += 1
        end = (TokenLogprobs(3, -0.5),)
        if self.given[number] == 1:
            return Pieces((Piece(number, 1, "b", (3,), end, "length"),), ())
        if self.fails:
            return Pieces((Piece(number, 0, "", (), None, "error", "broken"),), (number,))
        scores = (None, TokenLogprobs(4, -1.5, ((6, -0.25), (4, -1.5)), 2))
        return Pieces((Piece(number, 0, "a", (3,), end, "length", None, scores),), (number,))


@pytest.mark.parametrize("fails", [False, True])
def test_no_choice_is_sent_before_the_scores_of_its_prompt(tiny_llama: Path, fails: bool) -> None:
    async def run() -> None:
        engine = Racing()
        engine.fails = fails
        async with fake_server(tiny_llama, engine) as server, server.client() as client:
            body = {"prompt": [[5, 4]], "n": 2, "echo": True, "logprobs": 1, "prompt_logprobs": 2}
            answer = await client.post("/v1/completions", json={**body, "stream": True, "max_tokens": 1})
            if fails:
                assert answer.status_code == 500
                return
            chunks = [chunk["choices"][0] for chunk in events(answer.text)]
            assert [choice["index"] for choice in chunks] == [1, 0]
            for choice in chunks:
                assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -0.5]
                assert [len(top or {}) for top in choice["logprobs"]["top_logprobs"]] == [0, 2, 1]
                first, second = choice["prompt_logprobs"]
                assert first is None
                assert {token: score["rank"] for token, score in second.items()} == {"4": 2, "6": 1}

    asyncio.run(asyncio.wait_for(run(), 60))
