"""OpenAI's own description of its answers, and a check of ours against it.

`data/openai_schemas.json` has the schemas, and says where they are from. What we send beside OpenAI's fields
is allowed by them; a field of the wrong type and one that is missing are not.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

SOURCE = Path(__file__).parent / "data" / "openai_schemas.json"

ANSWERS = {
    "/v1/chat/completions": "CreateChatCompletionResponse",
    "/v1/completions": "CreateCompletionResponse",
    "/v1/embeddings": "CreateEmbeddingResponse",
    "/v1/models": "ListModelsResponse",
}
CHUNKS = {
    "/v1/chat/completions": "CreateChatCompletionStreamResponse",
    "/v1/completions": "CreateCompletionResponse",
}


@cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    schemas = json.loads(SOURCE.read_text())
    assert name in schemas["$defs"]
    schema = {"$ref": f"#/$defs/{name}", "$defs": schemas["$defs"]}
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def validate(name: str, value: Any) -> None:
    """Raises jsonschema.ValidationError when `value` is not what OpenAI describes by `name`."""
    if name == "CreateCompletionResponse":
        value = {**value, "choices": [_without_unscored(choice) for choice in value["choices"]]}
    _validator(name).validate(value)


def _without_unscored(choice: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls of an echoed prompt's first token: OpenAI's description forgets them."""
    logprobs = choice["logprobs"]
    if logprobs is None or logprobs["token_logprobs"][:1] != [None]:
        return choice
    assert logprobs["top_logprobs"][0] is None
    lists = {"token_logprobs", "top_logprobs"}
    return {**choice, "logprobs": {k: v[1:] if k in lists else v for k, v in logprobs.items()}}


def events(text: str, whole: bool = True) -> list[Any]:
    """The events of a stream that ended well, without the mark of its end; or of one that was left."""
    *sent, rest = text.split("\n\n")
    if whole or sent[-1:] == ["data: [DONE]"]:
        assert (sent.pop(), rest) == ("data: [DONE]", ""), text[-400:]
    assert all(event.startswith("data: ") for event in sent)
    return [json.loads(event.removeprefix("data: ")) for event in sent]


def validate_response(path: str, status: int, content_type: str, text: str, whole: bool = True) -> None:
    """Whatever was answered at one of OpenAI's paths."""
    if status >= 400:
        validate("ErrorResponse", json.loads(text))
    elif content_type.startswith("text/event-stream"):
        for event in events(text, whole):
            validate(CHUNKS[path], event)
    elif path in ANSWERS:
        validate(ANSWERS[path], json.loads(text))
    elif path.startswith("/v1/models/"):
        validate("Model", json.loads(text))


def checked(response: Any) -> None:
    """For the `response` hooks of an httpx client: validates every answer and every chunk that it gets."""
    response.read()
    _check(response)


async def checked_async(response: Any) -> None:
    """The same for asynchronous clients, but for streams, which tests read as they come."""
    if response.headers.get("content-type") == "application/json":
        await response.aread()
        _check(response)


def _check(response: Any) -> None:
    if response.request.method != "HEAD":
        kind = response.headers.get("content-type", "")
        validate_response(response.request.url.path, response.status_code, kind, response.text)
