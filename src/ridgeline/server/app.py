"""The application: routes, errors, and the gate before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp

from ridgeline.server.body import ClientGoneError
from ridgeline.server.errors import HttpError, http_error_of
from ridgeline.server.gate import Gate
from ridgeline.server.routes import chat, completions, embeddings, metrics, status, steps, tokenizer
from ridgeline.server.service import Service
from ridgeline.server.version import package_version
from ridgeline.server.wire import responses
from ridgeline.server.wire.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from ridgeline.types import RidgelineError

ROUTERS: Sequence[APIRouter] = (
    chat.router,
    completions.router,
    embeddings.router,
    tokenizer.router,
    metrics.router,
    steps.router,
    status.router,
)
"""Every endpoint. A new one is a module in `routes/` and its router here."""
ELSEWHERE = "other"
"""What is said instead of a path that is no endpoint's."""
CLIENT_GONE = 499
"""For the log: nobody is there to read it."""
DESCRIBED: Sequence[type[BaseModel]] = (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
    responses.ChatCompletion,
    responses.ChatCompletionChunk,
    responses.Completion,
    responses.Embeddings,
    responses.ServedModel,
    responses.ModelList,
    responses.Tokenized,
    responses.Detokenized,
    responses.Status,
    responses.Step,
    responses.Version,
    responses.Error,
)
"""What the endpoints refer to in their descriptions."""


def create_app(service: Service, on_answer: Callable[[str, int, float], None] | None = None) -> ASGIApp:
    """ASGI for one service. `on_answer` hears of each answer: its endpoint's path as it is described, or
    `ELSEWHERE`; status (0: none); seconds."""
    app = FastAPI(
        title="Ridgeline",
        version=package_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    for kind in (
        HttpError,
        RidgelineError,
        ClientGoneError,
        HTTPException,
        RequestValidationError,
        Exception,
    ):
        app.add_exception_handler(kind, _answer_error)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    if on_answer is None:
        return Gate(app, service.config)
    paths = EndpointPaths([app.openapi_url or "", *(route.path for route in _routes())])
    return Gate(app, service.config, lambda path, *answer: on_answer(paths.of(path), *answer))


def _routes() -> list[APIRoute]:
    return [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]


class EndpointPaths:
    """Finds the endpoint that a path belongs to, whether or not the request came as far as that."""

    def __init__(self, described: Sequence[str]) -> None:
        self._exact = frozenset(path for path in described if "{" not in path)
        self._patterns = [(compile_path(path)[0], path) for path in described if "{" in path]

    def of(self, path: str) -> str:
        if path in self._exact:
            return path
        return next((known for pattern, known in self._patterns if pattern.match(path)), ELSEWHERE)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = _routing_error(error)
    elif isinstance(error, RequestValidationError):
        error = HttpError(422, "the path or the query is malformed")
    elif isinstance(error, ClientGoneError):
        return Response(status_code=CLIENT_GONE)
    told = http_error_of(error)
    return Response(told.body(), told.status, told.headers, "application/json")


def _routing_error(error: HTTPException) -> HttpError:
    messages = {404: "there is nothing at this path", 405: "this path does not take this method"}
    message = messages.get(error.status_code, "the request cannot be served")
    return HttpError(error.status_code, message, headers=error.headers)


def _described(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with the bodies that we read and the answers that we write ourselves."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = described.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(responses.schemas(*DESCRIBED))
        app.openapi_schema = described
    return app.openapi_schema
