"""Perplexity of a text under a model, scored as llama.cpp's llama-perplexity does.

The text's tokens are cut into chunks that do not overlap. In each chunk the rows from its middle on predict
the token after them, so that every scored token has at least half a chunk before it; what the chunk's last
row predicts is not scored. A model that begins with a begin token has it in place of each chunk's first
token. The figure is exp of the mean negative log-likelihood, its error estimate the standard error of that
mean times the figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.config import MAX_OUTPUT_ROWS, pages_for
from ridgeline.execution.base import Executor
from ridgeline.types import NO_STATE, Float32Array, RequestError, Segment, SequenceRows, Step

MIN_CONTEXT = 8
"""Fewest tokens in a chunk: three of them are scored, so that there is a spread to speak of."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The figure after some chunks; `error` is its estimated standard error."""

    perplexity: float
    error: float
    tokens_scored: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Scorer:
    """A loaded program, run on one sequence at a time from page 0 on, and in slot 0 where it has recurrent
    state: nobody else may use its memory.

    `pages` is the pool of each memory group. A group with fewer pages than a chunk has is walked round and
    round: its window ends before the pages that are written again.
    """

    executor: Executor
    handle: Any
    pages: tuple[int, ...]
    max_rows: int

    def negative_log_likelihood(self, tokens: Sequence[int], first: int) -> NDArray[np.float64]:
        """-log p of tokens[first + 1:], each given all tokens before it, in nats."""
        scores = [
            _score(self.executor.run(self.handle, step).result().logits, targets)
            for step, targets in self._steps(tokens, first)
        ]
        return np.concatenate(scores)

    def _steps(self, tokens: Sequence[int], first: int) -> Iterator[tuple[Step, Sequence[int]]]:
        """Steps over the rows that predict something, each with the tokens that its outputs predict."""
        tables = tuple([index % pages for index in range(pages_for(len(tokens)))] for pages in self.pages)
        start, last = 0, len(tokens) - 1
        while start < last:
            scored = start >= first
            rows = min(last - start, min(self.max_rows, MAX_OUTPUT_ROWS) if scored else self.max_rows)
            end = start + rows if scored else min(start + rows, first)
            segment = Segment(tables, length=end)
            outputs = range(end - start) if scored else ()
            state = (0 if start else NO_STATE, 0)
            yield (
                Step((SequenceRows(tokens[start:end], start, (segment,), outputs, state=state),)),
                tokens[start + 1 : end + 1] if scored else (),
            )
            start = end


def _score(logits: Float32Array, targets: Sequence[int]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] of each row; the sum of exponentials is kept in double precision."""
    if not targets:
        return np.empty(0)
    peak = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - peak).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), np.asarray(targets)]
    scores: NDArray[np.float64] = np.log(total) - (chosen.astype(np.float64) - peak[:, 0])
    return scores


def check_context(context: int) -> None:
    """Raise RequestError for chunks that leave too little to score."""
    if context < MIN_CONTEXT:
        raise RequestError(
            f"a chunk of {context} tokens leaves too little to score; accepted: at least {MIN_CONTEXT}"
        )


def score_text(
    scorer: Scorer,
    tokens: Sequence[int],
    context: int,
    chunks: int | None = None,
    begin_token: int | None = None,
    on_chunk: Callable[[Perplexity], None] | None = None,
) -> Perplexity:
    """Perplexity of the first `chunks` chunks of `context` tokens (None: all whole ones).

    `begin_token` is given when the model begins its texts with one. `on_chunk` is told the running figure
    after each chunk. Raises RequestError when the text is shorter than one chunk.
    """
    check_context(context)
    whole = len(tokens) // context
    if whole == 0:
        raise RequestError(f"the text has {len(tokens)} tokens; accepted: at least one chunk of {context}")
    total = square = 0.0
    scored = 0
    result = Perplexity(math.nan, math.nan, 0, 0)
    for index in range(whole if chunks is None else min(chunks, whole)):
        chunk = list(tokens[index * context : (index + 1) * context])
        if begin_token is not None:
            chunk[0] = begin_token
        nll = scorer.negative_log_likelihood(chunk, context // 2)
        total, square, scored = total + float(nll.sum()), square + float(nll @ nll), scored + len(nll)
        result = _figure(total, square, scored, index + 1)
        if on_chunk is not None:
            on_chunk(result)
    return result


def _figure(total: float, square: float, scored: int, chunks: int) -> Perplexity:
    mean = total / scored
    variance = max(square / scored - mean * mean, 0.0)
    error = math.sqrt(variance / (scored - 1))
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, value * error, scored, chunks)
