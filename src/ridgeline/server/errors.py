"""What a client is told about an error: OpenAI's shape, and nothing of this machine's insides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ridgeline.server.engine_stream import ExpiredError
from ridgeline.types import CapacityError, EngineDeadError, RequestError

RETRY_AFTER = {"retry-after": "1"}


class HttpError(Exception):
    """An answer that is an error. `param` names the field at fault; `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> bytes:
        """The error as JSON."""
        # A message may quote what a client sent, and that need not be Unicode.
        message = str(self).encode("utf-8", "backslashreplace").decode()
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> HttpError:
    return HttpError(400, message, code, param)


def unavailable(state: str) -> HttpError:
    """For a server that serves nobody now: loading, restarting, stuck, draining …"""
    return HttpError(503, f"the server is {state}; try again later", state, headers=RETRY_AFTER)


def http_error_of(error: BaseException) -> HttpError:
    """The answer to an exception. What is no mistake of the client's is told without its cause."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, ExpiredError):
        message = "the request waited in the queue for too long and was not begun"
        return HttpError(503, message, "queue_timeout", headers=RETRY_AFTER)
    if isinstance(error, RequestError):
        return bad_request(str(error), _param(str(error)))
    if isinstance(error, EngineDeadError):
        message = "the engine stopped before the request was done; try again later"
        return HttpError(503, message, "engine_stopped", headers=RETRY_AFTER)
    if isinstance(error, CapacityError):
        return HttpError(503, str(error), "capacity", headers=RETRY_AFTER)
    if isinstance(error, MemoryError):
        return HttpError(503, "there is too little memory for this request", "capacity", headers=RETRY_AFTER)
    return HttpError(500, "the server failed on this request", "internal_error")


_PARAMS = {"prompt": "prompt", "message": "messages", "messages": "messages", "number": "stop"}


def _param(message: str) -> str | None:
    """The field that a RequestError speaks of: its first word, where that names one."""
    first: Any = message.split(maxsplit=1)[0].partition("[")[0] if message.strip() else ""
    return _PARAMS.get(first, first if "_" in first or first in _WORDS else None)


_WORDS = {
    "documents", "echo", "logprobs", "mirostat", "n", "seed", "speculation", "stop", "temperature", "tools"
}  # fmt: skip
