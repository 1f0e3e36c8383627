"""From the result of a step to its tokens: those that the executor drew, and those chosen here; and to the
scores of the prompt's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ridgeline.execution.draw import NOT_DRAWN, Drawer, Filter, largest
from ridgeline.sampling.constraints import Constraint, DeadEndError
from ridgeline.sampling.filters import compose_filters
from ridgeline.sampling.history import TokenHistory
from ridgeline.sampling.processors import Adjuster, compose_adjusters
from ridgeline.sampling.words import Words
from ridgeline.types import Draw, Float32Array, SamplingParams, Step, StepFuture, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them leaves nothing but the largest logit."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for one row, or the prompt's own with its score, or why there is none.

    `hidden` is the row's hidden state where that was asked for: memory of the step's result.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    hidden: Float32Array | None = None


class Chooser:
    """How one sequence chooses: its adjusters, composed once, and how a token is drawn from what they leave.

    The sequence owns it and reports each generated token to `history` by `append`. Draws depend on
    (seed, choice, position) alone. The prompt that all choices share is scored by the first.

    A `constraint` comes before all else: log-probabilities are those of the tokens that it permits.
    """

    __slots__ = (
        "_draw", "_filters", "_mirostat", "adjusters", "constraint", "history", "logprobs", "prompt_logprobs"
    )  # fmt: skip

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        choice: int,
        prompt: Sequence[int],
        end_token_ids: Sequence[int],
        constraint: Constraint | None = None,
        words: Words | None = None,
    ) -> None:
        greedy = params.temperature < GREEDY_BELOW
        shape = (max(params.top_k, 0), float(params.top_p), float(params.min_p))
        self._draw = (0.0 if greedy else float(params.temperature), *shape, seed % 2**64, choice)
        self.adjusters: tuple[Adjuster, ...] = compose_adjusters(params, end_token_ids, words)
        self._filters, self._mirostat = compose_filters(params, seed % 2**64, choice)
        self.logprobs = params.logprobs
        if self.logprobs is None and params.is_best_of:
            self.logprobs = 0
        self.prompt_logprobs = params.prompt_logprobs if choice == 0 else None
        self.history = TokenHistory(prompt) if self.adjusters else None
        self.constraint = constraint

    @property
    def needs_logits(self) -> bool:
        """Whether the token cannot be chosen without bringing the row's logits to the host."""
        told = self.logprobs is not None or self.constraint is not None
        return told or bool(self.adjusters) or bool(self._filters)

    @property
    def has_ended(self) -> bool:
        """Whether what is constrained is complete."""
        return self.constraint is not None and self.constraint.ended

    def draw(self, position: int) -> Draw:
        """How the token at `position` is drawn from an adjusted row."""
        return Draw(*self._draw, position)

    def append(self, token: int) -> None:
        """Note a token that the sequence has taken on."""
        if self.history is not None:
            self.history.append(token)
        if self._mirostat is not None:
            self._mirostat.append(token)
        if self.constraint is not None:
            self.constraint.append(token)

    def filters(self, position: int) -> list[Filter]:
        """What narrows the draw of the token at `position` further."""
        return [make(position) for make in self._filters]

    def permitted(self, logits: Float32Array) -> Float32Array:
        """The row of those tokens that the constraint permits. Raises DeadEndError where there are none."""
        return logits if self.constraint is None else self.constraint.masked(logits)

    def adjusted(self, logits: Float32Array) -> Float32Array:
        """The row after bias, bans and penalties. Bans that leave nothing of what a constraint permits, such
        as that of the end while there are fewer than min_tokens, give way to it."""
        adjusted = logits
        for adjust in self.adjusters:
            assert self.history is not None
            adjusted = adjust(adjusted, self.history)
        if self.constraint is not None and adjusted.max() == -np.inf:
            return logits
        return adjusted


class SampledRow(Protocol):
    """A sequence one of whose rows has an output."""

    @property
    def chooser(self) -> Chooser: ...

    @property
    def prompt_length(self) -> int: ...

    @property
    def token_ids(self) -> Sequence[int]: ...


