"""Clients that people use, unmodified, against the server: LangChain, LlamaIndex, LiteLLM, and `llm`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import FakeEngine, FakeServer, ServerProcess, server_process, with_server

from ridgeline.model.tokenizer import Tokenizer
from ridgeline.server.messages import Piece, Pieces

MESSAGES = [{"role": "user", "content": "hello"}]
PROMPT_TOKENS, TOKENS = 24, 8
LONG = "x" * 800


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home for clients' files, and no network but this machine's: neither telemetry nor downloads."""
    home = tmp_path_factory.mktemp("home")
    resolve = socket.getaddrinfo

    def resolve_here(host: Any, *more: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", None):
            raise socket.gaierror(f"{host} is not this machine")
        return resolve(host, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve_here)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        patch.setenv("LANGSMITH_TRACING", "false")
        patch.setenv("LLM_USER_PATH", str(home))
        yield home


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[ServerProcess]:
    with server_process(tiny_llama, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def base(server: ServerProcess) -> str:
    return f"{server.url}/v1"


def post(base: str, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{base}{path}", json={"model": "tiny", **body}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def answer(base: str) -> str:
    """What the model says to MESSAGES."""
    given = post(base, "/chat/completions", messages=MESSAGES, temperature=0, max_tokens=TOKENS)
    counts = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": TOKENS, "total_tokens": 32}
    assert given["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    text: str = given["choices"][0]["message"]["content"]
    assert len(text) > 3
    return text


@pytest.fixture(scope="module")
def continued(base: str) -> str:
    """How the model goes on after "hello"."""
    given = post(base, "/completions", prompt="hello", temperature=0, max_tokens=TOKENS)
    text: str = given["choices"][0]["text"]
    assert text
    return text


# ------------------------------------------------------------------------------ a model that calls tools


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments.city }}){% endfor %} | "
    "{% endfor %}{% if tools %}{{ tools[0].function.name }} <tool_call>{% endif %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SECOND = CALL.replace("Oslo", "Rome")


class Scripted(FakeEngine):
    """Gives request number n the n-th answer, some characters a step."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.answers = [[text[i : i + 7] for i in range(0, len(text), 7)] for text in answers]

    def _pieces(self, number: int) -> Pieces:
        parts = self.answers[list(self.adds).index(number)]
        self.given[number] += 1
        ended = self.given[number] == len(parts)
        text = parts[self.given[number] - 1]
        piece = Piece(number, 0, text, (100,), None, "stop" if ended else None)
        return Pieces((piece,), (number,) if ended else ())


def with_answers(model: Path, answers: tuple[str, ...], use: Callable[[str], None]) -> list[str]:
    """Run `use` on a server whose model gives these answers in turn; returns the prompts that it saw."""
    engine = Scripted(*answers)

    async def scenario(server: FakeServer) -> None:
        await asyncio.to_thread(use, f"{server.url}/v1")

    with_server(model, scenario, engine=engine, chat_template=TEMPLATE)
    tokenizer = Tokenizer.from_file(model)
    prompts = [tokenizer.decode(add.tokens) for add in engine.adds.values()]
    assert len(prompts) == len(answers)
    return prompts


def weather(city: str) -> str:
    """The weather in a city."""
    return f"{city} has 15 degrees"


# -------------------------------------------------------------------------------------------- LangChain


@pytest.fixture(scope="module")
def langchain() -> Any:
    return pytest.importorskip("langchain_openai")


def langchain_chat(langchain: Any, base: str, **more: Any) -> Any:
    settings = {"model": "tiny", "temperature": 0, "max_tokens": TOKENS, "max_retries": 0, **more}
    return langchain.ChatOpenAI(base_url=base, api_key="none", **settings)


def test_langchain_chats(langchain: Any, base: str, answer: str) -> None:
    chat = langchain_chat(langchain, base)
    whole = chat.invoke("hello")
    assert whole.content == answer
    assert whole.response_metadata["finish_reason"] == "length"
    usage = whole.usage_metadata
    assert (usage["input_tokens"], usage["output_tokens"]) == (PROMPT_TOKENS, TOKENS)
    assert [each.content for each in chat.batch(["hello", "hello"])] == [answer, answer]
    chunks = list(langchain_chat(langchain, base, stream_usage=True).stream("hello"))
    assert "".join(chunk.content for chunk in chunks) == answer
    assert len(chunks) > 3
    assert sum(c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata) == TOKENS

    async def later() -> tuple[str, str]:
        # Closed in the loop that opened its connections: else it closes itself in one of another test.
        async with chat.root_async_client:
            streamed = [chunk.content async for chunk in chat.astream("hello")]
            return (await chat.ainvoke("hello")).content, "".join(streamed)

    assert asyncio.run(later()) == (answer, answer)


def test_langchain_completes(langchain: Any, base: str, continued: str) -> None:
    model = langchain.OpenAI(
        base_url=base, api_key="none", model="tiny", temperature=0, max_tokens=TOKENS, max_retries=0
    )
    assert model.invoke("hello") == continued
    assert "".join(model.stream("hello")) == continued
    assert model.batch(["hello", "hello"]) == [continued, continued]


def test_langchain_embeds_texts(langchain: Any, base: str) -> None:
    embeddings = langchain.OpenAIEmbeddings(
        base_url=base, api_key="none", model="tiny", check_embedding_ctx_length=False, max_retries=0
    )
    given = post(base, "/embeddings", input=["hello", "world"])["data"]
    vectors = embeddings.embed_documents(["hello", "world"])
    for vector, each in zip(vectors, given, strict=True):
        assert vector == pytest.approx(each["embedding"], abs=1e-6)

    async def later() -> Any:
        async with embeddings.async_client._client:
            return await embeddings.aembed_query("world")

    assert asyncio.run(later()) == pytest.approx(vectors[1], abs=1e-6)


def test_langchain_embeds_token_ids(langchain: Any, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless told otherwise it sends ids of a tokenizer of OpenAI's, which is downloaded: here, of bytes."""
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)}
    ours = tiktoken.Encoding("cl100k_base", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "cl100k_base", ours)
    embeddings = langchain.OpenAIEmbeddings(base_url=base, api_key="none", model="tiny", max_retries=0)
    (given,) = post(base, "/embeddings", input=[list(b"hello")])["data"]
    assert embeddings.embed_query("hello") == pytest.approx(given["embedding"], abs=1e-6)


