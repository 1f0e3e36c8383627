"""From the model's logits to those that a request asked for: the adjusters, which know its tokens.

A request composes them once, in this order, which is that of vLLM and transformers; those that are off are
left out:

1. the constraint on the answer's form, which comes before all else (`constraints`);
2. logit bias, bad words, ban of the end tokens while fewer than min_tokens were generated;
3. repetition penalty (prompt and output), frequency, then presence penalty (output), DRY (prompt and output);
4. top-n-sigma;
5. temperature, top-k, top-p, min-p (`execution.draw`, also on the device);
6. typical-p, XTC, mirostat (`filters`).

A temperature of 0 takes the best token of what the fourth leaves.

Each is a pure function of one row and of that sequence's own tokens, in float32, so that its result never
depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ridgeline.sampling.history import TokenHistory
from ridgeline.sampling.repetition import BadWords, Dry
from ridgeline.sampling.words import Words
from ridgeline.types import Float32Array, RequestError, SamplingParams

Adjuster = Callable[[Float32Array, TokenHistory], Float32Array]


def compose_adjusters(
    params: SamplingParams, end_token_ids: Sequence[int], words: Words | None = None
) -> tuple[Adjuster, ...]:
    """The adjusters that `params` switches on; `end_token_ids` are those that would end this request. Raises
    RequestError for those that need `words` where there are none."""
    adjusters: list[Adjuster] = []
    if params.logit_bias:
        adjusters.append(logit_bias(params.logit_bias))
    if params.bad_words:
        adjusters.append(BadWords(params.bad_words, _known("bad_words", words)))
    if params.min_tokens and end_token_ids:
        adjusters.append(end_ban(params.min_tokens, end_token_ids))
    if params.repetition_penalty != 1:
        adjusters.append(repetition_penalty(params.repetition_penalty))
    if params.frequency_penalty or params.presence_penalty:
        adjusters.append(output_penalties(params.frequency_penalty, params.presence_penalty))
    if params.dry_multiplier:
        adjusters.append(Dry(params, _known("dry_multiplier", words)))
    if params.top_n_sigma > 0:
        adjusters.append(top_n_sigma(params.top_n_sigma))
    return tuple(adjusters)


def _known(name: str, words: Words | None) -> Words:
    if words is None:
        raise RequestError(f"{name} cannot be used: this engine knows no tokenizer")
    return words


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


def top_n_sigma(n: float) -> Adjuster:
    """Forbid the tokens whose logit is more than n standard deviations under the largest (Tang et al.,
    "Top-nσ: Not All Logits Are You Need", 2024); a temperature changes nothing about which these are."""

    def adjust(logits: Float32Array, history: TokenHistory) -> Float32Array:
        finite = logits[np.isfinite(logits)]
        if not finite.size:
            return logits
        least = float(finite.max()) - n * float(finite.std(dtype=np.float64))
        return np.where(logits >= least, logits, np.float32(-np.inf))

    return adjust
