"""Routing, experts' products and their sum in the C++ extension against NumPy, whatever the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_oracles import (
    ACTIVATIONS,
    LEVELS,
    QUANTISED,
    Floats,
    a8_buffer,
    a8_values,
    blocks,
    dequantised,
    f32_buffer,
    gate_factor,
    packed,
    plain_step,
)

from ridgeline import native

TEAM = native.Team(2)
ONE_THREAD = native.Team(1)
MAX_ROWS = 72


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def packed_experts(weights: Floats, storage: str) -> native.Matrix:
    """(experts, rows, cols)"""
    count, rows, cols = weights.shape
    data = native.pack(blocks(weights.reshape(-1, cols), storage), storage, cols, TEAM, experts=count)
    return native.Matrix(data, storage, rows, cols, count)


@dataclass(frozen=True)
class Router:
    """A layer's routing, with its meaning in float64."""

    weights: Floats  # (experts, width)
    chosen: int
    renormalise: bool = True
    bias: Floats | None = None
    shared_gate: Floats | None = None

    @property
    def width(self) -> int:
        return 2 * self.chosen + (self.shared_gate is not None)

    def scores(self, x: Floats) -> np.ndarray:
        logits = x.astype(np.float64) @ self.weights.T.astype(np.float64)
        if self.bias is not None:
            logits = logits + self.bias
        exps = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exps / exps.sum(axis=1, keepdims=True)

    def append(self, tape: native.Tape, x: Floats) -> np.ndarray:
        """A launch that reads the buffer x; the buffer that it routes into."""
        out = np.full(native.routes_size(tape.max_rows, self.width), -1, np.int32)
        router = packed(self.weights, "F32", TEAM)
        tape.route(x, out, router, self.chosen, self.renormalise, self.bias, self.shared_gate)
        return out

    def read(self, routes: np.ndarray, rows: int) -> tuple[np.ndarray, Floats]:
        """Experts (rows, chosen) and scores (rows, chosen or 1 more)."""
        table = routes[: rows * self.width].reshape(rows, self.width)
        return table[:, : self.chosen].copy(), table[:, self.chosen :].copy().view(np.float32)

    def run(self, isa: str, x: Floats, team: native.Team = TEAM) -> tuple[np.ndarray, Floats]:
        tape = native.Tape(team, isa, MAX_ROWS)
        routes = self.append(tape, f32_buffer(MAX_ROWS, x.shape[1], x))
        tape.run(plain_step(len(x)))
        return self.read(routes, len(x))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(
    ("rows", "width", "count", "chosen"),
    [
        (1, 32, 4, 1),
        (1, 2048, 128, 8),
        (7, 100, 60, 4),
        (20, 520, 33, 8),
        (40, 64, 16, 16),
        (65, 48, 8, 2),
        (3, 32, 300, 90),
    ],
)
def test_routes_are_the_largest_scores(isa: str, rows: int, width: int, count: int, chosen: int) -> None:
    rng = np.random.default_rng(rows)
    x, weights = normal(rng, rows, width), normal(rng, count, width) / np.float32(np.sqrt(width))
    router = Router(weights, chosen, False, normal(rng, count), normal(rng, width))
    experts, scores = router.run(isa, x)
    exact = router.scores(x)
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :chosen]
    np.testing.assert_array_equal(experts, expected)
    kept = np.take_along_axis(exact, expected, axis=1)
    np.testing.assert_allclose(scores[:, :chosen], kept, rtol=2e-5)
    shared = 1 / (1 + np.exp(-x.astype(np.float64) @ router.shared_gate))
    np.testing.assert_allclose(scores[:, chosen], shared, rtol=2e-5, atol=1e-6)
    plain = replace(router, renormalise=True, bias=None, shared_gate=None)
    experts, scores = plain.run(isa, x)
    kept = np.take_along_axis(plain.scores(x), experts.astype(int), axis=1)
    np.testing.assert_allclose(scores, kept / kept.sum(axis=1, keepdims=True), rtol=2e-5)


