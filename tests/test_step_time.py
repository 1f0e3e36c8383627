"""The step-time model: its predictions against the roofline, and what measured steps do to them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.presets import presets
from ridgeline.resources.roofline import arithmetic_s, memory_s, predicted_s
from ridgeline.resources.step_costs import STEP_COSTS, StepCosts, costs_here, costs_of, load_costs, save_costs
from ridgeline.resources.step_fit import Timed, fit
from ridgeline.resources.step_time import StepTimeModel
from ridgeline.types import ConfigError, StepWork, Work

LIMITS = presets()["A100-80G"]
WORKS = st.builds(Work, *(st.integers(0, 1 << 50) for _ in range(5)))
STEPS = st.builds(StepWork, WORKS, WORKS, *(st.integers(0, 1 << 12) for _ in range(4)))


def step(
    dense: Work, attention: Work | None = None, rows: int = 1, launches: int = 0, **bytes_: int
) -> StepWork:
    return StepWork(dense, attention or Work(), rows, 1, 1, launches, **bytes_)


DECODE = step(Work(int8_ops=10**9, read_bytes=10**9))
PREFILL = step(Work(int8_ops=10**12, read_bytes=10**9), rows=512)


@given(STEPS, st.sampled_from(list(STEP_COSTS)))
def test_a_prediction_is_never_below_the_bound(work: StepWork, kind: str) -> None:
    predicted = StepTimeModel.of(LIMITS, STEP_COSTS[kind]).predict(work)
    assert predicted.seconds >= predicted_s(work.total, LIMITS) * (1 - 1e-9)
    ideal = StepTimeModel.of(LIMITS, StepCosts(1.0, 1.0, 1.0, 1.0, "", 1e-4, 1e-6, 1e-5)).predict(work)
    overhead = 1e-4 + work.launches * 1e-6 + work.outputs * 1e-5
    one_by_one = memory_s(work.total, LIMITS) + arithmetic_s(work.total, LIMITS)
    assert predicted_s(work.total, LIMITS, overhead) * (1 - 1e-9) <= ideal.seconds
    assert ideal.seconds <= (one_by_one + overhead) * (1 + 1e-9)


def test_what_bounds_a_step() -> None:
    model = StepTimeModel.of(LIMITS, StepCosts(1.0, 1.0, 1.0, 1.0, "", launch_s=1e-6))
    read = Work(read_bytes=10**9)
    assert model.predict(step(read, weight_bytes=9 * 10**8)).bound == "weights"
    assert model.predict(step(read, read, weight_bytes=4 * 10**8, kv_bytes=10**9)).bound == "KV cache"
    assert model.predict(step(read, weight_bytes=10**8, kv_bytes=10**8)).bound == "activations"
    assert model.predict(step(read + Work(fp32_flops=10**12), weight_bytes=10**9)).bound == "arithmetic"
    assert model.predict(step(read, launches=10**4)).bound == "overhead"


def test_what_a_cache_holds_comes_faster() -> None:
    """All of a step up to the cache's size, nothing from twice of it, and never less time for more bytes."""
    costs = StepCosts(1.0, 1.0, 1.0, 1.0, "", cache_bytes=1e8, cache_speed=2.0)
    cached, without = StepTimeModel.of(LIMITS, costs), StepTimeModel.of(LIMITS, replace(costs, cache_bytes=0))
    sizes = range(10**7, 4 * 10**8, 10**7)
    reads = [step(Work(read_bytes=size), weight_bytes=size) for size in sizes]
    times = [cached.predict(work).seconds for work in reads]
    shares = [one / without.predict(work).seconds for one, work in zip(times, reads, strict=True)]
    assert times == sorted(times)
    assert shares == sorted(shares)
    assert shares[:10] == [pytest.approx(0.5)] * 10
    assert shares[-20:] == [pytest.approx(1.0)] * 20
    attending = step(Work(), Work(read_bytes=10**7))  # is not counted
    assert cached.predict(attending) == without.predict(attending)
    with pytest.raises(ConfigError, match="cache_speed"):
        StepCosts(0.5, 0.5, 0.5, 0.5, "", cache_speed=0.5)
    with pytest.raises(ConfigError, match="cache_bytes is -1"):
        StepCosts(0.5, 0.5, 0.5, 0.5, "", cache_bytes=-1)


