# ruff: noqa: E501
"""Tool calls and reasoning out of what models write: every format, every cut, cut short, and hostile."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
import tokenizers
from family_templates import TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from ridgeline.model.special_tokens import SpecialTokens
from ridgeline.model.tokenizer import Tokenizer
from ridgeline.server.parsers import Delta, OutputParser, PlainParser, parser_for

CASES_OF_TEMPLATES = {
    **TEMPLATES,
    "magistral": "[TOOL_CALLS][THINK]",
    "hermes": "<tool_call>",
    "no template": None,
}

# Those that are special tokens in the vocabularies of their families.
SPECIAL = (
    "<|START_ACTION|>", "<|END_ACTION|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>",
    "<|END_RESPONSE|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "<|python_tag|>",
    "<|tool_call|>", "<|/tool_call|>", "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>",
    "<|call|>", "<|return|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<|im_end|>",
)  # fmt: skip
IDS = {text: index for index, text in enumerate(SPECIAL)}
_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")


class Letters:
    """A vocabulary of special tokens and single characters, and the text of its tokens."""

    def push(self, token_id: int) -> str:
        return SPECIAL[token_id] if token_id < len(SPECIAL) else chr(token_id - len(SPECIAL))


def spelled(text: str) -> list[int]:
    return [ord(character) + len(SPECIAL) for character in text]


def encoded(text: str) -> list[int]:
    """Tokens of a text with its special tokens."""
    return [t for part in _SPLIT.split(text) for t in ([IDS[part]] if part in IDS else spelled(part))]


@dataclass
class Answer:
    """What deltas add up to; `parts` has them in their order, neighbours of one kind joined."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    parts: list[tuple[Any, str]] = field(default_factory=list)

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Answer:
        answer = cls()
        for delta in deltas:
            kinds = (bool(delta.content), bool(delta.reasoning), bool(delta.tool_calls))
            assert sum(kinds) == 1
            answer.content += delta.content
            answer.reasoning += delta.reasoning
            for call in delta.tool_calls:
                answer._call(call.index, call.id, call.name, call.arguments)
            if not delta.tool_calls:
                answer._part("content" if delta.content else "reasoning", delta.content or delta.reasoning)
        return answer

    def _call(self, index: int, call_id: str | None, name: str | None, arguments: str) -> None:
        assert (call_id is None) == (name is None)
        if name is not None:
            assert call_id
            assert index == len(self.calls)
            self.calls.append((name, ""))
        assert index == len(self.calls) - 1
        self.calls[index] = (self.calls[index][0], self.calls[index][1] + arguments)
        self._part(index, arguments)

    def _part(self, kind: Any, text: str) -> None:
        if self.parts and self.parts[-1][0] == kind:
            self.parts[-1] = (kind, self.parts[-1][1] + text)
        else:
            self.parts.append((kind, text))


def parser(family: str, by_id: bool = True, tools: bool = True, **options: Any) -> OutputParser:
    return parser_for(CASES_OF_TEMPLATES[family], IDS if by_id else {}, tools, Letters(), **options)


def read(parser: OutputParser, tokens: Sequence[int], cuts: Sequence[int] | None = None) -> Answer:
    """Feed tokens in pieces that end at `cuts`; one by one when there are none given."""
    ends = sorted({*cuts, len(tokens)}) if cuts is not None else range(1, len(tokens) + 1)
    letters, deltas = Letters(), []
    for start, end in pairwise([0, *ends]):
        deltas += parser.feed("".join(letters.push(t) for t in tokens[start:end]), tokens[start:end])
    deltas += parser.finish()
    answer = Answer.of(deltas)
    assert parser.called_tools == bool(answer.calls)
    return answer


# --------------------------------------------------------------------------------------------- formats

ARGS = '{"city": "Zürich }]", "n": [1, {"x": "a\\"b\\\\"}]}'