def test_langchain_calls_tools(langchain: Any, tiny_llama: Path) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    def use(base: str) -> None:
        chat = langchain_chat(langchain, base).bind_tools([weather])
        asked = chat.invoke([HumanMessage("how warm?")])
        (call,) = asked.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
        result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
        assert chat.invoke([HumanMessage("how warm?"), asked, result]).content == "15 degrees."
        first, *others = chat.stream([HumanMessage("how warm?")])
        for chunk in others:
            first += chunk
        assert [(c["name"], c["args"]) for c in first.tool_calls] == [("weather", {"city": "Oslo"})]
        one = langchain_chat(langchain, base).bind_tools([weather], parallel_tool_calls=False)
        assert [c["args"] for c in one.invoke("how warm?").tool_calls] == [{"city": "Oslo"}]

    prompts = with_answers(tiny_llama, (CALL, "15 degrees.", CALL, f"{CALL}\n{SECOND}"), use)
    assert prompts[0] == "user: how warm? | weather <tool_call>"
    assert "assistant: weather(Oslo) | tool: Oslo has 15 degrees |" in prompts[1]


def test_langchain_knows_our_errors(langchain: Any, base: str) -> None:
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(langchain.chat_models.base.openai.NotFoundError, match="'gpt-9' is not served"):
        langchain_chat(langchain, base, model="gpt-9").invoke("hello")
    with pytest.raises(ContextOverflowError, match="512"):
        langchain_chat(langchain, base).invoke(LONG)


