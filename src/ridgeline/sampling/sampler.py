"""From the logits of a step to its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ridgeline.sampling import noise
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
_HEAD_WIDTH = 2.0
"""Logits this close to the best are drawn first; the best of those bounds the rest."""


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

    def candidates(self, logits: Float32Array) -> Candidates:
        """What may be drawn from an adjusted row."""
        candidates = Candidates(np.arange(logits.size), logits)
        for narrow in self.filters:
            candidates = narrow(candidates)
        return candidates


class SampledRow(Protocol):
    """A sequence whose next token is wanted; it will stand at position len(token_ids)."""

    @property
    def chooser(self) -> Chooser: ...

    @property
    def token_ids(self) -> Sequence[int]: ...


class SamplingPlan(Protocol):
    @property
    def sampled(self) -> Sequence[SampledRow]: ...


@dataclass(frozen=True, slots=True)
class _Draw:
    """A row whose token is drawn at random."""

    row: int
    seed: int
    choice: int
    position: int
    candidates: Candidates


class Sampler:
    """Chooses the tokens of a step: argmax of the processed logits, plus keyed Gumbel noise if not greedy.

    Ties go to the lowest token id. A row of logits that has no largest finite value gives an error for its
    own sequence. No result depends on the other rows.
    """

    def finish(self, future: StepFuture, plan: SamplingPlan) -> list[Sampled]:
        """Wait for the step and choose a token for each of `plan.sampled`, in their order."""
        logits = future.result().logits
        rows = plan.sampled
        if len(rows) != len(logits):
            raise ValueError(f"{len(logits)} rows of logits for {len(rows)} sequences")
        if all(row.chooser.plain for row in rows):
            best = logits.argmax(axis=1) if len(rows) else []
            return [_checked(logits[i], int(token)) for i, token in enumerate(best)]
        sampled: list[Sampled] = []
        draws: list[_Draw] = []
        for i, row in enumerate(rows):
            sampled.append(_choose(logits[i], row, i, draws))
        for draw, token in zip(draws, _drawn(draws), strict=True):
            sampled[draw.row] = Sampled(token)
        return [
            _with_logprobs(s, row.chooser, logits[i])
            for i, (s, row) in enumerate(zip(sampled, rows, strict=True))
        ]


def _choose(logits: Float32Array, row: SampledRow, index: int, draws: list[_Draw]) -> Sampled:
    """The greedy choice, which also finds rows that cannot be sampled; a random one is queued in `draws`."""
    chooser = row.chooser
    adjusted = chooser.adjusted(logits)
    greedy = _checked(adjusted, int(adjusted.argmax()))
    if not chooser.greedy and greedy.error is None:
        candidates = chooser.candidates(adjusted)
        if not candidates.ids.size:
            return Sampled(
                greedy.token_id, error="logits over temperature overflow; accepted: finite numbers"
            )
        draws.append(_Draw(index, chooser.seed, chooser.choice, len(row.token_ids), candidates))
    return greedy


def _checked(logits: Float32Array, best: int) -> Sampled:
    # argmax returns the place of a NaN if there is one, so one look at the winner checks the whole row.
    if np.isfinite(logits[best]):
        return Sampled(best)
    return Sampled(best, error=f"largest logit is {logits[best]}; accepted: a finite number")


def _drawn(draws: Sequence[_Draw]) -> list[int]:
    """Gumbel-max for each draw (Maddison et al., "A* Sampling", 2014); the noise of all is made at once."""
    large = [i for i, draw in enumerate(draws) if draw.candidates.ids.size > _PRUNE_ABOVE]
    survivors = [draw.candidates for draw in draws]
    heads = [_near_best(survivors[i]) for i in large]
    for i, perturbed in zip(large, _perturbed([draws[i] for i in large], heads), strict=True):
        # Rounded addition is monotonic: what cannot reach the bound with the largest noise cannot win.
        everyone = survivors[i]
        reach = everyone.logits + np.float32(noise.GUMBEL_MAX)
        survivors[i] = _subset(everyone, reach >= perturbed.max())
    noisy = _perturbed(draws, survivors)
    return [int(s.ids[values.argmax()]) for s, values in zip(survivors, noisy, strict=True)]


def _near_best(candidates: Candidates) -> Candidates:
    return _subset(candidates, candidates.logits >= candidates.logits.max() - np.float32(_HEAD_WIDTH))


def _subset(candidates: Candidates, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Candidates:
    return Candidates(candidates.ids[mask], candidates.logits[mask])


def _perturbed(draws: Sequence[_Draw], sets: Sequence[Candidates]) -> list[Float32Array]:
    """Logits plus noise, float32, for each set of candidates."""
    if not draws:
        return []
    sizes = [s.ids.size for s in sets]

    def spread(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        return np.repeat(np.array(values, np.uint64), sizes)

    ids = np.concatenate([s.ids for s in sets])
    noisy = np.concatenate([s.logits for s in sets]) + noise.gumbel(
        spread([d.seed for d in draws]),
        spread([d.choice for d in draws]),
        spread([d.position for d in draws]),
        noise.TARGET,
        ids,
    )
    return np.split(noisy, np.cumsum(sizes)[:-1])


def _with_logprobs(sampled: Sampled, chooser: Chooser, logits: Float32Array) -> Sampled:
    if chooser.logprobs is None or sampled.error is not None:
        return sampled
    return Sampled(sampled.token_id, token_logprobs(logits, sampled.token_id, chooser.logprobs))


def token_logprobs(logits: Float32Array, token_id: int, top: int) -> TokenLogprobs:
    """Log-softmax of a raw row at `token_id` and at its `top` most probable tokens."""
    highest = float(logits.max())
    normaliser = highest + float(np.log(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))
    best = largest(logits, top) if top else np.empty(0, np.int64)
    ranked = best[np.argsort(-logits[best], kind="stable")]
    pairs = tuple((int(i), float(logits[i]) - normaliser) for i in ranked)
    return TokenLogprobs(token_id, float(logits[token_id]) - normaliser, pairs)
