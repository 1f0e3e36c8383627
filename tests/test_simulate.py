"""The simulator: traces small enough to be counted by hand, what must hold of any, and a real run beside
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import AHEAD, HOST, LLAMA, UNPACED, WINDOWED, Constant, configured, run

from ridgeline.apps.bare_engine import bare_engine
from ridgeline.apps.plan.host import Host
from ridgeline.apps.plan.model import FormattedModel, open_model
from ridgeline.apps.simulate.generate import Workload, generate
from ridgeline.apps.simulate.replay import Served, serve
from ridgeline.apps.simulate.report import figures
from ridgeline.apps.simulate.trace import TraceRequest
from ridgeline.config import EngineConfig, pages_for
from ridgeline.execution.base import page_bytes
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.program import StateGroup
from ridgeline.resources.step_time import Prediction
from ridgeline.types import SERVICE_CLASSES, CapacityError, ConfigError, StepWork


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> FormattedModel:
    return configured(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> FormattedModel:
    model = configured(tmp_path_factory.mktemp("windowed"), WINDOWED)
    assert any(group.window == 40 for group in model.program.groups)
    return model


def own(name: str, tokens: int, output: int, at: float = 0.0, **more: Any) -> TraceRequest:
    return TraceRequest(name, ((f"{name}/prompt", tokens),), output, at, **more)


def pool_of(model: FormattedModel, pages: int) -> int:
    """Bytes of KV cache in which every group has so many pages."""
    return sum(page_bytes(group, model.kv_format) for group in model.program.groups) * pages


# ------------------------------------------------------------------------------------------- by hand

STEP = Constant(1.0)


@pytest.mark.parametrize("jump", [True, False])
def test_one_request_has_a_token_at_the_end_of_each_step(llama: FormattedModel, jump: bool) -> None:
    (served,) = run(llama, [own("a", 8, 12, at=0.5)], times=STEP, jump=jump).served
    assert list(served.text_s) == [1.5 + step for step in range(12)]
    assert served.end_s == 12.5
    assert served.output_tokens == 12


@pytest.mark.parametrize("jump", [True, False])
def test_who_comes_during_a_step_is_in_the_next(llama: FormattedModel, jump: bool) -> None:
    done = run(llama, [own("a", 8, 10), own("b", 8, 2, at=4.25)], times=STEP, jump=jump)
    first, second = done.served
    assert list(first.text_s) == [1.0 + step for step in range(10)]
    assert list(second.text_s) == [6.0, 7.0]
    assert done.simulation.executor.usage.steps == 10
    assert done.duration_s == 10.0


@pytest.mark.parametrize("jump", [True, False])
def test_a_gpu_has_launched_the_next_step_already(llama: FormattedModel, jump: bool) -> None:
    done = run(llama, [own("a", 8, 10), own("b", 8, 2, at=4.25)], host=AHEAD, times=STEP, jump=jump)
    first, second = done.served
    assert list(first.text_s) == [1.0 + step for step in range(10)]
    assert list(second.text_s) == [7.0, 8.0]  # seen at 5, when the step from 5 to 6 is launched
    assert done.simulation.executor.usage.steps == 10


def test_a_long_prompt_takes_as_many_steps_as_its_chunks(llama: FormattedModel) -> None:
    config = replace(UNPACED, max_num_seqs=4, max_num_batched_tokens=16)
    (served,) = run(llama, [own("a", 40, 2)], config, times=STEP).served
    assert list(served.text_s) == [3.0, 4.0]


def test_who_finds_no_seat_waits_for_one(llama: FormattedModel) -> None:
    config = replace(UNPACED, max_num_seqs=1)
    done = run(
        llama, [own("a", 8, 3), own("b", 8, 3), own("c", 8, 3, service_class="keystroke")], config, times=STEP
    )
    assert [served.text_s[0] for served in done.served] == [4.0, 7.0, 1.0]


def test_parts_of_the_same_name_are_computed_once(llama: FormattedModel) -> None:
    shared = ("system", 64)
    trace = [
        TraceRequest("a", (shared, ("a", 20)), 4, 0.0),
        TraceRequest("b", (shared, ("b", 20)), 4, 10.0),
        TraceRequest("c", (("system", 40), ("c", 20)), 4, 20.0),
        TraceRequest("d", (("d", 20), shared), 4, 30.0),
        TraceRequest("e", (shared, ("e", 20)), 4, 40.0, tenant="another"),
    ]
    done = run(llama, trace, times=STEP)
    assert [served.cached_tokens for served in done.served] == [0, 64, 32, 0, 0]
    told = figures(done)
    assert told["cached_tokens"] == 96
    assert told["cache_hit_rate"] == 96 / sum(request.prompt_tokens for request in trace)
    uncached = run(llama, trace, replace(UNPACED, enable_prefix_caching=False), times=STEP)
    assert [served.cached_tokens for served in uncached.served] == [0] * 5


def test_a_turn_comes_after_the_answer_before_it_and_finds_it_computed(llama: FormattedModel) -> None:
    first = TraceRequest("a", (("asked", 30),), 20, 1.0, output="told")
    second = TraceRequest("b", (("asked", 30), ("told", 20), ("asked again", 10)), 5, None, "a", 2.5)
    done = run(llama, [first, second], times=STEP)
    assert done.served[0].end_s == 21.0
    assert done.served[1].start_s == 23.5
    assert done.served[1].cached_tokens == 48  # whole pages of 49: the last token was never run
    assert done.served[1].text_s[0] == 24.5


def test_recurrent_states_are_left_where_the_next_turn_finds_them(llama: FormattedModel) -> None:
    recurrent = replace(llama, program=replace(llama.program, states=(StateGroup((0,), 16),)))
    first = TraceRequest("a", (("asked", 30),), 40, 1.0, output="told")
    second = TraceRequest("b", (("asked", 30), ("told", 40), ("asked again", 10)), 5, None, "a", 2.5)
    planned, jumped = (run(recurrent, [first, second], times=STEP, jump=jump) for jump in (False, True))
    assert [served.cached_tokens for served in planned.served] == [0, 64]
    assert [served.cached_tokens for served in jumped.served] == [0, 64]


def test_what_can_never_be_served_is_refused_and_the_rest_goes_on(llama: FormattedModel) -> None:
    trace = [own("a", 600, 4), own("b", 500, 40), TraceRequest("c", (("c", 8),), 2, None, "a", 1.0)]
    done = run(llama, trace, times=STEP)
    assert "context of 512" in (done.served[0].refused or "")
    assert done.served[1].refused is None
    assert done.served[1].output_tokens == 12  # to the end of the context
    assert done.served[2].start_s == 1.0
    told = figures(done)
    assert (told["requests"], told["refused"]) == (2, 1)
    assert "context of 512" in told["refusal"]


def test_figures_of_a_trace_that_is_counted_by_hand(llama: FormattedModel) -> None:
    targets = {"interactive": (1.5, 1.0), "batch": (60.0, 1.0)}
    trace = [own("a", 8, 4), own("b", 8, 2, at=1.5), own("c", 8, 1, at=2.0, service_class="batch")]
    told = figures(run(llama, trace, replace(UNPACED, class_targets=targets), times=STEP))
    interactive, batch = told["classes"]["interactive"], told["classes"]["batch"]
    assert set(told["classes"]) == {"interactive", "batch"}
    assert interactive["ttft_ms"] == {
        "mean": 1250.0,
        "p50": 1250.0,
        "p95": 1475.0,
        "p99": 1495.0,
        "max": 1500.0,
    }
    assert interactive["itl_ms"]["max"] == interactive["itl_ms"]["mean"] == 1000.0
    assert interactive["goodput"]["ok"] == 2
    assert batch["ttft_ms"]["max"] == 1000.0
    assert batch["itl_ms"] is None
    assert told["duration_s"] == 4.0
    assert told["output_tokens"] == 7
    assert told["usage"]["steps"] == 4
    assert told["usage"]["busy"] == 1.0
    assert told["usage"]["rows_per_step"] == (8 + 1 + (1 + 8 + 8) + 2) / 4
    tight = figures(
        run(llama, trace, replace(UNPACED, class_targets={"interactive": (1.2, 1.0)}), times=STEP)
    )
    assert tight["classes"]["interactive"]["goodput"]["ok"] == 1


def test_predicted_steps_are_what_the_plan_expects(llama: FormattedModel) -> None:
    """Nothing but one decode after the other: their predictions add up."""
    from ridgeline.apps.plan.steps import load_of, prompt_loads, step_time

    served = run(llama, [own("a", 30, 5)]).served[0]
    loads = [*prompt_loads(llama, 30, 512), *(load_of(llama, 1, 30 + place) for place in range(1, 5))]
    expected = [step_time(llama, load, HOST).expected_s for load in loads]
    ends = [sum(expected[: place + 1]) for place in range(5)]
    assert list(served.text_s) == pytest.approx(ends, rel=1e-12)


def test_memory_is_shared_out_as_a_server_does(llama: FormattedModel) -> None:
    pages = pages_for(512) + 3
    config = replace(UNPACED, kv_cache_memory_bytes=pool_of(llama, pages))
    done = run(llama, [own("a", 8, 4)], config)
    assert [pool.pages for pool in done.simulation.scheduler.cache.pools] == [pages]
    with pytest.raises(CapacityError, match="kv_cache_memory_bytes is"):
        run(llama, [], replace(UNPACED, kv_cache_memory_bytes=1 << 40))
    with pytest.raises(ConfigError, match="max_model_len is 1000; accepted: up to 512"):
        run(llama, [], replace(UNPACED, max_model_len=1000))


# ------------------------------------------------------------------------------------ whatever comes

_NAMES = st.sampled_from(["system", "document", "x"])


@st.composite
def traces(draw: st.DrawFn) -> list[TraceRequest]:
    trace: list[TraceRequest] = []
    for place in range(draw(st.integers(1, 24))):
        parts = draw(st.lists(st.tuples(_NAMES, st.integers(1, 60)), max_size=2))
        parts.append((f"{place}/own", draw(st.integers(1, 80))))
        after = draw(st.integers(0, place - 1)) if place and draw(st.booleans()) else None
        if after is not None and draw(st.booleans()):  # a turn of a chat
            before = trace[after]
            parts = [*before.prompt, (before.answer, before.output_tokens), parts[-1]]
        moment = draw(st.floats(0, 0.4))
        trace.append(
            TraceRequest(
                f"r{place}",
                tuple(parts),
                draw(st.integers(1, 90)),
                moment if after is None else None,
                None if after is None else f"r{after}",
                0.0 if after is None else moment,
                service_class=draw(st.sampled_from(SERVICE_CLASSES)),
                tenant=draw(st.sampled_from(["", "acme"])),
            )
        )
    return trace


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    trace=traces(),
    seats=st.sampled_from([2, 6, 64]),
    pages=st.sampled_from([34, 60, 400]),
    budget=st.sampled_from(["off", "usual", "tight"]),
    ahead=st.booleans(),
    with_windows=st.booleans(),
)
def test_jumping_changes_nothing_and_every_request_ends_once(
    llama: FormattedModel,
    windowed: FormattedModel,
    trace: list[TraceRequest],
    seats: int,
    pages: int,
    budget: str,
    ahead: bool,
    with_windows: bool,
) -> None:
    model, host = windowed if with_windows else llama, AHEAD if ahead else HOST
    tight = {"keystroke": (0.05, 0.0014), "interactive": (0.2, 0.002), "batch": (1.0, 0.01)}
    config = EngineConfig(
        max_num_seqs=seats,
        max_num_batched_tokens=96,
        kv_cache_memory_bytes=pool_of(model, pages),
        measured_budget=budget != "off",
        class_targets=tight if budget == "tight" else {},
    )
    plain, jumped = (run(model, trace, config, host, jump=jump) for jump in (False, True))
    assert plain.jumped == 0
    assert figures(jumped) == figures(plain)
    for one, other, request in zip(jumped.served, plain.served, trace, strict=True):
        assert one == other
        assert one.refused is not None or one.output_tokens == min(
            request.output_tokens, 512 - request.prompt_tokens
        )
        assert list(one.text_s) == sorted(one.text_s)
        if one.refused is None:
            assert one.start_s < one.text_s[0]
            assert one.end_s == one.text_s[-1]
            assert one.cached_tokens < request.prompt_tokens
    by_id = {each.request.id: each for each in jumped.served}
    for each in jumped.served:
        if each.request.after is not None:
            assert each.start_s == by_id[each.request.after].end_s + each.request.delay_s


@pytest.mark.parametrize("host", [HOST, AHEAD], ids=["cpu", "gpu"])
def test_tenants_are_charged_for_steps_that_are_jumped(llama: FormattedModel, host: Host) -> None:
    """One has had two answers so far, the other one behind a longer prompt: it is the other's turn."""
    trace = [
        own("a", 10, 60, tenant="acme"),
        own("b", 10, 90, tenant="acme"),
        own("c", 60, 90, tenant="other"),
        own("d", 10, 5, at=50.5, tenant="acme"),
        own("e", 10, 5, at=50.5, tenant="other"),
    ]
    config = replace(UNPACED, max_num_seqs=3)
    plain, jumped = (run(llama, trace, config, host, STEP, jump) for jump in (False, True))
    assert jumped.jumped > 40
    assert list(jumped.served) == list(plain.served)
    assert jumped.served[4].text_s[0] < jumped.served[3].text_s[0]


