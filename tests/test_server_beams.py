"""`use_beam_search` over HTTP: the same beams as from Python, and what is refused beside it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai_schemas import checked
from prometheus_client.parser import text_string_to_metric_families
from serving import FakeEngine, FakeServer, ServerProcess, server_process, with_server

from ridgeline import LLM, SamplingParams
from ridgeline.apps.beam_search import Beam, BeamSearchParams, beam_search
from ridgeline.config import EngineConfig
from ridgeline.server.engine_client import EngineClient
from ridgeline.server.engine_stream import ExpiredError
from ridgeline.server.messages import Add, Message, Piece, Pieces, Search, Sender
from ridgeline.server.wire import responses
from ridgeline.types import RequestError

PROMPT = [5, 9, 40, 77]
QUESTION = [{"role": "user", "content": "Who?"}]
OPTIONS = {"threads": 1, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[ServerProcess]:
    with server_process(tiny_llama, "--served-model-name", "tiny", "--max-num-seqs", 8) as running:
        yield running


@pytest.fixture(scope="module")
def web(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, event_hooks={"response": [checked]}) as client:
        yield client


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama), **OPTIONS) as llm:
        yield llm


def complete(web: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 8, "use_beam_search": True, **fields}
    answer = web.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return responses.Completion.model_validate(answer.json()).model_dump()


def expected(llm: LLM, prompt: Any = PROMPT, **fields: Any) -> list[Beam]:
    params = BeamSearchParams(**{"beam_width": 4, "max_tokens": 8, **fields})
    return beam_search(llm, [prompt], params)[0]


def same(choices: list[dict[str, Any]], beams: list[Beam]) -> None:
    assert len(choices) == len(beams)
    for index, (choice, beam) in enumerate(zip(choices, beams, strict=True)):
        assert choice["index"] == index
        assert choice["text"] == beam.text
        assert choice["cumulative_logprob"] == beam.cumulative_logprob
        assert choice["finish_reason"] == beam.finish_reason
        assert choice["stop_reason"] == ("" if beam.stop_reason is None else beam.stop_reason)


# --------------------------------------------------------------------------------------- the beams


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ignore_eos": True},
        {"length_penalty": 0.0},
        {"length_penalty": -1.5},
        {"early_stopping": True, "max_tokens": 40},
        {"stop": ["a", "e", "\x02"], "max_tokens": 20},
        {"stop": ["a", "e", "\x02"], "include_stop_str_in_output": True, "max_tokens": 20},
        {"stop_token_ids": list(range(60, 120)), "max_tokens": 20},
        {"skip_special_tokens": False, "stop_token_ids": [1], "include_stop_str_in_output": True},
    ],
    ids=str,
)
def test_beams_are_those_of_the_python_api(web: httpx.Client, llm: LLM, fields: dict[str, Any]) -> None:
    found = complete(web, n=4, logprobs=0, **fields)
    beams = expected(llm, logprobs=0, **fields)
    same(found["choices"], beams)
    for choice, beam in zip(found["choices"], beams, strict=True):
        scores = choice["logprobs"]["token_logprobs"]
        assert len(scores) == len(beam.token_ids)
        assert math.fsum(scores) == pytest.approx(beam.cumulative_logprob, abs=1e-9)
    assert found["usage"]["prompt_tokens"] == len(PROMPT)
    assert found["usage"]["completion_tokens"] == sum(len(beam.token_ids) for beam in beams)


@pytest.mark.parametrize("begin", [1, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_beams_end_where_their_text_does(llm: LLM, begin: int, length: int) -> None:
    """Stop strings over several tokens, in a vocabulary of bytes whose text is no UTF-8 as a rule."""
    options = {"max_tokens": 16, "ignore_eos": True, "length_penalty": 0.0}
    stop = expected(llm, **options)[0].text[begin : begin + length]
    beams, decode = expected(llm, **options, stop=[stop]), llm.tokenizer.decode
    assert any(beam.finish_reason == "stop" for beam in beams)
    for beam in beams:
        if beam.finish_reason == "stop":
            assert beam.stop_reason == stop
            assert decode(beam.token_ids).startswith(beam.text + stop)
        else:
            assert beam.text == decode(beam.token_ids)
            assert stop not in beam.text.removesuffix("\ufffd")


def test_one_beam_is_greedy(web: httpx.Client) -> None:
    found = complete(web, ignore_eos=True, logprobs=3, max_tokens=20)
    greedy = complete(web, ignore_eos=True, logprobs=3, max_tokens=20, use_beam_search=False, temperature=0)
    (beam,), (single,) = found["choices"], greedy["choices"]
    assert beam.pop("cumulative_logprob") < 0 == single.pop("cumulative_logprob")
    assert beam == single
    assert found["usage"]["completion_tokens"] == greedy["usage"]["completion_tokens"]


def test_best_of_is_the_width_where_it_is_given(web: httpx.Client, llm: LLM) -> None:
    assert complete(web, n=2, best_of=6)["choices"] == complete(web, n=6)["choices"][:2]
    same(complete(web, n=2, best_of=6)["choices"], expected(llm, beam_width=6, n=2))


def test_several_prompts_and_an_echo(web: httpx.Client, llm: LLM) -> None:
    found = complete(web, prompt=["the sky", "x"], n=2, echo=True)["choices"]
    for prompt, at in (("the sky", 0), ("x", 2)):
        beams = expected(llm, prompt, beam_width=2)
        assert [choice["text"] for choice in found[at : at + 2]] == [prompt + beam.text for beam in beams]
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]


def test_an_empty_prompt_begins_with_the_begin_token(web: httpx.Client, llm: LLM) -> None:
    same(complete(web, prompt="", n=3)["choices"], expected(llm, "", beam_width=3))
    bos = llm.tokenizer.bos_id
    assert bos is not None
    same(complete(web, prompt=[bos], n=3)["choices"], expected(llm, "", beam_width=3))


def test_a_long_search_is_the_same_over_pages_and_without_a_limit(web: httpx.Client, llm: LLM) -> None:
    """Beams are found again in the prefix cache, page for page, or computed again."""
    same(complete(web, n=3, max_tokens=60)["choices"], expected(llm, beam_width=3, max_tokens=60))
    longest = [7] * ((llm.config.max_model_len or 0) - 6)
    found = complete(web, prompt=longest, n=2, max_tokens=100, ignore_eos=True)
    assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
    assert found["usage"]["completion_tokens"] == 2 * 6


def test_chats_have_them_too(server: ServerProcess, llm: LLM) -> None:
    """As vLLM's users ask for it."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Who?"}],
            n=3,
            max_tokens=6,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
            extra_body={"use_beam_search": True, "length_penalty": 0.5},
        )
    tokens = llm.loaded.chat_tokens(QUESTION)
    beams = expected(llm, tokens, beam_width=3, max_tokens=6, length_penalty=0.5, logprobs=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokens)
    for choice, beam in zip(answer.choices, beams, strict=True):
        assert choice.message.content == beam.text
        assert choice.model_extra is not None
        assert choice.model_extra["cumulative_logprob"] == beam.cumulative_logprob
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert beam.logprobs is not None
        for told, known in zip(choice.logprobs.content, beam.logprobs, strict=True):
            assert told.logprob == known.logprob
            assert [top.logprob for top in told.top_logprobs] == [logprob for _, logprob in known.top]


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"mirostat": 2}, "mirostat"),
        ({"dry_multiplier": 1}, "dry_multiplier"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs"),
        ({"n": 51}, "n"),
        ({"n": 0}, "n"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"early_stopping": "never"}, "early_stopping"),
        ({"use_beam_search": "yes"}, "use_beam_search"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_does_not_go_with_beams_is_named(
    web: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    asked = {"prompt": "x"} if path == "/v1/completions" else {"messages": QUESTION}
    answer = web.post(path, json={**asked, "max_tokens": 2, "use_beam_search": True, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert "\n" not in error["message"]


def test_more_that_only_one_endpoint_has(web: httpx.Client) -> None:
    for fields, param in (({"best_of": 51}, "best_of"), ({"echo": True, "logprobs": 1}, "echo")):
        body = {"prompt": "x", "use_beam_search": True, **fields}
        error = web.post("/v1/completions", json=body).json()["error"]
        assert error["param"] == param
    tool = {"type": "function", "function": {"name": "f"}}
    forced = {"messages": QUESTION, "use_beam_search": True, "tools": [tool], "tool_choice": "required"}
    answer = web.post("/v1/chat/completions", json=forced)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")


def test_what_changes_nothing_passes(web: httpx.Client) -> None:
    neutral = {
        "temperature": 1,
        "top_p": 1.0,
        "top_k": -1,
        "logit_bias": {},
        "seed": 4,
        "speculation": {"drafter": "ngram"},
        "length_penalty": 1,
        "early_stopping": False,
        "response_format": {"type": "text"},
    }
    assert complete(web, n=2, **neutral)["choices"] == complete(web, n=2)["choices"]
    alone = {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False}
    assert complete(web, **alone)["choices"]


def test_a_width_out_of_range_from_python() -> None:
    for fields in (
        {"n": 5},
        {"n": 0},
        {"length_penalty": math.nan},
        {"length_penalty": 1e9},
        {"early_stopping": None},
        {"stop": [""]},
        {"logprobs": 101},
        {"stop_token_ids": [-1]},
    ):
        with pytest.raises(RequestError, match=next(iter(fields))):
            BeamSearchParams(**{"beam_width": 4, "max_tokens": 3, **fields})


# --------------------------------------------------------------------------------- the engine process


def running(model: Path, scenario: Callable[[EngineClient], Any], **options: Any) -> None:
    async def run() -> None:
        config = EngineConfig(model=str(model), **{**OPTIONS, **options})
        client = EngineClient(config)
        await client.start()
        try:
            await scenario(client)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(run(), 60))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def pieces_of(client: EngineClient, params: Any, **options: Any) -> list[Piece]:
    return [piece async for pieces in client.submit(PROMPT, params, **options) for piece in pieces]


ENDLESS = BeamSearchParams(4, None, ignore_eos=True)


def test_who_leaves_leaves_nothing_running(tiny_llama: Path) -> None:
    async def scenario(client: EngineClient) -> None:
        stream = client.submit(PROMPT, ENDLESS)
        await until(lambda: client.pulse is not None and client.pulse.running > 1)
        stream.abort()
        assert client.open_requests == 0

        def idle() -> bool:
            pulse = client.pulse
            return pulse is not None and (pulse.running, pulse.waiting, pulse.kv_used) == (0, 0, 0)

        await until(idle)
        steps = client.pulse.steps if client.pulse is not None else 0
        await asyncio.sleep(0.5)
        assert client.pulse is not None
        assert client.pulse.steps == steps, "something went on"
        assert len(await pieces_of(client, BeamSearchParams(3, 4))) == 3

    running(tiny_llama, scenario)


def test_searches_share_steps_with_other_requests(tiny_llama: Path, llm: LLM) -> None:
    async def scenario(client: EngineClient) -> None:
        greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        searched = BeamSearchParams(4, 30, length_penalty=0.5)
        sender = Sender("salt", "tenant", "batch")
        *beams, plain = await asyncio.gather(
            *(pieces_of(client, searched, sender=sender) for _ in range(3)), pieces_of(client, greedy)
        )
        known = expected(llm, max_tokens=30, length_penalty=0.5)
        for found in beams:
            assert [piece.tokens for piece in found] == [beam.token_ids for beam in known]
            assert [piece.choice for piece in found] == [0, 1, 2, 3]
        (alone,) = llm.generate([PROMPT], greedy)
        assert sum((piece.tokens for piece in plain), ()) == alone.outputs[0].token_ids

    running(tiny_llama, scenario, max_num_seqs=3)  # fewer seats than beams


def test_a_search_has_a_deadline_to_begin(tiny_llama: Path) -> None:
    async def scenario(client: EngineClient) -> None:
        endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        stream = client.submit(PROMPT, endless)
        async for _ in stream:  # it has the only seat from now on
            with pytest.raises(ExpiredError):
                await pieces_of(client, ENDLESS, deadline_s=time.monotonic() + 0.05)
            break
        stream.abort()
        soon = time.monotonic() + 20
        assert len(await pieces_of(client, BeamSearchParams(2, 3), deadline_s=soon)) == 2

    running(tiny_llama, scenario, max_num_seqs=1)


def test_a_search_is_in_the_line_once(tiny_llama: Path) -> None:
    """What came later gets the only seat after its last round, not between two."""

    async def scenario(client: EngineClient) -> None:
        ended: list[str] = []

        async def note(name: str, params: Any) -> None:
            await pieces_of(client, params)
            ended.append(name)

        later = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        tasks = [asyncio.create_task(note("search", BeamSearchParams(3, 12, ignore_eos=True)))]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(note("later", later)) for _ in range(3)]
        await asyncio.gather(*tasks)
        assert ended == ["search", *["later"] * 3]

    running(tiny_llama, scenario, max_num_seqs=1)


# ------------------------------------------------------------------------------------------- the server


class BeamEngine(FakeEngine):
    """Answers searches too, with one token for each beam."""

    def _send(self, message: Message) -> None:
        if isinstance(message, Search):
            self.adds[message.id] = message  # type: ignore[assignment]
        super()._send(message)

    def _pieces(self, number: int) -> Pieces:
        asked = self.adds[number]
        if isinstance(asked, Add):
            return super()._pieces(number)
        width = asked.params.n or asked.params.beam_width
        pieces = [
            Piece(number, i, "a", (3,), None, "length", cached_tokens=0, cumulative_logprob=-1.0)
            for i in range(width)
        ]
        return Pieces(tuple(pieces), (number,))


def test_a_search_is_one_request_in_the_metrics_and_the_queue(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        server.engine.running.clear()
        body = {"prompt": [1, 2, 3], "use_beam_search": True, "n": 3, "best_of": 4, "max_tokens": 2}
        async with server.client() as client:
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: bool(server.engine.streams))
            assert server.server.service.open_sequences == 4
            server.engine.running.set()
            assert len((await asking).json()["choices"]) == 3
            told = (await client.get("/metrics")).text
        samples = {
            sample.name.removeprefix("ridgeline_"): sample.value
            for family in text_string_to_metric_families(told)
            for sample in family.samples
            if not sample.labels
        }
        assert samples["time_to_first_token_seconds_count"] == 0
        assert samples["inter_token_latency_seconds_count"] == 0
        assert samples["e2e_request_latency_seconds_count"] == 1
        assert samples["prompt_tokens_total"] == 3
        assert samples["generation_tokens_total"] == 3

    with_server(tiny_llama, scenario, engine=BeamEngine())


def test_a_client_that_goes_away_ends_its_search(server: ServerProcess, web: httpx.Client) -> None:
    body = {"prompt": PROMPT, "use_beam_search": True, "n": 4, "max_tokens": 400, "ignore_eos": True}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.15)
    end_s = time.monotonic() + 30
    wanted = {"ridgeline_num_requests_running": 0, "ridgeline_num_requests_waiting": 0}
    while True:
        families = text_string_to_metric_families(web.get("/metrics").text)
        samples = {s.name: s.value for f in families for s in f.samples if not s.labels}
        aborted = 'ridgeline_request_failure_total{reason="aborted"} 1.0' in web.get("/metrics").text
        if aborted and {name: samples[name] for name in wanted} == wanted:
            break
        assert time.monotonic() < end_s, samples
        time.sleep(0.05)
