"""Chat templates: messages to the text, and the tokens, that a model was trained to answer.

Text inside a message is never a control token, even where it is spelled like one: `ChatTemplate.encode`
renders messages in which each such text is masked by a character that means nothing, finds the special tokens
in what the template wrote, and only then puts the masked texts back, as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgeline.model.checkpoint.files import parse_json_object, shown
from ridgeline.model.tokenizer import Tokenizer, TokenizerSource, unused_character
from ridgeline.types import CheckpointError, RequestError

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["ChatTemplate", "template_source"]

Message = Mapping[str, Any]

_OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplate:
    """The Jinja template of one model. `path` names the model in errors."""

    def __init__(self, source: str, tokenizer: Tokenizer, path: Path) -> None:
        self.source = source
        self._tokenizer = tokenizer
        self._path = path

    @staticmethod
    def from_checkpoint(checkpoint: TokenizerSource, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that comes with a model, None when there is none.

        Raises CheckpointError when it is not text. A template that does not compile is found out when it is
        first used.
        """
        source = template_source(checkpoint)
        return None if source is None else ChatTemplate(source, tokenizer, checkpoint.path)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat; `variables` are what else the template reads, such as `enable_thinking`.

        A message has a `role`, and a `content` that is a string or a list of text parts. Raises RequestError
        when messages are malformed, or the template refuses them or does not end, and CheckpointError when it
        is not a template.
        """
        checked = _checked(messages)
        chat = {"messages": checked, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return self._rendered(chat, variables)

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a chat, after the begin token where the tokenizer adds one and the template did not.

        Where no message holds the text of a special token, they are those of the rendered text with special
        tokens parsed. Raises what `render` raises.
        """
        checked = _checked(messages)
        chat = {"messages": checked, "tools": tools, "add_generation_prompt": add_generation_prompt}
        given = (checked, tools, variables)
        try:
            masks = self._masks(given)
            if masks:
                masking = {text: mask for mask, text in masks.items()}
                chat["messages"], chat["tools"], variables = (_replaced(value, masking) for value in given)
        except RecursionError:
            raise RequestError("messages are nested too deeply; accepted: a few levels of lists") from None
        text = self._rendered(chat, variables)
        return self._tokenizer.begun(self._tokenizer.encode_masked(text, masks))

    def _masks(self, values: object) -> dict[str, str]:
        """A mask for each text of a special token that stands in any string of `values`."""
        strings: list[str] = []
        _collect(values, strings)
        joined = "\0".join(strings)
        used = joined + self.source
        masks: dict[str, str] = {}
        for text in self._tokenizer.special_texts:
            if text in joined:
                mask = unused_character(used)
                used += mask
                masks[mask] = text
        return masks

    # -------------------------------------------------------------------------------------------- jinja

    def _rendered(self, chat: Mapping[str, Any], variables: Mapping[str, Any]) -> str:
        named = self._tokenizer.named_tokens
        for name in variables:
            if name in _OWN_VARIABLES or name in named:
                raise RequestError(f"template variable {shown(name)} is the chat's own; accepted: others")
        template = self._template
        # The budget of a rendering is its own, in its own context.
        return copy_context().run(self._run, template, {**named, **variables, **chat})

    def _run(self, template: Template, variables: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError

        from ridgeline.model.chat_sandbox import (
            MAX_OUTPUT_CHARACTERS,
            Budget,
            TemplateLimitError,
            current_budget,
        )

        current_budget.set(Budget())
        pieces, size = [], 0
        try:
            for piece in template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_OUTPUT_CHARACTERS:
                    raise TemplateLimitError(f"it writes more than {MAX_OUTPUT_CHARACTERS} characters")
        except TemplateLimitError as error:
            raise RequestError(f"the chat template does more than a chat needs: {_reason(error)}") from None
        except TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {_reason(error)}") from None
        except RecursionError:
            raise RequestError("the chat template calls itself without end") from None
        except MemoryError:
            raise RequestError("the chat template asks for more memory than there is") from None
        except Exception as error:
            # A template is a program: on messages that it was not written for, any error can come out of it.
            raise RequestError(f"the chat template fails on these messages: {_reason(error)}") from None
        return "".join(pieces)

    @cached_property
    def _template(self) -> Template:
        return copy_context().run(self._compiled)

    def _compiled(self) -> Template:
        # jinja2 takes a tenth of a second to import, which only a chat needs.
        from ridgeline.model.chat_sandbox import Budget, ChatEnvironment, current_budget

        current_budget.set(Budget())
        try:
            return ChatEnvironment().compiled(self.source)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # What a hostile template can make of the parser and of Python's compiler is not a closed set.
            raise CheckpointError(f"{self._path}: chat template does not compile: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# -------------------------------------------------------------------------------------------- sources


def template_source(checkpoint: TokenizerSource) -> str | None:
    """The Jinja text that comes with a model, None when there is none. CheckpointError when it is not text.

    A GGUF's `tokenizer.chat_template`; a folder's `chat_template.jinja`, or `chat_template` in its
    tokenizer_config.json: a string, or a list of named templates.
    """
    if checkpoint.kind == "gguf":
        return _text(checkpoint.path, checkpoint.metadata.get("tokenizer.chat_template"))
    content = checkpoint.sidecar("chat_template.jinja")
    if content is not None:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{checkpoint.path}: chat_template.jinja is not UTF-8 at byte {error.start}"
            ) from None
    content = checkpoint.sidecar("tokenizer_config.json")
    if content is None:
        return None
    found = parse_json_object(content, checkpoint.path, "tokenizer_config.json").get("chat_template")
    if not isinstance(found, list):
        return _text(checkpoint.path, found)
    named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    return _text(checkpoint.path, named.get("default", next(iter(named.values()), None)))


def _text(path: Path, found: object) -> str | None:
    if found is None or isinstance(found, str):
        return found
    raise CheckpointError(f"{path}: the chat template is {shown(found)}; accepted: text")


# ------------------------------------------------------------------------------------------- messages


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as templates want them: text parts joined. RequestError for what is not a chat."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages is not a list of messages; accepted: one or more, of role and content")
    return [_checked_message(index, message) for index, message in enumerate(messages)]


def _checked_message(index: int, message: object) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is {shown(message)}; accepted: an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where} has the role {shown(role)}; accepted: a name, such as 'user'")
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(_part_text(where, part) for part in content)
    elif content is None and message.get("tool_calls"):
        content = ""
    elif not isinstance(content, str):
        raise RequestError(f"{where} has the content {shown(content)}; accepted: text, or text parts")
    return {**message, "content": content}


def _part_text(where: str, part: object) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        seen = part.get("type") if isinstance(part, Mapping) else part
        raise RequestError(f"{where} has a part of type {shown(seen)}; accepted: 'text', with its text")
    text: str = part["text"]
    return text


def _collect(value: object, strings: list[str]) -> None:
    """Append every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        strings.append(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(key, strings)
            _collect(item, strings)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, strings)


def _replaced(value: Any, replacements: Mapping[str, str]) -> Any:
    """A JSON-like value with texts replaced in every string, keys included; longer texts go first."""
    if isinstance(value, str):
        for text, mask in replacements.items():
            value = value.replace(text, mask)
        return value
    if isinstance(value, Mapping):
        return {_replaced(key, replacements): _replaced(item, replacements) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, replacements) for item in value]
    return value
