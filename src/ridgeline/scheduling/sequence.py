"""One continuation of a request, as the scheduler sees it."""

from __future__ import annotations

from ridgeline.cache.kv import SequencePages
from ridgeline.sampling.sampler import Chooser


class Sequence:
    """A sequence's tokens, how many of them are in the KV cache, and its pages.

    `token_ids` holds prompt and output; the engine appends to it. `computed` counts the leading tokens
    whose keys and values are stored; the scheduler moves it on after a step and back to 0 when it takes
    the pages away. `arrival` numbers sequences in the order in which they came and is their name.
    """

    __slots__ = ("arrival", "chooser", "computed", "pages", "preemptions", "prompt_length", "token_ids")

    def __init__(self, arrival: int, prompt: tuple[int, ...], chooser: Chooser, pages: SequencePages) -> None:
        self.arrival = arrival
        self.token_ids = list(prompt)
        self.prompt_length = len(prompt)
        self.chooser = chooser
        self.pages = pages
        self.computed = 0
        self.preemptions = 0

    @property
    def remaining(self) -> int:
        """Known tokens that have not been run: 1 for a decode, more for a prefill."""
        return len(self.token_ids) - self.computed

    @property
    def generated(self) -> int:
        """Tokens of the output."""
        return len(self.token_ids) - self.prompt_length

    def append(self, token: int) -> None:
        """Take on a sampled token."""
        self.token_ids.append(token)
        self.chooser.append(token)
