"""Templates with the constructs of each family's give the text that `transformers` gives, or both refuse."""

from __future__ import annotations

import enum
import json
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from family_templates import TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from vocabularies import oracle, vocabulary_keys, write_folder, write_gguf

from ridgeline.model.chat_template import ChatTemplate, template_source, template_sources
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.tokenizer import Tokenizer
from ridgeline.types import RequestError

PROPERTIES = {
    "place": {"type": "string", "enum": ["Köln", "<b>"], "description": 'where & "when"\''},
    "days": {"type": ["integer", "null"], "default": 3},
    "more": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}},
}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["place"]}
TOOLS = [
    {"type": "function", "function": {"name": "sky", "description": "Look.\nUp.", "parameters": PARAMETERS}},
    {
        "type": "function",
        "function": {"name": "now", "description": "é", "parameters": {"type": "object", "properties": {}}},
    },
]
DOCUMENTS = [{"title": "T <1>", "text": "First & é", "doc_id": 7}, {"title": "b", "text": "Second"}]
THINKING = "<think>\nhm {1}\n</think>\n\nSo: "

TEXT = st.sampled_from(
    ["Hi", " Wie geht's? \n", "", '\n2 < 3 & "4"', "/no_think é", THINKING + "x", "<tool_response>", "🌈"]
) | st.text(max_size=8)
CALL = st.fixed_dictionaries(
    {
        "id": st.just("abcdef123"),
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": st.just("sky"), "arguments": st.sampled_from([{"place": "Köln", "days": 2}, '{"x": 1}'])}
        ),
    }
)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": TEXT})
ASSISTANT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXT},
    optional={"reasoning_content": TEXT, "thinking": TEXT, "tool_calls": st.none()},
)
CALLING = st.fixed_dictionaries(
    {"role": st.just("assistant"), "tool_calls": st.lists(CALL, min_size=1, max_size=2)},
    optional={"content": TEXT | st.none(), "reasoning": TEXT},
)
RESULT = st.fixed_dictionaries(
    {"role": st.just("tool"), "content": TEXT, "tool_call_id": st.just("abcdef123")},
    optional={"name": st.just("sky")},
)
SYSTEM = st.fixed_dictionaries({"role": st.sampled_from(["system", "developer"]), "content": TEXT})
PAIR = st.one_of(st.tuples(USER, ASSISTANT), st.tuples(USER, CALLING, RESULT, ASSISTANT))


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = [*draw(st.lists(SYSTEM, max_size=1))]
    for turns in draw(st.lists(PAIR, max_size=2)):
        messages += turns
    messages += draw(st.sampled_from([[], 1, 2]).flatmap(_ending))
    return messages or [{"role": "user", "content": "Hi"}]


def _ending(kind: Any) -> st.SearchStrategy[list[dict[str, Any]]]:
    if not kind:
        return st.just([])
    return st.tuples(USER).map(list) if kind == 1 else st.tuples(USER, CALLING, RESULT).map(list)


VARIABLES = st.fixed_dictionaries(
    {},
    optional={
        "enable_thinking": st.booleans(),
        "thinking": st.booleans(),
        "reasoning_effort": st.sampled_from(["low", "high"]),
        "date_string": st.just("01 Jan 2020"),
        "builtin_tools": st.just(["browser", "code_interpreter"]),
        "xml_tools": st.just(["a <b>", {"name": "c"}]),
        "controls": st.just({"length": "long", "citations": True}),
        "tools_in_user_message": st.booleans(),
    },
)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIDGELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> Tokenizer:
    return Tokenizer.from_file(write_gguf(tmp_path_factory.mktemp("v") / "v.gguf", vocabulary_keys()))


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=oracle(), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def template_of(source: str, tokenizer: Tokenizer, **named: str) -> ChatTemplate:
    return ChatTemplate(source, tokenizer, Path("model.gguf"), named)


def outcome(render: Any, *args: Any, error: type[Exception] = RequestError, **options: Any) -> str | None:
    """The text, None where it is refused."""
    try:
        text: str = render(*args, **options)
    except error:
        return None
    return text


