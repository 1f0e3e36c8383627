"""What is served, and how the server is: models, health, version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ridgeline.server.errors import unavailable
from ridgeline.server.routes.common import gives, json_answer, service_of
from ridgeline.server.service import Service
from ridgeline.server.version import package_version
from ridgeline.server.wire.responses import ModelList, ServedModel, Status, Version

router = APIRouter()


@router.get("/v1/models", responses=gives(ModelList))
async def models(request: Request) -> Response:
    """The models that are served."""
    service = service_of(request)
    return json_answer({"object": "list", "data": [_model(service, name) for name in service.text.names]})


@router.get("/v1/models/{model:path}", responses=gives(ServedModel))
async def model(request: Request, model: str) -> Response:
    """One of the models."""
    service = service_of(request)
    return json_answer(_model(service, service.model_name(model)))


def _model(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's fields, and of a model that is loaded: its context, the device, and how many matrices run in
    each number format."""
    fields = {"id": name, "object": "model", "created": service.created_s, "owned_by": "ridgeline"}
    card = service.client.card
    if card is None:
        return fields
    return {**fields, "max_model_len": card.max_model_len, "device": card.device, "formats": card.formats}


@router.head("/live", include_in_schema=False)
@router.get("/live", responses=gives(Status))
async def live(request: Request) -> Response:
    """The HTTP process lives."""
    return json_answer({"status": "alive"})


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=gives(Status))
async def health(request: Request) -> Response:
    """Requests are served: the engine makes progress. 503, with the state as its code, when they are not."""
    state = service_of(request).state
    if state != "ready":
        raise unavailable(state)
    return json_answer({"status": "ready"})


@router.get("/version", responses=gives(Version))
async def version_(request: Request) -> Response:
    """The version of this server."""
    return json_answer({"version": package_version()})