@pytest.mark.parametrize("isa", LEVELS)
def test_ties_go_to_the_lower_expert(isa: str) -> None:
    weights = np.zeros((24, 32), np.float32)
    weights[[20, 3, 17], 0] = 1.0
    x = np.zeros((3, 32), np.float32)
    x[0, 0], x[1, 0] = 1.0, -1.0
    experts, scores = Router(weights, 5).run(isa, x)
    np.testing.assert_array_equal(experts, [[3, 17, 20, 0, 1], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(scores[1:], np.full((2, 5), np.float32(1) / np.float32(5)))


@pytest.mark.parametrize("isa", LEVELS)
def test_rows_of_nan_still_choose_experts_that_there_are(isa: str) -> None:
    rng = np.random.default_rng(1)
    x = normal(rng, 4, 64)
    x[1], x[2, 5] = np.nan, np.inf
    router = Router(normal(rng, 20, 64), 6)
    experts, _ = router.run(isa, x)
    assert all(len(set(row)) == 6 and row.min() >= 0 and row.max() < 20 for row in experts)
    alone, _ = router.run(isa, x[3:])
    np.testing.assert_array_equal(experts[3], alone[0])


@dataclass(frozen=True)
class Layer:
    """Gate, up and down of each expert, as one launch and another, then their sum."""

    router: Router
    gate: Floats  # (experts, inner, width)
    up: Floats
    down: Floats  # (experts, width, inner)
    storage: str
    activation: str = "silu"
    biases: tuple[Floats, Floats, Floats] | None = None

    def run(
        self, isa: str, x: Floats, team: native.Team = TEAM, stream: Floats | None = None
    ) -> tuple[Floats, Floats, Floats]:
        """The sum of each row, what each expert gave, and the activations between."""
        (_, inner, width), chosen = self.up.shape, self.router.chosen
        tape = native.Tape(team, isa, MAX_ROWS)
        source = f32_buffer(MAX_ROWS, width, x)
        routes = self.router.append(tape, source)
        mixed, each = f32_buffer(MAX_ROWS * chosen, inner), f32_buffer(MAX_ROWS * chosen, width)
        out = f32_buffer(MAX_ROWS, width, stream)
        gate, up, down = (packed_experts(w, self.storage) for w in (self.gate, self.up, self.down))
        bias, gate_bias, down_bias = self.biases or (None, None, None)
        between, into = source, mixed
        if self.storage in QUANTISED:
            between, into = a8_buffer(MAX_ROWS, width), a8_buffer(MAX_ROWS * chosen, inner)
            tape.quantise(source, between, width)
            part = native.Part(up, mixed, bias, gate, gate_bias, self.activation)
            tape.experts(between, routes, part)
        tape.experts(between, routes, native.Part(up, into, bias, gate, gate_bias, self.activation))
        tape.experts(into, routes, native.Part(down, each, down_bias), x_by_expert=True)
        tape.combine(each, routes, out, width, accumulate=stream is not None)
        tape.run(plain_step(len(x)))
        rows = len(x) * chosen
        if self.storage in QUANTISED:
            seen = native.dequantise_a8(into, inner)[:rows]
            np.testing.assert_array_equal(seen, a8_values(mixed[:rows, :inner].copy()))
        for buffer, end in ((mixed, rows), (each, rows), (out, len(x))):
            assert np.isnan(buffer[end:]).all(), "wrote beyond the step's rows"
        return out[: len(x), :width].copy(), each[:rows, :width].copy(), mixed[:rows, :inner].copy()

    def expected(self, x: Floats, mixed: Floats) -> tuple[np.ndarray, np.ndarray]:
        """Activations, and the experts' outputs from the activations that the kernels had: so that one's
        error is not the other's."""
        experts, chosen = self.router.run("portable", x)[0], self.router.chosen
        quantised = self.storage in QUANTISED
        inputs = np.repeat(a8_values(x) if quantised else x, chosen, axis=0).astype(np.float64)
        between = (a8_values(mixed) if quantised else mixed).astype(np.float64)
        gates, ups, downs = (exact(w, self.storage) for w in (self.gate, self.up, self.down))
        biases = self.biases or tuple(np.zeros(w.shape[:2]) for w in (ups, gates, downs))
        activations, outputs = [], []
        for i, e in enumerate(experts.reshape(-1)):
            up, gate = ups[e] @ inputs[i] + biases[0][e], gates[e] @ inputs[i] + biases[1][e]
            activations.append(ACTIVATIONS[self.activation](gate) * gate_factor(self.activation, up))
            outputs.append(downs[e] @ between[i] + biases[2][e])
        return np.stack(activations), np.stack(outputs)


def exact(weights: Floats, storage: str) -> np.ndarray:
    flat = blocks(weights.reshape(-1, weights.shape[2]), storage)
    return dequantised(flat, storage).reshape(weights.shape).astype(np.float64)


def random_layer(
    rng: np.random.Generator, storage: str, count: int, chosen: int, width: int = 64, inner: int = 96
) -> Layer:
    router = Router(normal(rng, count, width), chosen)
    shapes = ((count, inner, width), (count, inner, width), (count, width, inner))
    return Layer(router, *(normal(rng, *shape) / np.float32(8) for shape in shapes), storage)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("storage", ["Q8_0", "Q4_1", "F32"])
@pytest.mark.parametrize(
    ("rows", "count", "chosen", "inner"), [(1, 8, 2, 32), (5, 4, 4, 96), (40, 60, 8, 32), (33, 6, 1, 64)]
)
def test_experts_are_their_products(
    isa: str, storage: str, rows: int, count: int, chosen: int, inner: int
) -> None:
    rng = np.random.default_rng(rows + count)
    layer = random_layer(rng, storage, count, chosen, 64, inner)
    x, stream = normal(rng, rows, 64), normal(rng, rows, 64)
    out, each, mixed = layer.run(isa, x)
    activations, outputs = layer.expected(x, mixed)
    np.testing.assert_allclose(mixed, activations, rtol=3e-5, atol=3e-5)
    np.testing.assert_allclose(each, outputs, rtol=3e-5, atol=3e-5)
    scores = layer.router.run(isa, x)[1].astype(np.float64)
    summed = np.einsum("rk,rkw->rw", scores, each.reshape(rows, chosen, -1).astype(np.float64))
    np.testing.assert_allclose(out, summed, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.run(isa, x, stream=stream)[0], stream + out)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "clamped_silu"])
