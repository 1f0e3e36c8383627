"""Experts on the CUDA executor: the choice, the list of work, every product and the sum, against float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cuda_tensors import DEVICE, normal, views
from test_cuda_linear import PAIRS, activations, matrix
from torch import Tensor

from ridgeline.execution.cuda.arrays import (
    A8,
    BLOCK_EXPERT,
    BLOCK_FIRST,
    BLOCK_PAIRS,
    MIN_BLOCK_PAIRS,
    Activations,
    Experts,
    Packed,
    Routes,
    empty_routes,
    most_blocks,
)
from ridgeline.execution.cuda.kernels.combine import combine, combine_reference
from ridgeline.execution.cuda.kernels.experts import expert_linear, expert_linear_reference
from ridgeline.execution.cuda.kernels.route import block_pairs, group, route, route_reference, work_blocks

NO_NUMBER = 2**31 - 1
SPARE = 3  # rows of the table after those of the step


def stale_routes(rows: int, chosen: int, count: int, shared: bool = False) -> Routes:
    """Room for more rows than a step has, all of it left over from something else."""
    routes = empty_routes(rows + SPARE, 2 * chosen + shared, count, DEVICE)
    for numbers in (routes.table, routes.order, routes.blocks):
        numbers.fill_(NO_NUMBER)
    routes.logits.fill_(torch.nan)
    return routes


def number(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32, device=DEVICE)


def scores(routes: Routes) -> Tensor:
    return routes.table[:, routes.chosen :].contiguous().view(torch.float32)


def check_work_list(routes: Routes, count: int, block: int) -> None:
    """Every pair of a row that counts is in one block, of its expert and no larger than it may be; an
    expert's pairs ascend, and all but its last block are full."""
    experts = routes.table[:, : routes.chosen].reshape(-1).tolist()
    blocks = routes.blocks[: work_blocks(routes, count)].tolist()
    of_expert: dict[int, list[int]] = {}
    for record in blocks:
        expert, first, pairs = (record[field] for field in (BLOCK_EXPERT, BLOCK_FIRST, BLOCK_PAIRS))
        assert 0 <= pairs <= block
        if pairs:
            found = of_expert.setdefault(expert, [])
            assert len(found) % block == 0
            found += routes.order[first : first + pairs].tolist()
    expected: dict[int, list[int]] = {}
    for pair, expert in enumerate(experts):
        if expert < count:
            expected.setdefault(expert, []).append(pair)
    assert of_expert == expected


# --------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("rows", "count", "chosen", "width", "renormalise", "extras"),
    [
        (1, 8, 2, 40, True, True),
        (1, 8, 8, 40, False, False),
        (5, 40, 8, 72, True, False),
        (9, 4, 4, 33, False, True),
        (3, 60, 1, 16, True, True),
        (2, 1, 1, 8, False, False),
        (30, 7, 3, 20, False, False),
        (2, 130, 5, 12, True, True),
    ],
)
def test_route(rows: int, count: int, chosen: int, width: int, renormalise: bool, extras: bool) -> None:
    """Against sorting in float64; scores of experts differ by more than rounding does."""
    (x,) = views(width, rows=rows, seed=rows)
    router, bias = normal(count + extras, width, seed=1), normal(count, seed=2) if extras else None
    routes = stale_routes(rows, chosen, count, extras)
    expected = dataclasses.replace(routes, table=routes.table.clone(), order=routes.order.clone())
    expected = dataclasses.replace(expected, blocks=routes.blocks.clone())
    route(x, router, bias, number(rows), routes[:rows], renormalise=renormalise)
    route_reference(x, router, bias, number(rows), expected[:rows], renormalise=renormalise)
    assert torch.equal(routes.table[:rows, :chosen], expected.table[:rows, :chosen])
    torch.testing.assert_close(scores(routes[:rows]), scores(expected[:rows]), rtol=2e-5, atol=1e-6)
    assert (routes.table[rows:] == NO_NUMBER).all()
    check_work_list(routes[:rows], count, 1 if rows == 1 else block_pairs(rows * chosen, count))


