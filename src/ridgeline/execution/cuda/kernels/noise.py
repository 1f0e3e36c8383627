"""Keyed Gumbel noise inside kernels; `execution.noise` has the rule, and the same bits.

Philox4x64-10 is that of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ridgeline.execution.noise import BITS, TARGET, gumbel_bound

BLOCK_TOKENS = tl.constexpr(8)
"""Neighbouring tokens whose noise comes from one block."""
MOST_NOISE = tl.constexpr(float(gumbel_bound(2**BITS - 1)))

_PURPOSE = tl.constexpr(TARGET)
_NUMBERS = tl.constexpr(2**BITS)
_LOWER, _UPPER = tl.constexpr(32 - BITS), tl.constexpr(64 - BITS)
_SPACING = tl.constexpr(2.0**-BITS)
_GRID = tl.constexpr(2.0**20)
_STEP = tl.constexpr(2.0**-20)
_SLACK = tl.constexpr(2.0**-10)

_ROUNDS = tl.constexpr(10)
_MULTIPLIER_0 = tl.constexpr(0xD2E7470EE14C6C93)
_MULTIPLIER_1 = tl.constexpr(0xCA5A826395121157)
_WEYL_0 = tl.constexpr(0x9E3779B97F4A7C15)
_WEYL_1 = tl.constexpr(0xBB67AE8584CAA73B)


@triton.jit
def block_words(blocks, seed, choice, position):
    """The four words, uint64 (N,), of the blocks (N,) of a draw; seed, choice and position are int64."""
    none = tl.zeros(blocks.shape, tl.uint64)
    multiplier_0 = tl.full(blocks.shape, _MULTIPLIER_0, tl.uint64)
    multiplier_1 = tl.full(blocks.shape, _MULTIPLIER_1, tl.uint64)
    c0 = none + (blocks.to(tl.int64) + 1).to(tl.uint64)
    c1 = none + position.to(tl.uint64)
    c2 = none + choice.to(tl.uint64)
    c3 = none + _PURPOSE
    k0 = none + seed.to(tl.uint64)
    k1 = none
    for _ in tl.static_range(_ROUNDS):
        high_0, low_0 = tl.umulhi(multiplier_0, c0), multiplier_0 * c0
        high_1, low_1 = tl.umulhi(multiplier_1, c2), multiplier_1 * c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += tl.full(blocks.shape, _WEYL_0, tl.uint64)
        k1 += tl.full(blocks.shape, _WEYL_1, tl.uint64)
    return c0, c1, c2, c3


@triton.jit
def lower_bits(words):
    """The number k, int32, in the lower half of each word."""
    return ((words >> _LOWER) & (_NUMBERS - 1)).to(tl.int32)


@triton.jit
def upper_bits(words):
    """The number k, int32, in the upper half of each word."""
    return (words >> _UPPER).to(tl.int32)


@triton.jit
def bits_of_tokens(ids, seed, choice, position):
    """The number k of any tokens: int32 (N,) for ids (N,), a block for each."""
    w0, w1, w2, w3 = block_words(ids // BLOCK_TOKENS, seed, choice, position)
    place = ids % BLOCK_TOKENS
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    return tl.where(place % 2 == 0, lower_bits(word), upper_bits(word))


@triton.jit
def bits_of_blocks(blocks, seed, choice, position):
    """The number k of the tokens of whole blocks: int32 (N, 8) for blocks (N,)."""
    w0, w1, w2, w3 = block_words(blocks, seed, choice, position)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (blocks.shape[0], 4))
    halves = tl.join(lower_bits(words), upper_bits(words))
    return tl.reshape(halves, (blocks.shape[0], BLOCK_TOKENS))


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise, float32, of numbers k.

    Rounding up the half is as good as to even: no value lies that close to a boundary of the grid.
    """
    uniform = (bits.to(tl.float64) + 0.5) * _SPACING
    noise = -tl.log(-tl.log(uniform))
    return (tl.floor(noise * _GRID + 0.5) * _STEP).to(tl.float32)


@triton.jit
def gumbel_above(bits):
    """What the noise of numbers k never exceeds, float32, for the price of one logarithm in float32.

    −ln u ≥ 1 − u, so that −ln(−ln u) ≤ −ln(1 − u). The slack covers the grid and a logarithm that is good
    to 1e-5, which is all that is asked of it.
    """
    rest = ((-bits + _NUMBERS).to(tl.float32) - 0.5) * _SPACING
    return -tl.log(rest) + _SLACK
