"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.model.tokenizer import Tokenizer
from ridgeline.sampling.beam_search import BeamSearchParams
from ridgeline.server.errors import bad_request
from ridgeline.server.messages import Piece
from ridgeline.server.parsers import Delta, FirstCall, ForcedCalls, OutputParser, PlainParser
from ridgeline.server.routes.common import (
    Admitted,
    admitted,
    answer_with,
    generated,
    gives,
    new_head,
    reason_of,
    takes,
)
from ridgeline.server.service import Ticket
from ridgeline.server.streaming import DONE
from ridgeline.server.text import TextSide
from ridgeline.server.wire.answers import (
    ChatChunks,
    Head,
    Usage,
    chat_logprobs,
    delta_fields,
    message_fields,
    prompt_logprobs,
)
from ridgeline.server.wire.requests import ChatRequest, ChatTemplateFields, NamedTool, TokenizeRequest
from ridgeline.server.wire.responses import ChatCompletion
from ridgeline.types import SamplingParams, TokenLogprobs

router = APIRouter()


@router.post(
    "/v1/chat/completions", openapi_extra=takes(ChatRequest), responses=gives(ChatCompletion, events=True)
)
async def chat_completions(request: Request) -> Response:
    """Answer a chat."""
    asked = await admitted(request, ChatRequest)
    return await answer_with(request, asked.ticket, _answer(asked))


async def _answer(asked: Admitted[ChatRequest]) -> Response:
    service, body = asked.service, asked.body
    tokens = await service.in_thread(chat_tokens, service.text, body, body.tool_choice != "none")
    params = service.text.constrained(asked.params, tokens)
    usage = asked.count([tokens], "messages")
    with_tools = bool(body.tools) and body.tool_choice != "none"
    skip = params.skip_special_tokens
    forced = body.forces_calls
    parsers = [service.text.new_parser(tokens, with_tools and not forced, skip) for _ in range(params.n)]
    if forced:
        parsers = [ForcedCalls(parser) for parser in parsers]
    elif with_tools and not body.parallel_tool_calls:
        parsers = [FirstCall(parser) for parser in parsers]
    head = new_head(asked, "chatcmpl")
    answer = ChatAnswer(service.text.tokenizer, head, body, parsers, usage)
    asked.ticket.submit([tokens], answer.as_read(asked.beams or params), body.stream)
    return await generated(asked, answer)


def chat_tokens(
    text: TextSide, body: ChatTemplateFields | TokenizeRequest, with_tools: bool = True
) -> tuple[int, ...]:
    """The tokens of a chat, up to where the answer begins."""
    options: dict[str, Any] = dict(body.chat_template_kwargs or {})
    source = text.template.source if text.template is not None else ""
    for name in ("tools", "documents", "add_generation_prompt", "continue_final_message"):
        if name in options:
            raise bad_request(
                f"chat_template_kwargs has {name!r}; accepted: the template's own variables",
                "chat_template_kwargs",
            )
    if body.reasoning_effort is not None:
        if "reasoning_effort" not in source:
            raise bad_request(
                "this model's chat template knows no reasoning_effort",
                "reasoning_effort",
                "unsupported_parameter",
            )
        options["reasoning_effort"] = body.reasoning_effort
    if body.tools and with_tools:
        options["tools"] = body.tools
    if body.documents:
        options["documents"] = body.documents
    generate = body.add_generation_prompt
    messages = [_as_templates_read(message, source) for message in body.messages or ()]
    try:
        return text.chat_tokens(
            messages,
            add_generation_prompt=not body.continue_final_message if generate is None else generate,
            continue_final_message=body.continue_final_message,
            **options,
        )
    except TypeError:  # a variable's name that is no name of Python's, or one of the call's own
        raise bad_request(
            "chat_template_kwargs has a name that cannot be a template's", "chat_template_kwargs"
        ) from None