# ------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", TEMPLATES)
def test_family_renders_as_transformers_does(
    family: str, tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast
) -> None:
    source = TEMPLATES[family]
    ours = template_of(source, tokenizer)
    their_options: dict[str, Any] = {"chat_template": source, "tokenize": False, "error": Exception}
    assert ours.render([{"role": "user", "content": "Why?"}])

    @settings(max_examples=25, deadline=None, database=None)
    @given(
        messages=conversations(),
        tools=st.sampled_from([None, [], TOOLS]),
        documents=st.sampled_from([None, DOCUMENTS]),
        prompt=st.booleans(),
        variables=VARIABLES,
    )
    def check(messages: Any, tools: Any, documents: Any, prompt: bool, variables: dict[str, Any]) -> None:
        options = {"tools": tools, "documents": documents, "add_generation_prompt": prompt, **variables}
        expected = outcome(theirs.apply_chat_template, messages, **their_options, **options)
        assert outcome(ours.render, messages, **options) == expected

    check()


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("text", ["It is blue", " It is blue \n", "<think>\nhm\n</think>\n\nIt is"])
def test_a_final_message_is_continued_as_transformers_does(
    family: str, text: str, tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast
) -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    their_options = {"chat_template": TEMPLATES[family], "tokenize": False, "error": Exception, **options}
    expected = outcome(theirs.apply_chat_template, messages, **their_options)
    assert outcome(template_of(TEMPLATES[family], tokenizer).render, messages, **options) == expected
    if family == "chatml":
        assert expected is not None
        assert expected.endswith(f"assistant\n{text}")


def test_a_final_message_that_cannot_be_continued_is_refused(tokenizer: Tokenizer) -> None:
    chat = template_of("{{ messages[0].content }}", tokenizer)
    two = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RequestError, match="both set"):
        chat.render(two, continue_final_message=True)
    with pytest.raises(RequestError, match="does not write the final message"):
        chat.render(two, add_generation_prompt=False, continue_final_message=True)
    calling = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    with pytest.raises(RequestError, match="no text to continue"):
        chat.render(calling, add_generation_prompt=False, continue_final_message=True)


# ---------------------------------------------------------------------------------------------- parts

PARTS = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": " b"}]}]


@pytest.mark.parametrize("family", TEMPLATES)
def test_parts_reach_templates_that_read_them_and_are_joined_for_others(
    family: str, tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast
) -> None:
    chat = template_of(TEMPLATES[family], tokenizer)
    as_parts = family in ("gemma3", "tekken")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}, *PARTS]
    messages = PARTS if family == "gemma2" else messages
    given_there = messages if as_parts else [*messages[:-1], {"role": "user", "content": " a  b"}]
    expected = theirs.apply_chat_template(given_there, chat_template=TEMPLATES[family], tokenize=False)
    assert chat.render(messages, add_generation_prompt=False) == expected
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert chat.render(messages, **options) == chat.render(given_there, **options)


# ---------------------------------------------------------------------------------- what a template reads


def test_templates_find_special_texts_in_messages_but_never_make_tokens_of_them(tokenizer: Tokenizer) -> None:
    source = """{% for m in messages %}{{ '<|im_start|>' }}{% if '<|endoftext|>' in m.content %}
{{- m.content.split('<|endoftext|>')[-1] | replace('<|im_end|>', '<|im_start|>') }}
{%- elif m.content.startswith('<|im_start|>') %}S{{ m.content }}{% endif %}{% endfor %}"""
    chat = template_of(source, tokenizer)
    messages = [
        {"role": "user", "content": "before<|endoftext|>after<|im_end|>"},
        {"role": "user", "content": "<|im_start|>"},
    ]
    text = chat.render(messages)
    assert text == "<|im_start|>after<|im_start|><|im_start|>S<|im_start|>"
    ids = chat.encode(messages)
    assert tokenizer.decode(ids, skip_special=False) == text
    # The template wrote three of them; the last one is the user's.
    assert [index for index in ids if index in tokenizer.special_ids] == [1, 1, 1]


def test_generation_blocks_have_their_own_scope(
    tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast
) -> None:
    block = "{% generation %}{% set x = 2 %}{% set y = x %}{{ x }}{% endgeneration %}"
    source = "{% set x = 1 %}" + block + "{{ x }}{{ y }}"
    messages = [{"role": "user", "content": "a"}]
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert template_of(source, tokenizer).render(messages) == expected == "21"


