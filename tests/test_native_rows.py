"""Row kernels, embedding and the tape's checks against NumPy."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from native_oracles import (
    ACTIVATIONS,
    LEVELS,
    STORAGES,
    Floats,
    Part,
    Rows,
    a8_buffer,
    a8_values,
    blocks,
    dequantised,
    f32_buffer,
    gate_factor,
    ints,
    packed,
    plain_step,
    step_inputs,
)

from ridgeline import native

TEAM = native.Team(2)


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def norm_of(x: np.ndarray, kind: str, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    if kind == "layer":
        x = x - x.mean(axis=1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [1, 16, 33, 100, 576])
def test_norms(isa: str, kind: str, width: int) -> None:
    x, weight, bias = normal(13, width) * 3 + 1, normal(width, seed=1), normal(width, seed=2)
    base = normal(13, width, seed=3)
    tape = native.Tape(TEAM, isa, 20)
    source = f32_buffer(20, width, x)
    plain, full, coded = f32_buffer(20, width), f32_buffer(20, width), a8_buffer(20, width)
    added, gathered = f32_buffer(20, width, base), f32_buffer(20, width)
    tape.norm(source, plain, kind, 1e-5, width)
    tape.norm(source, full, kind, 1e-5, width, weight, bias)
    tape.norm(source, coded, kind, 1e-5, width, weight, bias)
    tape.norm(source, added, kind, 1e-5, width, weight, accumulate=True)
    tape.norm(source, gathered, kind, 1e-5, width, weight, bias, gather=True)
    tape.norm(source, source, kind, 1e-5, width)
    tape.run(plain_step(13, output_rows=[12, 0, 5]))
    expected = norm_of(x, kind, 1e-5)
    np.testing.assert_allclose(plain[:13, :width], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(full[:13, :width], expected * weight + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(added[:13, :width], base + expected * weight, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        native.dequantise_a8(coded, width)[:13], a8_values(full[:13, :width].copy())
    )
    np.testing.assert_array_equal(gathered[:3, :width], full[[12, 0, 5], :width])
    np.testing.assert_array_equal(source[:13, :width], plain[:13, :width])
    assert np.isnan(gathered[3:]).all()


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(isa: str, activation: str) -> None:
    x = np.concatenate(
        [np.linspace(-30, 30, 2001), np.geomspace(1e-30, 1e4, 300), -np.geomspace(1e-30, 1e4, 300)]
    )
    x32 = x.astype(np.float32).reshape(1, -1)
    width = x32.shape[1]
    times = normal(1, width)
    tape = native.Tape(TEAM, isa, 1)
    source = f32_buffer(1, width, x32)
    out, product, coded = f32_buffer(1, width), f32_buffer(1, width), a8_buffer(1, width)
    tape.activate(source, out, width, activation)
    tape.activate(source, product, width, activation, times=f32_buffer(1, width, times))
    tape.activate(source, coded, width, activation)
    tape.run(plain_step(1))
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[activation](x32.astype(np.float64))
    np.testing.assert_allclose(out[:, :width], expected, rtol=3e-6, atol=2e-7)
    factor = gate_factor(activation, times).astype(np.float32)
    np.testing.assert_array_equal(product[:, :width], out[:, :width] * factor)
    np.testing.assert_array_equal(native.dequantise_a8(coded, width), a8_values(out[:, :width].copy()))


@pytest.mark.parametrize("isa", LEVELS)
def test_add(isa: str) -> None:
    x, y = normal(9, 45), normal(9, 45, seed=1)
    tape = native.Tape(TEAM, isa, 16)
    out = f32_buffer(16, 45, y)
    tape.add(f32_buffer(16, 45, x), out, 45)
    tape.run(plain_step(9))
    np.testing.assert_array_equal(out[:9, :45], y + x)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("storage", STORAGES)
def test_embeddings_of_tokens_and_positions(isa: str, storage: str) -> None:
    table, places = normal(50, 96), normal(20, 96, seed=1)
    tape = native.Tape(TEAM, isa, 16)
    out = f32_buffer(16, 96)
    tape.embed(packed(table, storage, TEAM), out, 3.5)
    tape.embed(packed(places, "F32", TEAM), out, source="positions", accumulate=True)
    tokens = [49, 0, 17, 16, 15, 31, 7]
    tape.run(step_inputs([Rows(5, 7, (Part(12),), ((0,),))], tokens))
    expected = dequantised(blocks(table, storage), storage)[tokens] * np.float32(3.5) + places[5:12]
    np.testing.assert_array_equal(out[:7, :96], expected)


@pytest.mark.parametrize("isa", LEVELS)
def test_softcap_is_accurate_at_every_size(isa: str) -> None:
    x = np.concatenate([np.geomspace(1e-20, 300, 5000), -np.geomspace(1e-20, 300, 5001)]).astype(np.float32)
    tape = native.Tape(TEAM, isa, 1)
    tape.softcap(len(x), 30.0)
    logits = x.reshape(1, -1).copy()
    tape.run(plain_step(1, output_rows=[0], logits=logits))
    np.testing.assert_allclose(logits[0], 30 * np.tanh(x.astype(np.float64) / 30), rtol=5e-7)


@pytest.mark.parametrize("isa", LEVELS)
def test_profile_names_every_launch_and_runs_the_step(isa: str) -> None:
    tape = native.Tape(TEAM, isa, 4)
    x, out = f32_buffer(4, 32, normal(4, 32)), f32_buffer(4, 32, np.zeros((4, 32), np.float32))
    tape.add(x, out, 32)
    tape.quantise(x, a8_buffer(4, 32), 32)
    seconds = tape.profile(plain_step(4))
    assert tape.launches == ["add", "quantise"]
    assert len(seconds) == 2
    assert all(s > 0 for s in seconds)
    np.testing.assert_array_equal(out, x)


def test_denormals_are_flushed_and_the_callers_state_is_restored() -> None:
    """By every thread: there are rows for all of them."""
    tiny = np.full((20_000, 64), 1e-39, np.float32)
    for isa in LEVELS:
        tape = native.Tape(TEAM, isa, len(tiny))
        out = np.zeros_like(tiny)
        tape.add(tiny, out, 64)
        for _ in range(4):
            tape.run(plain_step(len(tiny)))
            assert not out.any()
        assert (tiny + out == tiny).all(), "denormals work again after the run"


def step_with(**changed: object) -> native.StepInputs:
    """A valid step of two sequences (5 rows at 0, 1 row at 20), with some of its arrays replaced."""
    arrays: dict[str, object] = {
        "tokens": ints([0] * 6),
        "positions": ints([0, 1, 2, 3, 4, 20]),
        "slots": ints([0, 1, 2, 3, 4, 20]),
        "row_sequence": ints([0] * 5 + [1]),
        "sequence_row_begin": ints([0, 5, 6]),
        "output_rows": ints([4, 5]),
        "segment_begin": ints([0, 1, 2]),
        "segment_length": ints([5, 21]),
        "segment_first_position": ints([0, 0]),
        "segment_bias": np.zeros(2, np.float32),
        "segment_causal": np.ones(2, np.uint8),
        "table_begin": ints([0, 1, 3]),
        "tables": ints([3, 0, 2]).reshape(1, 3),
        "logits": np.zeros((2, 10), np.float32),
    }
    return native.StepInputs(**(arrays | changed))  # type: ignore[arg-type]


def checking_tape(window: int = 0) -> native.Tape:
    tape = native.Tape(TEAM, LEVELS[0], 6)
    q, k = f32_buffer(6, 32, normal(6, 32)), f32_buffer(6, 32, normal(6, 32))
    pool = np.zeros((4, 1, 2 * 16 * 32), np.uint16)
    tape.embed(packed(normal(8, 32), "F32", TEAM), q)
    tape.rope_store(q, k, k, pool, 0, 1, 1, 32)
    tape.attention(q, q, pool, 0, 1, 1, 32, 1.0, window)
    tape.linear(q, [native.Part(packed(normal(10, 32), "F32", TEAM), None)], outputs_only=True)
    return tape


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": ints([0, 0, 8, 0, 0, 0])}, r"^tokens\[2\] is 8; accepted: 0 to 7$"),
        ({"tokens": ints([0, -1, 0, 0, 0, 0])}, r"^tokens\[1\] is -1"),
        ({"positions": ints([0, 1, 2, 3, -4, 20])}, r"^positions\[4\] is -4"),
        ({"slots": ints([0, 1, 2, 3, 5, 20])}, r"^slots\[4\] is 5; accepted: below its segment's length 5"),
        ({"row_sequence": ints([0, 0, 0, 0, 1, 1])}, r"^row_sequence\[4\] is 1; accepted: 0"),
        ({"sequence_row_begin": ints([0, 7, 6])}, r"^sequence_row_begin\[1\] is 7"),
        ({"sequence_row_begin": ints([0, 5, 5])}, r"^sequence_row_begin\[2\] is 5; accepted: 6"),
        ({"output_rows": ints([6, 0])}, r"^output_rows\[0\] is 6; accepted: 0 to 5"),
        ({"segment_begin": ints([0, 0, 2])}, r"^segment_begin\[1\] is 0; accepted: at least one"),
        ({"segment_length": ints([17, 21])}, r"^segment_length\[0\] is 17; accepted: 0 to 16, the slots"),
        ({"table_begin": ints([0, 1, 4])}, r"^table_begin\[2\] is 4"),
        ({"tables": ints([3, 4, 2]).reshape(1, 3)}, r"^tables\[1\] is 4; accepted: 0 to 3"),
        ({"tables": ints([3, -1, 2]).reshape(1, 3)}, r"^tables\[1\] is -1"),
        ({"tables": ints([]).reshape(0, 3)}, r"^groups in tables is 0; accepted: more than 0"),
        ({"logits": np.zeros((1, 10), np.float32)}, r"^rows of logits is 1; accepted: at least 2"),
        ({"logits": np.zeros((2, 9), np.float32)}, r"^columns of logits is 9; accepted: at least 10"),
    ],
)
def test_a_step_that_contradicts_itself_is_refused(changed: dict[str, object], message: str) -> None:
    tape = checking_tape()
    tape.run(step_with())
    with pytest.raises(ValueError, match=message):
        tape.run(step_with(**changed))


def test_a_window_is_checked_from_the_earliest_row_on() -> None:
    """Rows 16 to 20 with a window of 5: the first sees slots of page 0, the last does not."""
    arrays = {
        "positions": ints([16, 17, 18, 19, 20, 20]),
        "slots": ints([16, 17, 18, 19, 20, 20]),
        "segment_length": ints([21, 21]),
        "table_begin": ints([0, 2, 4]),
        "tables": ints([3, 1, 0, 2]).reshape(1, 4),
    }
    checking_tape(window=5).run(step_with(**arrays))
    with pytest.raises(ValueError, match=r"^tables\[0\] is 9; accepted: 0 to 3"):
        checking_tape(window=5).run(step_with(**arrays | {"tables": ints([9, 1, 0, 2]).reshape(1, 4)}))
    last = Rows(20, 1, (Part(21),), ((9, 2),))
    checking_tape(window=5).run(step_inputs([last], output_rows=[0], logits=np.zeros((1, 10), np.float32)))


def test_pages_that_a_window_has_left_are_not_checked() -> None:
    gone = step_with(tables=ints([3, -1, 2]).reshape(1, 3))
    checking_tape(window=5).run(gone)
    with pytest.raises(ValueError, match=r"^tables\[1\] is -1"):
        checking_tape(window=6).run(gone)


def test_arrays_of_a_step_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^positions.shape\[0\] is 5; accepted: 6"):
        step_with(positions=ints([0] * 5))
    with pytest.raises(ValueError, match=r"^slots is of item type 'l'|^slots is of item type 'q'"):
        step_with(slots=np.zeros(6, np.int64))
    frozen = np.zeros((2, 10), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"^logits is read-only"):
        step_with(logits=frozen)
    with pytest.raises(ValueError, match=r"^tables is not C-contiguous"):
        step_with(tables=np.zeros((3, 3), np.int32).T)
    with pytest.raises(ValueError, match=r"^rows is 7; accepted: 1 to 6"):
        checking_tape().run(plain_step(7))


def test_probes_give_positive_rates() -> None:
    found = native.probe_read(TEAM, 4 << 20, 0.0)
    assert len(found) >= 3
    assert all(positive(rates) for _, rates in found)
    for isa in LEVELS:
        for name in ("int8", "fp32", "bf16"):
            assert positive(native.probe_peak(TEAM, isa, name, 0.01))
        for size_bytes in (512, 700, 1 << 20):
            assert positive(native.probe_cached_read(TEAM, isa, size_bytes, 0.0))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_barrier_and_a_start_cost_something(threads: int) -> None:
    team = native.Team(threads)
    try:
        assert positive(native.probe_barrier(team, 0.005))
        assert positive(native.probe_start(team, 0.0, 0.002))
        assert positive(native.probe_start(team, 0.001, 0.002))
    finally:
        team.close()
    with pytest.raises(RuntimeError, match="closed"):
        native.probe_barrier(team, 0.0)


def test_every_process_puts_the_levels_in_the_same_order() -> None:
    # Results depend on the level, and the first is what an engine takes.
    code = "from ridgeline.native import isa_levels; print(*isa_levels())"
    for _ in range(3):
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert said.stdout.split() == native.isa_levels()


def test_probes_refuse_what_would_not_end() -> None:
    with pytest.raises(ValueError, match="format"):
        native.probe_peak(TEAM, LEVELS[0], "int9", 0.0)
    with pytest.raises(ValueError, match=r"^seconds is .*; accepted: 0 to 60"):
        native.probe_peak(TEAM, LEVELS[0], "int8", math.nan)
    with pytest.raises(ValueError, match=r"^seconds is 61"):
        native.probe_barrier(TEAM, 61.0)
    with pytest.raises(ValueError, match=r"^pause_s is -1"):
        native.probe_start(TEAM, -1.0, 0.0)
    for size_bytes in (-1, 511, 1 << 62):
        with pytest.raises(ValueError, match=rf"^worker_bytes is {size_bytes}; accepted: 512 to"):
            native.probe_cached_read(TEAM, LEVELS[0], size_bytes, 0.0)


def positive(samples: list[float]) -> bool:
    return len(samples) >= 2 and all(math.isfinite(x) and x > 0 for x in samples)


@pytest.mark.parametrize("isa", LEVELS)
def test_only_rows_with_outputs(isa: str) -> None:
    """Launches that are for these leave other rows' results as they are, whatever the order of the outputs;
    one that is wanted twice is added once."""
    rows, width, wanted = 90, 64, [89, 3, 4, 5, 41, 4]
    x, other, weights = normal(rows, width), normal(rows, width, seed=1), normal(48, width, seed=2)
    base = normal(rows, 48, seed=3)
    matrix = packed(weights, "Q8_0", TEAM)
    results = []
    for only in (False, True):
        tape = native.Tape(TEAM, isa, rows)
        source, times = f32_buffer(rows, width, x), f32_buffer(rows, width, other)
        coded = a8_buffer(rows, width)
        tape.quantise(source, coded, width)
        normed, activated, narrow = (f32_buffer(rows, width) for _ in range(3))
        summed, projected = f32_buffer(rows, width, other), f32_buffer(rows, 48, base)
        again = a8_buffer(rows, width)
        again[:] = 77
        tape.only_outputs(only)
        tape.norm(source, normed, "rms", 1e-5, width)
        tape.quantise(source, again, width)
        tape.add(source, summed, width)
        tape.activate(source, activated, width, "silu", times)
        tape.linear(coded, [native.Part(matrix, projected, accumulate=True)])
        tape.only_outputs(False)
        tape.norm(source, narrow, "rms", 1e-5, width, gather=True)
        tape.run(plain_step(rows, output_rows=wanted))
        results.append((normed, again, summed, activated, projected, narrow))
    chosen = sorted(set(wanted))
    others = np.setdiff1d(np.arange(rows), chosen)
    untouched = (np.nan, 77, other, np.nan, base)
    for every, some, before in zip(*results, (*untouched, None), strict=True):
        if before is None:
            np.testing.assert_array_equal(some, every)
            continue
        np.testing.assert_array_equal(some[chosen], every[chosen])
        kept = some[others] if np.isscalar(before) else some[others, : before.shape[1]]
        np.testing.assert_array_equal(kept, before if np.isscalar(before) else before[others])


def test_only_some_launches_are_for_outputs() -> None:
    tape = native.Tape(TEAM, "portable", 4)
    tape.only_outputs(True)
    with pytest.raises(ValueError, match="only_outputs is on before softcap; accepted: off"):
        tape.softcap(16, 30.0)