@pytest.mark.parametrize("count", [3, 8, 33])
def test_ties_go_to_lower_experts(count: int) -> None:
    """A router of few different rows: all products are exact."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [-1.0, 0.0]], device=DEVICE)
    router = torch.zeros(count, 2, device=DEVICE)
    router[1::2, 0] = 1.0
    router[2, 1] = 3.0
    routes = stale_routes(4, 3, count)[:4]
    route(x, router, None, number(4), routes, renormalise=True)
    products = (x @ router.T).cpu().numpy()
    expected = np.argsort(-products, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(routes.table[:, :3].cpu().numpy(), expected)
    assert routes.table[2, :3].tolist() == [0, 1, 2]
    torch.testing.assert_close(scores(routes)[2], torch.full((3,), 1 / 3, device=DEVICE))


def test_scores_far_apart_stay_finite() -> None:
    x = torch.tensor([[1000.0], [-1000.0], [3e37]], device=DEVICE)
    router = torch.tensor([[1.0], [2.0], [-1.0], [0.0]], device=DEVICE)
    routes = stale_routes(3, 2, 4)[:3]
    route(x, router, None, number(3), routes, renormalise=True)
    assert routes.table[:, :2].tolist() == [[1, 0], [2, 3], [1, 0]]
    assert torch.equal(scores(routes), torch.tensor([[1.0, 0.0]] * 3, device=DEVICE))


@pytest.mark.parametrize("rows", [1, 6])
def test_whatever_a_row_holds_its_experts_exist_and_differ(rows: int) -> None:
    """NaN and infinities, of which the other rows see nothing."""
    x, router = normal(rows, 8), normal(5, 8, seed=1)
    clean = stale_routes(rows, 3, 5)[:rows]
    route(x, router, None, number(rows), clean, renormalise=False)
    bad = x.clone()
    bad[0] = torch.nan
    bad[rows // 2, 0] = torch.inf
    routes = stale_routes(rows, 3, 5)[:rows]
    route(bad, router, None, number(rows), routes, renormalise=False)
    for row in routes.table[:, :3].tolist():
        assert len(set(row)) == 3
        assert set(row) <= set(range(5))
    same = [row for row in range(rows) if row not in (0, rows // 2)]
    assert torch.equal(routes.table[same], clean.table[same])
    check_work_list(routes, 5, 1 if rows == 1 else MIN_BLOCK_PAIRS)


@pytest.mark.parametrize("live", [0, 1, 5, 7])
def test_rows_that_nobody_reads_add_no_work(live: int) -> None:
    x, router = normal(7, 8), normal(6, 8, seed=1)
    x[live:] = torch.nan
    routes = stale_routes(7, 2, 6)[:7]
    route(x, router, None, number(live), routes, renormalise=True)
    assert (routes.table[live:, :2] == 6).all()
    assert (routes.table[:live, :2] < 6).all()
    check_work_list(routes, 6, MIN_BLOCK_PAIRS)
    assert int(routes.blocks[: work_blocks(routes, 6), BLOCK_PAIRS].sum()) == 2 * live


@pytest.mark.parametrize(("rows", "count", "chosen"), [(300, 3, 2), (600, 4, 1), (1100, 5, 4), (130, 40, 4)])
def test_long_lists(rows: int, count: int, chosen: int) -> None:
    """Several chunks of pairs, high blocks, experts without pairs, and rows that nobody reads."""
    routes = chosen_at_random(rows, chosen, count, without=count // 2, live=rows - 40)
    check_work_list(routes, count, block_pairs(rows * chosen, count))


def test_all_rows_to_one_expert() -> None:
    for expert in range(3):
        routes = stale_routes(100, 1, 3)[:100]
        routes.table[:, 0] = expert
        group(routes, 3)
        check_work_list(routes, 3, block_pairs(100, 3))


@pytest.mark.parametrize("count", [1, 8, 128, 256])
def test_lists_have_room_for_the_worst(count: int) -> None:
    for pairs in (1, 2, 31, 512, 4096, 65536):
        block = block_pairs(pairs, count)
        used = min(count, pairs)
        worst = used + (pairs - used) // block  # every expert that is used has a block that is not full
        assert worst <= most_blocks(pairs, count, block) <= most_blocks(pairs, count)


# ------------------------------------------------------------------------------------- the products


def chosen_at_random(
    rows: int, chosen: int, count: int, without: int | None = None, live: int | None = None
) -> Routes:
    """Routes as `route` leaves them, to random experts; perhaps none to one, or of the first rows only."""
    routes = stale_routes(rows, chosen, count)[:rows]
    order = normal(rows, count)
    if without is not None and count > chosen:
        order[:, without] = -torch.inf
    routes.table[:, :chosen] = order.argsort(dim=1, descending=True)[:, :chosen]
    routes.table[live if live is not None else rows :, :chosen] = count
    if rows > 1:
        group(routes, count)
        return routes
    routes.order[:chosen] = torch.arange(chosen)
    routes.blocks[:chosen, BLOCK_EXPERT] = routes.table[0, :chosen]
    routes.blocks[:chosen, BLOCK_FIRST] = torch.arange(chosen)
    routes.blocks[:chosen, BLOCK_PAIRS] = 1
    return routes


def experts_of(bits: int, count: int, width: int, cols: int, parts: int = 1) -> Experts:
    return Experts(matrix(bits, parts * count * width, cols), count, width)


def check_products(x: Activations, routes: Routes, experts: Experts, bias: Tensor | None = None) -> None:
    wide = torch.full((routes.pairs + 3, experts.outputs + 6), torch.nan, device=DEVICE)
    seen = wide[: routes.pairs, 3:-3]
    expected = torch.full((routes.pairs, experts.outputs), torch.nan, device=DEVICE)
    expert_linear(x, routes, experts, seen, bias)
    expert_linear_reference(x, routes, experts, expected, bias)
    limit = 1e-5 * float(expected.nan_to_num().abs().max())
    torch.testing.assert_close(seen, expected, rtol=0, atol=limit, equal_nan=True)
    seen.fill_(torch.nan)
    assert wide.isnan().all(), "written outside of the result"


@pytest.mark.parametrize(("kind", "bits"), PAIRS)
@pytest.mark.parametrize(
    ("rows", "count", "chosen"), [(1, 8, 2), (1, 8, 8), (3, 20, 3), (9, 3, 1), (40, 2, 2)]
)
def test_products(kind: str, bits: int, rows: int, count: int, chosen: int) -> None:
    routes = chosen_at_random(rows, chosen, count)
    check_products(activations(kind, rows, 50), routes, experts_of(bits, count, 37, 50))


@pytest.mark.parametrize(("kind", "bits"), PAIRS)
@pytest.mark.parametrize("rows", [1, 6])
def test_stacked_products_with_biases(kind: str, bits: int, rows: int) -> None:
    """Two matrices of each expert side by side, a bias for each, and inputs of each pair's own."""
    routes = chosen_at_random(rows, 3, 4)
    bias = normal(2 * 4 * 23, seed=5)
    check_products(activations(kind, rows, 96), routes, experts_of(bits, 4, 23, 96, parts=2), bias)
    check_products(activations(kind, 3 * rows, 96), routes, experts_of(bits, 4, 23, 96), bias[: 4 * 23])


