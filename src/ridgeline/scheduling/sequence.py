"""One continuation of a request, as the scheduler sees it."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any

from ridgeline.cache.table import SequencePages
from ridgeline.sampling.sampler import Chooser
from ridgeline.types import SpeculationParams

if TYPE_CHECKING:
    from ridgeline.scheduling.waiting import Account


class Sequence:
    """A sequence's tokens, how many of them are in the KV cache, and its pages.

    `token_ids` holds prompt and output; the engine appends to it, up to `limit` tokens. `computed` counts
    the leading tokens whose keys and values are stored, or will be by the steps that are launched; the
    scheduler moves it on with a step and back to 0 when it takes the pages away. `drawn` stands for the
    token after `token_ids` while only the executor knows it; `length` counts it too. `arrival` numbers
    sequences in the order in which they came and is their name.

    The row that completes the known tokens always has an output. Of the prompt's rows before its last, those
    from `first_output` on have one too; the engine moves it on as it takes them in, so that rows that are run
    again are not asked twice. `pooled` sequences run through the encoder, and only their prompt is run.

    `owner` is what whoever made the sequence knows it by, until it has ended. `tables` are those of its
    `pages`, and `draw` is how each of its tokens is drawn where that is the same for all: every step asks
    for both.

    Of one request's sequences, which have one prompt, the others name the first as `leader`. `cached_tokens`
    counts those that were found computed before the sequence was first preempted.

    The rest is the scheduler's: `level` is the place of the service class, 0 the highest; `standing` the
    level by which memory and seats are kept; `yields` counts how often in a row, without progress since
    `yielded_length`, it gave way to a higher one; `served` is the step in which it last had rows; `charged`
    counts the tokens of the prompt that are on its tenant's account; `speculation` says how its tokens may be
    guessed, None: not at all.
    """

    __slots__ = (
        "_listener",
        "account",
        "arrival",
        "arrived_s",
        "cached_tokens",
        "charged",
        "chooser",
        "computed",
        "draw",
        "drawn",
        "first_output",
        "leader",
        "length",
        "level",
        "limit",
        "owner",
        "pages",
        "pooled",
        "preemptions",
        "prompt_length",
        "queued",
        "running",
        "served",
        "speculation",
        "standing",
        "tables",
        "token_ids",
        "yielded_length",
        "yields",
    )

    account: Account

    def __init__(
        self,
        arrival: int,
        prompt: tuple[int, ...],
        chooser: Chooser,
        pages: SequencePages,
        limit: int = sys.maxsize,
        pooled: bool = False,
        leader: Sequence | None = None,
    ) -> None:
        self.arrival = arrival
        self.limit = limit
        self.drawn: int | None = None
        self.token_ids = list(prompt)
        self.length = self.prompt_length = len(prompt)
        self.pooled = pooled
        self.first_output = len(prompt) - 1
        self.chooser = chooser
        self.draw = None if chooser.needs_logits else chooser.every_draw
        self._listener = chooser if chooser.listens else None
        self.owner: Any = None
        self.pages = pages
        self.tables = pages.tables
        self.computed = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.leader = leader
        self.level = self.standing = 0
        self.arrived_s = 0.0
        self.charged = 0
        self.queued = self.running = False  # whether the scheduler has it, and whether it has a seat
        self.served = -1
        self.speculation: SpeculationParams | None = None
        self.yields = self.yielded_length = 0

    @property
    def tenant(self) -> str:
        """Whose it is: what was computed or said for one is not used for another."""
        return self.pages.scope.salt

    @property
    def forced(self) -> Many[int] | None:
        """The next tokens, as far as the form of the answer leaves no choice and that is known by now; None
        where it has no form."""
        constraint = self.chooser.constraint
        return None if constraint is None else constraint.forced()

    @property
    def remaining(self) -> int:
        """Tokens that can be run and have not been: 1 for a decode, more for a prefill, 0 while the next
        token is awaited. The last token of all is never run."""
        return min(self.length, self.limit - 1) - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        """Who has the lesser one keeps its seat and its pages before others."""
        return self.standing, self.arrival

    @property
    def restorable(self) -> int:
        """How many leading tokens may be taken from a cache: one row at least is run, and every row whose
        output is wanted."""
        return min(self.length - 1, self.first_output) if self.asks_many else self.length - 1

    @property
    def sibling(self) -> Sequence | None:
        """The sequence that computes, or has computed, this one's prompt, while that is all it is made of."""
        leader = self.leader
        if leader is None or not leader.running or self.length > self.prompt_length:
            return None
        return leader

    @property
    def awaits_sibling(self) -> bool:
        sibling = self.sibling
        return sibling is not None and sibling.computed < self.restorable

    def tokens(self, begin: int, end: int) -> Many[int]:
        """Some of the tokens, as a step wants them."""
        drawn = self.drawn
        if drawn is not None and end == self.length:
            return (*self.token_ids[begin : end - 1], drawn) if begin < end - 1 else (drawn,)
        return self.token_ids[begin:end] if begin < end - 1 else (self.token_ids[begin],)

    @property
    def asks_many(self) -> bool:
        """Whether outputs are wanted of rows before the prompt's last."""
        return self.first_output < self.prompt_length - 1

    def outputs(self, begin: int, end: int) -> Many[int]:
        """Those of the rows from `begin` to `end` that have an output, counted from `begin`."""
        last = (end - 1 - begin,) if end == self.length else ()
        if begin >= self.prompt_length:
            return last
        return (*range(max(self.first_output - begin, 0), min(end, self.prompt_length - 1) - begin), *last)

    @property
    def generated(self) -> int:
        """Tokens of the output."""
        return len(self.token_ids) - self.prompt_length

    def await_token(self, token: int | None) -> None:
        """The next token is drawn on the device, and `token` stands for it; None where it is not."""
        self.drawn = token
        self.length = len(self.token_ids) + (token is not None)

    def append(self, token: int) -> None:
        """Take on a sampled token."""
        known = self.token_ids
        known.append(token)
        self.length = length = len(known)
        if self.computed < length:  # else it has been run, and drawn comes after it
            self.drawn = None
        elif self.drawn is not None:
            self.length = length + 1
        if self._listener is not None:
            self._listener.append(token)
