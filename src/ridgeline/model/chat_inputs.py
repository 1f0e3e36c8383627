"""What a chat template is given: messages, tools, documents and variables, checked and copied as plain JSON.

A template is a program from a stranger, so it sees only fresh copies of plain values, never an object of a
caller's. The forms follow `transformers.apply_chat_template`: keys of None are dropped from a message, and
reasoning is found under each of its names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from ridgeline.model.checkpoint.files import shown
from ridgeline.types import RequestError

__all__ = ["ChatInputs", "Message", "Objects", "prints_parts"]

Message = Mapping[str, Any]
Objects = Sequence[Mapping[str, Any]]

_OWN_VARIABLES = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "documents", "messages", "tools",
        "cycler", "dict", "joiner", "namespace", "raise_exception", "range", "strftime_now",
    }
)  # fmt: skip
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class ChatInputs:
    """The values of one rendering. Everything in them is a JSON value that belongs to them."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    tools: list[dict[str, Any]] | None
    documents: list[dict[str, Any]] | None
    variables: dict[str, Any]

    @classmethod
    def checked(
        cls,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Objects | None,
        documents: Objects | None,
        variables: Mapping[str, Any],
    ) -> Self:
        """Copies of what a caller gives. RequestError for what is not a chat."""
        if not isinstance(add_generation_prompt, bool):
            seen = shown(add_generation_prompt)
            raise RequestError(f"add_generation_prompt is {seen}; accepted: true or false")
        if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
            raise RequestError(
                "messages is not a list of messages; accepted: one or more, of role and content"
            )
        try:
            return cls(
                [_checked_message(index, message) for index, message in enumerate(messages)],
                add_generation_prompt,
                _checked_objects("tools", tools),
                _checked_objects("documents", documents),
                {name: _plain(f"template variable {name}", value) for name, value in variables.items()},
            )
        except RecursionError:
            raise RequestError("messages are nested too deeply; accepted: a few levels of lists") from None

    def check_variables(self, named_tokens: Collection[str]) -> None:
        """RequestError for a variable that would hide one of the chat's own."""
        for name in self.variables:
            if name in _OWN_VARIABLES or name in named_tokens:
                raise RequestError(f"template variable {shown(name)} is the chat's own; accepted: others")

    def strings(self) -> Iterator[str]:
        """Every string in the values, keys included."""
        pending: list[object] = [self.messages, self.tools, self.documents, self.variables]
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                yield value
            elif isinstance(value, dict):
                pending += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                pending += value

    def with_texts_replaced(self, replacements: Mapping[str, str]) -> ChatInputs:
        """The same with texts replaced in every string, keys included, in the order of `replacements`."""
        return ChatInputs(
            _replaced(self.messages, replacements),
            self.add_generation_prompt,
            _replaced(self.tools, replacements),
            _replaced(self.documents, replacements),
            _replaced(self.variables, replacements),
        )

    # ------------------------------------------------------------------------------------------ parts

    def has_parts(self) -> bool:
        """Whether a message has a list of text parts that is not empty."""
        return any(
            isinstance(message.get("content"), list) and message["content"] for message in self.messages
        )

    def with_parts_joined(self) -> ChatInputs:
        """The same with each list of text parts made one text."""
        return replace(self, messages=[_joined(message) for message in self.messages])

    def with_parts_marked(self, mark: str) -> tuple[ChatInputs, list[str]]:
        """The same with a mark of its own in the place of each part's text, and these marks."""
        marks: list[str] = []
        messages = []
        for message in self.messages:
            if isinstance(message.get("content"), list):
                parts = []
                for part in message["content"]:
                    marks.append(f"{mark}{len(marks)}{mark}")
                    parts.append({**part, "text": marks[-1]})
                message = {**message, "content": parts}
            messages.append(message)
        return replace(self, messages=messages), marks

    # ---------------------------------------------------------------------------------- final message

    def with_final_text(self, added: str) -> tuple[ChatInputs, str]:
        """The same with a text added to that of the last message, and what that text was before."""
        *earlier, final = self.messages
        content = final.get("content")
        if isinstance(content, list) and content:
            *before, last = content
            text = last["text"]
            content = [*before, {**last, "text": text + added}]
        elif isinstance(content, str):
            text, content = content, content + added
        else:
            raise RequestError("the final message has no text to continue; accepted: one with content")
        return replace(self, messages=[*earlier, {**final, "content": content}]), text


def prints_parts(rendered: str, mark: str) -> bool:
    """Whether a template wrote the list of parts itself, as Python or JSON spells it."""
    return re.search(f"""['"]text['"]: ?['"]{re.escape(mark)}""", rendered) is not None


# --------------------------------------------------------------------------------------------- checks


def _checked_message(index: int, message: object) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is {shown(message)}; accepted: an object with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    copy: dict[str, Any] = _plain(where, given)
    role, content, calls = copy.get("role"), copy.get("content"), copy.get("tool_calls")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where} has the role {shown(role)}; accepted: a name, such as 'user'")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RequestError(f"{where} has the tool_calls {shown(calls)}; accepted: a list of objects")
    reasoning = next((copy[name] for name in _REASONING if name in copy), None)
    if isinstance(content, list):
        for part in content:
            _check_part(where, part)
    elif not isinstance(content, str) and (content is not None or not (calls or reasoning)):
        raise RequestError(f"{where} has the content {shown(content)}; accepted: text, or text parts")
    if reasoning is None:
        return copy
    return {"thinking": reasoning, **copy, "reasoning_content": reasoning}


def _check_part(where: str, part: object) -> None:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        seen = part.get("type") if isinstance(part, dict) else part
        raise RequestError(f"{where} has a part of type {shown(seen)}; accepted: 'text', with its text")


def _checked_objects(name: str, values: object) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise RequestError(f"{name} is {shown(values)}; accepted: a list of objects")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RequestError(f"{name}[{index}] is {shown(value)}; accepted: an object")
    return [_plain(name, value) for value in values]


def _plain(where: str, value: Any) -> Any:
    """A copy of a JSON value, of exactly its types. RequestError for what is not one."""
    if value is None or isinstance(value, bool):
        return value
    # A subclass may bring methods along, which a template could call.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain_key(where, key): _plain(where, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(where, item) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}; accepted: values of JSON")


def _plain_key(where: str, key: object) -> str:
    if not isinstance(key, str):
        raise RequestError(f"{where} has the key {shown(key)}; accepted: text")
    return str.__str__(key)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _replaced(value: Any, replacements: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for text, other in replacements.items():
            value = value.replace(text, other)
        return value
    if isinstance(value, dict):
        return {_replaced(key, replacements): _replaced(item, replacements) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, replacements) for item in value]
    return value