@pytest.mark.parametrize(("kind", "bits"), PAIRS)
def test_high_blocks(kind: str, bits: int) -> None:
    """64 and 128 pairs in a block."""
    for rows, count in ((70, 3), (140, 2)):
        routes = chosen_at_random(rows, 1, count)
        assert block_pairs(routes.pairs, count) == (64 if count == 3 else 128)
        check_products(activations(kind, rows, 33), routes, experts_of(bits, count, 7, 33))


@pytest.mark.parametrize(("kind", "bits"), PAIRS)
def test_a_pair_does_not_depend_on_the_others(kind: str, bits: int) -> None:
    """Nor on how many there are, nor on rows that nobody reads, whatever they hold."""
    x, experts = activations(kind, 30, 160), experts_of(bits, 2, 37, 160)
    routes = chosen_at_random(30, 1, 2)
    whole = torch.empty((30, 37), device=DEVICE)
    expert_linear(x, routes, experts, whole)
    part = stale_routes(12, 1, 2)[:12]
    part.table[:9, 0] = routes.table[3:12, 0]
    part.table[9:, 0] = 2
    group(part, 2)
    held: Activations
    if isinstance(x, A8):
        held = A8(x.codes[3:15].clone(), x.scales[3:15].clone())
        held.scales[9:] = torch.nan
    else:
        held = x[3:15].clone()
        held[9:] = torch.nan
    out = torch.full((12, 37), torch.nan, device=DEVICE)
    expert_linear(held, part, experts, out)
    assert torch.equal(out[:9], whole[3:12])
    assert out[9:].isnan().all()