def test_a_turn_of_few_rows_takes_nearly_as_long_as_a_full_one() -> None:
    """Of six rows at a time, a third of whose time goes by with any number of them."""
    turns = StepCosts(1.0, 1.0, 1.0, 1.0, "", tile_rows=6, tile_share=1 / 3)
    assert [turns.full_rows(rows) for rows in (0, 6, 12)] == [0, 6, 12]
    assert turns.full_rows(1) == pytest.approx(1 + 5 / 3)
    steps = [turns.full_rows(rows + 1) - turns.full_rows(rows) for rows in range(1, 12)]
    assert steps == [pytest.approx(8 / 3 if rows == 6 else 2 / 3) for rows in range(1, 12)]
    model = StepTimeModel.of(LIMITS, turns)
    seconds = [
        model.predict(StepWork(Work(bf16_flops=10**9 * rows), Work(), rows, rows, rows, 0)).seconds
        for rows in (6, 7, 12)
    ]
    assert seconds[1] / seconds[0] == pytest.approx((6 + 8 / 3) / 6)
    assert seconds[2] / seconds[0] == pytest.approx(2)
    with pytest.raises(ConfigError, match="tile_rows is 0"):
        StepCosts(0.5, 0.5, 0.5, 0.5, "", tile_rows=0)
    with pytest.raises(ConfigError, match="the share of tile_share is 0"):
        StepCosts(0.5, 0.5, 0.5, 0.5, "", tile_share=0.0)


def test_weights_are_read_while_they_are_multiplied_and_activations_are_not() -> None:
    model = StepTimeModel.of(LIMITS, StepCosts(1.0, 1.0, 1.0, 1.0, ""))
    work = Work(bf16_flops=10**12, read_bytes=10**10)
    memory, arithmetic = memory_s(work, LIMITS), arithmetic_s(work, LIMITS)
    weights, activations = (model.predict(step(work, weight_bytes=n)).seconds for n in (10**10, 0))
    assert weights == pytest.approx(math.hypot(memory, arithmetic))
    assert activations == pytest.approx(memory + arithmetic)


def test_outputs_cost_whoever_wants_them() -> None:
    """Guesses of one sequence as much as tokens of several; rows of a prompt, which have none, nothing."""
    model = StepTimeModel.of(LIMITS, StepCosts(1.0, 1.0, 1.0, 1.0, "", output_s=1e-4))
    nothing = Work(read_bytes=1)
    times = [
        model.predict(StepWork(nothing, Work(), 8, outputs, sequences, 0)).seconds
        for outputs, sequences in ((8, 1), (8, 8), (1, 1))
    ]
    assert times == [pytest.approx(8e-4), pytest.approx(8e-4), pytest.approx(1e-4)]


def test_costs_have_sources_and_refuse_more_than_all() -> None:
    assert all(costs.source for costs in STEP_COSTS.values())
    assert costs_of("apple") is costs_of("gpu") is not costs_of("cpu")
    for wrong in (0.0, 1.01):
        with pytest.raises(ConfigError, match="share of memory"):
            StepCosts(wrong, 0.5, 0.5, 0.5, "")
    with pytest.raises(ConfigError, match="launch_s"):
        StepCosts(0.5, 0.5, 0.5, 0.5, "", launch_s=-1e-6)


# ------------------------------------------------------------------------------------- correction


def model() -> StepTimeModel:
    return StepTimeModel.of(LIMITS, costs_of("gpu"))


