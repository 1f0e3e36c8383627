"""Drawing a token from a row of logits: the `Sample` operation's arithmetic, in NumPy.

What a request changes about its row comes first (`Adjustment`). Then, in this order, which is that of vLLM
and transformers: temperature, top-k, top-p, min-p, each a filter that narrows a set of candidates; then the
argmax of logits plus keyed Gumbel noise (`execution.noise`). Filters that are off are left out, and a
temperature of 0 is the argmax of the logits themselves.

Everything is in float32 but where it says otherwise, and depends on one row alone. Where candidates are
ranked, it is by descending logit, then by ascending id. The shares that top-p adds up are whole numbers
(`weights`), so that their sums are the same in any order. `native.Drawer` draws the same tokens, bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

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

_WEIGHT_BITS = 30
_WEIGHT_REACH = 22.0
_EXP_TERMS = tuple(
    np.float32(term)
    for term in (0.5, 0.166666657, 0.0416662954, 0.00833349768, 0.00139447593, 0.000197902482)
)

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may still be chosen: ids in ascending order, and their logits (float32)."""

    ids: Ids
    logits: Float32Array


Filter = Callable[[Candidates], Candidates]


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """A change to the logits of `ids`, int64 (N,), none of them twice: `amounts`, float32 (N,), are added; or
    those that are positive are divided by `factor` and the others multiplied with it; or, where there is
    neither, they become −inf."""

    ids: Ids
    amounts: Float32Array | None = None
    factor: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Adjustment:
    """What is done to a row before its token is drawn. Only tokens with a bit in `mask` may be, int32
    (vocabulary / 32, rounded up), the lowest bit first; what it forbids is not looked at. Then come the
    edits, in their order; where they leave nothing of what a mask permits, they are not made."""

    mask: Int32Array | None = None
    edits: tuple[Edit, ...] = ()


class RowDrawer(Protocol):
    """Draws a token for each row of logits, float32 (rows, vocabulary): int32 (rows,)."""

    def rows(
        self,
        logits: Float32Array,
        draws: Sequence[Draw | None],
        adjustments: Sequence[Adjustment | None] = (),
    ) -> Int32Array:
        """NOT_DRAWN where a row's draw is None, or where it has no largest finite logit, over its temperature
        too. No draws at all are draws that are all None, as with adjustments. Logits are as before when it
        returns, but must be writable where there are adjustments; no row's token depends on the others."""


class Drawer:
    """The rule as it is written down here. It remembers nothing between calls; it is kept only because its
    noise is slow to make."""

    __slots__ = ("_noise",)

    def __init__(self) -> None:
        self._noise = NoiseSource()

    def rows(
        self,
        logits: Float32Array,
        draws: Sequence[Draw | None],
        adjustments: Sequence[Adjustment | None] = (),
    ) -> Int32Array:
        """As `RowDrawer` says."""
        rows = len(logits)
        each = zip(logits, draws or (None,) * rows, adjustments or (None,) * rows, strict=True)
        tokens = [
            NOT_DRAWN if draw is None else self.one(row if change is None else adjusted(row, change), draw)
            for row, draw, change in each
        ]
        return np.array(tokens, np.int32)

    def one(self, logits: Float32Array, draw: Draw, further: Sequence[Filter] = ()) -> int:
        """The token of one row; NOT_DRAWN if it has no largest finite logit, over its temperature too.
        Filters that are not the draw's own come after those that are."""
        best = int(logits.argmax())
        # argmax returns the place of a NaN if there is one, so one look at the winner checks the whole row.
        if not math.isfinite(logits[best]):
            return NOT_DRAWN
        if draw.greedy:
            return best
        with np.errstate(over="ignore", divide="ignore"):
            if not math.isfinite(logits[best] / np.float32(draw.temperature)):
                return NOT_DRAWN
        found = candidates(logits, draw)
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


def adjusted(logits: Float32Array, adjustment: Adjustment) -> Float32Array:
    """The row after an adjustment."""
    masked = logits if adjustment.mask is None else permitted(logits, adjustment.mask)
    row = masked
    for edit in adjustment.edits:
        row = edited(row, edit)
    if adjustment.mask is not None and row.max() == -np.inf:
        return masked
    return row


def permitted(logits: Float32Array, mask: Int32Array) -> Float32Array:
    """The row of the tokens that have a bit in a mask; the others are −inf."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=logits.size)
    return np.where(bits == 1, logits, np.float32(-np.inf))


def edited(logits: Float32Array, edit: Edit) -> Float32Array:
    """The row after an edit."""
    row = logits.copy()
    if edit.amounts is not None:
        row[edit.ids] += edit.amounts
    elif edit.factor is not None:
        seen, factor = logits[edit.ids], np.float32(edit.factor)
        row[edit.ids] = np.where(seen > 0, seen / factor, seen * factor)
    else:
        row[edit.ids] = -np.inf
    return row


def undrawn(logits: Float32Array, draws: Sequence[Draw | None]) -> Float32Array:
    """The rows of logits (outputs, vocabulary) that the host wants to see."""
    if not any(draws):
        return logits
    left = [i for i, draw in enumerate(draws) if draw is None]
    if not left:
        return logits[:0]
    if left[-1] - left[0] == len(left) - 1:
        return logits[left[0] : left[-1] + 1]
    return logits[left]


def candidates(logits: Float32Array, draw: Draw) -> Candidates:
    """What may be drawn from a row whose largest logit is finite, over the temperature too."""
    found = Candidates(_vocabulary(logits.size), logits)
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


def weights(distances: Float32Array) -> Floats:
    """e^distance, for distances from 0 down, in units of 2⁻³⁰ and rounded to whole numbers, so that sums of
    them are exact and have no order.

    Each operation is rounded to float32 by itself: any machine that has them in this order gives the same
    numbers. They are good to 3e-7 of themselves and half a unit, and 0 under −21.5.
    """
    distance = np.maximum(distances, np.float32(-_WEIGHT_REACH))
    power = np.rint(distance * np.float32(1.44269504))
    # ln 2 in two parts, of which the first has so few bits that its product with the power is exact.
    rest = (distance - power * np.float32(0.693145752)) - power * np.float32(1.42860677e-6)
    series = np.full_like(rest, _EXP_TERMS[-1])
    for term in _EXP_TERMS[-2::-1]:
        series = series * rest + term
    scaled = np.ldexp((rest * rest * series + rest) + np.float32(1), power.astype(np.int32) + _WEIGHT_BITS)
    whole: Floats = np.trunc(scaled + np.float32(0.5)).astype(np.float64)
    return whole


def top_p(p: float) -> Filter:
    """Keep the smallest set of most probable tokens that holds at least p (Holtzman et al., 2020), by their
    `weights`.

    A token with less than (1 − p)/N of the mass cannot belong to the set, so only the others are looked at
    further.
    """

    def narrow(candidates: Candidates) -> Candidates:
        best = candidates.logits.max()
        shares = weights(candidates.logits - best)
        total = float(shares.sum())
        likely = np.flatnonzero(shares >= (1 - p) * total / shares.size * 0.999)
        logits = candidates.logits[likely]
        bins = ((best - logits) * _BINS_PER_NAT).astype(np.int64)
        return _kept(candidates, likely[_heaviest(logits, bins, shares[likely], p * total)])

    return narrow


def _heaviest(logits: Float32Array, bins: Ids, weights: Floats, enough: float) -> Ids:
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
    reached = np.searchsorted(before + np.cumsum(weights[ranked]), enough)
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
