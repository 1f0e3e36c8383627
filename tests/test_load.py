"""The load generator: events out of bytes, when and what is asked, what is counted, and failures by cause."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Cli, command_line
from hypothesis import given
from hypothesis import strategies as st
from serving import FakeServer, until, with_server

from ridgeline.apps.load.arrivals import arrival_times
from ridgeline.apps.load.bench import Benchmark, Listener, run_benchmark
from ridgeline.apps.load.client import Answer, Asking, ask, chosen_model, served_models, settle
from ridgeline.apps.load.connections import Connections
from ridgeline.apps.load.dataset import Lengths, Sample, file_samples, random_samples
from ridgeline.apps.load.drive import Load, Run, drive
from ridgeline.apps.load.events import MAX_EVENT_BYTES, EventParser
from ridgeline.apps.load.failures import FailureError
from ridgeline.apps.load.report import figures, spread, targets_of
from ridgeline.types import ConfigError, RequestError

# ---------------------------------------------------------------------------------------------- events

LINES = st.sampled_from(
    [
        "data: a",
        "data:b",
        "data:  c",
        "data",
        "data:",
        ": comment",
        "",
        "",
        "event: error",
        "id: 7",
        "dat",
        "é:é",
    ]
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def events_of_text(text: str) -> list[tuple[str, str]]:
    """The standard's algorithm, on a whole text."""
    found, name, data = [], "", []
    *lines, _ = re.split("\r\n|\n|\r", text.removeprefix("\ufeff"))
    for line in lines:
        if not line:
            if data:
                found.append((name, "\n".join(data)))
            name, data = "", []
            continue
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if key == "data":
            data.append(value)
        elif key == "event":
            name = value
    return found


@given(st.lists(st.tuples(LINES, ENDS)), st.booleans(), st.data())
def test_any_split_of_the_bytes_gives_the_same_events(
    lines: list[tuple[str, str]], marked: bool, data: st.DataObject
) -> None:
    text = "\ufeff" * marked + "".join(map("".join, lines))
    content = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)))))
    parser = EventParser()
    parts = [content[a:b] for a, b in itertools.pairwise([0, *cuts, len(content)])]
    found = [event for part in parts for event in parser.feed(part)]
    assert [(name.decode(), value.decode()) for name, value in found] == events_of_text(text)


def test_an_event_without_end_is_a_broken_stream() -> None:
    for part in (b"x" * 65536, b"data: " + b"x" * 65530 + b"\n"):
        parser = EventParser()
        with pytest.raises(FailureError, match="an event is longer than"):  # noqa: PT012
            for _ in range(MAX_EVENT_BYTES // 65000 + 2):
                parser.feed(part)


# --------------------------------------------------------------------------------------------- arrivals


def test_arrivals_are_poissons_or_as_bursty_as_asked() -> None:
    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff(arrival_times(20_000, 50.0, burstiness, seed=3))
        assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
        assert gaps.std() == pytest.approx(1 / 50 / math.sqrt(burstiness), rel=0.05)
    assert arrival_times(9, 5.0, seed=1) == arrival_times(9, 5.0, seed=1) != arrival_times(9, 5.0, seed=2)
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]
    assert arrival_times(1, 5.0) == [0.0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0), (1, math.inf)])
def test_rates_out_of_range_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError, match=r"accepted: above 0"):
        Load(1, None, rate, burstiness)


# -------------------------------------------------------------------------------------------- what is asked


def take(samples: Any, count: int) -> list[Sample]:
    return list(itertools.islice(samples, count))


