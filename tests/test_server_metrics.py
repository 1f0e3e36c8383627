"""`/metrics`: what is counted, and that it is counted once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import httpx
import msgspec
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from serving import (
    CHAT,
    FakeEngine,
    FakeServer,
    ServerProcess,
    fake_server,
    server_process,
    until,
    with_server,
)

from ridgeline.records import DraftTotals, StepRecord, TierRecord, TiersRecord
from ridgeline.server.config import keys_of
from ridgeline.server.messages import (
    EVENTS,
    Add,
    Begun,
    Embed,
    Embedded,
    Failed,
    Piece,
    Pieces,
    Pulse,
    Refused,
    Steps,
    frame,
)
from ridgeline.server.metrics import Metrics
from ridgeline.server.version import package_version
from ridgeline.types import PoolingParams, SamplingParams

PROMPT = {"prompt": [5, 6, 7, 8], "max_tokens": 6, "temperature": 0, "ignore_eos": True}


class Told(dict[tuple[str, tuple[str, ...]], float]):
    """Samples by their name and the values of their labels, in the labels' alphabetical order."""

    @classmethod
    def of(cls, text: str) -> Told:
        samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
        told = cls()
        for each in samples:
            key = (each.name, tuple(value for _, value in sorted(each.labels.items())))
            assert key not in told, f"{key} is told twice"
            told[key] = each.value
        return told

    def of_ours(self, name: str, *labels: str) -> float:
        return self[f"ridgeline_{name}", labels]

    def each(self, name: str) -> dict[Sequence[str], float]:
        """What is not 0, by the values of its labels."""
        return {
            labels: value for (own, labels), value in self.items() if own == f"ridgeline_{name}" and value
        }


async def scrape(server: FakeServer) -> Told:
    async with server.client() as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    return Told.of(answer.text)


