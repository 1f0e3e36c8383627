"""One request to a server of OpenAI's API: its stream, and when each part of it came."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from ridgeline.apps.load.connections import Connections
from ridgeline.apps.load.dataset import DEFAULT_OUTPUT_TOKENS, Sample
from ridgeline.apps.load.events import Event, EventParser
from ridgeline.apps.load.failures import BROKEN, ERROR_EVENT, FailureError
from ridgeline.types import ConfigError, RequestError

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
MAX_ANSWER_BYTES = 4 << 20  # of an answer that is no stream


@dataclass(frozen=True, slots=True)
class Asking:
    """How every request is asked. A server may refuse the optional fields, which are then left out;
    `service_tier` is sent where there is one."""

    model: str
    endpoint: str = "chat"
    temperature: float = 0.0
    ignore_eos: bool = False
    include_usage: bool = True
    timeout_s: float = 600.0
    service_tier: str | None = None

    def __post_init__(self) -> None:
        if self.endpoint not in PATHS:
            raise ConfigError(f"endpoint is {self.endpoint!r}; accepted: {', '.join(PATHS)}")
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout is {self.timeout_s:g} s; accepted: above 0")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"temperature is {self.temperature:g}; accepted: 0 to 100")

    def body(self, sample: Sample) -> bytes:
        fields: dict[str, Any] = {"model": self.model, **sample.body(self.endpoint)}
        fields["max_tokens"] = sample.output_tokens or DEFAULT_OUTPUT_TOKENS
        fields |= {"stream": True, "temperature": self.temperature}
        if self.include_usage:
            fields["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.service_tier is not None:
            fields["service_tier"] = self.service_tier
        return msgspec.json.encode(fields)


@dataclass(slots=True)
class Answer:
    """What came back. Times are `time.perf_counter`'s; `text_s` has one for each chunk that carried text.
    `cause` says why it failed, None where it did not."""

    asked_tokens: int
    start_s: float
    end_s: float = 0.0
    text_s: list[float] = field(default_factory=list)
    chunks: int = 0
    input_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False  # by the server's usage; else by chunks
    cause: str | None = None
    detail: str = ""


# ------------------------------------------------------------------------------------ reading a stream


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def carries_text(self) -> bool:
        delta = self.delta
        if delta is None:
            return bool(self.text)
        return bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_CHUNK = msgspec.json.Decoder(_Chunk)


class _Reader:
    """Takes the bytes of one answer and fills an `Answer`."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._parser = EventParser()
        self._other = bytearray()  # an answer of another status
        self._finished = False

    def receive(self, status: int, data: bytes, now_s: float) -> None:
        if status != 200:
            self._other += data[: MAX_ANSWER_BYTES - len(self._other)]
            return
        for event in self._parser.feed(data):
            self._answer.end_s = now_s
            if event.data == b"[DONE]":
                self._finished = True
            else:
                self._take(event, now_s)

    def _take(self, event: Event, now_s: float) -> None:
        answer = self._answer
        try:
            chunk = _CHUNK.decode(event.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if event.name == b"error":
                raise FailureError(ERROR_EVENT, event.data.decode(errors="replace")) from None
            raise FailureError(BROKEN, f"an event is not a chunk: {error}") from None
        if chunk.error is not None or event.name == b"error":
            raise FailureError(ERROR_EVENT, _message(event.data))
        answer.chunks += 1
        for choice in chunk.choices or ():
            if choice.carries_text:
                answer.text_s.append(now_s)
            self._finished = self._finished or choice.finish_reason is not None
        if chunk.usage is not None:
            answer.input_tokens = chunk.usage.prompt_tokens
            answer.output_tokens = chunk.usage.completion_tokens
            answer.counted = True

    def end(self, status: int) -> None:
        """Raises FailureError where the answer is not a whole stream."""
        if status != 200:
            raise FailureError(f"status {status}", _message(bytes(self._other)))
        if not self._finished:
            raise FailureError(BROKEN, "the stream ended before the answer did")


def _message(data: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        read = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        read = None
    for key in ("error", "message", "detail"):
        if isinstance(read, dict) and read.get(key):
            read = read[key]
    text = read if isinstance(read, str) else data.decode(errors="replace")
    return " ".join(text.split())[:300] or "no message"


async def ask(
    connections: Connections,
    asking: Asking,
    sample: Sample,
    on_begin: Callable[[Answer], None] = lambda answer: None,
) -> Answer:
    """Send a request and read its stream to the end. What fails is in the answer's `cause`. `on_begin` gets
    the answer before there is anything in it."""
    body = asking.body(sample)
    answer = Answer(sample.output_tokens or DEFAULT_OUTPUT_TOKENS, time.perf_counter())
    on_begin(answer)
    reader = _Reader(answer)
    try:
        status = await connections.exchange(
            "POST", PATHS[asking.endpoint], body, reader.receive, asking.timeout_s
        )
        reader.end(status)
    except FailureError as error:
        answer.cause, answer.detail = error.cause, error.detail
    answer.end_s = answer.end_s or time.perf_counter()
    if not answer.counted:
        answer.output_tokens = len(answer.text_s)
    return answer


# ----------------------------------------------------------------------------------------- before a run


async def served_models(connections: Connections, timeout_s: float = 20) -> list[str]:
    """The names in /v1/models. Raises ConfigError where there is no such server."""
    wanted = "accepted: a server that answers /v1/models"
    held = bytearray()

    def receive(status: int, data: bytes, now_s: float) -> None:
        if len(held) + len(data) > MAX_ANSWER_BYTES:
            raise FailureError(BROKEN, f"/v1/models is longer than {MAX_ANSWER_BYTES} bytes")
        held.extend(data)

    try:
        status = await connections.exchange("GET", "/v1/models", b"", receive, timeout_s)
    except FailureError as error:
        raise ConfigError(f"{connections.url}: {error}; {wanted}") from None
    if status != 200:
        message = _message(bytes(held))
        raise ConfigError(f"{connections.url}: /v1/models gives status {status}: {message}; {wanted}")
    try:
        read = msgspec.json.decode(bytes(held), type=_Models)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{connections.url}: /v1/models: {error}; {wanted}") from None
    return [model.id for model in read.data]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def chosen_model(names: list[str], wanted: str | None) -> str:
    """The wanted one, or the first. Raises ConfigError where it is not served."""
    if wanted is None and names:
        return names[0]
    if wanted is None or wanted not in names:
        shown = ", ".join(names[:20]) or "none is served"
        raise ConfigError(f"model {wanted!r} is not served; accepted: {shown}")
    return wanted


async def settle(connections: Connections, asking: Asking, sample: Sample) -> tuple[Asking, list[str]]:
    """Ask once, and leave out optional fields that the server refuses by name; also notes that say which.
    Raises RequestError where the request fails for any other reason."""
    notes: list[str] = []
    while True:
        answer = await ask(connections, asking, sample)
        if answer.cause is None:
            return asking, notes
        refused = answer.cause in ("status 400", "status 422")
        if refused and asking.ignore_eos and "ignore_eos" in answer.detail:
            asking = replace(asking, ignore_eos=False)
            notes.append("the server does not take ignore_eos: answers may be shorter than asked")
        elif refused and asking.include_usage and "stream_options" in answer.detail:
            asking = replace(asking, include_usage=False)
            notes.append("the server does not take stream_options: tokens are counted by chunks")
        else:
            raise RequestError(f"the first request fails: {answer.cause}: {answer.detail}")