def test_random_prompts_repeat_with_their_seed_and_begin_differently() -> None:
    first = take(random_samples(Lengths(20, 9), seed=1), 100)
    assert first == take(random_samples(Lengths(20, 9), seed=1), 100)
    texts = [sample.prompt or "" for sample in first]
    assert {len(text.split()) for text in texts} == {20}
    assert {sample.output_tokens for sample in first} == {9}
    assert len({" ".join(text.split()[:4]) for text in texts}) == 100
    spread_out = take(random_samples(Lengths(100, 100, 0.5), seed=2), 500)
    lengths = [len((sample.prompt or "").split()) for sample in spread_out]
    assert (min(lengths) >= 50, max(lengths) <= 150) == (True, True)
    assert max(lengths) - min(lengths) > 80
    assert statistics.mean(sample.output_tokens or 0 for sample in spread_out) == pytest.approx(100, rel=0.05)


def test_lines_of_json_are_asked_in_order_and_again(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    lines = [
        {"prompt": "a", "max_tokens": 5},
        {"messages": messages, "id": 7},
        {"prompt": "c", "output_tokens": 3},
    ]
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = take(file_samples(file, 99), 4)
    assert found == [Sample("a", None, 5), Sample(None, messages), Sample("c", None, 3), Sample("a", None, 5)]
    assert [sample.output_tokens for sample in take(file_samples(file, 2, output_tokens=8), 3)] == [8, 8, 8]
    assert found[0].body("chat") == {"messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(ConfigError, match="has messages"):
        file_samples(file, 99, endpoint="completions")
    assert take(file_samples(file, 1, endpoint="completions"), 1)[0].prompt == "a"


def test_sharegpt_gives_first_turns(tmp_path: Path) -> None:
    file = tmp_path / "sharegpt.json"
    turns = [("q1", "a" * 41), ("", "x"), ("q" * 5000, "a"), ("q4", "a")]
    read: list[Any] = [
        {"id": "x", "conversations": [{"from": "human", "value": q}, {"value": a}]} for q, a in turns
    ]
    file.write_text(json.dumps([*read, {"conversations": None}, {}]))
    assert take(file_samples(file, 99), 3) == [
        Sample("q1", None, 11),
        Sample("q4", None, 1),
        Sample("q1", None, 11),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no prompts"),
        (b"\n \n", "has no prompts"),
        (b"[]", "has no prompts"),
        (b'[{"conversations": [{"value": 7}]}]', "accepted: ShareGPT's JSON"),
        (b"[" * 100_000, "accepted: ShareGPT's JSON"),
        (b'{"prompt": "a"}\n{"prompt": 7}', "line 2: Expected `str | null`, got `int`"),
        (b'{"prompt": "a"}\n{"prompt": "b"', "line 2"),
        (b'{"prompt": "\xff"}', "line 1"),
        (b'{"messages": ' + b"[" * 100_000, "line 1"),
        (b'{"prompt": "a", "messages": [{}]}', "line 1 should have either prompt or messages"),
        (b'{"prompt": ""}', "line 1 should have either prompt or messages"),
        (b'{"prompt": "a", "max_tokens": 0}', "line 1: 0 output tokens; accepted: 1 to 1048576"),
        (b'{"prompt": "a", "max_tokens": 1e99}', "line 1"),
        (b"\x00\x01PK\x03\x04", "line 1"),
    ],
)
def test_what_is_no_dataset_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "asked"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        file_samples(file, 9)
    assert "\n" not in str(caught.value)
    assert "accepted: " in str(caught.value)


# ---------------------------------------------------------------------------------------------- figures


def test_percentiles_are_those_of_the_standard_library() -> None:
    values = np.random.default_rng(0).gamma(2, size=357).tolist()
    found = spread(values)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert found == pytest.approx(
        {
            "mean": statistics.mean(values),
            "p50": cuts[49],
            "p90": cuts[89],
            "p99": cuts[98],
            "max": max(values),
        }
    )
    assert spread([None, 4.0]) == {"mean": 4.0, "p50": 4.0, "p90": 4.0, "p99": 4.0, "max": 4.0}
    assert spread([None]) is None


def test_figures_are_what_their_definitions_say() -> None:
    quick = Answer(5, 10.0, 10.5, [10.1, 10.2, 10.4], 4, 7, 5, True)
    slow = Answer(3, 10.0, 12.0, [11.0], 2, 9, 1, True)
    silent = Answer(2, 10.0, 11.0, [], 1, 3, 0, True)
    lost = Answer(2, 10.0, 10.9, [10.2], 1, None, 1, cause="status 429", detail="full")
    run = Run(Load(4, 2), [quick, slow, silent, lost], 2.0, 0.004, 0.0)
    found = figures(run, {"ttft": 150, "e2e": 600})
    assert (found["requests"], found["ok"], found["failed"]) == (4, 3, {"status 429": 1})
    assert found["examples"] == {"status 429": "full"}
    assert (found["input_tokens"], found["output_tokens"], found["short_answers"]) == (19, 6, 2)
    assert (found["requests_per_s"], found["output_tokens_per_s"]) == (1.5, 3.0)
    assert (found["input_tokens_per_s"], found["tokens_counted_by"]) == (9.5, "usage")
    assert found["ttft_ms"] == pytest.approx({"mean": 550, "p50": 550, "p90": 910, "p99": 991, "max": 1000})
    assert found["itl_ms"]["mean"] == pytest.approx(150)
    assert found["itl_ms"]["max"] == pytest.approx(200)
    assert found["tpot_ms"]["mean"] == pytest.approx(100)
    assert found["e2e_ms"]["p50"] == pytest.approx(1000)
    assert found["goodput"] == {"targets_ms": {"ttft": 150, "e2e": 600}, "ok": 1, "requests_per_s": 0.5}
    assert figures(run, {"ttft": 2000})["goodput"]["ok"] == 2
    assert figures(run, {"itl": 198})["goodput"]["ok"] == 2  # its 99th percentile is 199 ms
    assert figures(run, {"tpot": 101, "itl": 199.5})["goodput"]["ok"] == 3
    assert found["client"] == pytest.approx(
        {"cpu_s": 0.004, "cpu_us_per_chunk": 500, "chunks": 8, "late_ms": 0}
    )
    json.dumps(found, allow_nan=False)
    nothing = figures(Run(Load(1), [lost], 1.0, 0.0, 0.0))
    assert (nothing["ttft_ms"], nothing["tokens_counted_by"], nothing["goodput"]) == (None, None, None)


def test_targets() -> None:
    assert targets_of("ttft=500, e2e=2e3") == {"ttft": 500, "e2e": 2000}
    for text in ("", "ttft", "ttft=x", "ttft=-1", "ttft=nan", "speed=1", "ttft=500,"):
        with pytest.raises(ConfigError, match="accepted: milliseconds of ttft, itl, tpot, e2e"):
            targets_of(text)


# ------------------------------------------------------------------------------- against our own server


async def load_on(
    server: FakeServer, load: Load, asking: Asking | None = None, seen: Callable[[Answer], None] | None = None
) -> Run:
    connections = Connections(server.url)
    samples = random_samples(Lengths(6, 5, 0.5), seed=0)
    try:
        return await drive(
            connections, asking or Asking("tiny"), samples, load, seen or (lambda answer: None)
        )
    finally:
        await connections.close()


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("load", [Load(9, 3), Load(9), Load(9, None, 200.0), Load(9, 2, 500.0, 0.5)], ids=str)
def test_counts_are_the_servers(tiny_llama: Path, endpoint: str, load: Load) -> None:
    async def scenario(server: FakeServer) -> None:
        run = await load_on(server, load, Asking("tiny", endpoint, ignore_eos=True))
        found = figures(run)
        assert (found["ok"], found["failed"], found["short_answers"]) == (9, {}, 0)
        assert found["tokens_counted_by"] == "usage"
        adds = server.engine.adds.values()
        assert found["input_tokens"] == sum(len(add.tokens) for add in adds)
        assert found["output_tokens"] == sum(add.params.max_tokens or 0 for add in adds)
        assert all(add.params.ignore_eos and add.params.temperature == 0 for add in adds)
        for answer in run.answers:
            assert len(answer.text_s) == answer.output_tokens == answer.asked_tokens
            assert answer.start_s < answer.text_s[0] <= answer.text_s[-1] <= answer.end_s

    with_server(tiny_llama, scenario)


def test_refusals_are_counted_by_status(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        server.engine.running.clear()
        refused: list[Answer] = []
        running = asyncio.create_task(load_on(server, Load(12), seen=refused.append))
        await until(lambda: len(refused) + len(server.engine.streams) == 12)
        count = len(refused)
        server.engine.running.set()
        found = figures(await running)
        assert (found["ok"], found["failed"]) == (12 - count, {"status 429": count})
        assert 0 < count < 12
        assert "\n" not in found["examples"]["status 429"]

    with_server(tiny_llama, scenario, max_queue=2)


def test_streams_that_die_or_stand_still_are_counted_by_cause(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        server.engine.running.clear()
        still = await load_on(server, Load(2), Asking("tiny", timeout_s=0.3))
        assert figures(still)["failed"] == {"timeout": 2}
        await until(lambda: not server.engine.streams)

        server.engine.script = [("a", 3)] * 3
        server.engine.running.set()
        sample = Sample("hi", output_tokens=300)
        connections = Connections(server.url)
        asked = asyncio.create_task(ask(connections, Asking("tiny"), sample))
        await until(lambda: any(count > 3 for count in server.engine.given.values()) and not asked.done())
        server.engine.die()
        answer = await asked
        assert answer.cause == "error event"
        assert len(answer.text_s) >= 1
        late = await ask(connections, Asking("tiny"), sample)
        assert late.cause == "status 503"
        await connections.close()

    with_server(tiny_llama, scenario)


def test_nobody_there_is_one_line() -> None:
    async def scenario() -> None:
        connections = Connections("http://127.0.0.1:1")
        assert (await ask(connections, Asking("x"), Sample("hi"))).cause == "no connection"
        with pytest.raises(ConfigError, match="no connection: Connection refused; accepted: a server that"):
            await served_models(connections)

    asyncio.run(scenario())


# ------------------------------------------------------------------------------- servers that misbehave

Reply = Callable[[str, bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def scripted(reply: Reply) -> AsyncIterator[tuple[Connections, list[int]]]:
    """A server that answers each request as `reply` does, and how many connections were made to it."""
    made: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.append(1)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(size[1])) if size else b""
                await reply(head.split()[1], body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    connections = Connections(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    try:
        yield connections, made
    finally:
        await connections.close()
        server.close()


def answered(content: bytes, head: str = "200 OK", whole: bool = True, step: int = 1 << 20) -> Reply:
    """A chunked answer, sent a few bytes at a time; without its end the connection is closed."""

    async def reply(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {head}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for start in range(0, len(content), step):
            part = content[start : start + step]
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            await writer.drain()
            await asyncio.sleep(0)
        if whole:
            writer.write(b"0\r\n\r\n")
        else:
            writer.close()

    return reply


def asked(reply: Reply, count: int = 1) -> tuple[list[Answer], int]:
    async def scenario() -> tuple[list[Answer], int]:
        async with scripted(reply) as (connections, made):
            sample = Sample("hi", output_tokens=2)
            found = [await ask(connections, Asking("x", timeout_s=20), sample) for _ in range(count)]
            return found, len(made)

    return asyncio.run(scenario())


def chunk(text: str | None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, **more}
    return b"data: " + json.dumps({"id": "x", "choices": [choice], "usage": None}).encode() + b"\r\n\r\n"


ENDING = chunk(None, finish_reason="stop")
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2, "x": 1}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (chunk("a") + b": ping\n\n" + chunk("b") + ENDING + DONE, None),
        (chunk("a") + chunk("b") + ENDING, None),  # without [DONE]
        (chunk("a") + chunk("b"), "broken stream"),
        (b"", "broken stream"),
        (chunk("a") + b'data: {"error": {"message": "no\\nmore"}}\n\n', "error event"),
        (chunk("a") + b"event: error\ndata: gone\n\n", "error event"),
        (chunk("a") + b"data: {]\n\n" + DONE, "broken stream"),
        (b'data: {"choices": 7}\n\n', "broken stream"),
        (b"data: " + b"[" * 50_000 + b"\n\n", "broken stream"),
        (b"<html>hello</html>", "broken stream"),
    ],
)
def test_streams_in_the_wild(content: bytes, cause: str | None) -> None:
    for step in (1 << 20, 7) if len(content) < 5000 else (1 << 20,):
        (answer,), _ = asked(answered(content, step=step))
        assert answer.cause == cause, answer.detail
        assert "\n" not in answer.detail
        if cause is None:
            assert (answer.output_tokens, answer.counted, len(answer.text_s)) == (2, False, 2)


def test_usage_counts_where_there_is_one_and_connections_are_kept() -> None:
    answers, made = asked(answered(chunk("ab") + ENDING + USAGE + DONE, step=11), count=3)
    assert made == 1
    for answer in answers:
        assert (answer.input_tokens, answer.output_tokens, answer.counted) == (4, 2, True)
        assert len(answer.text_s) == 1


def test_broken_connections_and_odd_answers() -> None:
    (cut, again), made = asked(answered(chunk("a"), whole=False), count=2)
    assert (cut.cause, again.cause, made) == ("broken stream", "broken stream", 2)
    (failed,), _ = asked(answered(b'{"error": {"message": "too\\nmuch"}}', "500 Oh"))
    assert (failed.cause, failed.detail) == ("status 500", "too much")
    (bare,), _ = asked(answered(b"<h1>\nBad gateway</h1>", "502 Oh"))
    assert (bare.cause, bare.detail) == ("status 502", "<h1> Bad gateway</h1>")

    async def garbage(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")

    async def silence(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.close()

    for reply in (garbage, silence):
        assert asked(reply)[0][0].cause == "broken stream"


def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    whole = answered(chunk("a") + ENDING + USAGE + DONE)
    served = itertools.count()

    async def every_other(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if next(served) % 2:
            writer.close()
        else:
            await whole(path, body, writer)

    answers, made = asked(every_other, count=2)
    assert [answer.cause for answer in answers] == [None, None]
    assert made == 2


def test_optional_fields_that_are_refused_are_left_out() -> None:
    bodies: list[dict[str, Any]] = []

    async def reply(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        bodies.append(json.loads(body))
        for name in ("ignore_eos", "stream_options"):
            if name in bodies[-1]:
                refusal = json.dumps({"error": {"message": f"Unrecognized argument: {name}"}}).encode()
                return await answered(refusal, "400 Bad")(path, body, writer)
        if bodies[-1]["model"] == "none":
            return await answered(b'{"detail": "what?"}', "400 Bad")(path, body, writer)
        return await answered(chunk("a") + ENDING + DONE)(path, body, writer)

    async def scenario() -> None:
        async with scripted(reply) as (connections, _):
            asking, notes = await settle(connections, Asking("x", ignore_eos=True), Sample("hi"))
            assert (asking.ignore_eos, asking.include_usage, len(notes)) == (False, False, 2)
            await ask(connections, Asking("x", include_usage=False, service_tier="batch"), Sample("hi"))
            with pytest.raises(RequestError, match=r"the first request fails: status 400: what\?"):
                await settle(connections, Asking("none"), Sample("hi"))

    asyncio.run(scenario())
    assert bodies[0]["messages"] == [{"role": "user", "content": "hi"}]
    assert [body["service_tier"] for body in bodies if "service_tier" in body] == ["batch"]
    assert (bodies[0]["max_tokens"], bodies[0]["stream"], bodies[0]["temperature"]) == (128, True, 0.0)


@pytest.mark.parametrize(
    "content", [b"{}", b"[" * 9999, b'{"data": [{"id": 7}]}', b"<html>", b"x" * (5 << 20)]
)
def test_models_that_cannot_be_read_are_one_line(content: bytes) -> None:
    async def scenario() -> None:
        async with scripted(answered(content)) as (connections, _):
            with pytest.raises(ConfigError, match="accepted: a server that answers /v1/models") as caught:
                await served_models(connections)
            assert "\n" not in str(caught.value)

    asyncio.run(scenario())


def test_models_and_urls_that_are_not_known_are_refused() -> None:
    assert chosen_model(["a", "b"], None) == "a"
    with pytest.raises(ConfigError, match="model 'c' is not served; accepted: a, b"):
        chosen_model(["a", "b"], "c")
    with pytest.raises(ConfigError, match="none is served"):
        chosen_model([], None)
    for url in (
        "",
        "localhost:8000",
        "ftp://x",
        "http://",
        "http://x:99999",
        "http://[x",
        "http://é",
        "http://x y",
        "http://x/?a=b",
    ):
        with pytest.raises(ConfigError, match="accepted: http://host:port"):
            Connections(url)
    with pytest.raises(ConfigError, match="API key"):
        Connections("http://x", "a\r\nb")


def test_a_closed_loop_has_as_many_open_as_it_has_clients() -> None:
    open_now, most = 0, 0
    whole = answered(chunk("a") + ENDING + USAGE + DONE)

    async def reply(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0.01)
        open_now -= 1
        await whole(path, body, writer)

    async def scenario(load: Load) -> int:
        nonlocal most
        most = 0
        async with scripted(reply) as (connections, _):
            run = await drive(connections, Asking("x"), random_samples(Lengths(3, 3), 0), load)
        assert figures(run)["ok"] == load.requests
        return most

    assert asyncio.run(scenario(Load(12, 3))) == 3
    assert asyncio.run(scenario(Load(12, 4, math.inf))) == 4
    assert asyncio.run(scenario(Load(12, 2, 10_000.0))) == 2
    assert asyncio.run(scenario(Load(12))) == 12


# ---------------------------------------------------------------------------------------- the command


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


def test_bench_serve_ends_with_one_json_line(ridgeline: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    flags = (
        "--concurrency",
        "1,3",
        "--num-prompts",
        4,
        "-n",
        3,
        "-p",
        5,
        "--goodput",
        "ttft=60000,e2e=60000",
    )

    async def scenario(server: FakeServer) -> None:
        outcome = await asyncio.to_thread(
            ridgeline,
            "bench",
            "serve",
            "--url",
            server.url,
            *flags,
            "--ignore-eos",
            "--json",
            "--save",
            saved,
        )
        assert (outcome.code, outcome.err) == (0, "")
        found = json.loads(outcome.out.splitlines()[-1])
        assert (found["model"], found["endpoint"], found["dataset"]) == ("tiny", "chat", "random")
        assert [(run["concurrency"], run["ok"], run["output_tokens"]) for run in found["runs"]] == [
            (1, 4, 12),
            (3, 4, 12),
        ]
        assert all(run["goodput"]["ok"] == 4 for run in found["runs"])
        assert len(server.engine.adds) == 2 + 4 + 4
        kept = json.loads(saved.read_text())
        assert [len(run.pop("each")) for run in kept["runs"]] == [4, 4]
        assert kept == found

        url, sizes = f"{server.url}/v1", ("--num-prompts", 2, "-n", 2, "-p", 9)
        for clients in ("2", "1,2"):
            command = ("bench", "serve", "--url", url, *sizes, "--concurrency", clients)
            human = await asyncio.to_thread(ridgeline, *command)
            assert human.code == 0
            assert re.search(r"^(TTFT|      2) ", human.out, re.MULTILINE), human.out
            assert re.search(r"^tiny at http\S+, chat, dataset random$", human.out, re.MULTILINE)

    with_server(tiny_llama, scenario)


def test_keys_are_sent(ridgeline: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ridgeline.server.config import keys_of

    async def scenario(server: FakeServer) -> None:
        command = ("bench", "serve", "--url", server.url, "--num-prompts", 2, "-n", 2, "-p", 9, "--json")
        refused = await asyncio.to_thread(ridgeline, *command)
        assert (refused.code, refused.out) == (1, "")
        assert "/v1/models gives status 401" in refused.err
        monkeypatch.setenv("OPENAI_API_KEY", "sesame")
        opened = await asyncio.to_thread(ridgeline, *command)
        assert json.loads(opened.out)["runs"][0]["ok"] == 2

    with_server(tiny_llama, scenario, api_keys=keys_of(["sesame"]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--url", "nowhere"], "url is 'nowhere'; accepted: http://host:port"),
        (["serve", "--url", "http://127.0.0.1:1"], "no connection: Connection refused"),
        (["serve", "--url", "http://" + "a" * 64], "is no name of a host"),
        (["serve", "--concurrency", "1,x"], "concurrency is '1,x'; accepted: a number, or several"),
        (["serve", "--concurrency", "0"], "concurrency is 0; accepted: 1 to 65536"),
        (["serve", "--num-prompts", "0"], "num_prompts is 0; accepted: 1 to"),
        (["serve", "--dataset", "/nowhere"], "/nowhere: No such file or directory"),
        (["serve", "--endpoint", "speech"], "endpoint is 'speech'; accepted: chat, completions"),
        (["serve", "--goodput", "x=1"], "goodput is 'x=1'; accepted: milliseconds of"),
        (["serve", "--request-rate", "0"], "request_rate is 0; accepted: above 0"),
        (["serve", "--timeout", "0"], "timeout is 0 s; accepted: above 0"),
        (["serve", "--temperature", "-1"], "temperature is -1; accepted: 0 to 100"),
        (["serve", "--prompt-tokens", "0"], "prompt_tokens is 0; accepted: 1 to"),
        (["serve", "--warmup", "-1"], "warmup is -1; accepted: at least 0"),
        (["serve", "--spread", "1"], "spread is 1; accepted: 0 up to less than 1"),
        (["-n", "9", "serve"], "--output-tokens stands before serve; accepted: serve --output-tokens"),
        (["elsewhere"], "No such command 'elsewhere'"),
    ],
)
def test_mistakes_are_one_line(ridgeline: Cli, arguments: list[str], said: str) -> None:
    outcome = ridgeline("bench", *arguments)
    assert (outcome.code, outcome.out) == (1, "")
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


def test_flags_have_environment_twins_and_clients_know_openais(
    ridgeline: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert ridgeline("bench", "serve").err.startswith("error: http://127.0.0.1:1/v1: no connection")
    monkeypatch.setenv("RIDGELINE_URL", "http://127.0.0.2:1")
    assert ridgeline("bench", "serve").err.startswith("error: http://127.0.0.2:1: no connection")
    monkeypatch.setenv("RIDGELINE_NUM_PROMPTS", "0")
    assert "num_prompts is 0" in ridgeline("bench", "serve").err


def test_plain_bench_has_its_own_help_and_names_the_sub_verb(ridgeline: Cli) -> None:
    shown = ridgeline("bench", "--help").out
    assert "--repeats" in shown
    assert re.search(r"^  serve +Measure a server under load", shown, re.MULTILINE)
    assert "--request-rate" in ridgeline("bench", "serve", "--help").out


def test_a_benchmark_asks_for_a_model_that_is_served(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        notes: list[str] = []
        lengths = Lengths(9, 2)
        listener = Listener(note=notes.append)
        with pytest.raises(ConfigError, match="model 'big' is not served; accepted: tiny"):
            await run_benchmark(Benchmark(server.url, Asking("big"), (Load(1),)), listener)
        assert not server.engine.adds
        found = await run_benchmark(
            Benchmark(server.url, Asking(""), (Load(1),), lengths=lengths, warmup=0), listener
        )
        assert (found["model"], notes, len(server.engine.adds)) == ("tiny", [], 2)

    with_server(tiny_llama, scenario)