def test_widths_of_no_whole_tile_and_biases(isa: str, activation: str) -> None:
    rng = np.random.default_rng(4)
    layer = random_layer(rng, "F32", 7, 3, 50, 37)
    biases = (normal(rng, 7, 37), normal(rng, 7, 37), normal(rng, 7, 50))
    layer = replace(layer, activation=activation, biases=biases, up=layer.up * 9, gate=layer.gate * 9)
    x = normal(rng, 21, 50)
    _, each, mixed = layer.run(isa, x)
    activations, outputs = layer.expected(x, mixed)
    np.testing.assert_allclose(mixed, activations, rtol=3e-5, atol=3e-4)
    np.testing.assert_allclose(each, outputs, rtol=3e-5, atol=3e-4)


def one_expert_for_all(layer: Layer, expert: int) -> Layer:
    bias = np.zeros(len(layer.up), np.float32)
    bias[expert] = 1e4
    return replace(layer, router=replace(layer.router, bias=bias))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("storage", ["Q4_1", "F32"])
def test_all_rows_may_choose_one_expert(isa: str, storage: str) -> None:
    """More rows than a block of work holds, and the same result as of a linear."""
    rng = np.random.default_rng(5)
    layer = one_expert_for_all(random_layer(rng, storage, 5, 1), 3)
    x = normal(rng, 70, 64)
    out, each, mixed = layer.run(isa, x)
    np.testing.assert_array_equal(out, each)
    tape = native.Tape(TEAM, isa, MAX_ROWS)
    source, linear = f32_buffer(MAX_ROWS, 64, x), f32_buffer(MAX_ROWS, 96)
    if storage in QUANTISED:
        source = a8_buffer(MAX_ROWS, 64)
        tape.quantise(f32_buffer(MAX_ROWS, 64, x), source, 64)
    gate, up = packed(layer.gate[3], storage, TEAM), packed(layer.up[3], storage, TEAM)
    tape.linear(source, [native.Part(up, linear, gate=gate, activation="silu")])
    tape.run(plain_step(len(x)))
    np.testing.assert_array_equal(mixed, linear[: len(x), :96])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("storage", ["Q8_0", "Q4_1", "F32"])
@pytest.mark.parametrize("count", [4, 30])
def test_rows_do_not_depend_on_the_batch(isa: str, storage: str, count: int) -> None:
    rng = np.random.default_rng(6)
    layer, x = random_layer(rng, storage, count, 3), normal(rng, 29, 64)
    whole = layer.run(isa, x)[0]
    for team in (ONE_THREAD, native.Team(5)):
        np.testing.assert_array_equal(layer.run(isa, x, team)[0], whole)
    for row in range(0, len(x), 4):
        np.testing.assert_array_equal(layer.run(isa, x[row : row + 1])[0][0], whole[row])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(LEVELS), st.sampled_from(["Q8_0", "Q4_1", "F32"]), st.data())
