"""The text side of a model, which the HTTP process holds: tokenizer, chat template, defaults, names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ridgeline.model.catalog import resolve
from ridgeline.model.chat_template import ChatTemplate
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.generation_defaults import generation_defaults
from ridgeline.model.tokenizer import Tokenizer
from ridgeline.server.config import ServerConfig
from ridgeline.server.parsers import OutputParser, parser_for, thinking_marks
from ridgeline.types import ConfigError, RequestError, SamplingParams, Thinking

_TAIL_TOKENS = 16
"""The end of a prompt, in which it is seen whether the answer begins amid reasoning."""


@dataclass(frozen=True, slots=True)
class TextSide:
    """What turns requests into tokens and answers into messages. Safe to share between threads."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling_defaults: SamplingParams
    special_tokens: Mapping[str, int]

    @classmethod
    def load(cls, model: str, config: ServerConfig) -> TextSide:
        """Of the model that `model` names. Raises CheckpointError and ConfigError."""
        path = resolve(model)
        with closing(open_checkpoint(path)) as checkpoint:
            tokenizer = Tokenizer.from_checkpoint(checkpoint)
            template = ChatTemplate.from_checkpoint(checkpoint, tokenizer)
            defaults = SamplingParams(**generation_defaults(checkpoint))
        if config.chat_template is not None:
            template = ChatTemplate(_template_text(config.chat_template), tokenizer, Path("--chat-template"))
        if template is not None:
            template.check()  # now, and not at the first chat
        names = config.served_model_names or (_name_of(model),)
        special = {tokenizer.token_text(index): index for index in tokenizer.special_ids}
        return cls(names, tokenizer, template, defaults, special)

    def prompt_tokens(self, prompt: str | Sequence[int], add_special: bool = True) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_special=add_special))
        return tuple(prompt)

    def chat_tokens(self, messages: Sequence[dict[str, Any]], **options: Any) -> tuple[int, ...]:
        """Raises RequestError when there is no template or it refuses the chat."""
        if self.template is None:
            raise RequestError("messages cannot be used: this model has no chat template")
        return tuple(self.template.encode(messages, **options))

    def constrained(self, params: SamplingParams, prompt: Sequence[int]) -> SamplingParams:
        """Parameters for the answer to a chat, in which a model that reasons may do so first. Raises
        RequestError."""
        form = params.structured_outputs
        if form is None or self.template is None:
            return params
        tail = self.tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special=False)
        marks = thinking_marks("\n".join(self.template.sources), tail)
        if marks is None:
            return params
        start, end = (self.tokenizer.token_id(mark) for mark in marks[:2])
        if start is None or end is None:
            return params
        return replace(params, structured_outputs=replace(form, thinking=Thinking(start, end, marks[2])))

    def new_parser(self, prompt: Sequence[int], tools: bool, skip_special_tokens: bool) -> OutputParser:
        """What reads one answer to `prompt`. Without `tools` no calls are looked for."""
        tokenizer, template = self.tokenizer, self.template
        return parser_for(
            None if template is None else "\n".join(template.sources),
            self.special_tokens,
            tools,
            tokenizer.detokenizer(skip_special=False),
            tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special=False),
            skip_special_tokens=skip_special_tokens,
        )


def _name_of(model: str) -> str:
    """The name that a model has without `--served-model-name`: never a path of this machine."""
    path = Path(model).expanduser()
    if not path.exists():
        return model
    path = path.resolve()
    return path.name.removesuffix(".gguf") if path.is_file() else path.name


def _template_text(given: str) -> str:
    """A template as it is given: a file, or Jinja."""
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"chat template {given}: {cause}; accepted: a text file, or Jinja") from None