@dataclass(frozen=True)
class Case:
    family: str
    text: str
    calls: tuple[tuple[str, str], ...] = ()
    content: str = ""
    reasoning: str = ""
    verbatim: bool = True  # the arguments stand in the text as they come out

    def check(self, answer: Answer) -> None:
        assert answer.calls == list(self.calls)
        assert answer.content == self.content
        assert answer.reasoning == self.reasoning


HERMES = f'<tool_call>\n{{"name": "f", "arguments": {ARGS}}}\n</tool_call>'
CALL = ("f", ARGS)
CASES = {
    "plain": Case("chatml", "Two words. ", content="Two words. "),
    "hermes": Case("hermes", HERMES, (CALL,)),
    "hermes two": Case(
        "qwen2", f"Let me look.\n{HERMES}\n<tool_call>\n{{\"arguments\": {{}}, \"name\": \"g\"}}\n</tool_call>\n",
        (CALL, ("g", "{}")), "Let me look.",
    ),
    "hermes then text": Case("qwen2", HERMES + "\nDone; ok", (CALL,), "Done; ok"),
    "hermes no arguments": Case("qwen2", '<tool_call>{"name": "f"}</tool_call>', (("f", "{}"),),
                                verbatim=False),
    "hermes null": Case("qwen2", '<tool_call>{"name": "f", "arguments": null}</tool_call>', (("f", "{}"),),
                        verbatim=False),
    "hermes string": Case(
        "qwen2", '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\u00fc\\"}"}</tool_call>',
        (("f", '{"a": "ü"}'),), verbatim=False,
    ),
    "hermes function": Case(
        "qwen2", f'<tool_call>{{"type": "function", "function": {{"name": "f", "arguments": {ARGS}}}}}</tool_call>', (CALL,)
    ),
    "llama function": Case("llama3", f'{{"function": "f", "parameters": {ARGS}}}', (CALL,)),
    "hermes list": Case("qwen2", f'<tool_call>[{{"name": "f", "arguments": {ARGS}}}]</tool_call>', (CALL,)),
    "hermes not closed": Case(
        "qwen2", '<tool_call>{"name": "f", "arguments": {"a": {"b": 1}</tool_call>\nmore', (("f", '{"a": {"b": 1}'),),
        "more",
    ),
    "quoted marker": Case("qwen3", "Use `<tool_call>` or <think> here", content="Use `<tool_call>` or <think> here"),
    "no call": Case("qwen2", '<tool_call>\n{"name": f}</tool_call> x', content='<tool_call>\n{"name": f}</tool_call> x'),
    "qwen3": Case("qwen3", f"<think>\nFirst <b> this.\n</think>\n\nAnswer.\n\n{HERMES}", (CALL,), "Answer.",
                  "First <b> this."),
    "smollm3": Case("smollm3", f"<think>\nWhy?\n</think>\n{HERMES}", (CALL,), "", "Why?"),
    "deepseek": Case("deepseek-r1", "So\n</think>\n\nAnswer.", (), "Answer.", "So"),
    "deepseek opens": Case("deepseek-r1", "<think>\nSo <think>\n</think>\n\nAnswer.", (), "Answer.", "So <think>"),
    "deepseek calls": Case(
        "deepseek-r1",
        "So</think>I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        f"{ARGS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>g<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        (CALL, ("g", "{}")), "I look.", "So",
    ),
    "llama": Case("llama3", f'{{"name": "f", "parameters": {ARGS}}}', (CALL,)),
    "llama two": Case(
        "llama3", f'\n{{"type": "function", "name": "f", "parameters": {ARGS}}}; {{"name": "g", "parameters": {{}}}}\n',
        (CALL, ("g", "{}")),
    ),
    "llama tag": Case("llama3", f'<|python_tag|>{{"name": "f", "parameters": {ARGS}}}', (CALL,)),
    "llama code": Case("llama3", "<|python_tag|>print(1)", content="<|python_tag|>print(1)"),
    "llama json": Case("llama3", '{"name": "Ann", "age": 7}', content='{"name": "Ann", "age": 7}'),
    "llama name only": Case("llama3", '{"name": "Ann"} ', content='{"name": "Ann"} '),
    "llama late": Case("llama3", 'So: {"name": "f", "parameters": {}}', content='So: {"name": "f", "parameters": {}}'),
    "mistral": Case(
        "mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {ARGS}, "id": "abcdefghi"}}, {{"name": "g", "arguments": {{}}}}]',
        (CALL, ("g", "{}")),
    ),
    "mistral named": Case("mistral", f"Ok.[TOOL_CALLS]f[ARGS]{ARGS}[TOOL_CALLS]g{{}}", (CALL, ("g", "{}")), "Ok."),
    "mistral id": Case("mistral", f"[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{ARGS}", (CALL,)),
    "magistral": Case("magistral", "[THINK]Well <think>[/THINK]Yes.", (), "Yes.", "Well <think>"),
    "command-r": Case(
        "command-r",
        f'Plan: go\nAction: ```json\n[\n  {{"tool_name": "f", "parameters": {ARGS}}},\n  {{"tool_name": "g", "parameters": {{}}}}\n]\n```',
        (CALL, ("g", "{}")), "Plan: go",
    ),
    "command-r text": Case("command-r", "Action: none taken ```x```", content="Action: none taken ```x```"),
    "cohere2": Case(
        "command-r7b",
        f'<|START_THINKING|>I plan.<|END_THINKING|><|START_ACTION|>[\n{{"tool_call_id": "0", "tool_name": "f", "parameters": {ARGS}}}\n]<|END_ACTION|>',
        (CALL,), "", "I plan.",
    ),
    "cohere2 text": Case("command-r7b", "<|START_RESPONSE|>Hi\nyou<|END_RESPONSE|>", content="Hi\nyou"),
    "granite": Case("granite", f'<|tool_call|>[{{"name": "f", "arguments": {ARGS}}}]', (CALL,)),
    "granite 4": Case("granite", f"Ok\n{HERMES}\n{HERMES}", (CALL, CALL), "Ok"),
    "granite text": Case("granite", f'<tool_call>[{{"name": "f", "arguments": {ARGS}}}]', (CALL,)),
    "phi": Case("phi4-mini", f'<|tool_call|>[{{"name": "f", "arguments": {ARGS}}}]<|/tool_call|>', (CALL,)),
    "phi functools": Case("phi4-mini", f'functools[{{"name": "f", "arguments": {ARGS}}}]', (CALL,)),
    "phi words": Case("phi4-mini", 'Python has functools[{"name": "f"}]', content='Python has functools[{"name": "f"}]'),
    "harmony": Case(
        "gpt-oss",
        f"<|channel|>analysis<|message|>Why not<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{ARGS}<|call|>",
        (CALL,), "I look.", "Why not",
    ),
    "harmony role": Case(
        "gpt-oss", " to=functions.f<|channel|>commentary json<|message|>{}<|end|><|start|>assistant to=g<|channel|>analysis<|message|>{} <|call|>",
        (("f", "{}"), ("g", "{} ")),
    ),
    "harmony own tool": Case("gpt-oss", "<|channel|>analysis to=browser.open<|message|>{}<|call|>", reasoning="{}"),
    "harmony final to": Case("gpt-oss", "<|channel|>final to=functions.f<|message|>Yes", content="Yes"),
    "harmony two channels": Case("gpt-oss", "<|channel|>analysis<|message|>So<|channel|>final<|message|>Yes", content="Yes", reasoning="So"),
    "harmony text after": Case("gpt-oss", "<|channel|>final<|message|>A<|end|> B<|start|>assistant<|channel|>", content="A B"),
    "harmony final": Case("gpt-oss", "<|channel|>final<|message|> Yes. <|return|>", content=" Yes. "),
    "harmony lost": Case("gpt-oss", "Just to= text", content="Just to= text"),
}  # fmt: skip

# What may be missing of a text in its parts: markers, space, and what stands around arguments.
_WORDS = "|".join(
    map(re.escape, [*SPECIAL, "<think>", "</think>", "<tool_call>", "</tool_call>", "functools", "Action:", "```json",
                    "```", "to=functions.f", "to=functions.", "to=", "to=g", "assistant", "analysis", "commentary", "final", "json",
                    "function", "abcdefghi", '"0"', "null"])
)  # fmt: skip
_KEYS = "name|tool_name|arguments|parameters|type|function|id|tool_call_id|f|g|abcdefghi"
ENVELOPE = re.compile(rf'(?:\s|{_WORDS}|"(?:{_KEYS})"|\b[fg]\b|to=\w*(?:\.\w*)?|\b[a-z]+\Z|[\[\]{{}},:;])*')


# Markers after which content goes on, where both sides of them come out as one part.
AMID_CONTENT = re.compile(r"<｜tool▁calls▁(?:begin|end)｜>|<\|end\|>")


def accounted(text: str, parts: Sequence[str]) -> bool:
    """Whether the parts stand in the text in their order, and between them only what marks them."""
    if not parts:
        return ENVELOPE.fullmatch(text) is not None
    found = text.find(parts[0])
    while found >= 0:
        if ENVELOPE.fullmatch(text, 0, found) and accounted(text[found + len(parts[0]) :], parts[1:]):
            return True
        found = text.find(parts[0], found + 1)
    return False


@pytest.mark.parametrize("by_id", [True, False], ids=["by id", "by text"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_format_whole_and_cut_anywhere(case: Case, by_id: bool) -> None:
    tokens = encoded(case.text) if by_id else spelled(case.text)
    case.check(read(parser(case.family, by_id), tokens, []))
    case.check(read(parser(case.family, by_id), tokens))
    for cut in range(1, len(tokens)):
        case.check(read(parser(case.family, by_id), tokens, [cut]))


@pytest.mark.parametrize("by_id", [True, False], ids=["by id", "by text"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answer_cut_short_loses_and_doubles_nothing(case: Case, by_id: bool) -> None:
    tokens = encoded(case.text) if by_id else spelled(case.text)
    whole = read(parser(case.family, by_id), tokens)
    for size in range(len(tokens) + 1):
        answer = read(parser(case.family, by_id), tokens[:size], [])
        text = "".join(map(Letters().push, tokens[:size]))
        assert len(answer.calls) <= len(whole.calls)
        if case.verbatim:
            parts = [part for _, part in answer.parts if part]
            assert accounted(text, parts) or accounted(AMID_CONTENT.sub("", text), parts), (text, parts)
        for (name, arguments), (full_name, full) in zip(answer.calls, whole.calls, strict=False):
            assert name == full_name
            assert full.startswith(re.sub(r"<[|a-z]*\Z", "", arguments))  # half a marker


NOT_CALLS = [
    "",
    " [",
    "[]",
    "[1]",
    '[{"name": "f"',
    '{"name": "f" "arguments": {}}',
    '{"name" "f"}',
    '{"name": 1}',
    '{"name": " "}',
    '{"name": "a\nb"}',
    '{"name": "\\x"}',
    f'{{"name": "{"n" * 300}"}}',
    f'{{"{"k" * 300}": 1}}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": "no"}',
    '{"name": "f", "arguments": "{\\x"}',
    '{"name": "f", "arguments": nil}',
    '{"arguments": {"a": 1}, "arguments": {}}',
    '{"arguments": {"a": <}',
    '{"function": {"function": {"name": "f"}}}',
    '{"id": <',
    '{"id": ,',
    "{}",
    "{1: 2}",
]


@pytest.mark.parametrize("body", NOT_CALLS)
def test_what_does_not_parse_is_text(body: str) -> None:
    for text in (f"<tool_call>{body}", f"Say\n <tool_call>\n{body} </tool_call> so"):
        for sizes in ([], None, [len(text) // 2]):
            answer = read(parser("qwen2", by_id=False), spelled(text), sizes)
            assert (answer.content, answer.calls) == (text, [])


@pytest.mark.parametrize(
    ("rest", "content"),
    [
        (", oops}", "oops}"),
        (', "arguments": 1}', ', "arguments": 1}'),
        ("} oops", "oops"),
        ("}, {}]", ", {}]"),
        ('} </tool_call>{"name": "g"}', '{"name": "g"}'),
        ("}}\n</tool_call>", "}\n</tool_call>"),
    ],
)
def test_what_follows_a_broken_call_is_text(rest: str, content: str) -> None:
    opening = "[" if "]" in rest else ""
    text = f'<tool_call>{opening}{{"name": "f", "arguments": {{}}{rest}'
    for sizes in ([], None):
        answer = read(parser("qwen2", by_id=False), spelled(text), sizes)
        assert answer.calls == [("f", "{}")]
        assert answer.content == content


def test_arguments_stream_as_they_come() -> None:
    reader, seen = parser("qwen2"), ""
    reader.feed('<tool_call>{"name": "f", "arguments": ', ())
    for piece in ('{"te', 'xt": "o', "ne t", "wo"):
        (delta,) = (d for d in reader.feed(piece, ()) if d.tool_calls[0].arguments)
        seen += delta.tool_calls[0].arguments
        assert '{"text": "one two'.startswith(seen)
        assert delta.tool_calls[0].arguments == piece


def test_plain_text_streams_without_delay() -> None:
    reader = parser("qwen3")
    assert [d.content for d in reader.feed("One", ())] == ["One"]
    assert [d.content for d in reader.feed(" two <", ())] == [" two"]
    assert [d.content for d in reader.feed("b>", ())] == [" <b>"]


def test_mistral_ids_are_nine_letters_and_digits_and_ids_differ() -> None:
    for family, form in (("mistral", r"[A-Za-z0-9]{9}"), ("qwen2", r"call_[0-9a-f]{24}")):
        text = {"mistral": "[TOOL_CALLS]f{}[TOOL_CALLS]g{}", "qwen2": HERMES * 2}[family]
        deltas = parser(family, by_id=False).feed(text, ())
        ids = [part.id for delta in deltas for part in delta.tool_calls if part.id is not None]
        assert len(set(ids)) == 2
        assert all(re.fullmatch(form, each) for each in ids)


# ---------------------------------------------------------------------------------- ids and what is asked


@pytest.mark.parametrize("together", [True, False])
def test_spelled_marker_is_text_where_the_vocabulary_has_the_token(together: bool) -> None:
    tokens = [*spelled('Say [TOOL_CALLS]g{"a": 1}! '), *encoded('[TOOL_CALLS]f{"a": 1}')]
    answer = read(parser("mistral"), tokens, [] if together else None)
    assert answer.calls == [("f", '{"a": 1}')]
    assert answer.content == 'Say [TOOL_CALLS]g{"a": 1}!'


def test_text_may_lag_behind_its_tokens() -> None:
    case = CASES["harmony"]
    tokens = encoded(case.text)
    reader = parser(case.family)
    deltas = reader.feed("", tokens)
    for character in case.text:
        deltas += reader.feed(character, ())
    case.check(Answer.of(deltas + reader.finish()))


def test_text_cut_off_inside_a_special_token_is_kept() -> None:
    reader = parser("mistral")
    deltas = reader.feed("Hi [TOOL", encoded("Hi [TOOL_CALLS]"))
    assert Answer.of(deltas + reader.finish()).content == "Hi [TOOL"


def test_text_that_is_not_that_of_the_tokens_is_content() -> None:
    """As where the engine left special tokens out, or told of tokens after their text."""
    reader = parser("mistral")
    deltas = reader.feed("one two three", encoded("one[TOOL_CALLS] two three"))
    assert Answer.of(deltas + reader.finish()).content == "one two three"
    reader = parser("mistral")
    deltas = [*reader.feed("one[TOOL_CALLS]", ()), *reader.feed(" two", encoded("one[TOOL_CALLS] two"))]
    assert Answer.of(deltas + reader.finish()).content == "one[TOOL_CALLS] two"


@pytest.mark.parametrize(("skip", "content"), [(True, "ab"), (False, "a<|im_end|>b")])
def test_other_special_tokens_are_as_the_request_wants(skip: bool, content: str) -> None:
    for family in ("mistral", "gpt-oss"):
        lead = "<|channel|>final<|message|>" if family == "gpt-oss" else ""
        reader = parser(family, skip_special_tokens=skip)
        assert reader.needs_special_tokens
        assert read(reader, encoded(lead + "a<|im_end|>b")).content == content


def test_special_tokens_are_needed_only_where_markers_are_special() -> None:
    assert not parser_for(TEMPLATES["qwen3"], {"<|im_end|>": 0}, True, Letters()).needs_special_tokens
    assert not parser("mistral", tools=False, reasoning=False).needs_special_tokens
    assert not parser("gpt-oss", by_id=False).needs_special_tokens


def test_without_tools_calls_are_text() -> None:
    for name in ("hermes", "llama", "phi functools", "granite text", "command-r"):
        case = CASES[name]
        answer = read(parser(case.family, by_id=False, tools=False), spelled(case.text))
        assert (answer.content, answer.calls) == (case.text, [])
    harmony = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    assert read(parser("gpt-oss", tools=False), encoded(harmony)).content == "{}"


def test_reasoning_can_stay_in_the_content() -> None:
    text = "<think>So</think>Yes"
    assert read(parser("qwen3", reasoning=False), spelled(text)).content == text


def test_prompt_tells_whether_the_answer_begins_amid_reasoning() -> None:
    text = spelled("So\n</think>\n\nYes")
    assert read(parser("qwen3", prompt="<|im_start|>assistant\n<think>\n"), text).reasoning == "So"
    assert read(parser("qwen3", prompt="<think>\n\n</think>\n\n"), text).reasoning == ""
    assert read(parser("deepseek-r1", prompt="<｜Assistant｜>"), text).reasoning == ""


# -------------------------------------------------------------------------------------------- families

# What each template's models would write to call `f`, if they can.
CALLS_OF_FAMILIES = {
    "qwen2": HERMES, "qwen3": HERMES, "smollm3": HERMES, "hermes": HERMES,
    "llama3": '{"name": "f", "parameters": {}}', "mistral": "[TOOL_CALLS]f{}", "tekken": "[TOOL_CALLS]f{}",
    "phi4-mini": '<|tool_call|>[{"name": "f", "arguments": {}}]<|/tool_call|>',
    "granite": '<|tool_call|>[{"name": "f", "arguments": {}}]',
    "command-r": 'Action:\n{"tool_name": "f", "parameters": {}}',
    "deepseek-r1": "</think><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>",
    "gpt-oss": "<|channel|>commentary to=functions.f<|message|>{}",
    "command-r7b": '<|START_ACTION|>[{"tool_name": "f", "parameters": {}}]<|END_ACTION|>',
    "magistral": "[TOOL_CALLS]f{}",
}  # fmt: skip


@pytest.mark.parametrize("family", CASES_OF_TEMPLATES)
def test_template_chooses_the_parser(family: str) -> None:
    vocabulary = {text: IDS[text] for text in SPECIAL if text in CALLS_OF_FAMILIES.get(family, "")}
    reader = parser_for(CASES_OF_TEMPLATES[family], vocabulary, True, Letters())
    if family not in CALLS_OF_FAMILIES:
        assert isinstance(reader, PlainParser)
        return
    answer = read(reader, encoded(CALLS_OF_FAMILIES[family]))
    assert [name for name, _ in answer.calls] == ["f"]
    assert not answer.content


@pytest.mark.parametrize("marker", ["[TOOL_CALLS]", "<|START_ACTION|>", "<|tool_call|>", "<|python_tag|>"])
def test_vocabulary_chooses_where_the_template_is_silent(marker: str) -> None:
    text = marker + '[{"name": "f", "arguments": {}}]'
    for template in (None, TEMPLATES["chatml"]):
        reader = parser_for(template, {marker: IDS[marker]}, True, Letters())
        assert reader.needs_special_tokens
        assert read(reader, encoded(text)).calls == [("f", "{}")]


def test_with_the_tokenizer_s_own_stream_of_text() -> None:
    """Multi-byte characters come in several tokens, and special tokens among ordinary ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(text, special=True) for text in ("[TOOL_CALLS]", "[ARGS]")])
    tokenizer = Tokenizer(library, SpecialTokens())
    special = {tokenizer.token_text(index): index for index in tokenizer.special_ids}
    tokens = tokenizer.encode("Zürich\ud83c".replace("\ud83c", "🌍"))
    tokens = [*tokens[:-1], *tokenizer.encode(f"[TOOL_CALLS]f[ARGS]{ARGS}", parse_special=True)]
    reader = parser_for("[TOOL_CALLS]", special, True, tokenizer.detokenizer(skip_special=False))
    engine, deltas = tokenizer.detokenizer(skip_special=False), []
    for token in tokens:
        deltas += reader.feed(engine.push(token), [token])
    answer = Answer.of(deltas + reader.feed(engine.finish(), ()) + reader.finish())
    assert answer.calls == [CALL]
    assert answer.content == "Zürich\ufffd"


# ------------------------------------------------------------------------------------- any text, any cut

FAMILIES = sorted({case.family for case in CASES.values()})
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.builds(
    json.dumps,
    st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=4),
    ensure_ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
FRAMES: dict[str, Callable[[str], str]] = {
    "qwen2": lambda a: f'<tool_call>\n{{"name": "f", "arguments": {a}}}\n</tool_call>',
    "llama3": lambda a: f'{{"name": "f", "parameters": {a}}}',
    "mistral": lambda a: f"[TOOL_CALLS]f[ARGS]{a}",
    "granite": lambda a: f'<|tool_call|>[{{"arguments": {a}, "name": "f"}}]',
    "command-r": lambda a: f'Action: ```json\n[{{"tool_name": "f", "parameters": {a}}}]\n```',
    "command-r7b": lambda a: f'<|START_ACTION|>[{{"tool_name": "f", "parameters": {a}}}]<|END_ACTION|>',
    "gpt-oss": lambda a: f"<|channel|>commentary to=functions.f<|message|>{a}<|call|>",
    "deepseek-r1": lambda a: f"</think><｜tool▁call▁begin｜>f<｜tool▁sep｜>{a}<｜tool▁call▁end｜>",
}


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, max(size - 1, 1)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FRAMES)), OBJECTS, st.data())
def test_arguments_come_out_as_the_model_wrote_them(family: str, arguments: str, data: st.DataObject) -> None:
    text = FRAMES[family](arguments)
    tokens = [t for part in text.split(arguments, 1) for t in encoded(part)]
    at = len(encoded(text.split(arguments, 1)[0]))
    tokens[at:at] = spelled(arguments)
    answer = read(parser(family), tokens, data.draw(cuts(len(tokens))))
    assert answer.calls == [("f", arguments)]
    assert json.loads(answer.calls[0][1]) is not None
    assert not answer.content


PIECES = st.lists(
    st.sampled_from(
        [*SPECIAL, "<think>", "</think>", "<tool_call>", "</tool_call>", "functools", "Action:", "```json", "```",
         '{"name": "f", "arguments": ', '{"name": "f", "parameters": ', '{"arguments": {"a": "§"}, "name": "f"}',
         '{"a": [1, "§"]}', '{"function": ', "{}", "{", "}", "[", "]", ";", '"', "\\", "§", " ", "\n", "f", "<", "<|", "[TOOL", "to=",
         "functions.f", "analysis", "assistant", "commentary"]
    ),
    max_size=24,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FAMILIES), st.booleans(), PIECES, st.data())
def test_any_text_reads_the_same_in_any_cut_and_loses_nothing(
    family: str, by_id: bool, pieces: list[str], data: st.DataObject
) -> None:
    text = "".join(pieces)
    tokens = [t for piece in pieces for t in (encoded(piece) if by_id else spelled(piece))]
    whole = read(parser(family, by_id), tokens, [])
    assert read(parser(family, by_id), tokens) == whole
    assert read(parser(family, by_id), tokens, data.draw(cuts(len(tokens)))) == whole
    shown = whole.content + whole.reasoning + "".join(name + arguments for name, arguments in whole.calls)
    assert shown.count("§") == text.count("§")


# --------------------------------------------------------------------------------------------- hostile


def work(run: Callable[[], object]) -> int:
    """How many calls of the parsers' functions `run` makes, and characters in the strings that they hold."""
    total = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal total
        if event == "return" and "server/parsers" in frame.f_code.co_filename:
            total += 1 + sum(len(value) for value in frame.f_locals.values() if type(value) is str)

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return total


HOSTILE = {
    "braces": "{", "brackets": "[", "quotes": '"', "backslashes": "\\", "half markers": "<tool_cal",
    "tags": "<tool_call>", "objects": '<tool_call>{"name": "f", "arguments": {', "space": " ",
    "space after call": '{"name": "f", "parameters": {}}; ', "calls": "[TOOL_CALLS]", "long name": "[TOOL_CALLS]f",
    "heads": "[TOOL_CALLS]{", "channels": "<|channel|>", "starts": "<|start|>assistant", "fences": "Action: ```js",
    "frames": "<｜tool▁calls▁begin｜>", "less": "<", "think": "<think></think>",
}  # fmt: skip
LEADS = (
    "",
    '<tool_call>{"name": "',
    '<tool_call>{"name": "f", "arguments": {"a": ',
    "[TOOL_CALLS]",
)
STEPS = (1, 100)


def pieces_of(text: str, step: int) -> Iterator[str]:
    return (text[at : at + step] for at in range(0, len(text), step))


def feed_all(family: str, text: str, step: int) -> list[Delta]:
    reader = parser(family, by_id=False)
    deltas = [delta for piece in pieces_of(text, step) for delta in reader.feed(piece, ())]
    return deltas + reader.finish()


@pytest.mark.parametrize("family", ["qwen3", "llama3", "mistral", "command-r", "deepseek-r1", "gpt-oss"])
def test_work_on_hostile_text_is_linear(family: str) -> None:
    """Twice the text is twice the work, and no character is looked at more than so many times."""
    for name, unit in HOSTILE.items():
        for lead in LEADS:
            once, twice = (lead + unit * (size // len(unit)) for size in (400, 800))
            for step in STEPS:
                first = work(lambda: feed_all(family, once, step))  # noqa: B023
                second = work(lambda: feed_all(family, twice, step))  # noqa: B023
                assert second < 2.3 * first + 2000, (name, lead, step)
                assert second < 600 * len(twice), (name, lead, step)


@pytest.mark.parametrize(
    ("name", "step"),
    [("braces", 4096), ("half markers", 4096), ("space", 4096), ("backslashes", 10**6), ("tags", 10**6)],
)
def test_a_megabyte_of_hostile_text_comes_back(name: str, step: int) -> None:
    """FAULTS 59: linear, and the raw text is the content."""
    unit = HOSTILE[name]
    text = unit * (10**6 // len(unit))
    deltas: list[Delta] = []
    large = work(lambda: deltas.extend(feed_all("qwen3", text, step)))
    small = work(lambda: feed_all("qwen3", text[: len(text) // 8], step))
    assert large < 9 * small
    assert Answer.of(deltas).content == text


def test_deltas_of_long_text_hold_only_that_text() -> None:
    reader, sizes = parser("qwen2"), []
    for _ in range(1000):
        sizes += [len(delta.content) for delta in reader.feed("word < word ", ())]
    assert max(sizes) <= len("word < word ") + 1
