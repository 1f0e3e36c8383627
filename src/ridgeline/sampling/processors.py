"""From the model's logits to those that a request asked for: the adjusters, which know its tokens.

A request composes them once, in this order, which is that of vLLM and transformers; those that are off are
left out: logit bias, ban of the end tokens while fewer than min_tokens were generated, repetition penalty
(prompt and output), frequency, then presence penalty (output). What remains to be done to the row knows
nothing of the sequence but a position: `execution.draw` has it.

Each is a pure function of one row and of that sequence's own tokens, in float32, so that its result never
depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ridgeline.types import Float32Array, SamplingParams

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


Adjuster = Callable[[Float32Array, TokenHistory], Float32Array]


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
