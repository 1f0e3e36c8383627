"""The workloads of a comparison, by name."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

ACCEPTED = (
    "prefill-TOKENS (prefill-512), decode-1, decode-4096, batch-SEQUENCES (batch-16), cold, "
    "or SEQUENCESxCONTEXT+TOKENS (4x256+32)"
)
DEFAULT = ("prefill-512", "decode-1", "decode-4096", "batch-16", "batch-32", "cold")

_FIRST_ID = 16
"""Ids below are left out of prompts: control tokens stand there in most vocabularies."""


@dataclass(frozen=True, slots=True)
class Cell:
    """`kind` "prefill" reads one prompt of `context` tokens; "decode" decodes `tokens` for each of `batch`
    sequences, from `context` on; "cold" starts a process, which makes one token of a short prompt."""

    name: str
    kind: str
    context: int = 0
    batch: int = 1
    tokens: int = 1

    @property
    def counted_tokens(self) -> int:
        """What the rate is about: tokens read, tokens decoded, starts."""
        return self.context if self.kind == "prefill" else self.batch * self.tokens

    @property
    def unit(self) -> str:
        return "starts/s" if self.kind == "cold" else "tokens/s"

    @property
    def longest(self) -> int:
        """Tokens of context that a sequence needs, with those that it may decode while a batch fills."""
        ahead = self.batch * self.context // 256 + 4 if self.batch > 1 else 4
        return self.context + self.tokens + ahead

    def describe(self) -> str:
        if self.kind == "cold":
            return "process start to one token and exit"
        if self.kind == "prefill":
            return f"one prompt of {self.context} tokens"
        return f"batch {self.batch}, context {self.context} to {self.context + self.tokens}"

    def shortened(self) -> Cell:
        """The same with few tokens, to warm up."""
        return Cell(self.name, self.kind, self.context, self.batch, min(self.tokens, 4))

    def prompts(self, vocabulary: int, seed: int) -> list[list[int]]:
        """Random ids, the same for all systems in a round and others in each round: no prompt cache helps."""
        draw = random.Random(f"{self.name} {seed}")
        return [
            [draw.randrange(_FIRST_ID, vocabulary) for _ in range(self.context)] for _ in range(self.batch)
        ]


def parse(name: str) -> Cell:
    """The cell of a name. Raises ValueError."""
    fixed = {
        "cold": Cell(name, "cold"),
        "decode-1": Cell(name, "decode", 128, 1, 120),
        "decode-4096": Cell(name, "decode", 4096, 1, 32),
    }
    if name in fixed:
        return fixed[name]
    if found := re.fullmatch(r"prefill-(\d{1,6})", name):
        cell = Cell(name, "prefill", int(found[1]))
    elif found := re.fullmatch(r"batch-(\d{1,4})", name):
        cell = Cell(name, "decode", 128, int(found[1]), 64)
    elif found := re.fullmatch(r"(\d{1,4})x(\d{1,6})\+(\d{1,5})", name):
        cell = Cell(name, "decode", int(found[2]), int(found[1]), int(found[3]))
    else:
        raise ValueError(f"work is {name!r}; accepted: {ACCEPTED}")
    if min(cell.context, cell.batch, cell.tokens) < 1:
        raise ValueError(f"work is {name!r}; accepted: numbers from 1")
    return cell
