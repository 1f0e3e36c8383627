"""`/v1/completions`."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.server import logs
from ridgeline.server.messages import Piece
from ridgeline.server.routes.common import (
    STOPS,
    answer_with,
    broken_off,
    gives,
    json_answer,
    key_of,
    new_head,
    record_of,
    service_of,
    takes,
)
from ridgeline.server.service import Service, Ticket
from ridgeline.server.streaming import DONE, EventStream
from ridgeline.server.wire.answers import CompletionChunks, CompletionLogprobs, Head, Usage
from ridgeline.server.wire.requests import CompletionRequest
from ridgeline.server.wire.responses import Completion
from ridgeline.types import SamplingParams, TokenLogprobs

router = APIRouter()


@router.post(
    "/v1/completions", openapi_extra=takes(CompletionRequest), responses=gives(Completion, events=True)
)
async def completions(request: Request) -> Response:
    """Continue one prompt, or several."""
    service, key = service_of(request), key_of(request)
    service.check_ready(key)
    body = await service.bodies.read(request, CompletionRequest)
    model = service.model_name(body.model)
    body.check()
    params = body.params(service.text.sampling_defaults)
    name = request.scope["ridgeline.id"]
    ticket = service.admit(key, params.n * len(body.prompt), name)
    service.log_prompt(name, body.prompt)

    async def work() -> Response:
        prompts = await service.in_thread(_tokens, service, body)
        for prompt in prompts:
            service.check_tokens(prompt, "prompt")
        usage = Usage(sum(map(len, prompts)))
        record_of(request)["usage"] = usage
        echoed = await service.in_thread(_texts, service, body) if body.echo else [""] * len(prompts)
        scored = [prompt[0] for prompt in prompts] if body.scores_prompt else None
        answer = CompletionAnswer(service, new_head(service, "cmpl", model), params, echoed, usage, scored)
        if not body.only_echo:
            ticket.submit(prompts, params, body.stream)
        if not body.stream:
            return json_answer(await answer.whole(ticket, body.only_echo))
        chunks = answer.stream(ticket, body.only_echo, body.wants_usage)
        return EventStream(await anext(chunks), chunks, ticket.close)

    return await answer_with(request, ticket, work())


def _tokens(service: Service, body: CompletionRequest) -> list[tuple[int, ...]]:
    return [service.text.prompt_tokens(prompt, body.add_special_tokens) for prompt in body.prompt]


def _texts(service: Service, body: CompletionRequest) -> list[str]:
    """The prompts as text."""
    decode = service.text.tokenizer.decode
    return [
        prompt if isinstance(prompt, str) else decode(prompt, skip_special=False) for prompt in body.prompt
    ]


class CompletionAnswer:
    """Turns what the engine gives into choices, or into chunks of them. A choice's index counts through the
    prompts, `n` for each; `echoed` are the texts that stand before the prompts' answers. Where the prompts
    are scored too, `scored` has the first token of each, which has no score."""

    def __init__(
        self,
        service: Service,
        head: Head,
        params: SamplingParams,
        echoed: Sequence[str],
        usage: Usage,
        scored: Sequence[int] | None = None,
    ) -> None:
        self._head = head
        self._usage = usage
        self._n = params.n
        self._echoed = [text for text in echoed for _ in range(params.n)]
        self._scored = scored
        self._scores: dict[int, list[TokenLogprobs]] = {}  # of each prompt's tokens but the first
        self._begun: set[int] = set()
        self._logprobs: list[CompletionLogprobs] | None = None
        if params.logprobs is not None:
            tokenizer, skip = service.text.tokenizer, params.skip_special_tokens
            starts = [0 if scored else len(text) for text in self._echoed]
            self._logprobs = [CompletionLogprobs(tokenizer, skip, start) for start in starts]

    async def stream(self, ticket: Ticket, only_echo: bool, usage: bool) -> AsyncGenerator[bytes, None]:
        chunks = CompletionChunks(self._head, usage)
        if only_echo:
            ended = [_choice(index, text, None, "length", None) for index, text in enumerate(self._echoed)]
            yield b"".join(map(chunks.choice, ended))
        else:
            async with aclosing(ticket.pieces()) as arriving:  # type: ignore[type-var]
                async for prompt, pieces in arriving:
                    parts = [self._chunk(chunks, prompt, piece) for piece in pieces]
                    if any(parts):
                        yield b"".join(parts)
        yield (chunks.usage(self._usage) if usage else b"") + DONE

    def _chunk(self, chunks: CompletionChunks, prompt: int, piece: Piece) -> bytes:
        index, text = prompt * self._n + piece.choice, piece.text
        self._usage.completion_tokens += len(piece.tokens)
        if index not in self._begun:
            self._begun.add(index)
            text = self._echoed[index] + text
        elif not text and piece.finish_reason is None and piece.logprobs is None:
            return b""
        if piece.finish_reason is None and piece.logprobs is None:
            return chunks.text(index, text)
        logprobs = self._fields(index, piece.logprobs)
        reason = None if piece.finish_reason is None else self._reason(piece)
        return chunks.choice(_choice(index, text, logprobs, reason, piece.stop_reason))

    async def whole(self, ticket: Ticket, only_echo: bool) -> dict[str, Any]:
        count = len(self._echoed)
        texts = [[text] for text in self._echoed]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(count)]
        ends: list[tuple[str, str | int | None]] = [("length", None)] * count
        if not only_echo:
            async with aclosing(ticket.pieces()) as arriving:  # type: ignore[type-var]
                async for prompt, pieces in arriving:
                    for piece in pieces:
                        index = prompt * self._n + piece.choice
                        self._usage.completion_tokens += len(piece.tokens)
                        if piece.prompt_logprobs is not None:
                            self._scores[prompt] = [
                                each for each in piece.prompt_logprobs if each is not None
                            ]
                        texts[index].append(piece.text)
                        logprobs[index] += piece.logprobs or ()
                        if piece.finish_reason is not None:
                            ends[index] = (self._reason(piece), piece.stop_reason)
        choices = [
            _choice(i, "".join(texts[i]), self._fields(i, logprobs[i]), *ends[i]) for i in range(count)
        ]
        fields = self._head.fields("text_completion")
        return {**fields, "choices": choices, "usage": self._usage.fields()}

    def _fields(self, index: int, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        if self._scored is None:
            return self._logprobs[index].fields(logprobs or ())
        prompt = index // self._n
        return self._logprobs[index].fields([*self._scores[prompt], *(logprobs or ())], self._scored[prompt])

    def _reason(self, piece: Piece) -> str:
        if piece.finish_reason not in STOPS:
            logs.event("answer broke off", logging.ERROR, id=self._head.id, cause=piece.stop_reason)
            raise broken_off()
        return str(piece.finish_reason)


def _choice(
    index: int,
    text: str,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
    stop_reason: str | int | None,
) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
    if stop_reason is not None:
        choice["stop_reason"] = stop_reason
    return choice