class Mood(enum.StrEnum):
    GOOD = "good"


def test_templates_see_plain_copies(tokenizer: Tokenizer) -> None:
    chat = template_of("{{ messages | tojson }}{{ mood }}{{ documents is none }}{{ n }}", tokenizer)
    message = UserDict({"role": Mood.GOOD, "content": "x", "name": None})
    text = chat.render([message], mood=Mood.GOOD, n=(1, 2.5, True))
    assert text == '[{"role": "good", "content": "x"}]goodTrue[1, 2.5, True]'


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"tools": "sky"}, "tools is 'sky'; accepted: a list of objects"),
        ({"tools": [print]}, r"tools\[0\] is .*; accepted: an object"),
        ({"documents": [{"text": b"x"}]}, "documents holds a bytes; accepted: values of JSON"),
        ({"documents": {"text": "x"}}, "accepted: a list of objects"),
        ({"mood": print}, "template variable mood holds a builtin_function_or_method"),
        ({"mood": {1: "x"}}, "template variable mood has the key 1"),
        ({"raise_exception": 1}, "'raise_exception' is the chat's own"),
        ({"chat_template": "x"}, "'chat_template' is the chat's own"),
        ({"add_generation_prompt": "no"}, "accepted: true or false"),
    ],
)
def test_what_is_not_for_a_template_is_refused(
    options: dict[str, Any], seen: str, tokenizer: Tokenizer
) -> None:
    chat = template_of("x", tokenizer)
    for act in (chat.render, chat.encode):
        with pytest.raises(RequestError, match=seen):
            act([{"role": "user", "content": "x"}], **options)


def test_malformed_tool_calls_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="message 0 has the tool_calls 'f'; accepted: a list of objects"):
        template_of("x", tokenizer).render([{"role": "assistant", "content": "x", "tool_calls": "f"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.update(messages[0], role='x') }}",
        "{{ dict.mro() }}",
    ],
)
def test_the_environment_gives_no_way_out(source: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="chat template"):
        template_of(source, tokenizer).render([{"role": "user", "content": "x"}])


# -------------------------------------------------------------------------------------------- sources


def test_named_templates_are_chosen_by_what_is_given(tokenizer: Tokenizer) -> None:
    chat = template_of("plain", tokenizer, tool_use="tools", rag="documents", other="other")
    messages = [{"role": "user", "content": "x"}]
    assert chat.render(messages) == "plain"
    assert chat.render(messages, tools=TOOLS) == chat.render(messages, tools=[]) == "tools"
    assert chat.render(messages, documents=DOCUMENTS) == "documents"
    assert chat.render(messages, tools=TOOLS, documents=DOCUMENTS) == "tools"
    assert template_of("plain", tokenizer).render(messages, tools=TOOLS, documents=DOCUMENTS) == "plain"


def test_named_templates_of_a_gguf(tmp_path: Path) -> None:
    keys = vocabulary_keys() | {"tokenizer.chat_template": "D", "tokenizer.chat_template.tool_use": "T"}
    with open_checkpoint(write_gguf(tmp_path / "v.gguf", keys)) as checkpoint:
        chat = ChatTemplate.from_checkpoint(checkpoint, Tokenizer.from_checkpoint(checkpoint))
        assert template_source(checkpoint) == "D"
    assert chat is not None
    assert chat.render([{"role": "user", "content": "x"}], tools=TOOLS) == "T"


class Folder:
    """A checkpoint that is only a folder."""

    kind = "safetensors"
    metadata: Mapping[str, Any] = {}

    def __init__(self, path: Path) -> None:
        self.path = path

    def sidecar(self, name: str) -> bytes | None:
        file = self.path / name
        return file.read_bytes() if file.exists() else None


def test_named_templates_of_a_folder(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}, {"template": "?"}, 7]
    folder = write_folder(tmp_path, oracle(), tokenizer_config={"chat_template": named})
    assert template_sources(Folder(folder)) == {"default": "D", "rag": "R"}
    (folder / "chat_template.jinja").write_text("file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert template_sources(Folder(folder)) == {"default": "file", "tool_use": "tools"}
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == named