def test_correction_learns_of_memory_and_arithmetic() -> None:
    """What only decodes have shown is half believed of arithmetic; once both are seen, each is right."""
    learning = model()
    first, other = (learning.predict(work).seconds for work in (DECODE, PREFILL))
    for _ in range(50):
        learning.observe(DECODE, 1.4 * first)
    assert learning.predict(DECODE).seconds == pytest.approx(1.4 * first, rel=0.02)
    assert 1.1 * other < learning.predict(PREFILL).seconds < 1.3 * other
    for _ in range(80):
        learning.observe(PREFILL, 0.8 * other)
        learning.observe(DECODE, 1.4 * first)
    assert learning.predict(DECODE).seconds == pytest.approx(1.4 * first, rel=0.02)
    assert learning.predict(PREFILL).seconds == pytest.approx(0.8 * other, rel=0.02)


def test_times_of_steps_of_many_sizes_lie_on_one_curve() -> None:
    """Whatever was seen, and of which sizes: a wider step never seems the faster one."""
    learning = model()
    read = DECODE.dense.read_bytes
    rows = [
        StepWork(Work(int8_ops=3 * 10**10 * n, read_bytes=read), Work(), n, n, sequences, 0)
        for n in range(1, 40)
        for sequences in {1, n}
    ]
    for work, factor in ((rows[0], 3.0), (rows[20], 0.5), (PREFILL, 2.0), (rows[0], 0.6)):
        for _ in range(30):
            learning.observe(work, factor * learning.predict(work).seconds)
        predicted = [learning.predict(work).seconds for work in rows]
        assert predicted == sorted(predicted)


def test_slow_steps_move_little() -> None:
    """One in twenty takes a hundred times as long: the others are still predicted."""
    learning, random = model(), np.random.default_rng(0)
    usual = learning.predict(DECODE).seconds
    for index in range(400):
        noise = math.exp(random.normal(0, 0.03))
        learning.observe(DECODE, usual * noise * (100 if index % 20 == 7 else 1))
    assert learning.predict(DECODE).seconds == pytest.approx(usual, rel=0.06)
    before = learning.predict(DECODE).seconds
    learning.observe(DECODE, 1000 * usual)
    assert learning.predict(DECODE).seconds < 1.05 * before
    assert learning.error < 0.08


def test_correction_follows_a_machine_that_drifts() -> None:
    """To half its speed within a minute of steps, and back at once."""
    learning = model()
    usual = learning.predict(DECODE).seconds
    for index in range(600):
        actual = usual * (1 + index / 600)
        if index > 50:
            assert learning.predict(DECODE).seconds == pytest.approx(actual, rel=0.03)
        learning.observe(DECODE, actual)
    for _ in range(40):
        learning.observe(DECODE, usual)
    assert learning.predict(DECODE).seconds == pytest.approx(usual, rel=0.03)


def test_error_is_of_predictions_made_before() -> None:
    learning = model()
    assert learning.error == 0
    learning.observe(DECODE, 1.2 * learning.predict(DECODE).seconds)
    assert learning.error == pytest.approx(0.2)
    for _ in range(100):
        learning.observe(DECODE, learning.predict(DECODE).seconds)
    assert learning.error < 1e-9


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=40))
def test_correction_stays_within_bounds(elapsed: list[float]) -> None:
    learning = model()
    usual = learning.predict(DECODE).seconds
    for seconds in elapsed:
        learning.observe(DECODE, seconds)
    assert usual / 4.01 < learning.predict(DECODE).seconds < 4.01 * usual
    assert 0 <= learning.error < math.inf


# -------------------------------------------------------------------------------------- fitting


