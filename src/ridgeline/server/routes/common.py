"""What the routes share: the service, the caller, answers, and how an endpoint is described."""

from __future__ import annotations

import secrets
import time
from collections.abc import Coroutine
from typing import Any

import msgspec
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.server.config import ApiKey
from ridgeline.server.errors import HttpError
from ridgeline.server.service import Service, Ticket, while_connected
from ridgeline.server.streaming import EventStream
from ridgeline.server.wire.answers import Head
from ridgeline.server.wire.base import Body
from ridgeline.server.wire.responses import Answer, Error

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


def new_head(service: Service, prefix: str, model: str) -> Head:
    return Head(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model, service.fingerprint)


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


def broken_off() -> HttpError:
    """For an answer that the engine could not finish; its cause is in the log."""
    return HttpError(500, "the model could not go on with this answer", "generation_failed")


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
