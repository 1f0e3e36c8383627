"""Chat templates: messages to the text, and the tokens, that a model was trained to answer.

Text inside a message is never a control token, even where it is spelled like one: `ChatTemplate.encode`
renders messages in which each such text is masked by a character that means nothing, finds the special tokens
in what the template wrote, and only then puts the masked texts back, as text. Where the template looks for
such a text in a message, it looks for the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgeline.model.chat_inputs import ChatInputs, Message, Objects, prints_parts
from ridgeline.model.checkpoint.files import parse_json_object, shown
from ridgeline.model.tokenizer import Tokenizer, TokenizerSource, unused_character
from ridgeline.types import CheckpointError, RequestError

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["ChatTemplate", "Message", "Objects", "template_source", "template_sources"]

_DEFAULT, _WITH_TOOLS, _WITH_DOCUMENTS = "default", "tool_use", "rag"


class ChatTemplate:
    """The Jinja templates of one model. `path` names the model in errors.

    `source` is the one for plain chats; `named` may have others, of which `tool_use` is for chats with tools
    and `rag` for those with documents alone. Safe to share between threads.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, path: Path, named: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self._named = dict(named or {})
        self._tokenizer = tokenizer
        self._path = path
        self._ready: dict[str, Template] = {}

    @property
    def sources(self) -> tuple[str, ...]:
        """The Jinja texts of all the templates, that for plain chats first."""
        return tuple(dict.fromkeys((self.source, *self._named.values())))

    @staticmethod
    def from_checkpoint(checkpoint: TokenizerSource, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The templates that come with a model, None when there are none.

        Raises CheckpointError when one is not text. A template that does not compile is found out by `check`,
        or when it is first used.
        """
        named = template_sources(checkpoint)
        source = _plain_chats(named)
        return None if source is None else ChatTemplate(source, tokenizer, checkpoint.path, named)

    def check(self) -> None:
        """Raise CheckpointError when one of the templates does not compile."""
        for source in self.sources:
            self._template(source)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Objects | None = None,
        documents: Objects | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a chat; `variables` are what else the template reads, such as `enable_thinking`.

        A message has a `role`, and a `content` that is a string or a list of text parts; the parts are joined
        where the template does not read lists. With `continue_final_message` the text ends where that of the
        last message does, for the model to go on with it. Raises RequestError when what is given is
        malformed, or the template refuses it or does not end, and CheckpointError when it is not a template.
        """
        chat = ChatInputs.checked(messages, add_generation_prompt, tools, documents, variables)
        return self._text(chat, {}, continue_final_message)

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Objects | None = None,
        documents: Objects | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a chat, after the begin token where the tokenizer adds one and the template did not.

        Where nothing given holds the text of a special token, they are those of the rendered text with
        special tokens parsed. Raises what `render` raises.
        """
        chat = ChatInputs.checked(messages, add_generation_prompt, tools, documents, variables)
        masks = self._masks(chat)
        if masks:
            chat = chat.with_texts_replaced({text: mask for mask, text in masks.items()})
        text = self._text(chat, masks, continue_final_message)
        return self._tokenizer.begun(self._tokenizer.encode_masked(text, masks))

    def _masks(self, chat: ChatInputs) -> dict[str, str]:
        """A mask for each text of a special token that stands in any string of `chat`."""
        joined = "\0".join(chat.strings())
        used = joined + self._source_for(chat)
        masks: dict[str, str] = {}
        for text in self._tokenizer.special_texts:
            if text in joined:
                mask = unused_character(used)
                used += mask
                masks[mask] = text
        return masks

    # -------------------------------------------------------------------------------------------- text

    def _text(self, chat: ChatInputs, masks: Mapping[str, str], continue_final_message: bool) -> str:
        chat.check_variables(self._tokenizer.named_tokens)
        if not continue_final_message:
            return self._with_parts(chat, masks)
        if chat.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt are both set; accepted: one of them"
            )
        mark = self._mark(chat, masks)
        # The space shows whether the template keeps what stands at the end of the text.
        marked, final = chat.with_final_text(f"{mark} ")
        text, found, rest = self._with_parts(marked, masks).rpartition(mark)
        if not found or final.strip() not in text:
            raise RequestError(
                "the chat template does not write the final message; accepted: one that it does"
            )
        return text if rest.startswith(" ") else text.rstrip()

    def _with_parts(self, chat: ChatInputs, masks: Mapping[str, str]) -> str:
        """Render; lists of parts stay lists where the template writes the text of each of them."""
        if chat.has_parts():
            mark = self._mark(chat, masks)
            marked, marks = chat.with_parts_marked(mark)
            try:
                seen = self._rendered(marked, masks)
            except RequestError:
                seen = ""
            if prints_parts(seen, mark) or not all(each in seen for each in marks):
                chat = chat.with_parts_joined()
        return self._rendered(chat, masks)

    def _mark(self, chat: ChatInputs, masks: Mapping[str, str]) -> str:
        return unused_character("".join([*chat.strings(), *masks, self._source_for(chat)]))

    # -------------------------------------------------------------------------------------------- jinja

    def _source_for(self, chat: ChatInputs) -> str:
        if chat.tools is not None and _WITH_TOOLS in self._named:
            return self._named[_WITH_TOOLS]
        if chat.tools is None and chat.documents is not None and _WITH_DOCUMENTS in self._named:
            return self._named[_WITH_DOCUMENTS]
        return self.source

    def _rendered(self, chat: ChatInputs, masks: Mapping[str, str]) -> str:
        values = {
            **self._tokenizer.named_tokens,
            **chat.variables,
            "messages": chat.messages,
            "tools": chat.tools,
            "documents": chat.documents,
            "add_generation_prompt": chat.add_generation_prompt,
        }
        template = self._template(self._source_for(chat))
        # The budget of a rendering is its own, in its own context.
        return copy_context().run(self._run, template, values, masks)

    def _run(self, template: Template, variables: Mapping[str, Any], masks: Mapping[str, str]) -> str:
        from jinja2 import TemplateError

        from ridgeline.model.chat_sandbox import (
            MAX_OUTPUT_CHARACTERS,
            Budget,
            TemplateLimitError,
            current_budget,
            current_masks,
        )

        current_budget.set(Budget())
        current_masks.set({text: mask for mask, text in masks.items()})
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

    def _template(self, source: str) -> Template:
        if source not in self._ready:
            self._ready[source] = copy_context().run(self._compiled, source)
        return self._ready[source]

    def _compiled(self, source: str) -> Template:
        # jinja2 takes a tenth of a second to import, which only a chat needs.
        from ridgeline.model.chat_sandbox import Budget, ChatEnvironment, current_budget

        current_budget.set(Budget())
        try:
            return ChatEnvironment().compiled(source)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # What a hostile template can make of the parser and of Python's compiler is not a closed set.
            raise CheckpointError(f"{self._path}: chat template does not compile: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# -------------------------------------------------------------------------------------------- sources


def template_source(checkpoint: TokenizerSource) -> str | None:
    """The Jinja text for plain chats that comes with a model, None when there is none.

    Raises CheckpointError when what there is is not text.
    """
    return _plain_chats(template_sources(checkpoint))


def template_sources(checkpoint: TokenizerSource) -> dict[str, str]:
    """The Jinja texts that come with a model by their names, of which `default` is for plain chats.

    A GGUF's `tokenizer.chat_template` and `tokenizer.chat_template.NAME`; a folder's `chat_template.jinja`
    and `additional_chat_templates/NAME.jinja`, or `chat_template` in its tokenizer_config.json: a string, or
    a list of named templates. Raises CheckpointError when one is not text.
    """
    if checkpoint.kind == "gguf":
        return _gguf_sources(checkpoint)
    files = {_DEFAULT: "chat_template.jinja"}
    files |= {name: f"additional_chat_templates/{name}.jinja" for name in (_WITH_TOOLS, _WITH_DOCUMENTS)}
    found = {name: checkpoint.sidecar(file) for name, file in files.items()}
    if found[_DEFAULT] is not None:
        return {
            name: _decoded(checkpoint.path, files[name], content)
            for name, content in found.items()
            if content is not None
        }
    return _configured_sources(checkpoint)


def _gguf_sources(checkpoint: TokenizerSource) -> dict[str, str]:
    key = "tokenizer.chat_template"
    named = {name: checkpoint.metadata.get(f"{key}.{name}") for name in (_WITH_TOOLS, _WITH_DOCUMENTS)}
    return _texts(checkpoint.path, {_DEFAULT: checkpoint.metadata.get(key), **named})


def _configured_sources(checkpoint: TokenizerSource) -> dict[str, str]:
    content = checkpoint.sidecar("tokenizer_config.json")
    if content is None:
        return {}
    found = parse_json_object(content, checkpoint.path, "tokenizer_config.json").get("chat_template")
    if not isinstance(found, list):
        return _texts(checkpoint.path, {_DEFAULT: found})
    entries = [entry for entry in found if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
    return _texts(checkpoint.path, {entry["name"]: entry.get("template") for entry in entries})


def _plain_chats(named: Mapping[str, str]) -> str | None:
    """The template named `default`, else the first of them."""
    return named.get(_DEFAULT, next(iter(named.values()), None))


def _decoded(path: Path, name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: {name} is not UTF-8 at byte {error.start}") from None


def _texts(path: Path, named: Mapping[str, object]) -> dict[str, str]:
    texts = {}
    for name, found in named.items():
        if isinstance(found, str):
            texts[name] = found
        elif found is not None:
            raise CheckpointError(f"{path}: the chat template is {shown(found)}; accepted: text")
    return texts
