"""The step-time model: its predictions against the roofline, and what measured steps do to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.resources.presets import presets
from ridgeline.resources.roofline import arithmetic_s, memory_s, predicted_s
from ridgeline.resources.step_costs import STEP_COSTS, StepCosts, costs_of
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
    assert predicted.seconds >= predicted_s(work.total, LIMITS)
    ideal = StepTimeModel.of(LIMITS, StepCosts(1.0, 1.0, "", launch_s=1e-6)).predict(work)
    both = memory_s(work.total, LIMITS) + arithmetic_s(work.total, LIMITS) + work.launches * 1e-6
    assert ideal.seconds == pytest.approx(both)


def test_what_bounds_a_step() -> None:
    model = StepTimeModel.of(LIMITS, StepCosts(1.0, 1.0, "", launch_s=1e-6))
    read = Work(read_bytes=10**9)
    assert model.predict(step(read, weight_bytes=9 * 10**8)).bound == "weights"
    assert model.predict(step(read, read, weight_bytes=4 * 10**8, kv_bytes=10**9)).bound == "KV cache"
    assert model.predict(step(read, weight_bytes=10**8, kv_bytes=10**8)).bound == "activations"
    assert model.predict(step(read + Work(fp32_flops=10**12), weight_bytes=10**9)).bound == "arithmetic"
    assert model.predict(step(read, launches=10**4)).bound == "overhead"


def test_costs_have_sources_and_refuse_more_than_all() -> None:
    assert all(costs.source for costs in STEP_COSTS.values())
    assert costs_of("apple") is costs_of("gpu") is not costs_of("cpu")
    for wrong in (0.0, 1.01):
        with pytest.raises(ConfigError, match="share of memory"):
            StepCosts(wrong, 0.5, "")


# ------------------------------------------------------------------------------------- correction


def model() -> StepTimeModel:
    return StepTimeModel.of(LIMITS, costs_of("gpu"))


def test_correction_learns_each_regime_apart() -> None:
    learning = model()
    first, other = (learning.predict(work).seconds for work in (DECODE, PREFILL))
    for _ in range(50):
        learning.observe(DECODE, 1.4 * first)
    assert learning.predict(DECODE).seconds == pytest.approx(1.4 * first, rel=0.02)
    assert learning.predict(PREFILL).seconds == other
    for _ in range(50):
        learning.observe(PREFILL, 0.8 * other)
    assert learning.predict(DECODE).seconds == pytest.approx(1.4 * first, rel=0.02)
    assert learning.predict(PREFILL).seconds == pytest.approx(0.8 * other, rel=0.02)


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
