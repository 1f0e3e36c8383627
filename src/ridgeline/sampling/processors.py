"""From the model's logits to those that a request asked for: the editors, which know its tokens.

A request composes them once, in this order, which is that of vLLM and transformers; those that are off are
left out:

1. the constraint on the answer's form, which comes before all else (`constraints`);
2. logit bias, bad words, ban of the end tokens while fewer than min_tokens were generated;
3. repetition penalty (prompt and output), frequency, then presence penalty (output), DRY (prompt and output);
4. top-n-sigma;
5. temperature, top-k, top-p, min-p (`execution.draw`, also on the device);
6. typical-p, XTC, mirostat (`filters`).

A temperature of 0 takes the best token of what the fourth leaves.

The second and the third are edits of a few logits, made where the token is drawn
(`execution.draw.Adjustment`). Each is a pure function of that sequence's own tokens, in float32, so that its
result never depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ridgeline.execution.draw import Edit
from ridgeline.sampling.history import TokenHistory
from ridgeline.sampling.repetition import BadWords, Dry
from ridgeline.sampling.words import Words
from ridgeline.types import Float32Array, RequestError, SamplingParams

Editor = Callable[[TokenHistory], Edit | None]
"""The edit that a sequence's tokens call for, if any."""

RowAdjuster = Callable[[Float32Array], Float32Array]


def compose_editors(
    params: SamplingParams, end_token_ids: Sequence[int], words: Words | None = None
) -> tuple[Editor, ...]:
    """The editors that `params` switches on; `end_token_ids` are those that would end this request. Raises
    RequestError for those that need `words` where there are none."""
    editors: list[Editor] = []
    if params.logit_bias:
        editors.append(logit_bias(params.logit_bias))
    if params.bad_words:
        editors.append(BadWords(params.bad_words, _known("bad_words", words)))
    if params.min_tokens and end_token_ids:
        editors.append(end_ban(params.min_tokens, end_token_ids))
    if params.repetition_penalty != 1:
        editors.append(repetition_penalty(params.repetition_penalty))
    if params.frequency_penalty:
        editors.append(frequency_penalty(params.frequency_penalty))
    if params.presence_penalty:
        editors.append(presence_penalty(params.presence_penalty))
    if params.dry_multiplier:
        editors.append(Dry(params, _known("dry_multiplier", words)))
    return tuple(editors)


def _known(name: str, words: Words | None) -> Words:
    if words is None:
        raise RequestError(f"{name} cannot be used: this engine knows no tokenizer")
    return words


# ------------------------------------------------------------------------------------------ editors


def logit_bias(bias: Mapping[int, float]) -> Editor:
    """Add a fixed number to the logits of some tokens."""
    ids = np.fromiter(bias.keys(), np.int64, len(bias))
    edit = Edit(ids, amounts=np.fromiter(bias.values(), np.float32, len(bias)))
    return lambda history: edit


def end_ban(min_tokens: int, end_token_ids: Sequence[int]) -> Editor:
    """Forbid the end tokens until `min_tokens` tokens were generated."""
    edit = Edit(np.array(sorted(end_token_ids), np.int64))
    return lambda history: edit if history.generated < min_tokens else None


def repetition_penalty(penalty: float) -> Editor:
    """Divide positive and multiply negative logits of the tokens seen so far (Keskar et al., CTRL, 2019)."""
    return lambda history: Edit(history.ids, factor=penalty)


def frequency_penalty(frequency: float) -> Editor:
    """Subtract `frequency` per time that a token was generated (OpenAI's API)."""
    return lambda history: Edit(history.ids, amounts=-(np.float32(frequency) * history.counts))


def presence_penalty(presence: float) -> Editor:
    """Subtract `presence` from the tokens that were generated (OpenAI's API)."""
    return lambda history: Edit(history.ids, amounts=-(np.float32(presence) * (history.counts > 0)))


# --------------------------------------------------------------------------------------- whole rows


def top_n_sigma(n: float) -> RowAdjuster:
    """Forbid the tokens whose logit is more than n standard deviations under the largest (Tang et al.,
    "Top-nσ: Not All Logits Are You Need", 2024); a temperature changes nothing about which these are."""

    def adjust(logits: Float32Array) -> Float32Array:
        finite = logits[np.isfinite(logits)]
        if not finite.size:
            return logits
        least = float(finite.max()) - n * float(finite.std(dtype=np.float64))
        return np.where(logits >= least, logits, np.float32(-np.inf))

    return adjust
