"""Editors that look at the order of a sequence's tokens: words that may not be said, and DRY."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ridgeline.execution.draw import Edit
from ridgeline.sampling.history import TokenHistory
from ridgeline.sampling.words import Words
from ridgeline.types import RequestError, SamplingParams

_LONGEST_MATCH = 50
"""Tokens of a repetition that are counted: the penalty has long been beyond everything."""


class BadWords:
    """Forbid the token that would complete one of some words in the output, as vLLM does: a word is its
    tokens alone, and those that it has after a space where that is another first token and as many.

    Raises RequestError for a word that is no text of this vocabulary.
    """

    def __init__(self, bad_words: Sequence[str], words: Words) -> None:
        self._sequences: list[list[int]] = []
        for word in bad_words:
            alone = words.encode(word.lstrip())
            spaced = words.encode(" " + word.lstrip())
            if not alone:
                raise RequestError(f"bad_words has {word!r}; accepted: words with a text")
            self._sequences.append(alone)
            if spaced[0] != alone[0] and len(spaced) == len(alone):
                self._sequences.append(spaced)

    def __call__(self, history: TokenHistory) -> Edit | None:
        output = history.tokens[history.prompt_length :]
        banned = [
            tokens[-1]
            for tokens in self._sequences
            if len(tokens) == 1 or output[1 - len(tokens) :] == tokens[:-1]
        ]
        return Edit(np.array(banned, np.int64)) if banned else None


class Dry:
    """DRY, "don't repeat yourself" (p-e-w, text-generation-webui's pull request 5677, 2024): a token that
    would go on with a repetition of n ≥ `dry_allowed_length` tokens loses `dry_multiplier` · `dry_base`^(n −
    `dry_allowed_length`).

    A repetition reaches back over the last `dry_penalty_last_n` tokens of prompt and output (−1: all), and
    not over a token in which one of the `dry_sequence_breakers` ends.
    """

    def __init__(self, params: SamplingParams, words: Words) -> None:
        self._multiplier = params.dry_multiplier
        self._base = params.dry_base
        self._allowed = params.dry_allowed_length
        self._reach = params.dry_penalty_last_n
        self._words = words
        self._breakers = tuple(text.encode() for text in params.dry_sequence_breakers)
        self._kept = max(map(len, self._breakers), default=1) - 1
        self._tail = b""  # the text's last bytes, in which a breaker may have begun
        self._tokens = np.zeros(64, np.int64)
        self._breaks = np.zeros(64, bool)
        self._count = 0

    def __call__(self, history: TokenHistory) -> Edit | None:
        for token in history.tokens[self._count :]:
            self._push(token)
        lengths = self._matches()
        if not lengths:
            return None
        ids = np.fromiter(lengths.keys(), np.int64, len(lengths))
        beyond = np.fromiter(lengths.values(), np.float64, len(lengths)) - self._allowed
        with np.errstate(over="ignore"):
            penalties = np.minimum(self._multiplier * self._base**beyond, 1e30)
        return Edit(ids, amounts=-penalties.astype(np.float32))

    def _push(self, token: int) -> None:
        if self._count == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
            self._breaks = np.concatenate((self._breaks, np.zeros_like(self._breaks)))
        text = self._tail + self._words.token_bytes(token)
        # A breaker that ends in the tail ended in an earlier token.
        starts = ((text.rfind(breaker), len(breaker)) for breaker in self._breakers)
        self._tokens[self._count] = token
        self._breaks[self._count] = any(at >= 0 and at + size > len(self._tail) for at, size in starts)
        self._count += 1
        self._tail = text[-self._kept :] if self._kept else b""

    def _matches(self) -> dict[int, int]:
        """For each token that would go on with a repetition that is long enough, the longest one's length."""
        first = 0 if self._reach < 0 else max(0, self._count - self._reach)
        tokens, breaks = self._tokens[first : self._count], self._breaks[first : self._count]
        last = len(tokens) - 1
        if last < 1 or breaks[last]:
            return {}
        ends = np.flatnonzero((tokens[:-1] == tokens[last]) & ~breaks[1:])  # where what is repeated ended
        lengths: NDArray[np.int64] = np.ones(len(ends), np.int64)
        alive = np.arange(len(ends))
        for back in range(1, min(_LONGEST_MATCH, last + 1)):
            if breaks[last - back]:
                break
            alive = alive[ends[alive] >= back]
            alive = alive[tokens[ends[alive] - back] == tokens[last - back]]
            if not alive.size:
                break
            lengths[alive] = back + 1
        longest: dict[int, int] = {}
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
            if length >= self._allowed:
                token = int(tokens[end + 1])
                longest[token] = max(length, longest.get(token, 0))
        return longest
