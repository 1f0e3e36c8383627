"""`/tokenize` and `/detokenize`, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.server.errors import bad_request
from ridgeline.server.routes.chat import chat_tokens
from ridgeline.server.routes.common import gives, json_answer, service_of, takes
from ridgeline.server.service import Service
from ridgeline.server.wire.requests import DetokenizeRequest, TokenizeRequest
from ridgeline.server.wire.responses import Detokenized, Tokenized

router = APIRouter()


@router.post("/tokenize", openapi_extra=takes(TokenizeRequest), responses=gives(Tokenized))
async def tokenize(request: Request) -> Response:
    """The token ids of a text or a chat."""
    service = service_of(request)
    limit = service.card.max_model_len
    body = await service.bodies.read(request, TokenizeRequest)
    service.model_name(body.model)
    body.check()
    tokens, texts = await service.in_thread(_tokenized, service, body)
    return json_answer({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": texts})


def _tokenized(service: Service, body: TokenizeRequest) -> tuple[Sequence[int], list[str] | None]:
    if body.prompt is not None:
        tokens = service.text.prompt_tokens(body.prompt, body.add_special_tokens)
    else:
        tokens = chat_tokens(service.text, body)
    tokenizer = service.text.tokenizer
    return tokens, [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None


@router.post("/detokenize", openapi_extra=takes(DetokenizeRequest), responses=gives(Detokenized))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service = service_of(request)
    size = service.card.vocabulary_size
    body = await service.bodies.read(request, DetokenizeRequest)
    service.model_name(body.model)
    for token in body.tokens:
        if not 0 <= token < size:
            raise bad_request(f"token is {token}; accepted: 0 to {size - 1}", "tokens")
    decode: Any = service.text.tokenizer.decode
    return json_answer({"prompt": await service.in_thread(decode, body.tokens, skip_special=False)})
