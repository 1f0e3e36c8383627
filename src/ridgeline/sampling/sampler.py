"""From the result of a step to its tokens: those that the executor drew, and those chosen here; and to the
scores of the prompt's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from ridgeline.execution.draw import (
    NOT_DRAWN,
    Adjustment,
    Drawer,
    Filter,
    RowDrawer,
    adjusted,
    largest,
    permitted,
)
from ridgeline.sampling.constraints import Constraint, DeadEndError
from ridgeline.sampling.filters import compose_filters
from ridgeline.sampling.history import TokenHistory
from ridgeline.sampling.processors import compose_editors, top_n_sigma
from ridgeline.sampling.words import Words
from ridgeline.types import Draw, Float32Array, SamplingParams, Step, StepFuture, StepResult, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them leaves nothing but the largest logit."""
_GREEDY = Draw()
"""Without noise there is nothing to say but that, whatever the filters and the position are."""


class Sampled(msgspec.Struct, frozen=True, gc=False):
    """The token chosen for one row, or the prompt's own with its score, or why there is none.

    `hidden` is the row's hidden state where that was asked for: memory of the step's result.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    hidden: Float32Array | None = None


class Chooser:
    """How one sequence chooses: its editors, composed once, and how a token is drawn from what they leave.

    The sequence owns it and, where it `listens`, reports each generated token by `append`. Draws depend on
    (seed, choice, position) alone. The prompt that all choices share is scored by the first.

    A `constraint` comes before all else: log-probabilities are those of the tokens that it permits. With
    `needs_logits`, a token cannot be chosen without bringing its row's logits to the host.
    """

    __slots__ = (
        "_draw", "_editors", "_filters", "_mirostat", "_sigma", "constraint", "every_draw", "history",
        "listens", "logprobs", "needs_logits", "prompt_logprobs", "speculation",
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
        self.every_draw = _GREEDY if greedy else None
        self._editors = compose_editors(params, end_token_ids, words)
        self._sigma = top_n_sigma(params.top_n_sigma) if params.top_n_sigma > 0 else None
        self._filters, self._mirostat = compose_filters(params, seed % 2**64, choice)
        self.logprobs = params.logprobs
        if self.logprobs is None and params.is_best_of:
            self.logprobs = 0
        self.prompt_logprobs = params.prompt_logprobs if choice == 0 else None
        self.history = TokenHistory(prompt) if self._editors else None
        self.constraint = constraint
        self.listens = bool(self._editors) or self._mirostat is not None or constraint is not None
        told = self.logprobs is not None or constraint is not None
        self.needs_logits = told or bool(self._editors) or self.narrows_rows
        self.speculation = params.speculation

    @property
    def narrows_rows(self) -> bool:
        """Whether something narrows the draw that only the host has, row by row."""
        return self._sigma is not None or bool(self._filters)

    @property
    def has_ended(self) -> bool:
        """Whether what is constrained is complete."""
        return self.constraint is not None and self.constraint.ended

    def draw(self, position: int) -> Draw:
        """How the token at `position` is drawn from an adjusted row."""
        return self.every_draw or Draw(*self._draw, position)

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

    def adjustment(self) -> Adjustment | None:
        """What is done to the row that comes next. Raises DeadEndError where a constraint permits nothing."""
        mask = None if self.constraint is None else self.constraint.mask()
        if self.history is None:
            return None if mask is None else Adjustment(mask)
        edits = (edit(self.history) for edit in self._editors)
        return Adjustment(mask, tuple(edit for edit in edits if edit is not None))

    def adjusted(self, logits: Float32Array, adjustment: Adjustment | None) -> Float32Array:
        """The row after its adjustment and top-n-sigma."""
        row = logits if adjustment is None else adjusted(logits, adjustment)
        return row if self._sigma is None else self._sigma(row)


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
    the prompt is known and scored, any other is sampled. Those that are not `certain` are behind guesses. The
    outputs of a `pooled` step are hidden states.
    """

    @property
    def step(self) -> Step: ...

    @property
    def sampled(self) -> Sequence[SampledRow]: ...

    @property
    def positions(self) -> Sequence[int]: ...

    @property
    def pooled(self) -> bool: ...

    @property
    def certain(self) -> Iterable[int]: ...


