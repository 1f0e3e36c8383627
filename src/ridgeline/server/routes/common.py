"""What the routes share: the service, the caller, answers, and how an endpoint is described."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.sampling.beam_search import BeamSearchParams
from ridgeline.server import logs
from ridgeline.server.config import ApiKey
from ridgeline.server.errors import HttpError, bad_request
from ridgeline.server.messages import Piece
from ridgeline.server.service import Service, Ticket, while_connected
from ridgeline.server.streaming import EventStream
from ridgeline.server.wire.answers import Head, Usage
from ridgeline.server.wire.base import Body
from ridgeline.server.wire.requests import Sampled
from ridgeline.server.wire.responses import Answer, Error
from ridgeline.types import RequestError, SamplingParams

B = TypeVar("B", bound=Sampled)

STOPS = frozenset({"stop", "length"})
"""Reasons for which an answer ends well."""


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def key_of(request: Request) -> ApiKey | None:
    """Whose request it is, None on a server without keys."""
    key: ApiKey | None = request.scope.get("ridgeline.key")
    return key


def record_of(request: Request) -> dict[str, Any]:
    """What the request's line in the log will say beside what is said of every request."""
    record: dict[str, Any] = request.scope.setdefault("ridgeline.record", {})
    return record


def json_answer(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def new_head(asked: Admitted[Any], prefix: str) -> Head:
    name, now_s = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
    return Head(name, now_s, asked.model, asked.service.fingerprint, asked.ticket.tier)


async def answer_with(request: Request, ticket: Ticket, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that `work` makes while the client waits. The ticket is closed at the end of that, or of
    the stream."""
    try:
        response = await while_connected(request.receive, work)
    except BaseException:
        ticket.close()
        raise
    if not isinstance(response, EventStream):
        ticket.close()
    return response


# ------------------------------------------------------------------------------------------- generation


@dataclass(frozen=True, slots=True)
class Admitted(Generic[B]):
    """A request for tokens that has its place in the queue."""

    request: Request
    service: Service
    body: B
    model: str
    params: SamplingParams
    beams: BeamSearchParams | None
    ticket: Ticket

    def count(self, prompts: Sequence[Sequence[int]], param: str) -> Usage:
        """Begin the account of the answer, which the log gets too. Raises HttpError for a prompt that the
        model cannot take."""
        for prompt in prompts:
            self.service.check_tokens(prompt, param)
        usage = Usage(sum(map(len, prompts)))
        record_of(self.request)["usage"] = usage
        return usage


async def admitted(request: Request, kind: type[B]) -> Admitted[B]:
    """Take in a request: what is wrong with it is told in this order, and text is looked at last of all."""
    service, key = service_of(request), key_of(request)
    service.check_ready(key)
    body = await service.bodies.read(request, kind)
    model = service.model_name(body.model)
    body.check()
    with form_errors(body):
        params = body.params(service.text.sampling_defaults)
        beams = body.beams(params)
    name = request.scope["ridgeline.id"]
    ticket = service.admit(key, body, body.answers, name)
    service.log_prompt(name, body.content)
    return Admitted(request, service, body, model, params, beams, ticket)


class Generated(Protocol):
    """What a route makes of the pieces of an answer."""

    async def whole(self, ticket: Ticket) -> dict[str, Any]: ...

    def stream(self, ticket: Ticket) -> AsyncGenerator[bytes, None]: ...


async def generated(asked: Admitted[B], answer: Generated) -> Response:
    """An answer at once, or as it grows."""
    with form_errors(asked.body):
        if not asked.body.stream:
            return json_answer(await answer.whole(asked.ticket))
        chunks = answer.stream(asked.ticket)
        return EventStream(await anext(chunks), chunks, asked.ticket.close)


@contextmanager
def form_errors(body: Sampled) -> Iterator[None]:
    """Errors about the form of the answer speak of the field in which the request has it."""
    try:
        yield
    except RequestError as error:
        own, rest = body.form_field, str(error).removeprefix("structured_outputs")
        if rest == str(error) or own is None:
            raise
        raise bad_request(own + rest, own) from None


def reason_of(piece: Piece, head: Head) -> str:
    """Why a choice ended. Raises HttpError for one that ended in an error, whose cause is for the log."""
    if piece.finish_reason not in STOPS:
        logs.event("answer broke off", logging.ERROR, id=head.id, cause=piece.stop_reason)
        raise HttpError(500, "the model could not go on with this answer", "generation_failed")
    return str(piece.finish_reason)


# ------------------------------------------------------------------------------------------ description


def takes(kind: type[Body]) -> dict[str, Any]:
    """An endpoint's description of its body, which is read by `BodyReader` and not by FastAPI."""
    content = {"application/json": {"schema": _schema(kind)}}
    return {"requestBody": {"required": True, "content": content}}


def gives(kind: type[Answer], events: bool = False) -> dict[int | str, dict[str, Any]]:
    """An endpoint's description of its answers, which may come as server-sent events."""
    content: dict[str, Any] = {"application/json": {"schema": _schema(kind)}}
    if events:
        content["text/event-stream"] = {}
    return {200: {"description": "The answer.", "content": content}, **failures()}


def failures() -> dict[int | str, dict[str, Any]]:
    """An endpoint's description of its errors."""
    errors = {"application/json": {"schema": _schema(Error)}}
    return {
        "4XX": {"description": "The request cannot be served as it is.", "content": errors},
        "5XX": {"description": "The server cannot serve now.", "content": errors},
    }


def _schema(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