class SamplingPlan(Protocol):
    """A step; for each of its outputs, the sequence and the position of the token behind the row. One inside
    the prompt is known and scored, any other is sampled. The outputs of a `pooled` step are hidden states.
    """

    @property
    def step(self) -> Step: ...

    @property
    def sampled(self) -> Sequence[SampledRow]: ...

    @property
    def positions(self) -> Sequence[int]: ...

    @property
    def pooled(self) -> bool: ...


class Sampler:
    """Chooses the tokens of a step. Those that need nothing but their row of logits were drawn by the
    executor; for the others, logits have come to the host.

    A row of logits that has no largest finite value gives an error for its own sequence. No result depends
    on the other rows.
    """

    def __init__(self) -> None:
        self._drawer = Drawer()

    def finish(self, future: StepFuture, plan: SamplingPlan) -> list[Sampled]:
        """Wait for the step and choose a token for each of `plan.sampled`, in their order."""
        result, rows = future.result(), plan.sampled
        if plan.pooled:
            return [Sampled(NOT_DRAWN, hidden=hidden) for hidden in result.logits]
        draws = plan.step.draws or (None,) * len(rows)
        if not len(rows) == len(draws) == len(result.tokens):
            raise ValueError(f"{len(result.tokens)} outputs and {len(draws)} draws for {len(rows)} sequences")
        kept = iter(result.logits)
        return [
            self._chosen(next(kept), row, position) if draw is None else _drawn(token)
            for row, position, draw, token in zip(
                rows, plan.positions, draws, result.tokens.tolist(), strict=True
            )
        ]

    def _chosen(self, logits: Float32Array, row: SampledRow, position: int) -> Sampled:
        try:
            if position < row.prompt_length:
                return _scored(logits, row.token_ids[position], row.chooser.prompt_logprobs or 0)
            return self._choose(logits, row.chooser, position)
        except DeadEndError as error:
            return Sampled(NOT_DRAWN, error=str(error))
        except Exception as error:  # what is wrong with one request must not end the others
            return Sampled(NOT_DRAWN, error=f"sampling failed: {type(error).__name__}: {error}")

    def _choose(self, logits: Float32Array, chooser: Chooser, position: int) -> Sampled:
        logits = chooser.permitted(logits)
        row, further = chooser.adjusted(logits), chooser.filters(position)
        few = None if chooser.constraint is None else chooser.constraint.few
        sampled = _drawn(self._drawer.one(row, chooser.draw(position), further, few))
        if chooser.logprobs is None or sampled.error is not None:
            return sampled
        return Sampled(sampled.token_id, token_logprobs(logits, sampled.token_id, chooser.logprobs))


def _drawn(token: int) -> Sampled:
    if token != NOT_DRAWN:
        return Sampled(token)
    return Sampled(token, error="the largest logit, over the temperature, is not a finite number")


def _scored(logits: Float32Array, token: int, top: int) -> Sampled:
    if math.isfinite(logits.max()):
        return Sampled(token, token_logprobs(logits, token, top))
    return Sampled(token, error="the largest logit of a prompt token is not a finite number")


def token_logprobs(logits: Float32Array, token_id: int, top: int) -> TokenLogprobs:
    """Log-softmax of a raw row at `token_id` and at its `top` most probable tokens, and its rank; what a
    constraint forbids is not among them."""
    highest = float(logits.max())
    normaliser = highest + float(np.log(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))
    best = largest(logits, top) if top else np.empty(0, np.int64)
    ranked = best[np.argsort(-logits[best], kind="stable")]
    pairs = tuple((int(i), float(logits[i]) - normaliser) for i in ranked if logits[i] != -np.inf)
    rank = 1 + int(np.count_nonzero(logits > logits[token_id]))
    return TokenLogprobs(token_id, float(logits[token_id]) - normaliser, pairs, rank)
