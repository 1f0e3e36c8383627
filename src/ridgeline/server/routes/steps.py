"""`/v1/steps`: what the engine does, step by step."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.records import RECENT_STEPS
from ridgeline.server.errors import RETRY_AFTER, HttpError, unavailable
from ridgeline.server.routes.common import failures, service_of
from ridgeline.server.steps import MAX_LISTENERS
from ridgeline.server.streaming import EventStream

router = APIRouter()
_ANSWERS = {
    200: {
        "description": "Server-sent events. The data of each is a step; an event `dropped` says how many a "
        "slow reader has lost.",
        "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/Step"}}},
    },
    **failures(),
}
_BEGINNING = b": steps\n\n"
"""So that a listener has its headers before there is a step."""


@router.get("/v1/steps", response_class=Response, responses=_ANSWERS)
async def steps(
    request: Request, recent: Annotated[int, Query(ge=0, le=RECENT_STEPS)] = 0, follow: bool = True
) -> Response:
    """The engine's last steps, `recent` of them, and each further one as it ends, or with `follow=false` no
    more."""
    service = service_of(request)
    if service.draining:
        raise unavailable(service.state)
    feed = service.steps
    if feed.listeners >= MAX_LISTENERS:
        message = f"{MAX_LISTENERS} readers follow the steps already; try again later"
        raise HttpError(429, message, "rate_limit_exceeded", headers=RETRY_AFTER)
    feed.join()
    return EventStream(_BEGINNING, feed.events(recent, follow), feed.leave)