def made(costs: StepCosts, noise: float, slow: int = 0) -> list[Timed]:
    """Steps of many kinds that took what the model of `costs` says, times a noise; the last `slow` thrice."""
    random, found = np.random.default_rng(0), []
    truth = StepTimeModel.of(LIMITS, costs)
    for index, (batch, context) in enumerate(
        itertools.product((1, 2, 4, 8, 32, 128, 512), (100, 1000, 9000))
    ):
        read = 10**9 + 10**6 * batch
        dense = Work(bf16_flops=2 * 10**10 * batch, read_bytes=read)
        attention = Work(bf16_flops=10**6 * batch * context, read_bytes=10**5 * batch * context)
        work = StepWork(dense, attention, batch, batch, batch, 40 + 10 * (index % 3), 10**9, 0)
        seconds = truth.predict(work).seconds * math.exp(random.normal(0, noise))
        found.append(Timed((work,), seconds, LIMITS))
    return [replace(t, seconds=t.seconds * (3 if i < slow else 1)) for i, t in enumerate(found)]


TRUTH = StepCosts(0.85, 0.6, 0.5, 0.3, "", 4e-4, 5e-6, 2e-5, tile_rows=6, tile_share=0.35)


@pytest.mark.parametrize(("noise", "slow", "within"), [(0.0, 0, 0.03), (0.03, 0, 0.05), (0.02, 2, 0.08)])
def test_fitted_costs_predict_what_they_were_fitted_to(noise: float, slow: int, within: float) -> None:
    start = replace(STEP_COSTS["gpu"], tile_rows=TRUTH.tile_rows)  # that is known
    fitted = fit(made(TRUTH, noise, slow), start, "fitted")
    assert fitted.source == "fitted"
    learned = StepTimeModel.of(LIMITS, fitted)
    errors = [learned.predict(t.works[0]).seconds / t.seconds - 1 for t in made(TRUTH, 0.0)]
    assert np.median(np.abs(errors)) < within
    assert max(map(abs, errors)) < 3 * within


def test_what_timings_do_not_tell_stays() -> None:
    """Without attention, its shares are those of the start."""
    start = STEP_COSTS["cpu"]
    alone = [
        Timed(
            (structs.replace(t.works[0], attention=Work()),),
            1.5 * memory_s(t.works[0].dense, LIMITS),
            LIMITS,
        )
        for t in made(TRUTH, 0.0)
    ]
    fitted = fit(alone, start, "")
    assert fitted.attention_memory == pytest.approx(start.attention_memory)
    assert fitted.attention_arithmetic == pytest.approx(start.attention_arithmetic)
    assert fitted.memory != pytest.approx(start.memory, rel=0.01)


def test_no_fitted_share_exceeds_all() -> None:
    fast = [replace(t, seconds=t.seconds / 4) for t in made(TRUTH, 0.0)]
    fitted = fit(fast, STEP_COSTS["gpu"], "")
    assert max(fitted.memory, fitted.arithmetic, fitted.attention_memory, fitted.attention_arithmetic) <= 1


def test_costs_are_kept_by_machine_threads_and_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path))
    here = Ceilings(39e9, 884e9, 459e9, 231e9, 2, "avx512", "two cores", "2026-01-01T00:00:00+00:00")
    assert costs_here(here, "W4A8-g32") is costs_of("cpu")
    path = save_costs(TRUTH, here, "W4A8-g32")
    assert costs_here(here, "W4A8-g32") == TRUTH
    others = [replace(here, threads=1), replace(here, isa="avx2"), replace(here, machine="another")]
    assert all(load_costs(other, "W4A8-g32") is None for other in others)
    assert load_costs(here, "W8A8-g32") is None
    for damaged in (b"", b"{}", b"[1]", path.read_bytes().replace(b"0.85", b"7")):
        path.write_bytes(damaged)
        assert load_costs(here, "W4A8-g32") is None


def test_a_gpus_launches_cost_what_was_measured() -> None:
    gpu = Ceilings(
        2e12, 0, 3e14, 2e13, 108, "sm_80", "A100", "", device="cuda", launch_s=9e-6, graph_launch_s=1e-6
    )
    assert costs_here(gpu, "W16A16").launch_s == 1e-6
