"""Drawing a token from a row of logits: the `Sample` operation's arithmetic, in NumPy.

In this order, which is that of vLLM and transformers: temperature, top-k, top-p, min-p, each a filter that
narrows a set of candidates; then the argmax of logits plus keyed Gumbel noise (`execution.noise`). Filters
that are off are left out, and a temperature of 0 is the argmax of the logits themselves.

Everything is in float32 but where it says otherwise, and depends on one row alone. Where candidates are
ranked, it is by descending logit, then by ascending id.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ridgeline.execution.noise import BITS, Address, NoiseSource, gumbel, gumbel_bound
from ridgeline.types import Draw, Float32Array, Int32Array

NOT_DRAWN = -1
"""Stands for the token of a row that was left to the host, or that has no largest finite logit."""

_GROUPS = 1024
"""Groups into which a row is dealt to bound its largest values from below."""

_BINS_PER_NAT = np.float32(4)
"""How finely logits are binned by their distance from the largest."""

_PRUNE_ABOVE = 256
"""Candidates beyond which it pays to find out first which of them can still win."""
_HEAD_WIDTH = np.float32(2)
"""Logits this close to the best are drawn first; the best of those bounds the rest."""
_USUAL_BITS = 2**BITS - 2 ** (BITS - 8)
_USUAL_NOISE, _MOST_NOISE = gumbel_bound(_USUAL_BITS), gumbel_bound(2**BITS - 1)
"""The noise of all but one token in 256 is at most 5.54, and none is above 17.33."""

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may still be chosen: ids in ascending order, and their logits (float32)."""

    ids: Ids
    logits: Float32Array


Filter = Callable[[Candidates], Candidates]


class Drawer:
    """Draws tokens. It remembers nothing between calls; it is kept only because its noise is slow to make.

    `greedy` may be a faster `greedy_tokens`.
    """

    __slots__ = ("_greedy", "_noise")

    def __init__(self, greedy: Callable[[Float32Array], Int32Array] | None = None) -> None:
        self._noise = NoiseSource()
        self._greedy = greedy or greedy_tokens

    def rows(self, logits: Float32Array, draws: Sequence[Draw | None]) -> Int32Array:
        """A token for each row of logits (rows, vocabulary), int32; NOT_DRAWN where its draw is None.

        No draws at all are draws that are all None.
        """
        if not any(draws):
            return np.full(len(logits), NOT_DRAWN, np.int32)
        if all(draw is not None and draw.greedy for draw in draws):
            return self._greedy(logits)
        tokens = [
            NOT_DRAWN if draw is None else self.one(row, draw)
            for row, draw in zip(logits, draws, strict=True)
        ]
        return np.array(tokens, np.int32)

    def one(
        self, logits: Float32Array, draw: Draw, further: Sequence[Filter] = (), among: Ids | None = None
    ) -> int:
        """The token of one row; NOT_DRAWN if it has no largest finite logit, over its temperature too.
        Filters that are not the draw's own come after those that are. The token is one of `among`, ascending
        ids, if these are given."""
        if among is not None:
            logits = logits[among]
        best = int(logits.argmax())
        # argmax returns the place of a NaN if there is one, so one look at the winner checks the whole row.
        if not math.isfinite(logits[best]):
            return NOT_DRAWN
        if draw.greedy:
            return best if among is None else int(among[best])
        with np.errstate(over="ignore"):
            if not math.isfinite(logits[best] / np.float32(draw.temperature)):
                return NOT_DRAWN
        found = candidates(logits, draw, among)
        for narrow in further:
            found = narrow(found)
        return self._choose(found, Address(draw.seed, draw.choice, draw.position))

    def _choose(self, candidates: Candidates, address: Address) -> int:
        """Gumbel-max (Maddison et al., "A* Sampling", 2014): a token with the candidates' probabilities."""
        ids, logits = candidates.ids, candidates.logits
        if ids.size == 1:
            return int(ids[0])
        everything = ids is _vocabulary(ids.size)
        bits = self._noise.all_bits(address, ids.size) if everything else self._noise.bits(address, ids)
        if ids.size > _PRUNE_ABOVE:
            able = _able_to_win(logits, bits)
            ids, logits, bits = ids[able], logits[able], bits[able]
        return int(ids[(logits + gumbel(bits)).argmax()])


def greedy_tokens(logits: Float32Array) -> Int32Array:
    """The lowest id of the largest logit of each row (rows, vocabulary), int32; NOT_DRAWN where that is not
    finite, or a logit is NaN."""
    best = logits.argmax(axis=1)  # the place of a NaN, if there is one
    finite = np.isfinite(logits[np.arange(len(logits)), best])
    return np.where(finite, best, NOT_DRAWN).astype(np.int32)


def undrawn(logits: Float32Array, draws: Sequence[Draw | None]) -> Float32Array:
    """The rows of logits (outputs, vocabulary) that the host wants to see."""
    if not any(draws):
        return logits
    if all(draws):
        return logits[:0]
    return logits[[i for i, draw in enumerate(draws) if draw is None]]


