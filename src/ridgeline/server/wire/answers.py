"""Answers and chunks, as bytes. The parts of a chunk that never change are encoded once for each request."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ridgeline.model.tokenizer import Tokenizer
from ridgeline.server.messages import Piece
from ridgeline.server.parsers import Delta
from ridgeline.types import TokenLogprobs

encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of an answer repeats. `tier` is told where a request has asked for one."""

    id: str
    created_s: int
    model: str
    fingerprint: str
    tier: str | None = None

    def fields(self, kind: str) -> dict[str, Any]:
        fields = {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        return fields if self.tier is None else {**fields, "service_tier": self.tier}


@dataclass(slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, piece: Piece) -> None:
        self.completion_tokens += len(piece.tokens)
        self.cached_tokens += piece.cached_tokens

    def fields(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Chunks:
    """Encodes the events of one streamed answer. With `usage`, every chunk has a field for it, null before
    the last."""

    def __init__(self, head: Head, kind: str, usage: bool) -> None:
        self._head = head.fields(kind)
        self._open = b"data: " + encode(self._head)[:-1] + b',"choices":['
        self._close = b',"usage":null}\n\n' if usage else b"}\n\n"

    def usage(self, usage: Usage) -> bytes:
        """The last chunk of all, without choices."""
        return b"data: " + encode({**self._head, "choices": [], "usage": usage.fields()}) + b"\n\n"

    def choice(self, fields: dict[str, Any], more: bytes = b"") -> bytes:
        """A chunk of one choice; `more` is what stands behind that."""
        return b"%b%b]%b%b" % (self._open, encode(fields), more, self._close)


class ChatChunks(Chunks):
    def __init__(self, head: Head, usage: bool) -> None:
        super().__init__(head, "chat.completion.chunk", usage)
        self._plain_close = b'},"logprobs":null,"finish_reason":null}]' + self._close

    def role(self, index: int, prompt_logprobs: Sequence[Any] | None = None) -> bytes:
        """The first chunk of a choice."""
        more = b"" if prompt_logprobs is None else b',"prompt_logprobs":' + encode(prompt_logprobs)
        delta = {"role": "assistant", "content": ""}
        return self.choice({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, more)

    def content(self, index: int, text: str) -> bytes:
        """The chunk that nearly all are."""
        return b'%b{"index":%d,"delta":{"content":%b%b' % (
            self._open,
            index,
            encode(text),
            self._plain_close,
        )

    def delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
    ) -> bytes:
        fields = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if stop_reason is not None:
            fields["stop_reason"] = stop_reason
        return self.choice(fields)


class CompletionChunks(Chunks):
    """OpenAI's description allows no null for the usage of completions."""

    def __init__(self, head: Head) -> None:
        super().__init__(head, "text_completion", usage=False)
        self._plain_close = b',"logprobs":null,"finish_reason":null}]' + self._close

    def text(self, index: int, text: str) -> bytes:
        return b'%b{"index":%d,"text":%b%b' % (self._open, index, encode(text), self._plain_close)


def delta_fields(delta: Delta) -> dict[str, Any]:
    """A delta as a chunk of a chat has it; what is empty is left out."""
    fields: dict[str, Any] = {}
    if delta.reasoning:
        fields["reasoning_content"] = delta.reasoning
    if delta.content:
        fields["content"] = delta.content
    if delta.tool_calls:
        fields["tool_calls"] = [_tool_call(call) for call in delta.tool_calls]
    return fields


def _tool_call(call: Any) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    function = {"name": call.name, **function}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def message_fields(deltas: Iterable[Delta]) -> dict[str, Any]:
    """The message that deltas add up to."""
    content, reasoning = [], []
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        content.append(delta.content)
        reasoning.append(delta.reasoning)
        for part in delta.tool_calls:
            call = calls.setdefault(
                part.index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            )
            call["id"] = part.id or call["id"]
            call["function"]["name"] = part.name or call["function"]["name"]
            call["function"]["arguments"] += part.arguments
    text = "".join(content)
    fields: dict[str, Any] = {
        "role": "assistant",
        "content": None if calls and not text else text,
        "refusal": None,
    }
    if any(reasoning):
        fields["reasoning_content"] = "".join(reasoning)
    if calls:
        fields["tool_calls"] = [calls[index] for index in sorted(calls)]
    return fields


# --------------------------------------------------------------------------------------------- logprobs


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": _finite(logprob)}

    content = [
        {**entry(each.token_id, each.logprob), "top_logprobs": [entry(*top) for top in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer, scores: Sequence[TokenLogprobs | None], most: int
) -> list[dict[str, Any] | None]:
    """vLLM's field: for each token of a prompt None, or the scores of that token and of the `most` probable
    ones by their ids."""

    def entry(token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
        text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": text}

    def at(score: TokenLogprobs) -> dict[str, Any]:
        own = {str(score.token_id): entry(score.token_id, score.logprob, score.rank)}
        tops = enumerate(score.top[:most], start=1)
        return own | {str(top): entry(top, value, rank) for rank, (top, value) in tops}

    return [None if score is None else at(score) for score in scores]


class CompletionLogprobs:
    """The `logprobs` of a choice of a completion; offsets count the characters of its text from `start`."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, start: int) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = start

    def fields(self, logprobs: Sequence[TokenLogprobs], first: int | None = None) -> dict[str, Any]:
        """Those of the next tokens; a `first` one before them has nothing before it, and no score."""
        offsets: list[int] = []
        tokens: list[str] = []
        tops: list[dict[str, float] | None] = []
        if first is not None:
            offsets.append(self._pass(first))
            tokens.append(self._name(first))
            tops.append(None)
        for each in logprobs:
            name = self._name(each.token_id)
            offsets.append(self._pass(each.token_id))
            tokens.append(name)
            tops.append(
                {self._name(token): _finite(value) for token, value in each.top}
                | {name: _finite(each.logprob)}
            )
        unscored = [] if first is None else [None]
        values = [*unscored, *(_finite(each.logprob) for each in logprobs)]
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}

    def _pass(self, token_id: int) -> int:
        """Where a token begins in the text; the next one is looked for behind it."""
        shown = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
        if shown and shown[0] & 0xC0 != 0x80:  # what is held back will not become a character
            self._at += len(self._utf8.decode(b"", final=True))
        begin = self._at
        self._at += len(self._utf8.decode(shown))
        return begin

    def _name(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:  # a part of a character, spelled as OpenAI does
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is what OpenAI writes for a token that cannot come."""
    return max(logprob, -9999.0)