def test_what_was_asked_is_counted(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            await client.post("/v1/completions", json={**PROMPT, "stream": True})
            await client.post("/v1/completions", json={**PROMPT, "prompt": [[1, 2], [3]], "n": 2})
            await client.post("/v1/completions", json={"nonsense": 1})
        told = await scrape(server)
        assert told.each("request_success_total") == {("length",): 3}
        assert told.each("request_failure_total") == {}
        assert told.of_ours("prompt_tokens_total") == 4 + 2 + 1
        assert told.of_ours("generation_tokens_total") == 6 + 2 * 2 * 6
        assert told.of_ours("time_to_first_token_seconds_count") == 1
        assert told.of_ours("inter_token_latency_seconds_count") == 5
        assert told.of_ours("e2e_request_latency_seconds_count") == 3
        assert told.of_ours("request_prompt_tokens_sum") == 7
        assert told.of_ours("request_generation_tokens_sum") == 30
        assert told.of_ours("request_generation_tokens_bucket", "10.0") == 1
        assert told.of_ours("http_requests_total", "/v1/completions", "200") == 2
        assert told.of_ours("http_requests_total", "/v1/completions", "400") == 1
        assert told.of_ours("http_request_duration_seconds_count", "/v1/completions") == 3
        assert told.each("engine_state") == {("ready",): 1}
        assert told.each("build_info").keys() == {("cpu", "tiny", package_version())}

    with_server(tiny_llama, scenario)


@pytest.mark.parametrize("caching", [True, False])
def test_what_was_looked_for_and_found_is_counted(caching: bool) -> None:
    engine = FakeEngine(prefix_caching=caching)
    engine.card = engine._card
    metrics = Metrics(engine, "tiny", "1")
    metrics.hear(Add(1, (3,) * 40, SamplingParams(n=2)))
    for choice in (0, 1):
        piece = Piece(
            1, choice, "a", (3,), None, "length", cached_tokens=32 if choice == 0 and caching else 0
        )
        metrics.hear(Pieces((piece,), (1,) if choice else ()))
    metrics.hear(Embed(2, (3,) * 20, PoolingParams("last")))
    metrics.hear(Embedded(2, (0.5,), 16 if caching else 0))
    told = Told.of(generate_latest(metrics.registry).decode())
    assert told.of_ours("prompt_tokens_total") == 60
    assert told.of_ours("prefix_cache_queries_total") == (60 if caching else 0)
    assert told.of_ours("prefix_cache_hits_total") == (48 if caching else 0)


def test_failures_are_counted_once(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        engine = server.engine

        def refuse(add: Add) -> Refused | None:
            expired = add.tokens == (9,)
            return (
                Refused(add.id, "no", "expired" if expired else "invalid")
                if expired or add.tokens == (8,)
                else None
            )

        engine.refuse = refuse
        async with server.client() as client:
            for prompt in ([8], [9]):
                assert (await client.post("/v1/completions", json={"prompt": prompt})).status_code >= 400
            engine.reason = "error"
            assert (await client.post("/v1/completions", json=PROMPT)).status_code == 500
            engine.reason = "length"
            for stream in (True, False):
                engine.running.clear()
                with contextlib.suppress(httpx.TimeoutException):
                    await client.post("/v1/completions", json={**PROMPT, "stream": stream}, timeout=0.2)
                await until(lambda: not engine.streams)
            asking = asyncio.create_task(client.post("/v1/completions", json=PROMPT))
            await until(lambda: bool(engine.streams))
            engine.die()
            assert (await asking).status_code == 503
        told = await scrape(server)
        reasons = {("refused",): 1, ("expired",): 1, ("error",): 1, ("aborted",): 2, ("engine_stopped",): 1}
        assert told.each("request_failure_total") == reasons
        assert told.each("request_success_total") == {}
        assert told.of_ours("e2e_request_latency_seconds_count") == 0
        assert told.of_ours("http_requests_total", "/v1/completions", "499") == 2

    with_server(tiny_llama, scenario)


def test_labels_stay_few_whatever_is_asked_for(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            for number in range(50):
                for path in (
                    f"/{number}",
                    f"/v1/models/{number}",
                    f"/metrics/{number}",
                    f"/v1/{number}%0a%22",
                ):
                    await client.get(path)
                await client.request(f"M{number}", "/v1/completions")
            await client.get("/v1/models")
        paths = {labels[0] for labels in (await scrape(server)).each("http_requests_total")}
        assert paths == {"other", "/v1/models/{model:path}", "/v1/models", "/v1/completions"}

    with_server(tiny_llama, scenario)


def test_a_key_is_needed_where_there_are_keys(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            assert (await client.get("/metrics")).status_code == 401
            answer = await client.get("/metrics", headers={"authorization": "Bearer sk-1"})
            told = Told.of(answer.text)
            assert told.of_ours("http_requests_total", "/metrics", "401") == 1
            assert "sk-1" not in answer.text

    with_server(tiny_llama, scenario, api_keys=keys_of(["sk-1"]))


def test_openmetrics_where_it_is_accepted(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        async with server.client() as client:
            await client.post("/v1/chat/completions", json=CHAT)
            for version in ("1.0.0", "nonsense"):
                accept = f"application/openmetrics-text;version={version};escaping=x,text/plain;q=0.1"
                answer = await client.get("/metrics", headers={"accept": accept})
                assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1")
                names = {family.name for family in openmetrics.text_string_to_metric_families(answer.text)}
                assert {"ridgeline_prompt_tokens", "ridgeline_build", "process_cpu_seconds"} <= names
            plain = await client.get("/metrics")
            assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"

    with_server(tiny_llama, scenario)


def test_two_servers_count_for_themselves(tiny_llama: Path) -> None:
    async def run() -> None:
        async with fake_server(tiny_llama) as one, fake_server(tiny_llama) as two:
            async with one.client() as client:
                await client.post("/v1/chat/completions", json=CHAT)
            assert (await scrape(one)).each("request_success_total") == {("length",): 1}
            assert (await scrape(two)).each("request_success_total") == {}

    asyncio.run(run())


TIERS = TiersRecord(
    (TierRecord("memory", 3, 300, 5, 0.5), TierRecord("disk", 7, 700, 2, 0.25)),
    fetched_tokens=112,
    misses=4,
    declined=1,
    spilled_pages=9,
    dropped_pages=2,
    damaged_pages=6,
)


def pulse(steps: int, tiers: TiersRecord | None = None) -> Pulse:
    return Pulse(0.0, 0.1, (), steps, running=3, waiting=2, kv_used=0.5, tiers=tiers, kv_filled=0.97)


def test_lower_tiers_add_up_over_engines() -> None:
    metrics = Metrics(FakeEngine(), "tiny", "1")

    def told() -> Told:
        found = Told.of(generate_latest(metrics.registry).decode())
        return Told({key: value for key, value in found.items() if "kv_tier" in key[0]})

    metrics.hear(pulse(1))
    assert told() == {}
    as_it_comes = EVENTS.decode(frame(pulse(2, TIERS))[4:])
    for engines in (1, 2):
        metrics.hear(as_it_comes)
        metrics.hear(as_it_comes)
        found = told()
        assert found.each("kv_tier_pages") == {("memory",): 3, ("disk",): 7}
        assert found.each("kv_tier_bytes") == {("memory",): 300, ("disk",): 700}
        pages, seconds = {("memory",): 5, ("disk",): 2}, {("memory",): 0.5, ("disk",): 0.25}
        assert found.each("kv_tier_fetched_pages_total") == {k: v * engines for k, v in pages.items()}
        assert found.each("kv_tier_fetch_seconds_total") == {k: v * engines for k, v in seconds.items()}
        totals = {"fetched_tokens": 112, "misses": 4, "declined": 1}
        totals |= {"spilled_pages": 9, "dropped_pages": 2, "damaged_pages": 6}
        for name, value in totals.items():
            assert found.of_ours(f"kv_tier_{name}_total") == value * engines
        metrics.hear(Failed("killed", False))
        found = told()
        assert found.each("kv_tier_pages") == {}
        assert found.of_ours("kv_tier_misses_total") == 4 * engines


def test_guesses_add_up_over_engines() -> None:
    metrics = Metrics(FakeEngine(), "tiny", "1")
    totals = {"ngram": DraftTotals(8, 5, 2, 0.25), "suffix": DraftTotals()}
    for engines in (1, 2):
        metrics.hear(EVENTS.decode(frame(msgspec.structs.replace(pulse(1), drafters=totals))[4:]))
        for alive in (True, False):
            found = Told.of(generate_latest(metrics.registry).decode())
            for name, value in (("num_draft_tokens", 8), ("num_accepted_tokens", 5), ("num_drafts", 2)):
                told = found.each(f"spec_decode_{name}_total")
                assert told == {("ngram",): value * engines}, alive
            assert found.each("spec_decode_draft_seconds_total")["ngram",] == 0.25 * engines
            if alive:
                metrics.hear(Failed("killed", False))


def test_gauges_are_those_of_the_engine_that_lives(tiny_llama: Path) -> None:
    async def scenario(server: FakeServer) -> None:
        engine = server.engine
        engine._hear(pulse(10))
        engine._hear(pulse(15))
        told = await scrape(server)
        assert told.of_ours("num_requests_running") == 3
        assert told.of_ours("num_requests_waiting") == 2
        assert told.of_ours("kv_cache_usage_perc") == 0.5
        assert told.of_ours("kv_cache_filled_perc") == 0.97
        assert told.of_ours("engine_steps_total") == 15
        engine.die()
        told = await scrape(server)
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "engine_up"):
            assert told.of_ours(name) == 0
        assert told.each("engine_state") == {("restarting",): 1}
        engine._hear(pulse(4))
        assert (await scrape(server)).of_ours("engine_steps_total") == 19

    with_server(tiny_llama, scenario)


def step(number: int, **more: object) -> StepRecord:
    """Half of the bandwidth, a tenth of the arithmetic, 2 J."""
    figures = {"elapsed_s": 0.02, "predicted_s": 0.016, "mbu": 0.5, "mfu": 0.1, "energy_j": 2.0, **more}
    sizes = {"flops": 1000, "attention_flops": 10, "bytes": 3000, "weight_bytes": 2000, "kv_bytes": 600}
    about = {"kind": "decode", "rows": 4, "sequences": 4, "prompt_tokens": 0, "decoded_tokens": 4}
    state = {"running": 4, "waiting": 0, "kv_pages": 8, "kv_usage": 0.1, "launches": 9, "wall_s": 0.021}
    known = {"time_s": time.time(), "bound": "weights", **about, **state, **sizes, **figures}
    return StepRecord(number, **known)  # type: ignore[arg-type]


def test_steps_are_counted_beside_their_limits() -> None:
    engine = FakeEngine(energy_source="rapl")
    engine.card = engine._card
    metrics = Metrics(engine, "tiny", "1")

    def told() -> Told:
        return Told.of(generate_latest(metrics.registry).decode())

    assert ("ridgeline_mbu", ()) not in told()
    unknown = {"predicted_s": None, "bound": None, "mbu": None, "mfu": None, "energy_j": None}
    metrics.hear(Steps((step(0, **unknown),)))
    for name in ("mbu", "mfu", "tokens_per_joule"):
        assert (f"ridgeline_{name}", ()) not in told(), "nothing is known of it"
    prefill = {"kind": "prefill", "bound": "arithmetic", "elapsed_s": 0.06, "mbu": 0.1, "mfu": 0.7}
    metrics.hear(Steps((step(1), step(2, **prefill))))
    now = told()
    assert now.each("step_time_seconds_count") == {("decode",): 2, ("prefill",): 1}
    assert now.of_ours("step_time_seconds_sum", "prefill") == pytest.approx(0.06)
    assert now.of_ours("step_predicted_seconds_total", "decode") == pytest.approx(0.016)
    assert now.of_ours("step_prediction_error_ratio_count") == 2
    assert now.of_ours("step_prediction_error_ratio_sum") == pytest.approx(0.25 + 2.75)
    bounds = now.each("step_bound_seconds_total")
    assert bounds == pytest.approx({("weights",): 0.02, ("arithmetic",): 0.06})
    assert now.of_ours("step_memory_seconds_total") == pytest.approx(0.016)
    assert now.of_ours("step_arithmetic_seconds_total") == pytest.approx(0.044)
    assert now.of_ours("mbu") == pytest.approx(0.016 / 0.08)
    assert now.of_ours("mfu") == pytest.approx(0.044 / 0.08)
    assert now.each("step_bytes_total") == {("weights",): 6000, ("KV cache",): 1800, ("activations",): 1200}
    assert now.of_ours("step_flops_total") == 3000
    assert now.of_ours("iteration_tokens_sum") == 12
    assert now.each("energy_joules_total") == {("rapl",): 4}
    assert now.of_ours("tokens_per_joule") == pytest.approx(8 / 4)
    old = Metrics(engine, "tiny", "1")
    old.hear(Steps((step(0, time_s=time.time() - 60),)))
    now = Told.of(generate_latest(old.registry).decode())
    assert [now.of_ours(name) for name in ("mbu", "mfu", "tokens_per_joule")] == [0, 0, 0]


def test_latencies_are_those_of_each_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, now_s = Metrics(FakeEngine(), "tiny", "1"), 0.0
    monkeypatch.setattr("ridgeline.server.metrics.time", SimpleNamespace(monotonic=lambda: now_s))
    metrics.hear(Add(70, (1, 2, 3), SamplingParams(n=2), True, None, 1000.0))
    metrics.hear(Begun((70, 71), 1000.25))
    for at_s, choice, reason in (
        (1000.5, 0, None),
        (1001.0, 1, None),  # no gap: the first token of its choice
        (1001.5, 0, "length"),
        (1003.0, 1, "stop"),
    ):
        now_s, ended = at_s, (70,) if reason == "stop" else ()
        metrics.hear(Pieces((Piece(70, choice, "a", (5,), None, reason),), ended))
    told = Told.of(generate_latest(metrics.registry).decode())
    assert told.of_ours("request_queue_time_seconds_sum") == 0.25
    assert told.of_ours("request_queue_time_seconds_count") == 1
    assert told.of_ours("time_to_first_token_seconds_sum") == 0.5
    assert told.of_ours("inter_token_latency_seconds_sum") == 3.0
    assert told.of_ours("inter_token_latency_seconds_count") == 2
    assert told.of_ours("e2e_request_latency_seconds_sum") == 3.0
    assert told.each("request_success_total") == {("stop",): 1}


# ------------------------------------------------------------------------- the dashboard and the docs

DOCS = Path(__file__).parents[1] / "docs"


def everything() -> Metrics:
    """With a sample of each metric."""
    metrics = Metrics(FakeEngine(), "tiny", "1")
    metrics.answered("/metrics", 200, 0.1)
    metrics.hear(Steps((step(0),)))
    metrics.hear(pulse(1, TIERS))
    return metrics


def test_the_dashboard_asks_for_what_there_is() -> None:
    samples = [each for family in everything().registry.collect() for each in family.samples]
    names = {each.name for each in samples}
    labels = {label for each in samples for label in each.labels} | {"job", "instance"}
    board = json.loads((DOCS / "grafana.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    asked: set[str] = set()
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            expression = target["expr"]
            found = set(re.findall(r"([a-z_:][a-z0-9_:]*)\{", expression))
            assert found >= set(re.findall(r"\b(?:ridgeline|process)_\w+", expression)), expression
            assert found, expression
            asked |= found
            grouped = re.findall(r"by \(([^)]*)\)", expression)
            shown = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            filtered = re.findall(r"(\w+)=~", expression)
            assert labels >= {name for names in grouped for name in names.split(", ")} | {*shown, *filtered}
    if not any(name.startswith("process_") for name in names):  # told on Linux alone
        asked = {name for name in asked if not name.startswith("process_")}
    assert asked <= names
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables.keys() >= set(re.findall(r'"\$(\w+)"', json.dumps(panels).replace("\\", "")))


def test_every_metric_is_described() -> None:
    described = (DOCS / "server.md").read_text()
    for family in everything().registry.collect():
        if family.name.startswith("ridgeline_"):
            name = family.name.removeprefix("ridgeline_")
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            assert f"`{name}{suffix}`" in described
            assert family.documentation.endswith(".")


# ------------------------------------------------------------------------------------- a real engine


def ask(server: ServerProcess, path: str, body: dict[str, object]) -> httpx.Response:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_real_server_and_its_engine_s_death(tiny_llama: Path) -> None:
    with server_process(tiny_llama, "--max-num-seqs", 2) as server:

        def told() -> Told:
            return Told.of(httpx.get(f"{server.url}/metrics").text)

        async def emptied() -> None:
            await until(
                lambda: (
                    not any(
                        told().of_ours(name)
                        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
                    )
                )
            )

        ask(
            server,
            "/v1/completions",
            {**PROMPT, "prompt": [[5, 6, 7]] * 5, "stream": True, "speculation": False},
        )
        ask(server, "/v1/embeddings", {"input": [[5, 6, 7, 8]]})
        asyncio.run(emptied())
        asyncio.run(until(lambda: told().of_ours("engine_steps_total") >= 6 * 3))
        before = told()
        assert before.each("request_success_total") == {("length",): 5, ("embedded",): 1}
        assert before.of_ours("prompt_tokens_total") == 5 * 3 + 4
        assert before.of_ours("generation_tokens_total") == 5 * 6
        assert before.of_ours("request_queue_time_seconds_count") == 6
        assert before.of_ours("engine_resident_memory_bytes") > 1 << 20
        assert before["process_resident_memory_bytes", ()] > 1 << 20
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**PROMPT, "max_tokens": 200}) as _:
            server.engine.kill()
        server.await_log("engine died")
        asyncio.run(emptied())
        asyncio.run(until(lambda: told().of_ours("engine_up") == 1))
        ask(server, "/v1/completions", PROMPT)
        after = told()
        assert after.of_ours("engine_restarts_total") == 1
        for (name, labels), value in before.items():
            if name.endswith(("_total", "_count", "_bucket")):
                assert after[name, labels] >= value, name
        assert sum(after.each("request_success_total").values()) >= 7
