"""Random numbers that depend on what they are for, and on nothing else.

Every draw is addressed: the seed is the key of a counter-based generator, and (token id, position,
choice, purpose) its counter. A token's noise is therefore the same whatever else is in the batch, was
computed before, or was preempted, and only the tokens that can still win need theirs computed.

The generator is Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
From bits to noise, in this order, so that any device gives the same float32:

1. key = (seed mod 2³², seed div 2³²); counter = (token id div 4, position, choice, purpose);
2. k = word (token id mod 4) of the block, its upper 24 bits;
3. u = (k + ½) · 2⁻²⁴ in float64, which is exact and never 0 or 1;
4. g = −ln(−ln u) in float64, rounded to the nearest multiple of 2⁻²⁰, then to float32.

The grid in step 4 makes the result independent of the library that computes the logarithm: over all 2²⁴
values of k, g stays at least 94 half-ulps away from a rounding boundary of the grid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ridgeline.types import Float32Array

TARGET = 0
"""Purpose: choosing the token of the answer."""
SEED = 1
"""Purpose: deriving the seed of a request from the engine's."""

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10
_GRID = 2.0**20


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds over blocks: counter (4, N) and key (2, N or 1), 32 bits in each value, give (4, N)."""
    even, odd = counter[::2], counter[1::2]
    for _ in range(_ROUNDS):
        product = even * _MULTIPLIERS
        even = ((product >> _SHIFT)[::-1] ^ odd ^ key) & _LOW
        odd = (product & _LOW)[::-1]
        key = (key + _WEYL) & _LOW
    return np.stack((even[0], odd[0], even[1], odd[1]))


def gumbel(
    seed: ArrayLike, choice: ArrayLike, position: ArrayLike, purpose: int, token_ids: ArrayLike
) -> Float32Array:
    """Standard Gumbel noise of each token id, float32 (N,).

    `seed` (64 bits), `choice` and `position` are numbers, or arrays that pair with `token_ids`.
    """
    tokens = np.asarray(token_ids, np.uint64)
    seeds = np.atleast_1d(np.asarray(seed, np.uint64))
    counter = np.empty((4, tokens.size), np.uint64)
    counter[0] = tokens >> np.uint64(2)
    counter[1] = np.asarray(position, np.uint64)
    counter[2] = np.asarray(choice, np.uint64)
    counter[3] = purpose
    blocks = philox4x32(counter, np.stack((seeds & _LOW, seeds >> _SHIFT)))
    words = np.take_along_axis(blocks, (tokens & np.uint64(3)).astype(np.intp)[None], axis=0)[0]
    return gumbel_from_bits(words >> np.uint64(8))


def gumbel_from_bits(bits: NDArray[np.uint64]) -> Float32Array:
    """Steps 3 and 4 above, for 24-bit numbers."""
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-24
    noise = -np.log(-np.log(uniform))
    return (np.rint(noise * _GRID) / _GRID).astype(np.float32)


def derived_seed(seed: int, arrival: int) -> int:
    """The 64-bit seed of the request that arrived as number `arrival` at an engine seeded with `seed`."""
    counter = np.array([[arrival & 0xFFFFFFFF], [arrival >> 32], [0], [SEED]], np.uint64)
    words = philox4x32(counter, np.array([[seed & 0xFFFFFFFF], [seed >> 32 & 0xFFFFFFFF]], np.uint64))
    return int(words[0, 0]) | int(words[1, 0]) << 32


GUMBEL_MIN, GUMBEL_MAX = (float(g) for g in gumbel_from_bits(np.array([0, 2**24 - 1], np.uint64)))
"""The bounds of the noise: it lies in [−2.853, 17.329]."""
