"""The CUDA executor's row kernels against their references: rounding, norms, activations, page copies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cuda_tensors import DEVICE, KINDS, SPARE, assert_written, normal, poisoned, views
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ridgeline.execution.cuda.arrays import A8, NormWeights, empty_activations
from ridgeline.execution.cuda.kernels.activate import activate, activate_reference, softcap, softcap_reference
from ridgeline.execution.cuda.kernels.norm import residual_norm, residual_norm_reference
from ridgeline.execution.cuda.kernels.pages import copy_pages, copy_pages_reference, independent_runs
from ridgeline.execution.cuda.kernels.quantise import quantise, quantise_reference
from ridgeline.model.spec import Activation
from ridgeline.precision.quantise import TINY

WIDTHS = (6, 50, 80, 96, 576)


# ---------------------------------------------------------------------------------------- rounding


def hard_groups() -> Tensor:
    """Rows of two groups at the edges of the rule: ties, powers of two, zeros, and sizes around TINY."""
    tiny = float(TINY)
    below, above = (float(np.nextafter(TINY, np.float32(to))) for to in (0, 1))
    ties = torch.arange(-31, 33).float() - 0.5
    ties[[0, 32]] = 127.0  # so that the factor is exactly 1
    rows = [
        ties,
        ties * -1,
        ties * 2**40,
        ties * 2**-40,
        torch.zeros(64),
        torch.full((64,), -0.0),
        torch.linspace(-below, below, 64),
        torch.linspace(-tiny, tiny, 64),
        torch.linspace(-above, above, 64),
        torch.linspace(-1e-40, 1e-40, 64),
        torch.linspace(-1, 1, 64) * 3e38,
        2.0 ** torch.arange(-32, 32),
        -(2.0 ** -torch.arange(64)),
        torch.tensor([1e-30, *[0.0] * 31, 3e38, *[1e-38] * 31]),
    ]
    random = normal(60, 64, seed=1).cpu() * 10.0 ** torch.linspace(-30, 30, 60)[:, None]
    return torch.cat((torch.stack(rows), random)).float().to(DEVICE)


def near_ties() -> Tensor:
    """Values whose product with 127/amax lies within an ulp of a half, where a second rounding shows."""
    generator = np.random.default_rng(3)
    amax = generator.uniform(0.5, 2, (200, 1)).astype(np.float32)
    halves = generator.integers(-127, 127, (200, 64)) + 0.5
    x = (halves * amax / 127).astype(np.float32)
    for _ in range(2):
        x = np.nextafter(x, generator.choice([-9, 9], x.shape).astype(np.float32), dtype=np.float32)
    x = np.clip(x, -amax, amax)
    x[:, ::32] = amax
    return torch.from_numpy(x).to(DEVICE)


def assert_same_a8(x: Tensor) -> None:
    rows, width = x.shape
    out, expected = poisoned("A8-g32", rows, width), empty_activations("A8-g32", rows, width, DEVICE)
    assert isinstance(out, A8)
    assert isinstance(expected, A8)
    quantise(x, out[:rows])
    quantise_reference(x, expected)
    assert torch.equal(out.codes[:rows], expected.codes)
    denormal = expected.scales < 2.0**-126
    assert torch.equal(out.scales[:rows][~denormal], expected.scales[~denormal])
    assert (out.scales[:rows][denormal] < 2.0**-126).all()
    assert out.scales[rows:].isnan().all()
    assert (out.codes[rows:] == 77).all()


@pytest.mark.parametrize("rows", [hard_groups, near_ties])
def test_quantises_bit_for_bit(rows) -> None:  # type: ignore[no-untyped-def]
    assert_same_a8(rows())


@pytest.mark.parametrize("width", [1, *WIDTHS, 1056])
def test_quantises_any_width(width: int) -> None:
    assert_same_a8(views(3, width, rows=5, seed=width)[1])


@pytest.mark.parametrize("width", WIDTHS)
def test_rounds_to_bfloat16(width: int) -> None:
    x = views(3, width, rows=3)[1]
    x[0] = (torch.arange(width, device=DEVICE) * 2 + 1) * 2.0**-8 + 1  # ties between bfloat16 neighbours
    out = poisoned("bf16", 3, width)
    quantise(x, out[:3])
    assert torch.equal(out[:3], x.to(torch.bfloat16))
    assert out[3:].isnan().all()


def test_rounds_no_rows() -> None:
    quantise(normal(0, 64), empty_activations("A8-g32", 0, 64, DEVICE))


# ------------------------------------------------------------------------------------------- norms


def norm_weights(kind: str, width: int, seed: int = 7) -> NormWeights:
    weight = normal(width, seed=seed)
    if kind == "layer":
        return NormWeights("layer", 1e-5, weight, normal(width, seed=seed + 1))
    return NormWeights("rms", 1e-6, weight)


def expected_norm(x: Tensor, norm: NormWeights, **parts: Tensor | NormWeights | None) -> Tensor:
    rows = parts.get("rows")
    out = torch.empty((len(rows) if isinstance(rows, Tensor) else len(x), x.shape[1]), device=DEVICE)
    residual_norm_reference(x, out, norm, **parts)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [*WIDTHS, 2200])
def test_norm(width: int, norm_kind: str, kind: str) -> None:
    x = views(4, width, rows=3)[1] * 3 + 1
    norm, out = norm_weights(norm_kind, width), poisoned(kind, 3, width)
    residual_norm(x, out[:3], norm)
    assert_written(out, expected_norm(x, norm), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_kind", ["rms", "layer"])
@pytest.mark.parametrize("before_kind", [None, "rms", "layer"])
def test_norm_of_the_residual_stream(before_kind: str | None, norm_kind: str, kind: str) -> None:
    width = 80
    x, residual = views(width, rows=4)[0], views(7, width, rows=4 + SPARE, seed=5)[1]
    before = norm_weights(before_kind, width, seed=20) if before_kind else None
    norm, out, stream = norm_weights(norm_kind, width), poisoned(kind, 4, width), residual.clone()
    expected = expected_norm(x, norm, before=before, residual=stream)
    rest = residual[4:].clone()
    residual_norm(x, out[:4], norm, before=before, residual=residual)
    assert_written(out, expected, 1e-5)
    torch.testing.assert_close(residual[:4], stream[:4], rtol=1e-6, atol=2e-6)
    assert torch.equal(residual[4:], rest)


@pytest.mark.parametrize("before_kind", [None, "rms"])
def test_adds_to_the_residual_stream(before_kind: str | None) -> None:
    x, residual = normal(3, 96), normal(5, 96, seed=1)
    before = norm_weights(before_kind, 96) if before_kind else None
    expected = residual.clone()
    residual_norm_reference(x, None, None, before=before, residual=expected)
    residual_norm(x, None, None, before=before, residual=residual)
    if before is None:
        assert torch.equal(residual, expected)
    torch.testing.assert_close(residual, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_of_gathered_rows(kind: str) -> None:
    x = views(576, rows=9)[0]
    x[[1, 3]] = torch.nan
    rows = torch.tensor([8, 0, 5, 5], dtype=torch.int32, device=DEVICE)
    norm, before = norm_weights("rms", 576), norm_weights("layer", 576, seed=2)
    out = poisoned(kind, 4, 576)
    residual_norm(x, out[:4], norm, before=before, rows=rows)
    assert_written(out, expected_norm(x, norm, before=before, rows=rows), 1e-5)


def test_norm_in_place_and_of_a_constant_row() -> None:
    x = normal(3, 50)
    x[1] = 4.0
    x[2] = 0.0
    norm = norm_weights("layer", 50)
    expected = expected_norm(x, norm)
    residual_norm(x, x, norm)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, norm = normal(6, 576), norm_weights("rms", 576)
    together, alone = torch.empty_like(x), torch.empty_like(x)
    residual_norm(x, together, norm)
    residual_norm(x[4:5], alone[:1], norm)
    assert torch.equal(alone[0], together[4])


def test_norm_refuses_parts_that_do_not_go_together() -> None:
    x, norm, rows = normal(2, 32), norm_weights("rms", 32), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="gathered"):
        residual_norm(x, x.clone(), norm, residual=x.clone(), rows=rows)
    with pytest.raises(ValueError, match="output"):
        residual_norm(x, None, norm, residual=x.clone())
    with pytest.raises(ValueError, match="norm"):
        residual_norm(x, x.clone(), None, residual=x.clone())
    with pytest.raises(ValueError, match="neither"):
        residual_norm(x, None, None)


# ------------------------------------------------------------------------------------- activations


@pytest.mark.filterwarnings("ignore:overflow")  # exp of a large number, which the quotient forgives
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "clamped_silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [6, 50, 1536])
def test_activate(width: int, gated: bool, activation: Activation, kind: str) -> None:
    x, times = views(width, width, rows=2)
    x *= 4
    times *= 4
    out, expected = poisoned(kind, 2, width), torch.empty((2, width), device=DEVICE)
    activate_reference(x, expected, activation, times if gated else None)
    activate(x, out[:2], activation, times if gated else None)
    assert_written(out, expected, 4e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "clamped_silu"])
@pytest.mark.filterwarnings("ignore:overflow")
def test_activations_far_out(activation: Activation) -> None:
    x = torch.tensor(
        [[-1e30, -1e5, -200.0, -90.0, -30.0, -9.0, -0.0, 0.0, 9.0, 90.0, 1e5, 1e30]], device=DEVICE
    )
    out, expected = torch.empty_like(x), torch.empty_like(x)
    activate(x, out, activation)
    activate_reference(x, expected, activation)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_silu_is_good_to_a_few_ulps_in_the_tail() -> None:
    x = torch.linspace(-60, -1, 64, device=DEVICE)[None]
    out, expected = torch.empty_like(x), torch.empty_like(x)
    for activation in ("silu", "gelu_tanh"):
        shown = x / (1 if activation == "silu" else 10)
        activate(shown, out, activation)
        activate_reference(shown, expected, activation)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [6, 50, 2100])
def test_softcap(width: int) -> None:
    x = views(3, width, rows=3)[1]
    x *= 10.0 ** torch.linspace(-4, 5, width, device=DEVICE)
    expected = x.clone()
    softcap_reference(expected, 30.0)
    softcap(x, 30.0)
    torch.testing.assert_close(x, expected, rtol=2e-6, atol=0)


# ------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("head_dim", [6, 64])
def test_copies_pages_of_all_layers(dtype: torch.dtype, head_dim: int) -> None:
    pool = (normal(3, 7, 2, 2, 16, head_dim) * 40).to(dtype)
    if dtype != torch.int8:
        pool[:, 1] = torch.nan  # a recycled page; copied as it is
        pool[:, 3] = torch.nan
    pairs = torch.tensor([[0, 3], [5, 6], [1, 4]], dtype=torch.int32, device=DEVICE)
    expected = pool.clone()
    copy_pages_reference(expected, pairs)
    copy_pages(pool, pairs)
    assert torch.equal(bits(pool), bits(expected))
    copy_pages(pool, pairs[:0])
    assert torch.equal(bits(pool), bits(expected))


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=30), st.randoms())
def test_runs_in_any_order_equal_one_copy_after_the_other(moves: list[tuple[int, int]], random) -> None:  # type: ignore[no-untyped-def]
    expected, pages = list(range(8)), list(range(8))
    for source, target in moves:
        expected[target] = expected[source]
    runs = independent_runs(moves)
    for run in runs:
        random.shuffle(run)
        for source, target in run:
            pages[target] = pages[source]
    assert pages == expected
    assert sum(map(len, runs)) == sum(source != target for source, target in moves)


def test_runs_are_as_long_as_they_can_be() -> None:
    assert independent_runs([]) == []
    assert independent_runs([(2, 2)]) == []
    assert independent_runs([(0, 1), (0, 2), (4, 3)]) == [[(0, 1), (0, 2), (4, 3)]]
    assert independent_runs([(0, 1), (1, 2)]) == [[(0, 1)], [(1, 2)]]
    assert independent_runs([(0, 1), (2, 0), (3, 0)]) == [[(0, 1)], [(2, 0)], [(3, 0)]]


def test_series_of_tanh_meets_the_quotient() -> None:
    """Around the border of the two ways to compute it, softcap has no step."""
    x = torch.linspace(0.19, 0.21, 201, device=DEVICE)[None]
    capped = x.clone()
    softcap(capped, 1.0)
    assert (capped.diff() > 0).all()
    assert math.isclose(capped[0, 100], math.tanh(0.2), rel_tol=2e-6)
