"""From the logits of a step to its tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ridgeline.sampling.noise import BITS, Address, NoiseSource, gumbel, gumbel_bound
from ridgeline.sampling.processors import (
    GREEDY_BELOW,
    Adjuster,
    Candidates,
    Filter,
    TokenHistory,
    compose_adjusters,
    compose_filters,
    largest,
)
from ridgeline.types import Float32Array, SamplingParams, StepFuture, TokenLogprobs

_PRUNE_ABOVE = 256
"""Candidates beyond which it pays to find out first which of them can still win."""
_HEAD_WIDTH = np.float32(2)
"""Logits this close to the best are drawn first; the best of those bounds the rest."""
_USUAL_BITS = 2**BITS - 2 ** (BITS - 8)
_USUAL_NOISE, _MOST_NOISE = gumbel_bound(_USUAL_BITS), gumbel_bound(2**BITS - 1)
"""The noise of all but one token in 256 is at most 5.54, and none is above 17.33."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for one row, or why there is none."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class Chooser:
    """How one sequence chooses: its processors, composed once, and the address of its noise.

    The sequence owns it and reports each generated token to `history` by `append`. Draws depend on
    (seed, choice, position) alone.
    """

    __slots__ = ("adjusters", "choice", "filters", "greedy", "history", "logprobs", "plain", "seed")

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        choice: int,
        prompt: Sequence[int],
        end_token_ids: Sequence[int],
    ) -> None:
        self.seed = seed % 2**64
        self.choice = choice
        self.adjusters: tuple[Adjuster, ...] = compose_adjusters(params, end_token_ids)
        self.filters: tuple[Filter, ...] = compose_filters(params)
        self.greedy = params.temperature < GREEDY_BELOW
        self.logprobs = params.logprobs
        self.history = TokenHistory(prompt) if self.adjusters else None
        self.plain = self.greedy and not self.adjusters and self.logprobs is None

    def append(self, token: int) -> None:
        """Note a token that the sequence has taken on."""
        if self.history is not None:
            self.history.append(token)

    def adjusted(self, logits: Float32Array) -> Float32Array:
        """The row after bias, bans and penalties."""
        for adjust in self.adjusters:
            assert self.history is not None
            logits = adjust(logits, self.history)
        return logits

    def address(self, position: int) -> Address:
        """Where the noise of the token at `position` comes from."""
        return Address(self.seed, self.choice, position)

    def candidates(self, logits: Float32Array) -> Candidates:
        """What may be drawn from an adjusted row; nothing, when the temperature makes its logits overflow."""
        candidates = Candidates(_vocabulary(logits.size), logits)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found out by the caller
            for narrow in self.filters:
                candidates = narrow(candidates)
        return candidates


@functools.lru_cache(maxsize=4)
def _vocabulary(size: int) -> NDArray[np.int64]:
    ids = np.arange(size)
    ids.setflags(write=False)
    return ids


class SampledRow(Protocol):
    """A sequence whose next token is wanted; it will stand at position len(token_ids)."""

    @property
    def chooser(self) -> Chooser: ...

    @property
    def token_ids(self) -> Sequence[int]: ...


class SamplingPlan(Protocol):
    @property
    def sampled(self) -> Sequence[SampledRow]: ...


class Sampler:
    """Chooses the tokens of a step: argmax of the processed logits, plus keyed Gumbel noise if not greedy.

    Ties go to the lowest token id. A row of logits that has no largest finite value gives an error for its
    own sequence. No result depends on the other rows.
    """

    def __init__(self) -> None:
        self._noise = NoiseSource()

    def finish(self, future: StepFuture, plan: SamplingPlan) -> list[Sampled]:
        """Wait for the step and choose a token for each of `plan.sampled`, in their order."""
        logits = future.result().logits
        rows = plan.sampled
        if len(rows) != len(logits):
            raise ValueError(f"{len(logits)} rows of logits for {len(rows)} sequences")
        if rows and all(row.chooser.plain for row in rows):
            return [_checked(logits[i], token) for i, token in enumerate(logits.argmax(axis=1).tolist())]
        return [self._chosen(logits[i], row) for i, row in enumerate(rows)]

    def _chosen(self, logits: Float32Array, row: SampledRow) -> Sampled:
        try:
            return self._choose(logits, row)
        except Exception as error:  # what is wrong with one request must not end the others
            return Sampled(-1, error=f"sampling failed: {type(error).__name__}: {error}")

    def _choose(self, logits: Float32Array, row: SampledRow) -> Sampled:
        chooser = row.chooser
        adjusted = chooser.adjusted(logits)
        sampled = _checked(adjusted, int(adjusted.argmax()))  # also finds rows that cannot be sampled
        if not chooser.greedy and sampled.error is None:
            candidates = chooser.candidates(adjusted)
            if not candidates.ids.size:
                return Sampled(
                    sampled.token_id, error="logits over temperature overflow; accepted: finite numbers"
                )
            sampled = Sampled(self._draw(candidates, chooser.address(len(row.token_ids))))
        if chooser.logprobs is None or sampled.error is not None:
            return sampled
        return Sampled(sampled.token_id, token_logprobs(logits, sampled.token_id, chooser.logprobs))

    def _draw(self, candidates: Candidates, address: Address) -> int:
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


def _checked(logits: Float32Array, best: int) -> Sampled:
    # argmax returns the place of a NaN if there is one, so one look at the winner checks the whole row.
    if math.isfinite(logits[best]):
        return Sampled(best)
    return Sampled(best, error=f"largest logit is {logits[best]}; accepted: a finite number")


def token_logprobs(logits: Float32Array, token_id: int, top: int) -> TokenLogprobs:
    """Log-softmax of a raw row at `token_id` and at its `top` most probable tokens."""
    highest = float(logits.max())
    normaliser = highest + float(np.log(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))
    best = largest(logits, top) if top else np.empty(0, np.int64)
    ranked = best[np.argsort(-logits[best], kind="stable")]
    pairs = tuple((int(i), float(logits[i]) - normaliser) for i in ranked)
    return TokenLogprobs(token_id, float(logits[token_id]) - normaliser, pairs)