def candidates(logits: Float32Array, draw: Draw, ids: Ids | None = None) -> Candidates:
    """What may be drawn from a row whose largest logit is finite, over the temperature too. It is the row of
    the whole vocabulary, or of these ids."""
    found = Candidates(_vocabulary(logits.size) if ids is None else ids, logits)
    with np.errstate(over="ignore"):  # others may become −inf, and are never drawn
        for narrow in filters(draw.temperature, draw.top_k, draw.top_p, draw.min_p):
            found = narrow(found)
    return found


@functools.lru_cache(maxsize=256)
def filters(temperature_: float, k: int, p: float, least_p: float) -> tuple[Filter, ...]:
    """The filters that are switched on, in order."""
    chosen: list[Filter] = []
    if temperature_ != 1:
        chosen.append(temperature(temperature_))
    if k > 0:
        chosen.append(top_k(k))
    if p < 1:
        chosen.append(top_p(p))
    if least_p > 0:
        chosen.append(min_p(least_p))
    return tuple(chosen)


@functools.lru_cache(maxsize=4)
def _vocabulary(size: int) -> NDArray[np.int64]:
    ids = np.arange(size)
    ids.setflags(write=False)
    return ids


def _able_to_win(logits: Float32Array, bits: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Places that can hold the largest sum of logit and noise, found with two bounds on the noise.

    Rounded addition is monotonic: what does not reach the best sum of a few with its bound cannot win.
    """
    head = np.flatnonzero(logits >= logits.max() - _HEAD_WIDTH)
    best = (logits[head] + gumbel(bits[head])).max()
    usual = np.flatnonzero(logits + _USUAL_NOISE >= best)
    rare = np.flatnonzero(bits > _USUAL_BITS)
    rare = rare[logits[rare] + _MOST_NOISE >= best]
    return np.union1d(usual, rare)


# ------------------------------------------------------------------------------------------ filters


def temperature(value: float) -> Filter:
    """Divide the logits: under 1 sharpens the distribution, above 1 flattens it."""
    divisor = np.float32(value)

    def narrow(candidates: Candidates) -> Candidates:
        return Candidates(candidates.ids, candidates.logits / divisor)

    return narrow


def top_k(k: int) -> Filter:
    """Keep the k most probable tokens."""

    def narrow(candidates: Candidates) -> Candidates:
        return _kept(candidates, largest(candidates.logits, k))

    return narrow


def top_p(p: float) -> Filter:
    """Keep the smallest set of most probable tokens that holds at least p (Holtzman et al., 2020).

    Sums are in float64, from the most probable token down. A token with less than (1 − p)/N of the mass
    cannot belong to the set, so only the others are looked at further.
    """

    def narrow(candidates: Candidates) -> Candidates:
        best = candidates.logits.max()
        weights = np.exp(candidates.logits - best)
        total = float(weights.sum(dtype=np.float64))
        likely = np.flatnonzero(weights >= np.float32((1 - p) * total / weights.size))
        logits = candidates.logits[likely]
        bins = ((best - logits) * _BINS_PER_NAT).astype(np.int64)
        return _kept(candidates, likely[_heaviest(logits, bins, weights[likely], p * total)])

    return narrow


def _heaviest(logits: Float32Array, bins: Ids, weights: Float32Array, enough: float) -> Ids:
    """Places, ascending, of the largest logits whose weights add up to `enough`, or of all.

    `bins` counts down from the largest logit in steps of one size; only the logits of the bin in which the
    sum is reached are ever ranked.
    """
    mass = np.cumsum(np.bincount(bins, weights))
    last = int(np.searchsorted(mass, enough))
    kept = bins < last
    edge = np.flatnonzero(bins == last)
    ranked = edge[np.argsort(-logits[edge], kind="stable")]
    before = mass[last - 1] if last else 0.0
    reached = np.searchsorted(before + np.cumsum(weights[ranked], dtype=np.float64), enough)
    kept[ranked[: int(reached) + 1]] = True
    return np.flatnonzero(kept)


def min_p(p: float) -> Filter:
    """Keep the tokens at least p times as probable as the most probable one (Nguyen et al., 2024)."""
    distance = np.float32(math.log(p))

    def narrow(candidates: Candidates) -> Candidates:
        return _kept(candidates, np.flatnonzero(candidates.logits >= candidates.logits.max() + distance))

    return narrow


def _kept(candidates: Candidates, places: Ids) -> Candidates:
    return Candidates(candidates.ids[places], candidates.logits[places])


def largest(values: Float32Array, count: int) -> Ids:
    """Places of the `count` largest values, ascending; among equals the first ones. Never sorts them all."""
    if count >= values.size:
        return np.arange(values.size)
    places = None
    if values.size >= 4 * _GROUPS and 2 * count <= _GROUPS:
        # That many groups have a maximum of at least `bound`, hence at least that many values reach it.
        whole = values[: values.size // _GROUPS * _GROUPS]
        bound = _nth_largest(whole.reshape(-1, _GROUPS).max(axis=0), count)
        places = np.flatnonzero(values >= bound)
        values = values[places]
    bound = _nth_largest(values, count)
    above = np.flatnonzero(values > bound)
    equal = np.flatnonzero(values == bound)[: count - above.size]
    chosen = np.sort(np.concatenate((above, equal)))
    return chosen if places is None else places[chosen]


def _nth_largest(values: Float32Array, n: int) -> np.float32:
    return np.float32(np.partition(values, values.size - n)[values.size - n])
