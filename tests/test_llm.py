"""The Python API, on an executor without a model, and end to end on tiny ones."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_executor import FakeDetokenizer, FakeExecutor, make_engine

import ridgeline
from ridgeline import (
    LLM,
    AsyncLLM,
    ConfigError,
    EngineConfig,
    EngineDeadError,
    RequestError,
    RequestOutput,
    SamplingParams,
)
from ridgeline.engine import Engine
from ridgeline.loading import LoadedModel
from ridgeline.types import Request

if TYPE_CHECKING:
    from tiny_models import TinyModel

GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = SamplingParams(temperature=0, max_tokens=400)
PROMPTS = ["one", "two words", "three more words", "four"]


class LetterTokenizer:
    """One token for each character."""

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        return [2] * add_special + [ord(character) % 97 for character in text]


class LineTemplate:
    def encode(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        lines = [f"{m['role']}: {m['content']}" for m in messages] + [f"{k}={v}" for k, v in options.items()]
        return LetterTokenizer().encode("\n".join(lines))


def loaded_model(executor: FakeExecutor | None = None, **settings: Any) -> LoadedModel:
    template = settings.pop("chat_template", LineTemplate())
    engine = make_engine(executor or FakeExecutor(), **settings)
    defaults = SamplingParams(temperature=0, max_tokens=5)
    return LoadedModel(EngineConfig(), engine, LetterTokenizer(), template, defaults, {})  # type: ignore[arg-type]


@pytest.fixture
def make_llm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    def make(executor: FakeExecutor | None = None, **settings: Any) -> LLM:
        monkeypatch.setattr("ridgeline.llm.load_engine", lambda config: loaded_model(executor, **settings))
        return LLM()

    return make


@pytest.fixture
def make_async(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AsyncLLM]:
    def make(executor: FakeExecutor | None = None, **settings: Any) -> AsyncLLM:
        monkeypatch.setattr(
            "ridgeline.async_llm.load_engine", lambda config: loaded_model(executor, **settings)
        )
        return AsyncLLM()

    return make


def texts(outputs: Sequence[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


# ---------------------------------------------------------------------------------------- the package


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("numpy", "tokenizers", "asyncio", "importlib.metadata", "email")
    code = f"import sys, ridgeline; print([m for m in {heavy} if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


def test_an_answer_on_a_cpu_needs_no_pytorch(tiny_llama: Path) -> None:
    code = (
        "import sys; from ridgeline import LLM\n"
        f"with LLM({str(tiny_llama)!r}, device='cpu') as llm: llm.generate(['hi'])\n"
        "print({'torch', 'triton'} & set(sys.modules))"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "set()"


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(ridgeline, name) is not None for name in ridgeline.__all__)
    assert set(ridgeline.__all__) <= set(dir(ridgeline))
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = ridgeline.Llm


# --------------------------------------------------------------------------------------------- LLM


def test_results_come_in_input_order_and_as_if_alone(make_llm: Callable[..., LLM]) -> None:
    each = [SamplingParams(temperature=i % 2, seed=i, max_tokens=20 - 5 * i) for i in range(4)]
    with make_llm() as llm:
        together = llm.generate(PROMPTS, each)
    assert [output.prompt for output in together] == PROMPTS
    assert all(output.finished for output in together)
    alone = [make_llm().generate(prompt, params)[0] for prompt, params in zip(PROMPTS, each, strict=True)]
    assert [o.outputs for o in together] == [o.outputs for o in alone]


def test_prompts_are_texts_or_token_ids(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    ids = [2] + [ord(character) % 97 for character in "one"]
    (from_text,) = llm.generate("one", GREEDY)
    assert from_text.prompt_token_ids == tuple(ids)
    for prompts in (ids, [ids], [tuple(ids)]):
        (from_ids,) = llm.generate(prompts, GREEDY)
        assert (from_ids.prompt, from_ids.outputs) == (None, from_text.outputs)
    assert llm.generate([], GREEDY) == []
    with pytest.raises(RequestError, match="prompts mix token ids with prompts"):
        llm.generate([1, "one"], GREEDY)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("prompts", "kind"),
    [
        ({"prompt": "one"}, "prompts came as dict"),
        ([{"prompt": "one"}], "prompt came as dict"),
        ((text for text in PROMPTS), "prompts came as generator"),
        (np.arange(3), "prompts came as ndarray"),
        (b"one", "prompts came as bytes"),
        ([1.0], "prompt came as float"),
        (None, "prompts came as NoneType"),
    ],
)
def test_what_is_no_prompt_is_refused(make_llm: Callable[..., LLM], prompts: Any, kind: str) -> None:
    with pytest.raises(RequestError, match=f"{kind}; accepted: a list"):
        make_llm().generate(prompts)


def test_what_is_no_conversation_is_refused(make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(RequestError, match="messages came as str; accepted: a list"):
        make_llm().chat("hello")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="messages came as generator; accepted: a list"):
        make_llm().chat(chat for chat in [[{"role": "user", "content": "hello"}]])  # type: ignore[arg-type]


def test_parameters_are_the_models_unless_given(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    assert [len(o.outputs[0].token_ids) for o in llm.generate(["a", "b"])] == [5, 5]
    assert llm.sampling_defaults.max_tokens == 5
    lengths = [SamplingParams(max_tokens=n) for n in (3, 7)]
    assert [len(o.outputs[0].token_ids) for o in llm.generate(["a", "b"], lengths)] == [3, 7]
    with pytest.raises(RequestError, match="2 sampling parameters for 3 prompts; accepted: 1 or 3"):
        llm.generate(["a", "b", "c"], lengths)


def test_one_prompt_that_cannot_be_served_starts_none(make_llm: Callable[..., LLM]) -> None:
    executor = FakeExecutor()
    llm = make_llm(executor, max_model_len=30)
    with pytest.raises(RequestError, match="prompt has 41 tokens"):
        llm.generate(["fine", "x" * 40], GREEDY)
    assert executor.steps == []
    assert not llm.loaded.engine.has_work


def test_chat_answers_one_conversation_or_many(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    chats = [[{"role": "user", "content": text}] for text in ("hello", "bye")]
    one = llm.chat(chats[0], GREEDY)
    many = llm.chat(chats, GREEDY)
    assert len(one) == 1
    assert texts(many)[:1] == texts(one)
    assert texts(many)[1] != texts(many)[0]
    last = list(llm.stream_chat(chats[1], GREEDY))[-1]
    assert last.outputs == many[1].outputs
    thinking = llm.chat(chats[0], GREEDY, enable_thinking=True)
    added = len(thinking[0].prompt_token_ids) - len(one[0].prompt_token_ids)
    assert added == len("\nenable_thinking=True"), "what the template takes reaches it"
    with pytest.raises(RequestError, match="model has no chat template"):
        make_llm(chat_template=None).chat(chats[0])
    with pytest.raises(RequestError, match="mix messages with conversations"):
        llm.chat([chats[0][0], chats[0]])  # type: ignore[list-item]


def test_stream_grows_to_what_generate_gives(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    states = list(llm.stream("one", GREEDY))
    assert [state.finished for state in states] == [False] * (len(states) - 1) + [True]
    assert all(b.startswith(a) for a, b in zip(texts(states), texts(states)[1:], strict=False))
    assert states[-1].outputs == llm.generate("one", GREEDY)[0].outputs


SENDER = {"cache_salt": "salt", "service_class": "batch", "tenant": "somebody"}
CHAT = [{"role": "user", "content": "hello"}]


def senders_of(engine: Engine) -> list[dict[str, str]]:
    """Whose requests are that are added from now on."""
    seen: list[dict[str, str]] = []
    add = engine.add

    def watched(request: Request, *more: Any) -> None:
        seen.append({name: getattr(request, name) for name in SENDER})
        add(request, *more)

    engine.add = watched  # type: ignore[method-assign, assignment]
    return seen


def test_every_request_says_whose_it_is(
    make_llm: Callable[..., LLM], make_async: Callable[..., AsyncLLM]
) -> None:
    with make_llm() as llm:
        seen = senders_of(llm.loaded.engine)
        llm.generate(PROMPTS, **SENDER)
        llm.chat(CHAT, **SENDER)
        list(llm.stream("one", **SENDER))
        list(llm.stream_chat(CHAT, **SENDER))
        llm.embed("one", **SENDER)
        assert seen == [SENDER] * 8
        llm.generate("one")
        assert seen[-1] == {"cache_salt": "", "service_class": "interactive", "tenant": ""}

    async def scenario() -> None:
        async with make_async() as llm:
            seen = senders_of(llm.loaded.engine)
            for outputs in (llm.generate("one", **SENDER), llm.chat(CHAT, **SENDER)):
                async for _ in outputs:
                    pass
            await llm.embed("one", **SENDER)
            assert seen == [SENDER] * 3
            with pytest.raises(RequestError, match=r"service_class.*keystroke, interactive, batch"):
                await anext(llm.generate("one", service_class="urgent"))  # type: ignore[arg-type]

    asyncio.run(scenario())


def test_a_class_that_there_is_none_of_is_refused(make_llm: Callable[..., LLM]) -> None:
    with make_llm() as llm:
        with pytest.raises(RequestError, match=r"service_class.*keystroke, interactive, batch"):
            llm.generate(PROMPTS, service_class="urgent")  # type: ignore[arg-type]
        assert not llm.loaded.engine.has_work
        assert not llm._latest


def test_a_higher_class_goes_before_a_batch(make_llm: Callable[..., LLM]) -> None:
    with make_llm(max_num_seqs=1) as llm:
        batch = [llm.stream("one", LONG, service_class="batch") for _ in range(2)]
        begun = [next(stream).outputs[0].token_ids for stream in batch[:1]]
        (quick,) = llm.generate("two", GREEDY, service_class="keystroke")
        assert len(quick.outputs[0].token_ids) == 12
        assert llm.loaded.engine.scheduler.preemptions == 1
        assert len(begun[0]) == 1
        for stream in batch:
            stream.close()


def test_streams_may_be_interleaved_and_left_early(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    expected = texts(llm.generate(["one", "two"], GREEDY))
    first, second = llm.stream("one", GREEDY), llm.stream("two", GREEDY)
    left = llm.stream("three", LONG)
    next(left)
    seen: dict[str, RequestOutput] = {}
    for a, b in zip(first, second, strict=False):
        seen |= {"one": a, "two": b}
    for rest, name in ((first, "one"), (second, "two")):
        for state in rest:
            seen[name] = state
    assert [seen[name].outputs[0].text for name in ("one", "two")] == expected
    assert llm.loaded.engine.has_work
    left.close()
    assert not llm.loaded.engine.has_work
    assert llm.loaded.engine.scheduler.cache.usage == 0


def test_threads_share_a_model(make_llm: Callable[..., LLM]) -> None:
    prompts = [f"prompt {i}" for i in range(12)]
    expected = texts(make_llm().generate(prompts, GREEDY))
    llm = make_llm()
    with ThreadPoolExecutor(6) as pool:
        assert texts([o[0] for o in pool.map(lambda p: llm.generate(p, GREEDY), prompts)]) == expected
    assert not llm.loaded.engine.has_work


def test_a_failing_step_leaves_nothing_behind(make_llm: Callable[..., LLM]) -> None:
    executor = FakeExecutor()
    llm = make_llm(executor)
    expected = texts(llm.generate("one", GREEDY))
    executor.fail = MemoryError("no room")
    with pytest.raises(MemoryError, match="no room"):
        llm.generate(PROMPTS, GREEDY)
    assert not llm.loaded.engine.has_work
    executor.fail = None
    assert texts(llm.generate("one", GREEDY)) == expected


def test_a_stream_may_be_closed_in_the_midst_of_a_step(make_llm: Callable[..., LLM]) -> None:
    """As the garbage collector does with one that nobody holds."""
    executor = FakeExecutor()
    llm = make_llm(executor)
    expected = texts(llm.generate("one", GREEDY))
    left = llm.stream("three", LONG)
    next(left)
    executor.edit = lambda logits, tokens: left.close()
    assert texts(llm.generate("one", GREEDY)) == expected
    assert not llm.loaded.engine.has_work
    assert llm.loaded.engine.scheduler.cache.usage == 0
    assert not llm._latest


def test_an_interrupt_waits_for_the_end_of_the_step(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()
    expected = llm.generate("one", GREEDY)[0].outputs
    stream = llm.stream("one", GREEDY)
    next(stream)
    push, pushes = FakeDetokenizer.push, itertools.count()

    def interrupted(self: FakeDetokenizer, token_id: int) -> str:
        if next(pushes) == 5:  # the stream's second
            signal.raise_signal(signal.SIGINT)
        return push(self, token_id)

    monkeypatch.setattr(FakeDetokenizer, "push", interrupted)
    handler = signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)  # which a process among several may ignore
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, LONG)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(llm.loaded.engine._requests) == [next(stream).request_id], "only the stream goes on"
    assert list(stream)[-1].outputs == expected
    assert llm.loaded.engine.scheduler.cache.usage == 0


def test_a_closed_model_says_so(make_llm: Callable[..., LLM]) -> None:
    executor = FakeExecutor()
    llm = make_llm(executor)
    stream = llm.stream("one", LONG)
    next(stream)
    with llm:
        pass
    llm.close()
    assert executor.closed
    for use in (lambda: llm.generate("one"), lambda: next(stream), lambda: next(llm.stream("one"))):
        with pytest.raises(EngineDeadError, match="model is closed"):
            use()


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="engine setting is 'max_len'"):
        LLM(max_len=5)


# ---------------------------------------------------------------------------------------- AsyncLLM


async def last_of(
    llm: AsyncLLM, prompt: str, params: SamplingParams | None, name: str | None = None
) -> RequestOutput:
    last = None
    async for output in llm.generate(prompt, params, name):
        last = output
    assert last is not None
    return last


async def until_idle(llm: AsyncLLM) -> None:
    while llm.loaded.engine.has_work:
        await asyncio.sleep(0.001)
    assert llm.loaded.engine.scheduler.cache.usage == 0


def test_concurrent_requests_get_what_they_get_alone(
    make_llm: Callable[..., LLM], make_async: Callable[..., AsyncLLM]
) -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    expected = texts(make_llm().generate(prompts, GREEDY))

    async def main() -> list[RequestOutput]:
        async with make_async() as llm:
            return await asyncio.gather(*(last_of(llm, prompt, GREEDY) for prompt in prompts))

    outputs = asyncio.run(main())
    assert texts(outputs) == expected
    assert [output.prompt for output in outputs] == prompts


def test_states_grow_and_a_slow_reader_misses_only_steps(make_async: Callable[..., AsyncLLM]) -> None:
    async def main() -> list[RequestOutput]:
        async with make_async() as llm:
            states = []
            async for state in llm.generate("one", LONG):
                states.append(state)
                if len(states) == 1:
                    await until_idle(llm)
            return states

    states = asyncio.run(main())
    assert len(states) == 2
    assert texts(states)[1].startswith(texts(states)[0])
    assert (states[1].finished, len(states[1].outputs[0].token_ids)) == (True, 400)


def test_chat_and_defaults(make_llm: Callable[..., LLM], make_async: Callable[..., AsyncLLM]) -> None:
    messages = [{"role": "user", "content": "hello"}]

    async def main() -> str:
        async with make_async() as llm:
            assert llm.sampling_defaults.max_tokens == 5
            return [output async for output in llm.chat(messages)][-1].outputs[0].text

    assert [asyncio.run(main())] == texts(make_llm().chat(messages))


@pytest.mark.parametrize("how", ["break", "cancel", "close"])
def test_a_reader_that_leaves_aborts_its_request(make_async: Callable[..., AsyncLLM], how: str) -> None:
    endless = SamplingParams(max_tokens=None, ignore_eos=True)

    async def leave(llm: AsyncLLM) -> None:
        outputs = llm.generate("one", endless)
        if how == "cancel":
            task = asyncio.create_task(last_of(llm, "one", endless))
            while not llm.loaded.engine.has_work:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return
        async for _ in outputs:
            if how == "break":
                break
            await outputs.aclose()

    async def main() -> None:
        async with make_async(max_model_len=100_000, executor=FakeExecutor(pages=(7000,))) as llm:
            await leave(llm)
            await until_idle(llm)
            assert (await last_of(llm, "two", GREEDY)).finished

    asyncio.run(main())


def test_abort_ends_the_reader_with_what_there_is(make_async: Callable[..., AsyncLLM]) -> None:
    async def main() -> tuple[RequestOutput, RequestOutput]:
        async with make_async(max_model_len=100_000, executor=FakeExecutor(pages=(7000,))) as llm:
            endless = SamplingParams(max_tokens=None)
            reader = asyncio.create_task(last_of(llm, "one", endless, "mine"))
            other = asyncio.create_task(last_of(llm, "one", GREEDY, "mine too"))
            while not llm.loaded.engine.has_work:
                await asyncio.sleep(0)
            await llm.abort("mine")
            await llm.abort("mine")
            await llm.abort("nobody's")
            return await reader, await other

    aborted, other = asyncio.run(main())
    assert (aborted.finished, aborted.outputs[0].finish_reason) == (True, "abort")
    assert other.outputs[0].finish_reason == "length"


def test_refused_requests_raise_and_do_no_harm(make_async: Callable[..., AsyncLLM]) -> None:
    async def main() -> None:
        async with make_async(max_model_len=30) as llm:
            with pytest.raises(RequestError, match="prompt has 41 tokens"):
                await last_of(llm, "x" * 40, GREEDY)
            outputs = llm.generate("one", GREEDY, "same")
            await anext(outputs)
            with pytest.raises(RequestError, match="request id 'same' is in use"):
                await last_of(llm, "two", GREEDY, "same")
            await outputs.aclose()
            assert (await last_of(llm, "two", GREEDY, "same")).finished, "an id is free once its reader left"

    asyncio.run(main())


def test_a_dead_engine_tells_everybody(make_async: Callable[..., AsyncLLM]) -> None:
    executor = FakeExecutor()

    async def main() -> None:
        llm = make_async(executor, max_model_len=100_000)
        executor.fail = RuntimeError("kernel")
        waiting = [last_of(llm, prompt, GREEDY) for prompt in PROMPTS]
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in errors] == [EngineDeadError] * 4
        assert str(errors[0]) == "engine stopped: RuntimeError: kernel"
        with pytest.raises(EngineDeadError, match="kernel"):
            await last_of(llm, "late", GREEDY)
        assert not llm.is_alive
        await llm.abort("anything")
        llm.close()

    asyncio.run(main())
    assert executor.closed


def test_whatever_ends_the_engine_nobody_is_left_waiting(make_async: Callable[..., AsyncLLM]) -> None:
    class Panic(BaseException):
        """As libraries in other languages raise it."""

    def panic(logits: object, tokens: object) -> None:
        raise Panic("no way on")

    async def main() -> None:
        llm = make_async(FakeExecutor(edit=panic))
        with pytest.raises(EngineDeadError, match="engine stopped: Panic: no way on"):
            await asyncio.wait_for(last_of(llm, "one", GREEDY), 20)
        llm.close()

    asyncio.run(main())


def test_a_request_that_is_no_request_fails_alone(make_async: Callable[..., AsyncLLM]) -> None:
    async def main() -> None:
        async with make_async() as llm:
            with pytest.raises(AttributeError):
                await last_of(llm, "one", {"temperature": 0})  # type: ignore[arg-type]
            assert (await last_of(llm, "one", GREEDY)).finished

    asyncio.run(main())


def test_a_result_that_was_not_read_yet_outlives_the_engine(make_async: Callable[..., AsyncLLM]) -> None:
    async def main() -> None:
        llm = make_async()
        outputs = llm.generate("one", LONG)
        await anext(outputs)
        while llm.loaded.engine.has_work:
            pass  # this loop gets no turn to read
        llm.close()
        states = [state async for state in outputs]
        assert len(states[-1].outputs[0].token_ids) == 400

    asyncio.run(main())


def test_closing_ends_open_requests_and_the_thread(make_async: Callable[..., AsyncLLM]) -> None:
    executor = FakeExecutor(pages=(7000,))
    before = threading.active_count()

    async def main() -> None:
        llm = make_async(executor, max_model_len=100_000)
        reader = asyncio.create_task(last_of(llm, "one", SamplingParams(max_tokens=None)))
        while not llm.loaded.engine.has_work:
            await asyncio.sleep(0)
        await asyncio.to_thread(llm.close)
        llm.close()
        with pytest.raises(EngineDeadError, match="engine was closed"):
            await reader
        with pytest.raises(EngineDeadError, match="engine was closed"):
            await last_of(llm, "late", GREEDY)

    asyncio.run(main())
    assert executor.closed
    assert threading.active_count() == before


def test_readers_on_several_loops_and_loops_that_are_gone(make_async: Callable[..., AsyncLLM]) -> None:
    llm = make_async(FakeExecutor(pages=(7000,)), max_model_len=100_000)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda prompt: asyncio.run(last_of(llm, prompt, GREEDY)), PROMPTS))
    assert [output.prompt for output in outputs] == PROMPTS
    gone = asyncio.new_event_loop()
    stream = llm.generate("one", SamplingParams(max_tokens=None))
    gone.run_until_complete(anext(stream))
    gone.close()
    assert asyncio.run(last_of(llm, "two", GREEDY)).finished
    asyncio.run(until_idle(llm))
    llm.close()


# --------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_greedy_tokens_are_those_of_transformers(tiny: Callable[[str], TinyModel], family: str) -> None:
    model = tiny(family)
    prompts = [[5, 9, 200, 31], list(range(2, 60))]
    with LLM(str(model.folder), weights="W32A32", max_model_len=128, max_num_seqs=4, threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        mine = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
        assert llm.config.kv_format == "KV32"
    for prompt, tokens in zip(prompts, mine, strict=True):
        expected = model.logits([*prompt, *tokens[:-1]]).argmax(axis=1)[len(prompt) - 1 :]
        assert tokens == expected.tolist()


def test_executors_agree_on_a_chat(tiny_llama: Path) -> None:
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    with LLM(str(tiny_llama), device="cpu", max_model_len=128, max_num_seqs=2) as llm:
        (output,) = llm.chat(chat, SamplingParams(temperature=0, max_tokens=12, logprobs=0))
        (answer,) = output.outputs
        assert answer.text == llm.tokenizer.decode(
            [t for t in answer.token_ids if t not in llm.tokenizer.eos_ids]
        )
    said = [*output.prompt_token_ids, *answer.token_ids]
    with LLM(str(tiny_llama), device="reference", max_model_len=128, max_num_seqs=2) as llm:
        (scored,) = llm.generate([said], SamplingParams(max_tokens=0, prompt_logprobs=1))
    assert answer.logprobs is not None
    assert scored.prompt_logprobs is not None
    expected = scored.prompt_logprobs[-len(answer.token_ids) :]
    for own, reference in zip(answer.logprobs, expected, strict=True):
        assert reference is not None
        # What activations are rounded to may differ by one, and a random model makes much of little.
        assert own.logprob == pytest.approx(reference.logprob, abs=0.2)
        assert reference.logprob > max(score for _, score in reference.top) - 0.3


LEFT_OPEN = """
import asyncio, sys, threading
from ridgeline import LLM, AsyncLLM, SamplingParams
endless = SamplingParams(max_tokens=None, ignore_eos=True)
if sys.argv[2] == "async":
    llm = AsyncLLM(sys.argv[1])
    stream = llm.generate("one", endless)
    asyncio.new_event_loop().run_until_complete(anext(stream))
else:
    llm = LLM(sys.argv[1])
    stream = llm.stream("one", endless)
    next(stream)
    threading.Thread(target=llm.generate, args=("one", endless), daemon=True).start()
"""


@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_process_may_end_in_the_midst_of_a_step(tiny_llama: Path, face: str) -> None:
    command = [sys.executable, "-c", LEFT_OPEN, str(tiny_llama), face]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_closing_lets_go_of_the_weights(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), max_model_len=128)
    assert llm.loaded.engine.handle is not None
    llm.close()
    assert llm.loaded.engine.handle is None, "the tape holds on to every matrix"


def test_a_context_beyond_the_models_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 513; accepted: up to 512"):
        LLM(str(tiny_llama), max_model_len=513)