class Sampler:
    """Chooses the tokens of a step. Those that need nothing but their row of logits were drawn by the
    executor; for the others, logits have come to the host, where its drawer draws them together. Filters that
    only the host has are applied row by row.

    A row of logits that has no largest finite value gives an error for its own sequence. No result depends
    on the other rows.
    """

    def __init__(self, drawer: RowDrawer) -> None:
        self._drawer = drawer
        self._rows = Drawer()

    def finish(self, future: StepFuture, plan: SamplingPlan) -> list[Sampled]:
        """Wait for the step and choose a token for each of `plan.sampled`, in their order. Behind guesses,
        only those are chosen yet that the executor drew."""
        result, rows = future.result(), plan.sampled
        if plan.pooled:
            return [Sampled(NOT_DRAWN, hidden=hidden) for hidden in result.logits]
        draws = plan.step.draws or (None,) * len(rows)
        if not len(rows) == len(draws) == len(result.tokens):
            raise ValueError(f"{len(result.tokens)} outputs and {len(draws)} draws for {len(rows)} sequences")
        tokens = result.tokens.tolist()
        sampled = [Sampled(token) if token != NOT_DRAWN else _not_drawn() for token in tokens]
        if NOT_DRAWN in tokens and None in draws:
            self.choose(result, plan, plan.certain, sampled)
        return sampled

    def choose(
        self, result: StepResult, plan: SamplingPlan, outputs: Iterable[int], sampled: list[Sampled]
    ) -> None:
        """Choose what the executor did not draw for some outputs, into their places of `sampled`. What comes
        behind a guess is chosen once its sequence has taken the guess on."""
        draws = plan.step.draws or (None,) * len(sampled)
        rows = dict(zip([i for i, draw in enumerate(draws) if draw is None], range(len(draws)), strict=False))
        mine = [i for i in outputs if draws[i] is None]
        if not mine:
            return
        logits = result.logits
        if len(mine) < len(rows):
            logits = logits[[rows[i] for i in mine]]
        chosen = self._chosen(logits, [(plan.sampled[i], plan.positions[i]) for i in mine])
        for output, sample in zip(mine, chosen, strict=True):
            sampled[output] = sample

    def _chosen(self, logits: Float32Array, wanted: Sequence[tuple[SampledRow, int]]) -> list[Sampled]:
        """What is chosen for each row of logits."""
        prepared = [self._prepared(row, *each) for row, each in zip(logits, wanted, strict=True)]
        together = [each if isinstance(each, _Drawing) else None for each in prepared]
        tokens = self._together(logits, together)
        return [
            self._alone(row, known, token) if isinstance(known, _Drawing) else known
            for row, known, token in zip(logits, prepared, tokens, strict=True)
        ]

    def _prepared(self, logits: Float32Array, row: SampledRow, position: int) -> Sampled | _Drawing:
        """What is chosen for a row, or how it is drawn from together with others."""
        chooser = row.chooser
        try:
            if position < row.prompt_length:
                return _scored(logits, row.token_ids[position], chooser.prompt_logprobs or 0)
            drawing = _Drawing(chooser, chooser.draw(position), chooser.adjustment())
            if not chooser.narrows_rows:
                return drawing
            adjusted_row = chooser.adjusted(logits, drawing.adjustment)
            token = self._rows.one(adjusted_row, drawing.draw, chooser.filters(position))
            return _told(token, logits, drawing)
        except Exception as error:
            return _failed(error)

    def _together(self, logits: Float32Array, drawings: Sequence[_Drawing | None]) -> Sequence[int | None]:
        """A token for each row; None for all of them where that fails, which one of them alone may be the
        cause of."""
        if not any(drawings):
            return [NOT_DRAWN] * len(drawings)
        changes = [None if each is None else each.adjustment for each in drawings]
        try:
            draws = [None if each is None else each.draw for each in drawings]
            tokens: list[int] = self._drawer.rows(logits, draws, changes if any(changes) else ()).tolist()
        except Exception:
            return [None] * len(drawings)
        return tokens

    def _alone(self, logits: Float32Array, drawing: _Drawing, token: int | None) -> Sampled:
        """The token of one row, drawn now where that failed together with others."""
        try:
            if token is None:
                token = int(self._drawer.rows(logits[None], [drawing.draw], [drawing.adjustment])[0])
            return _told(token, logits, drawing)
        except Exception as error:
            return _failed(error)


@dataclass(frozen=True, slots=True)
class _Drawing:
    """A row that is drawn from together with others."""

    chooser: Chooser
    draw: Draw
    adjustment: Adjustment | None


def _not_drawn() -> Sampled:
    return Sampled(NOT_DRAWN, error="the largest logit, over the temperature, is not a finite number")


def _failed(error: Exception) -> Sampled:
    """What is wrong with one request, which must not end the others."""
    if isinstance(error, DeadEndError):
        return Sampled(NOT_DRAWN, error=str(error))
    return Sampled(NOT_DRAWN, error=f"sampling failed: {type(error).__name__}: {error}")


def _told(token: int, logits: Float32Array, drawing: _Drawing) -> Sampled:
    """The token with what the request wants to know about it; log-probabilities are among those tokens that a
    constraint permits."""
    if token == NOT_DRAWN:
        return _not_drawn()
    top = drawing.chooser.logprobs
    if top is None:
        return Sampled(token)
    change = drawing.adjustment
    if change is not None and change.mask is not None:
        logits = permitted(logits, change.mask)
    return Sampled(token, token_logprobs(logits, token, top))


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
