"""`/metrics`, in Prometheus' text format or OpenMetrics'."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import exposition
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.server.routes.common import failures, service_of

router = APIRouter()
_OPEN = "application/openmetrics-text"
_ANSWERS = {
    200: {
        "description": "Metrics in Prometheus' text format, or OpenMetrics' where that is accepted.",
        "content": {"text/plain": {"schema": {"type": "string"}}, _OPEN: {"schema": {"type": "string"}}},
    },
    **failures(),
}


@router.get("/metrics", response_class=Response, responses=_ANSWERS)
async def metrics(request: Request) -> Response:
    """What the server counts, for Prometheus."""
    registry = service_of(request).metrics.registry
    # Only the kind of the format is read: versions and escaping are a client's free text.
    if _OPEN in request.headers.get("accept", ""):
        text: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
        kind = openmetrics.CONTENT_TYPE_LATEST
    else:
        text, kind = exposition.generate_latest(registry), exposition.CONTENT_TYPE_PLAIN_0_0_4
    return Response(text, headers={"content-type": kind})