def _as_templates_read(message: dict[str, Any], source: str) -> dict[str, Any]:
    """A message in the form that templates are written for: they know `system`, and a call's arguments as an
    object."""
    if message.get("role") == "developer" and "developer" not in source:
        message = {**message, "role": "system"}
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message = {**message, "tool_calls": [_call(call) for call in calls]}
    return message


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class ChatAnswer:
    """Turns what the engine gives into a message, or into chunks of it."""

    def __init__(
        self, tokenizer: Tokenizer, head: Head, body: ChatRequest, parsers: list[OutputParser], usage: Usage
    ) -> None:
        self._tokenizer = tokenizer
        self._head = head
        self._usage = usage
        self._wants_usage = body.wants_usage
        self._wants_logprobs = body.logprobs
        self._prompt_logprobs = body.prompt_logprobs
        self._chose_tool = not isinstance(body.tool_choice, NamedTool)
        self._chunks = ChatChunks(head, body.wants_usage)
        self._parsers = parsers  # one for each choice
        self._begun: set[int] = set()
        self._scores: list[Any] | None = None  # of the prompt, as they are sent

    def as_read(self, params: SamplingParams | BeamSearchParams) -> SamplingParams | BeamSearchParams:
        """The parameters with which the text is what the parser reads."""
        if self._parsers[0].needs_special_tokens:
            return replace(params, skip_special_tokens=False)
        return params

    # --------------------------------------------------------------------------------------- streaming

    async def stream(self, ticket: Ticket) -> AsyncGenerator[bytes, None]:
        async with aclosing(ticket.pieces()) as arriving:  # type: ignore[type-var]
            async for _, pieces in arriving:
                await self._note_scores(pieces)
                parts: list[bytes] = []
                for piece in pieces:
                    self._add(piece, parts)
                if parts:
                    yield b"".join(parts)
        yield (self._chunks.usage(self._usage) if self._wants_usage else b"") + DONE

    def _add(self, piece: Piece, parts: list[bytes]) -> None:
        """The chunks of a piece."""
        index, chunks = piece.choice, self._chunks
        self._usage.add(piece)
        if index not in self._begun:
            self._begun.add(index)
            parts.append(chunks.role(index, self._scores if index == 0 else None))
        parser = self._parsers[index]
        if piece.logprobs is None and piece.finish_reason is None and type(parser) is PlainParser:
            if piece.text:
                parts.append(chunks.content(index, piece.text))
            return
        logprobs = chat_logprobs(self._tokenizer, piece.logprobs) if piece.logprobs else None
        for delta in self._deltas(piece):
            parts.append(chunks.delta(index, delta_fields(delta), logprobs))
            logprobs = None
        if logprobs is not None:
            parts.append(chunks.delta(index, {"content": ""}, logprobs))
        if piece.finish_reason is not None:
            parts.append(
                chunks.delta(index, {}, finish_reason=self._reason(piece), stop_reason=piece.stop_reason)
            )

    # ------------------------------------------------------------------------------------------- whole

    async def whole(self, ticket: Ticket) -> dict[str, Any]:
        deltas: list[list[Delta]] = [[] for _ in self._parsers]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in self._parsers]
        last: list[Piece | None] = [None] * len(self._parsers)
        async with aclosing(ticket.pieces()) as arriving:  # type: ignore[type-var]
            async for _, pieces in arriving:
                await self._note_scores(pieces)
                for piece in pieces:
                    self._usage.add(piece)
                    deltas[piece.choice] += self._deltas(piece)
                    logprobs[piece.choice] += piece.logprobs or ()
                    last[piece.choice] = piece
        choices = [
            self._choice(index, deltas[index], logprobs[index], piece)
            for index, piece in enumerate(last)
            if piece is not None
        ]
        fields = {**self._head.fields("chat.completion"), "choices": choices, "usage": self._usage.fields()}
        return fields if self._scores is None else {**fields, "prompt_logprobs": self._scores}

    def _choice(
        self, index: int, deltas: list[Delta], logprobs: list[TokenLogprobs], last: Piece
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": message_fields(deltas),
            "logprobs": chat_logprobs(self._tokenizer, logprobs) if self._wants_logprobs else None,
            "finish_reason": self._reason(last),
        }
        if last.stop_reason is not None:
            choice["stop_reason"] = last.stop_reason
        if last.cumulative_logprob is not None:  # of a beam
            choice["cumulative_logprob"] = last.cumulative_logprob
        return choice

    # ------------------------------------------------------------------------------------------ shared

    def _deltas(self, piece: Piece) -> list[Delta]:
        parser = self._parsers[piece.choice]
        deltas = list(parser.feed(piece.text, piece.tokens))
        if piece.finish_reason is not None:
            deltas += parser.finish()
        return deltas

    async def _note_scores(self, pieces: Sequence[Piece]) -> None:
        """Take in the scores of the prompt, which come with choice 0's first piece. They may be many, so they
        are written outside of the loop."""
        if self._prompt_logprobs is None or self._scores is not None:
            return
        for piece in pieces:
            if piece.prompt_logprobs is not None:
                scores, most = piece.prompt_logprobs, self._prompt_logprobs
                self._scores = await asyncio.to_thread(prompt_logprobs, self._tokenizer, scores, most)

    def _reason(self, piece: Piece) -> str:
        reason = reason_of(piece, self._head)
        # As at OpenAI, who names the tool is not told that one was called.
        called = self._chose_tool and self._parsers[piece.choice].called_tools
        return "tool_calls" if reason == "stop" and called else reason
