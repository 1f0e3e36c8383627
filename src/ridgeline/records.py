"""What is told of a step when it is over, and the recent ones of them; and of the cache's lower tiers."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import msgspec

T = TypeVar("T")

RECENT_STEPS = 1024
"""Steps that are remembered."""

Kind = Literal["decode", "prefill", "mixed", "embed"]


class StepRecord(msgspec.Struct, frozen=True, gc=False):
    """One step. Times are in seconds, `time_s` is since 1970: when the step was planned.

    `number` counts the engine's steps from 0. `rows` were run, of `sequences`; `prompt_tokens` of them were
    prompts', `drafted_tokens` guesses, of which `accepted_tokens` were right, and `decoded_tokens` were
    drawn and kept. `running` and `waiting` sequences there were in all, which held
    `kv_pages` pages, `kv_usage` of the fullest pool (0 to 1).

    `flops` counts all operations, a multiply-add as two, of which `attention_flops` are attention's; `bytes`
    all memory traffic, of which `weight_bytes` are weights and `kv_bytes` keys and values. `elapsed_s` is
    what the executor measured, `predicted_s` what was expected of it, and `bound` what takes most of that;
    of a step with guesses, `unguessed_s` is what was expected of it without them;
    `wall_s` is from planning to results, of steps that overlap the later one's own part. `mbu` and `mfu` are
    shares of the machine's ceilings. What needs ceilings is None where nobody has measured them, and
    `energy_j` where nothing is known of energy.
    """

    number: int
    time_s: float
    kind: Kind
    rows: int
    sequences: int
    prompt_tokens: int
    decoded_tokens: int
    running: int
    waiting: int
    kv_pages: int
    kv_usage: float
    flops: int
    attention_flops: int
    bytes: int
    weight_bytes: int
    kv_bytes: int
    launches: int
    elapsed_s: float
    wall_s: float
    predicted_s: float | None = None
    bound: str | None = None
    mbu: float | None = None
    mfu: float | None = None
    energy_j: float | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    unguessed_s: float | None = None


class DraftTotals(msgspec.Struct):
    """What one drafter has brought since the start. `drafted` and `accepted` count tokens that were verified,
    and of those the ones that were emitted; `passes`, in which one of its trees was verified for a sequence.
    `elapsed_s` is the time that it took to propose, whatever became of it."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    elapsed_s: float = 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a sequence gained in one pass that verified a draft; 1 where there was none."""
        return 1 + self.accepted / self.passes if self.passes else 1.0


class TierRecord(msgspec.Struct, frozen=True):
    """What a lower tier of the KV cache holds, and what came up from it since the engine was made.
    `fetch_seconds` is the time in which it was read."""

    name: str
    pages: int
    bytes: int
    fetched_pages: int
    fetch_seconds: float


class TiersRecord(msgspec.Struct, frozen=True):
    """The lower tiers, the upper one first, and what became of pages since the engine was made.

    For `fetched_tokens` nothing had to be computed. `misses` counts the looks for a prompt's next pages, one
    for each chunk at most, that found none below, and `declined` those that found some which are computed
    sooner. Pages were spilled to the tiers, dropped because too many were on their way, or found damaged.
    """

    tiers: tuple[TierRecord, ...]
    fetched_tokens: int
    misses: int
    declined: int
    spilled_pages: int
    dropped_pages: int
    damaged_pages: int


class Recent(Generic[T]):
    """The last `size` of what was appended, by its place in the order. One thread appends, any may read."""

    __slots__ = ("_slots", "count", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._slots: list[tuple[int, T] | None] = [None] * size

    def append(self, item: T) -> None:
        self._slots[self.count % self.size] = (self.count, item)
        self.count += 1

    def since(self, place: int) -> list[T]:
        """What is still there from that place on."""
        end = self.count
        places = range(max(place, end - self.size, 0), end)
        found = ((at, self._slots[at % self.size]) for at in places)
        # A slot may have been taken for a later item meanwhile.
        return [slot[1] for at, slot in found if slot is not None and slot[0] == at]
