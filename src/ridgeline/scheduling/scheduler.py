"""Which tokens of which sequences run in the next step.

A step is a number of tokens per sequence; there are no phases. Under one budget of tokens, first every
decode takes one, then prefills that have begun take what is left, then new sequences are admitted
(Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024).
Pages are taken chunk by chunk, as they are written.

Everything is in order of arrival. `running` followed by `waiting` is always the queue of arrivals: a
sequence is admitted from the front of `waiting` to the end of `running`, and preempted from the end of
`running` to the front of `waiting`. A preempted sequence loses its pages and keeps its tokens, and is
recomputed. The oldest sequence is therefore never held up by a younger one for good, and since every
sequence fits the pool alone, it always finishes: no starvation, no livelock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from ridgeline.cache.kv import KVCache
from ridgeline.config import PAGE_TOKENS
from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import Draw, Segment, SequenceRows, Step, drawn_token


@dataclass(frozen=True, slots=True)
class Plan:
    """A step, the sequences whose rows it holds, in its order, those whose next token it gives, and the
    positions of those tokens."""

    step: Step
    sequences: tuple[Sequence, ...]
    sampled: tuple[Sequence, ...]
    positions: tuple[int, ...]
    planned_s: float


class _Budget:
    """What one step may still take; made for one call of `schedule` and thrown away."""

    __slots__ = ("chunks", "planned", "tokens")

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.chunks: list[tuple[Sequence, int]] = []
        self.planned: set[int] = set()

    def take(self, sequence: Sequence, tokens: int) -> None:
        self.tokens -= tokens
        self.chunks.append((sequence, tokens))
        self.planned.add(sequence.arrival)


class Scheduler:
    """Owns the queues, and through `cache` the pages of every running sequence.

    `max_num_batched_tokens` bounds the rows of a step, `max_num_seqs` the sequences that run at once.
    """

    def __init__(self, cache: KVCache, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(f"{max_num_seqs} sequences in steps of {max_num_batched_tokens} tokens")
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others; its tokens must fit the cache when it runs alone."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, and free its pages. Removing twice is harmless."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.cache.release(sequence.pages)

    def schedule(self, now_s: float) -> Plan:
        """Choose the next step's rows and take the pages that they are written to.

        The plan is empty only when there is no sequence, or every one awaits a token. Planning again before
        `advance`, as after an interrupt, is sound: the same tokens are simply run again.
        """
        budget = _Budget(self.max_num_batched_tokens)
        self._plan_decodes(budget)
        if self._left_out(budget):
            self._plan_prefills(budget)
        if self.waiting:
            self._admit(budget)
        return _plan_of(budget.chunks, now_s)

    def advance(self, plan: Plan) -> None:
        """Note that the step is launched: its rows' keys and values are stored before any later step reads
        them, and its drawn tokens are there for the next one."""
        for sequence, rows in zip(plan.sequences, plan.step.sequences, strict=True):
            sequence.computed += len(rows.tokens)
        for output, (sequence, draw) in enumerate(zip(plan.sampled, plan.step.draws, strict=True)):
            sequence.drawn = None if draw is None else drawn_token(output)

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues and pages agree."""
        queue = [*self.running, *self.waiting]
        arrivals = [sequence.arrival for sequence in queue]
        assert arrivals == sorted(set(arrivals)), "the queues are out of order of arrival"
        assert len(self.running) <= self.max_num_seqs, "too many sequences are running"
        assert all(s.computed == 0 and s.pages.length == 0 for s in self.waiting), (
            "a sequence waits with pages"
        )
        assert all(s.computed <= s.pages.slots for s in self.running), "tokens were computed without pages"
        self.cache.check_integrity(sequence.pages for sequence in queue)

    def _plan_decodes(self, budget: _Budget) -> None:
        place = 0
        while place < len(self.running):
            sequence = self.running[place]
            place += 1
            if sequence.remaining != 1:
                continue
            self.cache.trim(sequence.pages, sequence.computed)
            # The victim is never one that is planned already: those are older than this sequence.
            while not self.cache.grow(sequence.pages, sequence.computed + 1):
                if self._preempt_youngest() is sequence:
                    return
            budget.take(sequence, 1)

    def _plan_prefills(self, budget: _Budget) -> None:
        place = 0
        while place < len(self.running) and budget.tokens > 0:
            sequence = self.running[place]
            place += 1
            if sequence.arrival in budget.planned or not sequence.remaining:
                continue
            while not self._take_chunk(sequence, budget):
                youngest = self.running[-1]
                if youngest is sequence or youngest.arrival in budget.planned:
                    break  # others go on in this step, and will give pages back
                self._preempt_youngest()

    def _take_chunk(self, sequence: Sequence, budget: _Budget) -> bool:
        """Plan as many of the sequence's tokens as budget and pages allow; False when that is none."""
        self.cache.trim(sequence.pages, sequence.computed)
        count = min(sequence.remaining, budget.tokens)
        reachable = self.cache.reachable_slots(sequence.pages)
        if reachable is not None:
            count = min(count, reachable - sequence.computed)
        if count < 1:
            return False
        self.cache.grow(sequence.pages, sequence.computed + count)
        budget.take(sequence, count)
        return True

    def _admit(self, budget: _Budget) -> None:
        # A running sequence that was left out is short of pages: whoever is younger has to wait.
        while self.waiting and budget.tokens > 0 and not self._left_out(budget):
            if len(self.running) == self.max_num_seqs or not self._has_room(self.waiting[0]):
                return
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            self._take_chunk(sequence, budget)

    def _left_out(self, budget: _Budget) -> bool:
        """Whether a running sequence could have rows in this step and has none."""
        if len(budget.chunks) == len(self.running):
            return False
        return any(s.remaining and s.arrival not in budget.planned for s in self.running)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether the sequence's known tokens would fit beside what the running ones need soon.

        Only a forecast, nothing is reserved: it keeps a sequence from being admitted, preempted, and
        recomputed over and over.
        """
        if not self.running:
            return True
        free = [pool.free_pages for pool in self.cache.pools]
        for other in [sequence, *self.running]:
            soon = len(other.token_ids) + (PAGE_TOKENS if other is not sequence else 0)
            wanted = self.cache.pages_wanted(other.pages, soon)
            free = [left - want for left, want in zip(free, wanted, strict=True)]
        return all(left >= 0 for left in free)

    def _preempt_youngest(self) -> Sequence:
        sequence = self.running.pop()
        self.cache.release(sequence.pages)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)
        return sequence


def _plan_of(chunks: Ordered[tuple[Sequence, int]], now_s: float) -> Plan:
    """The step for these chunks; a token is wanted only of a row that ends its sequence's known tokens."""
    rows = []
    sampled = []
    positions = []
    draws: list[Draw | None] = []
    for sequence, count in chunks:
        start, end = sequence.computed, sequence.computed + count
        outputs: tuple[int, ...] = ()
        if end == sequence.length:
            outputs = (count - 1,)
            sampled.append(sequence)
            positions.append(end)
            chooser = sequence.chooser
            draws.append(None if chooser.needs_logits else chooser.draw(end))
        segments = (Segment(sequence.pages.tables, end),)
        rows.append(SequenceRows(sequence.tokens(start, end), start, segments, outputs))
    planned = tuple(sequence for sequence, _ in chunks)
    return Plan(Step(tuple(rows), tuple(draws)), planned, tuple(sampled), tuple(positions), now_s)
