"""What a sequence has said so far, as editors look at it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ridgeline.types import Float32Array

Ids = NDArray[np.int64]


class TokenHistory:
    """The tokens of a sequence, and how often it generated each; what penalties and bans look at."""

    __slots__ = ("_counts", "_ids", "_slots", "generated", "prompt_length", "tokens")

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = sorted(set(prompt))
        self._slots = {token: slot for slot, token in enumerate(distinct)}
        capacity = max(64, 2 * len(distinct))
        self._ids = np.zeros(capacity, np.int64)
        self._ids[: len(distinct)] = distinct
        self._counts = np.zeros(capacity, np.float32)
        self.generated = 0
        self.tokens = list(prompt)
        self.prompt_length = len(self.tokens)

    def append(self, token: int) -> None:
        """Note a generated token."""
        self.tokens.append(token)
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
