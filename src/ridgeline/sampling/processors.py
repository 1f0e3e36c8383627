"""From the model's logits to the distribution that a request asked for.

A request composes its processors once, in this order, which is that of vLLM and transformers; those that
are off are left out:

 1. logit bias, 2. ban of the end tokens while fewer than min_tokens were generated,
 3. repetition penalty (prompt and output), 4. frequency, then presence penalty (output) — the adjusters,
    which take the whole row;
 5. temperature, 6. top-k, 7. top-p, 8. min-p — the filters, which narrow a set of candidates.

Each is a pure function of one row and of that sequence's own tokens, in float32, so that its result never
depends on what else is in the batch. Where candidates are ranked, it is by descending logit, then by
ascending id. Greedy requests stop after the adjusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ridgeline.types import Float32Array, SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them leaves nothing but the largest logit."""

_GROUPS = 1024
"""Groups into which a row is dealt to bound its largest values from below."""

_BINS_PER_NAT = np.float32(4)
"""How finely logits are binned by their distance from the largest."""

Ids = NDArray[np.int64]


class TokenHistory:
    """Which tokens a sequence holds and how often it generated each; what the penalties look at."""

    __slots__ = ("_counts", "_ids", "_slots", "generated")

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = sorted(set(prompt))
        self._slots = {token: slot for slot, token in enumerate(distinct)}
        capacity = max(64, 2 * len(distinct))
        self._ids = np.zeros(capacity, np.int64)
        self._ids[: len(distinct)] = distinct
        self._counts = np.zeros(capacity, np.float32)
        self.generated = 0

    def append(self, token: int) -> None:
        """Note a generated token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[slot] = token
        self._counts[slot] += 1
        self.generated += 1

    @property
    def ids(self) -> Ids:
        """The distinct tokens of prompt and output."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Float32Array:
        """How often each of `ids` was generated; 0 for those that only the prompt holds."""
        return self._counts[: len(self._slots)]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may still be chosen: ids in ascending order, and their logits (float32)."""

    ids: Ids
    logits: Float32Array


Adjuster = Callable[[Float32Array, TokenHistory], Float32Array]
Filter = Callable[[Candidates], Candidates]


def compose_adjusters(params: SamplingParams, end_token_ids: Sequence[int]) -> tuple[Adjuster, ...]:
    """The adjusters that `params` switches on; `end_token_ids` are those that would end this request."""
    adjusters: list[Adjuster] = []
    if params.logit_bias:
        adjusters.append(logit_bias(params.logit_bias))
    if params.min_tokens and end_token_ids:
        adjusters.append(end_ban(params.min_tokens, end_token_ids))
    if params.repetition_penalty != 1:
        adjusters.append(repetition_penalty(params.repetition_penalty))
    if params.frequency_penalty or params.presence_penalty:
        adjusters.append(output_penalties(params.frequency_penalty, params.presence_penalty))
    return tuple(adjusters)


def compose_filters(params: SamplingParams) -> tuple[Filter, ...]:
    """The filters that `params` switches on; none for a greedy request."""
    if params.temperature < GREEDY_BELOW:
        return ()
    filters: list[Filter] = []
    if params.temperature != 1:
        filters.append(temperature(params.temperature))
    if params.top_k > 0:
        filters.append(top_k(params.top_k))
    if params.top_p < 1:
        filters.append(top_p(params.top_p))
    if params.min_p > 0:
        filters.append(min_p(params.min_p))
    return tuple(filters)


# ---------------------------------------------------------------------------------------- adjusters


def logit_bias(bias: Mapping[int, float]) -> Adjuster:
    """Add a fixed number to the logits of some tokens."""
    ids = np.fromiter(bias.keys(), np.int64, len(bias))
    amounts = np.fromiter(bias.values(), np.float32, len(bias))

    def adjust(logits: Float32Array, history: TokenHistory) -> Float32Array:
        adjusted = logits.copy()
        adjusted[ids] += amounts
        return adjusted

    return adjust


def end_ban(min_tokens: int, end_token_ids: Sequence[int]) -> Adjuster:
    """Forbid the end tokens until `min_tokens` tokens were generated."""
    ids = np.array(sorted(end_token_ids), np.int64)

    def adjust(logits: Float32Array, history: TokenHistory) -> Float32Array:
        if history.generated >= min_tokens:
            return logits
        adjusted = logits.copy()
        adjusted[ids] = -np.inf
        return adjusted

    return adjust


def repetition_penalty(penalty: float) -> Adjuster:
    """Divide positive and multiply negative logits of the tokens seen so far (Keskar et al., CTRL, 2019)."""
    factor = np.float32(penalty)

    def adjust(logits: Float32Array, history: TokenHistory) -> Float32Array:
        adjusted = logits.copy()
        seen = logits[history.ids]
        adjusted[history.ids] = np.where(seen > 0, seen / factor, seen * factor)
        return adjusted

    return adjust


def output_penalties(frequency: float, presence: float) -> Adjuster:
    """Subtract `frequency` per time that a token was generated, and `presence` once (OpenAI's API)."""

    def adjust(logits: Float32Array, history: TokenHistory) -> Float32Array:
        adjusted = logits.copy()
        counts = history.counts
        penalised = logits[history.ids] - np.float32(frequency) * counts
        adjusted[history.ids] = penalised - np.float32(presence) * (counts > 0)
        return adjusted

    return adjust


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
