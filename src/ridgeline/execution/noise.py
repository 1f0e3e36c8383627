"""Random numbers that depend on what they are for, and on nothing else.

Every draw is addressed: the seed is the key of a counter-based generator, and (token id, position,
choice, purpose) its counter. A token's noise is therefore the same whatever else is in the batch, was
computed before, or was preempted, and only the tokens that can still win need theirs computed.

The generator is Philox4x64-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011),
as NumPy has it in C. From bits to noise, in this order, so that any device gives the same float32:

1. key = (seed, 0) and counter = (1 + token id div 8, position, choice, purpose), 64 bits each; the block
   is four words of 64 bits, read as eight of 32, the lower half of a word first;
2. k = the upper 24 bits of half-word (token id mod 8);
3. u = (k + ½) · 2⁻²⁴ in float64, which is exact and never 0 or 1;
4. g = −ln(−ln u) in float64, rounded to the nearest multiple of 2⁻²⁰, then to float32.

The grid in step 4 makes the result independent of the library that computes the logarithm: over all 2²⁴
values of k, g stays at least 90 · 2⁻⁵³ · (1 + |g|) away from a rounding boundary of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ridgeline.types import Float32Array

TARGET = 0
"""Purpose: choosing the token of the answer."""
SEED = 1
"""Purpose: deriving the seed of a request from the engine's."""

XTC = 2
"""Purpose: choosing the positions at which the most probable tokens are excluded."""

BITS = 24
_BLOCK_TOKENS = 8
_BLOCK_WORDS = 4
_JUMP_BLOCKS = 100
"""Blocks that are generated rather than jumped over: a jump costs about as much as this many."""
_GRID = 2.0**20
_DROPPED = np.uint32(32 - BITS)


@dataclass(frozen=True, slots=True)
class Address:
    """What a draw is for: a request's seed (0 to 2⁶⁴−1), which of its choices, and the token's position."""

    seed: int
    choice: int
    position: int
    purpose: int = TARGET


class NoiseSource:
    """Bits by address. It remembers nothing between calls; it is kept only because it is slow to make."""

    __slots__ = ("_philox",)

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=np.zeros(2, np.uint64))

    def all_bits(self, address: Address, vocabulary: int) -> NDArray[np.uint32]:
        """The number k of every token id below `vocabulary`, uint32 (vocabulary,)."""
        return self._halves(address, [0], [-(-vocabulary // _BLOCK_TOKENS)])[:vocabulary] >> _DROPPED

    def bits(self, address: Address, token_ids: NDArray[np.int64]) -> NDArray[np.uint32]:
        """The number k of each token, uint32 (N,), for token ids (N,) in ascending order."""
        blocks = token_ids // _BLOCK_TOKENS
        if not blocks.size:
            return np.empty(0, np.uint32)
        runs = np.flatnonzero(np.diff(blocks) > _JUMP_BLOCKS) + 1
        first = blocks[np.concatenate(([0], runs))]
        count = blocks[np.concatenate((runs - 1, [blocks.size - 1]))] - first + 1
        halves = self._halves(address, first.tolist(), count.tolist())
        # Where each run begins among the generated blocks, spread over the tokens of the run.
        skipped = first - np.concatenate(([0], np.cumsum(count)[:-1]))
        if runs.size:
            skipped = skipped[np.searchsorted(runs, np.arange(blocks.size), side="right")]
        bits: NDArray[np.uint32] = halves[token_ids - skipped * _BLOCK_TOKENS] >> _DROPPED
        return bits

    def _halves(self, address: Address, first: list[int], count: list[int]) -> NDArray[np.uint32]:
        """All half-words of the blocks `first[i]` … `first[i] + count[i] − 1`, one run after the other."""
        self._philox.state = {
            "bit_generator": "Philox",
            # NumPy steps the counter before it makes a block, so block b comes at counter 1 + b.
            "state": {
                "counter": np.array([0, address.position, address.choice, address.purpose], np.uint64),
                "key": np.array([address.seed, 0], np.uint64),
            },
            "buffer": np.zeros(_BLOCK_WORDS, np.uint64),
            "buffer_pos": _BLOCK_WORDS,
            "has_uint32": 0,
            "uinteger": 0,
        }
        here, words = 0, []
        for begin, length in zip(first, count, strict=True):
            if begin > here:
                self._philox.advance(begin - here)
            words.append(self._philox.random_raw(_BLOCK_WORDS * length))
            here = begin + length
        whole = words[0] if len(words) == 1 else np.concatenate(words)
        halves: NDArray[np.uint32] = whole.astype("<u8", copy=False).view("<u4")
        return halves


def gumbel(bits: NDArray[np.uint32]) -> Float32Array:
    """Steps 3 and 4 above: standard Gumbel noise, float32, for 24-bit numbers."""
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-BITS
    noise = -np.log(-np.log(uniform))
    return (np.rint(noise * _GRID) / _GRID).astype(np.float32)


def gumbel_bound(bits: int) -> np.float32:
    """The noise of 24-bit number `bits`, which no smaller number exceeds."""
    return np.float32(gumbel(np.array([bits], np.uint32))[0])


def derived_seed(seed: int, arrival: int) -> int:
    """The 64-bit seed of the request that arrived as number `arrival` at an engine seeded with `seed`."""
    low, high = NoiseSource()._halves(Address(seed % 2**64, 0, arrival, SEED), [0], [1])[:2]
    return int(low) | int(high) << 32