# ------------------------------------------------------------------------------------------- LlamaIndex


def llama_index(base: str, **more: Any) -> Any:
    module = pytest.importorskip("llama_index.llms.openai_like")
    settings = {"is_chat_model": True, "temperature": 0, "max_tokens": TOKENS, "max_retries": 0, **more}
    return module.OpenAILike(model="tiny", api_base=base, api_key="none", context_window=512, **settings)


def test_llama_index_chats(base: str, answer: str) -> None:
    model = llama_index(base)
    from llama_index.core.llms import ChatMessage

    messages = [ChatMessage(role="user", content="hello")]
    whole = model.chat(messages)
    assert whole.message.content == answer
    assert whole.additional_kwargs["completion_tokens"] == TOKENS
    assert "".join(chunk.delta for chunk in model.stream_chat(messages)) == answer

    async def later() -> tuple[str, str]:
        streamed = [chunk.delta async for chunk in await model.astream_chat(messages)]
        return (await model.achat(messages)).message.content, "".join(streamed)

    assert asyncio.run(later()) == (answer, answer)


def test_llama_index_completes(base: str, continued: str) -> None:
    model = llama_index(base, is_chat_model=False)
    assert model.complete("hello").text == continued
    assert "".join(chunk.delta for chunk in model.stream_complete("hello")) == continued


def test_llama_index_calls_tools(tiny_llama: Path) -> None:
    pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.tools import FunctionTool

    def use(base: str) -> None:
        tools = [FunctionTool.from_defaults(weather)]
        model = llama_index(base, is_function_calling_model=True)
        given = model.chat_with_tools(tools, user_msg="how warm?")  # it asks for one call at most
        (call,) = model.get_tool_calls_from_response(given)
        assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Oslo"})
        told = model.predict_and_call(tools, user_msg="how warm?")
        assert told.response == "Oslo has 15 degrees"
        *_, last = model.stream_chat_with_tools(tools, user_msg="how warm?", allow_parallel_tool_calls=True)
        cities = [call.tool_kwargs["city"] for call in model.get_tool_calls_from_response(last)]
        assert cities == ["Oslo", "Rome"]

    with_answers(tiny_llama, (f"{CALL}\n{SECOND}", CALL, f"{CALL}\n{SECOND}"), use)


def test_llama_index_gets_our_errors(base: str) -> None:
    import openai

    model = llama_index(base)
    model.model = "gpt-9"
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served"):
        model.complete("hello")


# ---------------------------------------------------------------------------------------------- LiteLLM


@pytest.fixture(scope="module")
def litellm(alone: Path) -> Any:
    module = pytest.importorskip("litellm")
    module.telemetry = False
    module.suppress_debug_info = True
    return module


def lite(base: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "openai/tiny", "api_base": base, "api_key": "none", "temperature": 0, "max_tokens": TOKENS,
        "num_retries": 0, **more,
    }  # fmt: skip


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_chats(litellm: Any, base: str, answer: str, provider: str) -> None:
    ask = lite(base, model=f"{provider}/tiny", messages=MESSAGES)
    whole = litellm.completion(**ask)
    assert whole.choices[0].message.content == answer
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (PROMPT_TOKENS, TOKENS)
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
    assert chunks[-1].usage.completion_tokens == TOKENS

    async def later() -> tuple[str, str]:
        stream = await litellm.acompletion(**ask, stream=True)
        streamed = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return (await litellm.acompletion(**ask)).choices[0].message.content, "".join(streamed)

    assert asyncio.run(later()) == (answer, answer)