def test_rows_of_any_batch_are_those_of_the_whole(isa: str, storage: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(7)
    count = data.draw(st.integers(4, 60))
    chosen = data.draw(st.integers(1, min(8, count)))
    layer, x = random_layer(rng, storage, count, chosen, 32, 32), normal(rng, 40, 32)
    whole = layer.run(isa, x)[0]
    rows = data.draw(st.permutations(range(40)))[: data.draw(st.integers(1, 40))]
    np.testing.assert_array_equal(layer.run(isa, x[rows])[0], whole[rows])


@pytest.mark.parametrize("isa", LEVELS)
def test_the_shared_output_is_weighed(isa: str) -> None:
    rng = np.random.default_rng(8)
    router = Router(normal(rng, 9, 600), 2, shared_gate=normal(rng, 600))
    x, each, shared = normal(rng, 3, 600), normal(rng, 6, 600), normal(rng, 3, 600)
    tape = native.Tape(TEAM, isa, 3)
    routes = router.append(tape, f32_buffer(3, 600, x))
    out, coded = f32_buffer(3, 600), a8_buffer(3, 600)
    for target in (out, coded):
        tape.combine(f32_buffer(6, 600, each), routes, target, 600, f32_buffer(3, 600, shared))
    tape.run(plain_step(3))
    scores = router.read(routes, 3)[1].astype(np.float64)
    expected = np.einsum("rk,rkw->rw", scores[:, :2], each.reshape(3, 2, -1)) + scores[:, 2:] * shared
    np.testing.assert_allclose(out[:, :600], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(native.dequantise_a8(coded, 600), a8_values(out[:, :600].copy()))


@pytest.mark.parametrize("isa", LEVELS)
def test_rows_of_several_experts_activate_and_quantise(isa: str) -> None:
    rng = np.random.default_rng(9)
    x, times = normal(rng, 12, 40), normal(rng, 12, 40)
    out, coded = f32_buffer(16, 40), a8_buffer(16, 40)
    tape = native.Tape(TEAM, isa, 4)
    tape.activate(f32_buffer(16, 40, x), out, 40, "silu", f32_buffer(16, 40, times), experts=4)
    tape.quantise(out, coded, 40, experts=4)
    tape.run(plain_step(3))
    np.testing.assert_allclose(out[:12, :40], ACTIVATIONS["silu"](x.astype(np.float64)) * times, atol=1e-5)
    assert np.isnan(out[12:]).all()
    np.testing.assert_array_equal(native.dequantise_a8(coded, 40)[:12], a8_values(out[:12, :40].copy()))


@pytest.mark.parametrize("storage", ["Q4_0", "F32"])
def test_packed_experts_unpack_to_their_values(storage: str) -> None:
    weights = normal(np.random.default_rng(10), 3, 21, 64)
    matrix = packed_experts(weights, storage)
    assert (matrix.experts, matrix.rows, matrix.cols) == (3, 21, 64)
    expected = dequantised(blocks(weights.reshape(63, 64), storage), storage)
    np.testing.assert_array_equal(np.stack([matrix.unpack_row(row) for row in range(63)]), expected)
    with pytest.raises(ValueError, match=r"^row is 63; accepted: 0 to 62"):
        matrix.unpack_row(63)


def test_wrong_arguments_are_refused_by_name() -> None:
    rng = np.random.default_rng(11)
    tape = native.Tape(TEAM, "portable", 4)
    x, routes = f32_buffer(4, 32), np.zeros(native.routes_size(4, 4), np.int32)
    router, matrix = packed(normal(rng, 6, 32), "F32", TEAM), packed_experts(normal(rng, 6, 16, 32), "F32")
    part = native.Part(matrix, f32_buffer(8, 16))
    with pytest.raises(ValueError, match=r"^routes is another buffer; accepted: one that a launch before"):
        tape.experts(x, routes, part)
    with pytest.raises(ValueError, match=r"^chosen is 7; accepted: 1 to 6"):
        tape.route(x, routes, router, 7, True)
    with pytest.raises(ValueError, match=r"^rows of the router is 4097"):
        tape.route(x, routes, packed(normal(rng, 4097, 32), "F32", TEAM), 2, True)
    with pytest.raises(ValueError, match=r"^x is a float32 buffer; accepted: A8"):
        tape.route(x, routes, packed(normal(rng, 6, 32), "Q8_0", TEAM), 2, True)
    with pytest.raises(ValueError, match=r"^out.shape\[0\] is"):
        tape.route(x, routes[:-1], router, 2, True)
    tape.route(x, routes, router, 2, True)
    with pytest.raises(ValueError, match=r"^experts of the matrix is 5; accepted: 6"):
        tape.experts(x, routes, native.Part(packed_experts(normal(rng, 5, 16, 32), "F32"), x))
    with pytest.raises(ValueError, match=r"^out.shape\[0\] is 4; accepted: at least 8"):
        tape.experts(x, routes, native.Part(matrix, f32_buffer(4, 16)))
    with pytest.raises(ValueError, match=r"^x.shape\[0\] is 4; accepted: at least 8"):
        tape.experts(x, routes, part, x_by_expert=True)
    with pytest.raises(ValueError, match=r"^bias.shape\[0\] is 5"):
        tape.experts(x, routes, native.Part(matrix, f32_buffer(8, 16), np.zeros((5, 16), np.float32)))
    with pytest.raises(ValueError, match=r"^shared is given"):
        tape.combine(f32_buffer(8, 32), routes, x, 32, shared=x)
    with pytest.raises(ValueError, match=r"^matrix is a matrix of 6 experts"):
        tape.linear(x, [native.Part(matrix, f32_buffer(4, 16))])
    with pytest.raises(ValueError, match=r"^experts is 4"):
        native.pack(np.zeros((6, 34), np.uint8), "Q8_0", 32, TEAM, experts=4)
    assert tape.launches == ["route"]