@pytest.mark.parametrize(("kind", "bits"), PAIRS)
def test_an_expert_gives_what_the_linear_of_its_matrix_gives(kind: str, bits: int) -> None:
    """The order of pairs in a list does not matter."""
    x, experts = activations(kind, 6, 64), experts_of(bits, 2, 20, 64)
    routes = chosen_at_random(6, 2, 2)
    out, again = (torch.empty((12, 20), device=DEVICE) for _ in range(2))
    expert_linear(x, routes, experts, out)
    blocks = routes.blocks[: work_blocks(routes, 2)]
    assert sorted(blocks[:, BLOCK_PAIRS].tolist()) == [0, 0, 6, 6][-len(blocks) :]
    routes.order[:6], routes.order[6:12] = routes.order[:6].flip(0), routes.order[6:12].flip(0)
    blocks.copy_(blocks.flip(0))
    expert_linear(x, routes, experts, again)
    assert torch.equal(out, again)


@pytest.mark.parametrize(("kind", "bits"), [("f32", 16), ("f32", 4), ("bf16", 32), ("A8-g32", 16)])
def test_refusal_names_what_was_given(kind: str, bits: int) -> None:
    routes = chosen_at_random(2, 1, 2)
    with pytest.raises(ValueError, match=rf"no experts' product takes {kind} .* {bits} bits"):
        expert_linear(
            activations(kind, 2, 32), routes, experts_of(bits, 2, 5, 32), torch.empty((2, 5), device=DEVICE)
        )


# ------------------------------------------------------------------------------------------ the sum


@pytest.mark.parametrize("width", [6, 72, 1100])
@pytest.mark.parametrize("chosen", [1, 2, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_combine(width: int, chosen: int, shared: bool) -> None:
    rows = 3
    x, beside = normal(rows * chosen, width + 4), normal(rows, width + 2, seed=1)
    routes = stale_routes(rows, chosen, 9, shared)
    router = normal(9 + shared, 5, seed=2)
    route(normal(rows, 5, seed=3), router, None, number(rows), routes[:rows], renormalise=False)
    out = torch.full((rows + 1, width), torch.nan, device=DEVICE)
    expected = torch.empty((rows, width), device=DEVICE)
    operands = (beside[:, 2:] if shared else None,)
    combine(x[:, 4:], routes[:rows], out[:rows], *operands)
    combine_reference(x[:, 4:], routes[:rows], expected, *operands)
    torch.testing.assert_close(out[:rows], expected, rtol=1e-5, atol=1e-6)
    assert out[rows:].isnan().all()


def test_no_rows() -> None:
    routes = stale_routes(2, 2, 4)[:0]
    route(normal(0, 8), normal(4, 8), None, number(0), routes, renormalise=True)
    weights = Packed(32, 8, normal(4 * 3, 8))
    expert_linear(normal(0, 8), routes, Experts(weights, 4, 3), torch.empty((0, 3), device=DEVICE))
    combine(normal(0, 3), routes, torch.empty((0, 3), device=DEVICE))