def test_litellm_completes_embeds_and_passes_our_fields(
    litellm: Any, base: str, answer: str, continued: str
) -> None:
    ask = lite(base, model="text-completion-openai/tiny", prompt="hello")
    assert litellm.text_completion(**ask).choices[0].text == continued
    (given,) = post(base, "/embeddings", input=["hello"])["data"]
    found = litellm.embedding(model="openai/tiny", api_base=base, api_key="none", input=["hello"])
    assert found.data[0]["embedding"] == pytest.approx(given["embedding"], abs=1e-6)
    assert found.usage.prompt_tokens == len("hello")
    greedy = lite(base, model="hosted_vllm/tiny", messages=MESSAGES, temperature=2, top_k=1, min_p=0.1)
    assert litellm.completion(**greedy).choices[0].message.content == answer


def test_litellm_calls_tools(litellm: Any, tiny_llama: Path) -> None:
    pytest.importorskip("mcp")  # it cannot do without where there are tools
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]

    def use(base: str) -> None:
        ask = lite(base, messages=MESSAGES, tools=tools)
        choice = litellm.completion(**ask).choices[0]
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert json.loads(call.function.arguments) == {"city": "Oslo"}
        chunks = list(litellm.completion(**ask, stream=True))
        built = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
        assert [json.loads(call.function.arguments)["city"] for call in built] == ["Oslo", "Rome"]

    with_answers(tiny_llama, (CALL, f"{CALL}\n{SECOND}"), use)


def test_litellm_knows_our_errors(litellm: Any, base: str) -> None:
    with pytest.raises(litellm.NotFoundError, match="'gpt-9' is not served"):
        litellm.completion(**lite(base, model="openai/gpt-9", messages=MESSAGES))
    for provider in ("openai", "hosted_vllm"):
        ask = lite(base, model=f"{provider}/tiny", messages=[{"role": "user", "content": LONG}])
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(**ask)
    with pytest.raises(litellm.BadRequestError, match="store"):
        litellm.completion(**lite(base, messages=MESSAGES, extra_body={"store": True}))


# ------------------------------------------------------------------------------------------------- llm


@pytest.fixture(scope="module")
def llm() -> Any:
    return pytest.importorskip("llm")


def told_of(llm: Any, home: Path, base: str) -> None:
    """Tell `llm` of our server, as its manual says."""
    entry = f"- model_id: tiny\n  model_name: tiny\n  api_base: {base}\n  supports_tools: true\n"
    (home / "extra-openai-models.yaml").write_text(entry, encoding="utf-8")


def test_llm_on_the_command_line(llm: Any, alone: Path, base: str, answer: str) -> None:
    told_of(llm, alone, base)
    command = [sys.executable, "-m", "llm", "-m", "tiny", "hello", "--no-log", "-o", "temperature", "0"]
    command += ["-o", "max_tokens", str(TOKENS)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == answer + "\n"


def test_llm_in_python(llm: Any, alone: Path, base: str, answer: str) -> None:
    told_of(llm, alone, base)
    for stream in (True, False):
        given = llm.get_model("tiny").prompt("hello", temperature=0, max_tokens=TOKENS, stream=stream)
        assert given.text() == answer
        assert (given.usage().input, given.usage().output) == (PROMPT_TOKENS, TOKENS)

    async def later() -> str:
        model = llm.get_async_model("tiny")
        text: str = await model.prompt("hello", temperature=0, max_tokens=TOKENS).text()
        return text

    assert asyncio.run(later()) == answer
    with pytest.raises(Exception, match="maximum context length is 512"):
        llm.get_model("tiny").prompt(LONG).text()


def test_llm_calls_tools(llm: Any, alone: Path, tiny_llama: Path) -> None:
    def use(base: str) -> None:
        told_of(llm, alone, base)
        for stream in (True, False):
            chain = llm.get_model("tiny").chain("how warm?", tools=[weather], stream=stream)
            assert chain.text() == "15 degrees."

    prompts = with_answers(tiny_llama, (CALL, "15 degrees.") * 2, use)
    assert "| tool: Oslo has 15 degrees |" in prompts[1]
    assert "| tool: Oslo has 15 degrees |" in prompts[3]
