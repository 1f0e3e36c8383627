"""Drawing tokens on the device; `execution.draw` has the rule.

One program draws for one row, in one launch and without scratch memory. Top-k, top-p and min-p each raise
the floor that `candidates` describes; what reaches the last one takes part, first in the hand and then,
if the hand does not hold all of them, in the whole row. Its bits are those of the CPU, but for what
`candidates` says of top-p.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ridgeline.execution import draw as cpu
from ridgeline.execution.cuda import arrays
from ridgeline.execution.cuda.kernels.candidates import (
    LAST_ID,
    MAX_VOCABULARY,
    id_of,
    load_logits,
    logit_of,
    lowest_rank,
    mass_of_hand,
    mass_of_row,
    raised,
    rank_of,
    survey,
)
from ridgeline.execution.cuda.kernels.noise import (
    BLOCK_TOKENS,
    MOST_NOISE,
    bits_of_blocks,
    bits_of_tokens,
    gumbel,
    gumbel_above,
)
from ridgeline.types import Draw

_NO_ID = tl.constexpr(MAX_VOCABULARY)
_NOT_DRAWN = tl.constexpr(cpu.NOT_DRAWN)
_WANTED = tl.constexpr(arrays.DRAW_WANTED)
_TEMPERATURE = tl.constexpr(arrays.DRAW_TEMPERATURE)
_TOP_K = tl.constexpr(arrays.DRAW_TOP_K)
_TOP_P = tl.constexpr(arrays.DRAW_TOP_P)
_LOG_MIN_P = tl.constexpr(arrays.DRAW_LOG_MIN_P)
_SEED = tl.constexpr(arrays.DRAW_SEED)
_CHOICE = tl.constexpr(arrays.DRAW_CHOICE)
_POSITION = tl.constexpr(arrays.DRAW_POSITION)


@triton.jit
def _winner(scores, ids, best_score, token):
    """The token with the largest score, the one given included; among equals the smallest id."""
    score = tl.max(scores, axis=0)
    id_ = tl.min(tl.where(scores == score, ids, _NO_ID), axis=0)
    wins = (score > best_score) | ((score == best_score) & (id_ < token))
    return tl.where(wins, score, best_score), tl.where(wins, id_, token)


@triton.jit
def _draw_in_hand(ranks, floor, best_score, token, seed, choice, position):
    """The winner among tokens, one or none in a lane, that reach the floor, the one given included."""
    kept = ranks >= floor
    if tl.max(kept.to(tl.int32), axis=0) != 0:
        ids = id_of(ranks)
        noise = gumbel(bits_of_tokens(ids, seed, choice, position))
        scores = tl.where(kept, logit_of(ranks) + noise, -float("inf"))
        best_score, token = _winner(scores, ids, best_score, token)
    return best_score, token


@triton.jit
def _draw_in_row(
    row,
    temperature,
    floor,
    best_score,
    token,
    seed,
    choice,
    position,
    VOCABULARY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The winner among all that reach the floor, given a first one. Bounds spare most of the noise."""
    TOKENS: tl.constexpr = BLOCKS * BLOCK_TOKENS
    blocks = tl.arange(0, BLOCKS)
    places = tl.arange(0, BLOCK_TOKENS)
    for begin in range(0, VOCABULARY, TOKENS):
        ids = begin + blocks[:, None] * BLOCK_TOKENS + places[None, :]
        x = load_logits(row, temperature, ids, VOCABULARY)
        kept = (ids < VOCABULARY) & (rank_of(x, ids) >= floor)
        able = kept & (x + MOST_NOISE >= best_score)
        if tl.max(tl.reshape(able.to(tl.int32), (TOKENS,)), axis=0) != 0:
            bits = bits_of_blocks(blocks + begin // BLOCK_TOKENS, seed, choice, position)
            able = kept & (x + gumbel_above(bits) >= best_score)
            if tl.max(tl.reshape(able.to(tl.int32), (TOKENS,)), axis=0) != 0:
                scores = tl.where(kept, x + gumbel(bits), -float("inf"))
                best_score, token = _winner(
                    tl.reshape(scores, (TOKENS,)), tl.reshape(ids, (TOKENS,)), best_score, token
                )
    return token


@triton.jit
def _real(draw, FIELD: tl.constexpr):
    return tl.load(draw + FIELD).to(tl.float64, bitcast=True)


@triton.jit
def _sampled(row, draw, temperature, first, second, third, VOCABULARY: tl.constexpr, LANES: tl.constexpr):
    """The token of a row, given its hand and the best logit that the hand may lack."""
    floor = tl.full((), 0, tl.int64)
    cover = lowest_rank(third) + LAST_ID + 1
    peak = tl.max(first, axis=0) + 1
    best = logit_of(peak - 1)

    top_k = tl.load(draw + _TOP_K)
    if (top_k > 0) & (top_k < VOCABULARY):
        floor = raised(
            row, temperature, best, first, second, floor, cover, peak, top_k, VOCABULARY, LANES, False
        )
    top_p = _real(draw, _TOP_P)
    if top_p < 1.0:
        if floor < cover:
            total = mass_of_row(row, temperature, best, floor, VOCABULARY, LANES)
        else:
            total = mass_of_hand(first, second, best, floor)
        floor = raised(
            row, temperature, best, first, second, floor, cover, peak, top_p * total, VOCABULARY, LANES, True
        )
    log_min_p = _real(draw, _LOG_MIN_P)
    if log_min_p > -float("inf"):
        floor = tl.maximum(floor, lowest_rank(best + log_min_p.to(tl.float32)))

    seed, choice, position = tl.load(draw + _SEED), tl.load(draw + _CHOICE), tl.load(draw + _POSITION)
    score = tl.full((), -float("inf"), tl.float32)
    token = tl.full((), _NO_ID, tl.int32)
    score, token = _draw_in_hand(first, floor, score, token, seed, choice, position)
    score, token = _draw_in_hand(second, floor, score, token, seed, choice, position)
    if floor < cover:
        token = _draw_in_row(
            row, temperature, floor, score, token, seed, choice, position, VOCABULARY, LANES // 4
        )
    return token


@triton.jit
def _draw_kernel(
    logits, row_stride, draws, draw_stride, tokens, VOCABULARY: tl.constexpr, LANES: tl.constexpr
):
    output = tl.program_id(0).to(tl.int64)
    row = logits + output * row_stride
    draw = draws + output * draw_stride
    token = tl.full((), _NOT_DRAWN, tl.int32)
    if tl.load(draw + _WANTED) != 0:
        temperature = _real(draw, _TEMPERATURE).to(tl.float32)
        greedy = temperature == 0.0
        temperature = tl.where(greedy, 1.0, temperature)
        first, second, third, nan = survey(row, temperature, VOCABULARY, LANES)
        best_rank = tl.max(first, axis=0)
        if (nan == 0) & (best_rank >= 0) & (logit_of(best_rank) < float("inf")):
            if greedy:
                token = id_of(best_rank)
            else:
                token = _sampled(row, draw, temperature, first, second, third, VOCABULARY, LANES)
    tl.store(tokens + output, token)


def draw_configuration(vocabulary: int) -> tuple[int, int]:
    """(lanes, warps) for a row of logits.

    Lanes take 16 bytes per thread and load. More of them would make the hand larger, and with it the work
    that has no use for most of it; fewer would leave too few loads in flight. A small vocabulary has
    fewer, so that its lanes, too, have more tokens than the hand takes.
    """
    lanes = min(max(triton.next_power_of_2(vocabulary) // 8, 16), 2048)
    return lanes, max(1, lanes // 128)


def draw(logits: Tensor, draws: Tensor, tokens: Tensor) -> None:
    """Draw a token for each row of logits.

    `logits` float32 (outputs, vocabulary), at most 262144 wide, `draws` int64 (outputs, DRAW_FIELDS) as in
    `arrays`, `tokens` int32 (outputs,). A token is −1 where its row is not wanted, or has no largest finite
    logit (over its temperature too), or holds NaN. No token depends on the other rows.
    """
    outputs, vocabulary = _check(logits, draws, tokens)
    if outputs == 0:
        return
    lanes, num_warps = draw_configuration(vocabulary)
    _draw_kernel[(outputs,)](
        logits,
        logits.stride(0),
        draws,
        draws.stride(0),
        tokens,
        VOCABULARY=vocabulary,
        LANES=lanes,
        num_warps=num_warps,
        enable_fp_fusion=False,  # the sum of logit and noise is rounded as it is on the CPU
    )


def draw_reference(logits: Tensor, draws: Tensor, tokens: Tensor) -> None:
    """As `draw`, by the CPU's own rule."""
    _check(logits, draws, tokens)
    drawer = cpu.Drawer()
    reals = draws.contiguous().view(torch.float64).tolist()
    for output, (fields, real) in enumerate(zip(draws.tolist(), reals, strict=True)):
        how = Draw(
            temperature=real[arrays.DRAW_TEMPERATURE],
            top_k=fields[arrays.DRAW_TOP_K],
            top_p=real[arrays.DRAW_TOP_P],
            min_p=math.exp(real[arrays.DRAW_LOG_MIN_P]),
            seed=fields[arrays.DRAW_SEED] % 2**64,
            choice=fields[arrays.DRAW_CHOICE],
            position=fields[arrays.DRAW_POSITION],
        )
        wanted = how if fields[arrays.DRAW_WANTED] else None
        tokens[output] = int(drawer.rows(logits[output : output + 1].cpu().numpy(), [wanted])[0])


def _check(logits: Tensor, draws: Tensor, tokens: Tensor) -> tuple[int, int]:
    outputs, vocabulary = logits.shape
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.stride(1) == 1 or vocabulary == 1, logits.stride()
    assert 0 < vocabulary <= MAX_VOCABULARY, vocabulary
    assert draws.dtype == torch.int64, draws.dtype
    assert draws.shape == (outputs, arrays.DRAW_FIELDS), draws.shape
    assert draws.stride(1) == 1, draws.stride()
    assert tokens.dtype == torch.int32, tokens.dtype
    assert tokens.shape == (outputs,), tokens.shape
    assert tokens.stride() == (1,), tokens.stride()
    return outputs, vocabulary
