"""What answers look like, for the description that the server gives of itself and for tests. Answers are not
made from these classes: `answers.py` writes bytes."""

from __future__ import annotations

from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from ridgeline.records import StepRecord


class Answer(BaseModel):
    """Base of answers; fields without a default are always there."""

    model_config = ConfigDict(strict=True, extra="forbid")


class PromptTokensDetails(Answer):
    """`cached_tokens` were found in the prefix cache."""

    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Answer):
    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob] | None
    refusal: None


class PromptLogprob(Answer):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt null, or scores by token id; the first is null."""


class CalledFunction(Answer):
    name: str
    arguments: str


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int = ""
    cumulative_logprob: float = 0.0


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str = ""
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs = []


class ToolCallPart(Answer):
    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: dict[str, str]


class ChatDelta(Answer):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCallPart] = []


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int = ""


class ChatCompletionChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str = ""
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs = []


class CompletionLogprobs(Answer):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int = ""
    prompt_logprobs: PromptLogprobs = []
    cumulative_logprob: float = 0.0


class Completion(Answer):
    """Also the chunks of a stream; before the last of a choice, `finish_reason` is null."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str = ""
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Embedding(Answer):
    """In base64, the vector is float32, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Embeddings(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    service_tier: str = ""


class ServedModel(Answer):
    """`formats` counts the matrices that run in each number format."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = 0
    device: str = ""
    formats: dict[str, int] = {}


class ModelList(Answer):
    object: Literal["list"]
    data: list[ServedModel]


class Tokenized(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    prompt: str


class Status(Answer):
    status: str


class Version(Answer):
    version: str


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    error: ErrorDetail


_FIGURES: dict[str, Any] = {name: (kind, ...) for name, kind in get_type_hints(StepRecord).items()}

Step = create_model("Step", __base__=Answer, __doc__=StepRecord.__doc__, **_FIGURES)
"""The data of an event of `/v1/steps`: every field is always there."""


def schemas(*kinds: type[BaseModel]) -> dict[str, Any]:
    """JSON schemas by their names, in the form that OpenAPI keeps them."""
    found: dict[str, Any] = {}
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        found.update(schema.pop("$defs", {}))
        found[kind.__name__] = schema
    return found