@pytest.mark.parametrize("host", [HOST, AHEAD], ids=["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["poisson", "chats", "shared-prompts"])
def test_most_steps_of_a_light_load_are_jumped(llama: FormattedModel, kind: str, host: Host) -> None:
    work = Workload(kind, 4.0, 60, prompt_tokens=60, output_tokens=60, shared_tokens=48, think_s=0.5)
    trace = [request for request in generate(work) if request.prompt_tokens + request.output_tokens < 512]
    kept = {request.id for request in trace}
    trace = [request for request in trace if request.after is None or request.after in kept]
    plain, jumped = (run(llama, trace, EngineConfig(), host, jump=jump) for jump in (False, True))
    assert figures(jumped) == figures(plain)
    assert list(jumped.served) == list(plain.served)
    assert jumped.jumped > jumped.simulation.executor.usage.steps / 2


def test_memory_of_a_tenth_makes_sequences_give_way_and_all_of_them_end(llama: FormattedModel) -> None:
    trace = [own(str(place), 100, 200, at=place * 1e-3) for place in range(12)]
    config = replace(UNPACED, kv_cache_memory_bytes=pool_of(llama, 36))
    done = run(llama, trace, config)
    told = figures(done)
    assert told["preemptions"] > 0
    assert told["output_tokens"] == 12 * 200
    assert told["usage"]["kv_cache_peak"] > 0.9
    assert done.simulation.scheduler.preemptions == sum(served.preemptions for served in done.served)


# -------------------------------------------------------------------------------- a real run beside it


class Recorded:
    """Steps take what those of another run took, one after the other; when these are used up, their
    median."""

    def __init__(self, step_s: Sequence[float]) -> None:
        self._left = iter(step_s)
        self._usual_s = median(step_s)

    def predict(self, work: StepWork) -> Prediction:
        return Prediction(next(self._left, self._usual_s), "overhead")


def quantiles(served: Sequence[Served]) -> dict[str, float]:
    """TTFT and inter-token times, in seconds."""
    assert all(each.refused is None for each in served)
    first = [each.text_s[0] - each.start_s for each in served]
    gaps = np.concatenate([np.diff(each.text_s) for each in served])
    return {
        f"{name} p{percent}": float(np.percentile(values, percent))
        for name, values in (("ttft", first), ("itl", gaps))
        for percent in (50, 90, 95, 99)
    }


def test_a_real_run_has_the_times_that_are_simulated(tiny_llama: Path) -> None:
    """Queueing, seats, chunks and shared prompts are compared: the simulated steps take what the real ones
    took, so that a machine that is busy meanwhile makes no difference."""
    config = EngineConfig(
        device="cpu", threads=1, max_num_seqs=4, max_num_batched_tokens=64, packed_cache=False, seed=1
    )
    solo = [TraceRequest("solo", (("solo", 64),), 24)]
    with open_checkpoint(tiny_llama) as checkpoint, bare_engine(checkpoint, config) as bare:
        serve(bare.engine, [replace(solo[0], id="warm", prompt=(("warm", 64),))])
        alone_s = serve(bare.engine, solo).served[0].end_s
        # So many at once that some find no seat.
        work = Workload(
            "shared-prompts", 6 / alone_s, 48, shared_tokens=70, prompt_tokens=40, output_tokens=24
        )
        trace = [
            replace(request, prompt=(*request.prompt[:1], (request.id, min(request.prompt[1][1], 200))))
            for request in generate(work)
        ]
        real = serve(bare.engine, trace)
    with open_model(tiny_llama) as source:
        model = source.in_format("auto", "cpu", "KV16")
    config = replace(config, measured_budget=False)
    simulated = run(model, trace, config, times=Recorded(real.step_s))
    steps = simulated.simulation.executor.usage.steps
    assert abs(steps - len(real.step_s)) <= 0.1 * len(real.step_s)
    assert sum(each.cached_tokens for each in real.served) > 48 * 32
    told, seen = quantiles(simulated.served), quantiles(real.served)
    assert {name: told[name] / seen[name] for name in seen} == pytest.approx(
        dict.fromkeys(seen, 1.0), abs=0.25
    )
