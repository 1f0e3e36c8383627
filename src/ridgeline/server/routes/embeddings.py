"""`/v1/embeddings`: a vector for each text, by pooling the final hidden states of any loaded model."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.server.routes.common import (
    answer_with,
    gives,
    json_answer,
    key_of,
    record_of,
    service_of,
    takes,
)
from ridgeline.server.service import Service
from ridgeline.server.wire.answers import Usage
from ridgeline.server.wire.requests import EmbeddingRequest
from ridgeline.server.wire.responses import Embeddings

router = APIRouter()
T = TypeVar("T")


@router.post("/v1/embeddings", openapi_extra=takes(EmbeddingRequest), responses=gives(Embeddings))
async def embeddings(request: Request) -> Response:
    """Pool one text, or several."""
    service, key = service_of(request), key_of(request)
    service.check_ready(key)
    body = await service.bodies.read(request, EmbeddingRequest)
    model = service.model_name(body.model)
    name = request.scope["ridgeline.id"]
    ticket = service.admit(key, body, len(body.input), name)
    service.log_prompt(name, body.input)

    async def work() -> Response:
        prompts = await service.in_thread(_tokens, service, body)
        for prompt in prompts:
            service.check_tokens(prompt, "input")
        usage = Usage(sum(map(len, prompts)))
        record_of(request)["usage"] = usage
        how = (body.pooling, body.normalize, ticket.deadline_s, ticket.arrived_s, name, ticket.sender)
        embedded = await _all([service.client.embed(each, *how) for each in prompts])
        usage.cached_tokens = sum(each.cached_tokens for each in embedded)
        fields = usage.fields()
        del fields["completion_tokens"]
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(each.embedding, body.encoding_format)}
            for i, each in enumerate(embedded)
        ]
        tier = {} if ticket.tier is None else {"service_tier": ticket.tier}
        return json_answer({"object": "list", "data": data, "model": model, "usage": fields, **tier})

    return await answer_with(request, ticket, work())


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all of `work`; the first error ends the rest, and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _tokens(service: Service, body: EmbeddingRequest) -> list[tuple[int, ...]]:
    return [service.text.prompt_tokens(prompt, body.add_special_tokens) for prompt in body.input]


def _encoded(vector: Sequence[float], encoding: str) -> Sequence[float] | str:
    """In base64 the vector is float32, little-endian: what OpenAI's client asks for."""
    if encoding == "float":
        return vector
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
