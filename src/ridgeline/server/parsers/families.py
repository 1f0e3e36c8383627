"""Which parser reads a model's answers: its chat template tells, and its vocabulary where that is silent."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from ridgeline.server.parsers.deltas import OutputParser, PlainParser
from ridgeline.server.parsers.harmony import CHANNEL, HARMONY_MARKERS, MESSAGE, HarmonyParser
from ridgeline.server.parsers.markers import SpecialCutter, TokenStream
from ridgeline.server.parsers.markup import Calls, Form, Markup, MarkupParser
from ridgeline.types import RequestError

_THINK = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))

# Hermes, Qwen 2.5 and 3, SmolLM3, Granite 4.
_HERMES = Markup(calls=(Calls("<tool_call>", ("</tool_call>",)),))
# Before version 11 of its tokenizer a list, from then on a name and the arguments.
_MISTRAL = Markup(calls=(Calls("[TOOL_CALLS]", form=Form.MISTRAL),), short_ids=True)
_COHERE = Markup(
    calls=(Calls("<|START_ACTION|>", ("<|END_ACTION|>",)),),
    frames=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
)
_COMMAND_R = Markup(calls=(Calls("Action:", ("```",), Form.FENCED),))
# Granite 3 has the marker as a token or, from 3.1 on, as text.
_GRANITE = Markup(calls=(Calls("<|tool_call|>"), Calls("<tool_call>", ("</tool_call>",))))
_PHI = Markup(calls=(Calls("<|tool_call|>", ("<|/tool_call|>",)), Calls("functools", leads=True)))
_DEEPSEEK = Markup(
    calls=(Calls("<｜tool▁call▁begin｜>", ("```", "<｜tool▁call▁end｜>"), Form.DEEPSEEK),),
    frames=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)
_LLAMA = Markup(calls=(Calls("<|python_tag|>"),), bare=True)


def parser_for(
    template: str | None,
    tokens: Mapping[str, int],
    tools: bool,
    stream: TokenStream,
    prompt: str | None = None,
    reasoning: bool = True,
    skip_special_tokens: bool = True,
) -> OutputParser:
    """A parser for one answer of a model.

    `template` is the source of its chat template; where it has several, all of them one after the other.
    `tokens` are the texts of its special tokens, those that decoding skips, and their ids. `stream` gives the
    text of the answer's tokens with special tokens in it: a new `Tokenizer.detokenizer(skip_special=False)`.
    Without `tools` (none were given, or tool_choice is "none") no calls are looked for, and without
    `reasoning` it stays in the content. `prompt` is the end of the prompt's text, special tokens included,
    from which it is seen whether the answer begins amid reasoning; the template has to tell if it is None.
    `skip_special_tokens` is what the request asks for; see `OutputParser.needs_special_tokens`.
    """
    source = template or ""
    harmony = _is_harmony(source) or (not source and _is_harmony(tokens))
    markup = _markup(source, tokens, tools, reasoning)
    markers = HARMONY_MARKERS if harmony else markup.markers
    special = markers.intersection(tokens)
    cutter = SpecialCutter({index: text for text, index in tokens.items()}, stream) if special else None
    if harmony:
        return HarmonyParser(tools, cutter, special, skip_special_tokens)
    if not markers and not markup.bare:
        return PlainParser()
    thinking = _open_reasoning(markup, source, prompt)
    return MarkupParser(markup, cutter, special, skip_special_tokens, thinking)


def thinking_marks(template: str | None, prompt: str) -> tuple[str, str, bool] | None:
    """The markers around reasoning of a model with this chat template, and whether `prompt` ends amid it.
    None where it does not reason. Raises RequestError for a form in which reasoning and answer are parts of
    one frame, which no constraint on the answer alone can keep."""
    source = template or ""
    if _is_harmony(source):
        raise RequestError(
            "structured_outputs cannot be used in chats with this model; accepted: completions"
        )
    for start, end in _THINK:
        if start in source or end in source:
            return start, end, prompt.rstrip().endswith(start)
    return None


def _is_harmony(shown: Container[str]) -> bool:
    return CHANNEL in shown and MESSAGE in shown


def _markup(source: str, tokens: Container[str], tools: bool, reasoning: bool) -> Markup:
    think = tuple(pair for pair in _THINK if any(m in source or m in tokens for m in pair))
    calls = _calls_shown(source) or _calls_of_vocabulary(tokens) or Markup()
    if not tools:
        calls = Markup(frames=calls.frames if calls is _COHERE else ())
    return replace(calls, think=think if reasoning else ())


def _calls_shown(source: str) -> Markup | None:
    """The format whose marks are in a template. Formats that share a mark are told apart by their order."""
    if "<|START_ACTION|>" in source:
        return _COHERE
    if "[TOOL_CALLS]" in source:
        return _MISTRAL
    if "<｜tool▁calls▁begin｜>" in source:
        return _DEEPSEEK
    if "<|start_of_role|>" in source:
        return _GRANITE
    if "<|tool|>" in source or "functools" in source:
        return _PHI
    if "<tool_call>" in source or "<tools>" in source:
        return _HERMES
    if "CHATBOT_TOKEN|>" in source and "Action:" in source:
        return _COMMAND_R
    if "<|python_tag|>" in source or ("<|start_header_id|>" in source and "ipython" in source):
        return _LLAMA
    return None


def _calls_of_vocabulary(tokens: Container[str]) -> Markup | None:
    known = (_COHERE, _MISTRAL, _DEEPSEEK, _PHI, _HERMES, _LLAMA)
    return next((markup for markup in known if markup.calls[0].opens in tokens), None)


def _open_reasoning(markup: Markup, source: str, prompt: str | None) -> str | None:
    """The marker that will close the reasoning in which the prompt ends; None where it ends elsewhere."""
    for start, end in markup.think:
        if prompt is not None:
            if prompt.rstrip().endswith(start):
                return end
            continue
        _, asked, shown = source.rpartition("add_generation_prompt")
        if asked and start in shown and end not in shown:
            return end
    return None
