"""`/v1/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.model.tokenizer import Tokenizer
from ridgeline.server.messages import Piece
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
from ridgeline.server.service import Service, Ticket
from ridgeline.server.streaming import DONE
from ridgeline.server.wire.answers import (
    CompletionChunks,
    CompletionLogprobs,
    Head,
    Usage,
    prompt_logprobs,
)
from ridgeline.server.wire.requests import CompletionRequest
from ridgeline.server.wire.responses import Completion
from ridgeline.types import TokenLogprobs

router = APIRouter()


@router.post(
    "/v1/completions", openapi_extra=takes(CompletionRequest), responses=gives(Completion, events=True)
)
async def completions(request: Request) -> Response:
    """Continue one prompt, or several."""
    asked = await admitted(request, CompletionRequest)
    return await answer_with(request, asked.ticket, _answer(asked))


async def _answer(asked: Admitted[CompletionRequest]) -> Response:
    service, body = asked.service, asked.body
    prompts = await service.in_thread(_tokens, service, body)
    usage = asked.count(prompts, "prompt")
    texts = await service.in_thread(_texts, service, body) if body.echo else [""] * len(prompts)
    head = new_head(asked, "cmpl")
    answer = CompletionAnswer(service.text.tokenizer, head, asked, prompts, texts, usage)
    if not body.only_echo:
        asked.ticket.submit(prompts, asked.beams or asked.params, body.stream)
    return await generated(asked, answer)


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
    prompts, `n` for each; `texts` stand before the answers of their prompts."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        head: Head,
        asked: Admitted[CompletionRequest],
        prompts: Sequence[Sequence[int]],
        texts: Sequence[str],
        usage: Usage,
    ) -> None:
        body, params = asked.body, asked.params
        self._tokenizer = tokenizer
        self._head = head
        self._usage = usage
        self._wants_usage = body.wants_usage
        self._n = params.n
        self._echoed = [text for text in texts for _ in range(params.n)]
        self._prompts = prompts
        self._only_echo = body.only_echo
        self._echo_logprobs = body.echo_logprobs
        self._prompt_logprobs = body.prompt_logprobs
        self._awaits_scores = params.prompt_logprobs is not None and not body.only_echo
        self._scores: dict[int, dict[str, Any]] = {}  # the field with each prompt's scores, or no field
        self._echoes: dict[int, dict[str, Any]] = {}  # the `logprobs` of each choice's echo
        self._held: dict[int, list[Piece]] = {}  # of each prompt, until it has its scores
        self._begun: set[int] = set()
        self._logprobs: list[CompletionLogprobs] | None = None
        if params.logprobs is not None:
            skip = params.skip_special_tokens
            starts = [0 if self._echo_logprobs is not None else len(text) for text in self._echoed]
            self._logprobs = [CompletionLogprobs(tokenizer, skip, start) for start in starts]

    # --------------------------------------------------------------------------------------- streaming

    async def stream(self, ticket: Ticket) -> AsyncGenerator[bytes, None]:
        chunks = CompletionChunks(self._head)
        if self._only_echo:
            yield b"".join(map(chunks.choice, self._only_echoes()))
        else:
            async with aclosing(ticket.pieces()) as arriving:  # type: ignore[type-var]
                async for prompt, pieces in arriving:
                    ready = await self._scored(prompt, pieces) if self._awaits_scores else pieces
                    parts = [self._chunk(chunks, prompt, piece) for piece in ready]
                    if any(parts):
                        yield b"".join(parts)
        yield (chunks.usage(self._usage) if self._wants_usage else b"") + DONE

    async def _scored(self, prompt: int, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """What can be sent now: nothing before the prompt's scores. They come with choice 0, and the other
        choices may be ahead of it."""
        if prompt in self._scores:
            return pieces
        held = self._held.setdefault(prompt, [])
        held += pieces
        for piece in pieces:
            if piece.prompt_logprobs is not None:
                await self._note(prompt, piece.prompt_logprobs)
                return self._held.pop(prompt)
            if piece.finish_reason is not None:
                reason_of(piece, self._head)
        return ()

    def _chunk(self, chunks: CompletionChunks, prompt: int, piece: Piece) -> bytes:
        index, text = prompt * self._n + piece.choice, piece.text
        self._usage.add(piece)
        first = index not in self._begun
        if first:
            self._begun.add(index)
            text = self._echoed[index] + text
        elif not text and piece.finish_reason is None and piece.logprobs is None:
            return b""
        if piece.finish_reason is None and piece.logprobs is None and not self._awaits_scores:
            return chunks.text(index, text)
        logprobs = self._fields(index, piece.logprobs or ())
        reason = None if piece.finish_reason is None else reason_of(piece, self._head)
        fields = _choice(index, text, logprobs, reason, piece.stop_reason)
        return chunks.choice(fields | self._scores.get(prompt, {}) if first else fields)

    # ------------------------------------------------------------------------------------------- whole

    async def whole(self, ticket: Ticket) -> dict[str, Any]:
        choices = self._only_echoes() if self._only_echo else await self._choices(ticket)
        fields = self._head.fields("text_completion")
        return {**fields, "choices": choices, "usage": self._usage.fields()}

    async def _choices(self, ticket: Ticket) -> list[dict[str, Any]]:
        texts = [[text] for text in self._echoed]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in texts]
        ends: list[tuple[str | None, str | int | None]] = [(None, None)] * len(texts)
        scores: list[dict[str, float]] = [{} for _ in texts]
        async with aclosing(ticket.pieces()) as arriving:  # type: ignore[type-var]
            async for prompt, pieces in arriving:
                for piece in pieces:
                    index = prompt * self._n + piece.choice
                    self._usage.add(piece)
                    if piece.prompt_logprobs is not None:
                        await self._note(prompt, piece.prompt_logprobs)
                    texts[index].append(piece.text)
                    logprobs[index] += piece.logprobs or ()
                    if piece.finish_reason is not None:
                        ends[index] = (reason_of(piece, self._head), piece.stop_reason)
                    if piece.cumulative_logprob is not None:
                        scores[index] = {"cumulative_logprob": piece.cumulative_logprob}
        return [
            _choice(i, "".join(texts[i]), self._fields(i, logprobs[i]), *ends[i])
            | self._scores.get(i // self._n, {})
            | scores[i]
            for i in range(len(texts))
        ]

    # ------------------------------------------------------------------------------------------ shared

    def _only_echoes(self) -> list[dict[str, Any]]:
        """The choices where the model is not asked."""
        return [_choice(index, text, None, "length", None) for index, text in enumerate(self._echoed)]

    async def _note(self, prompt: int, scores: Sequence[TokenLogprobs | None]) -> None:
        """Take in the scores of a prompt. They may be many, so they are written outside of the loop."""
        await asyncio.to_thread(self._write, prompt, scores)

    def _write(self, prompt: int, scores: Sequence[TokenLogprobs | None]) -> None:
        most = self._prompt_logprobs
        wanted = {} if most is None else {"prompt_logprobs": prompt_logprobs(self._tokenizer, scores, most)}
        if self._logprobs is not None and self._echo_logprobs is not None:
            top, tokens = self._echo_logprobs, self._prompts[prompt]
            first = tokens[0] if tokens else None  # an empty prompt has nothing to show
            known = [replace(each, top=each.top[:top]) for each in scores if each is not None]
            for index in range(prompt * self._n, (prompt + 1) * self._n):
                self._echoes[index] = self._logprobs[index].fields(known, first)
        self._scores[prompt] = wanted

    def _fields(self, index: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """The `logprobs` of a choice; behind those of an echoed prompt, the first time."""
        if self._logprobs is None:
            return None
        echo = self._echoes.pop(index, {})
        fields = self._logprobs[index].fields(logprobs)
        return {name: echo.get(name, []) + values for name, values in fields.items()}


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
