"""Which tokens of which sequences run in the next step.

A step is a number of tokens per sequence; there are no phases. Under one budget of tokens, first every
decode takes one, then prefills that have begun take what is left, then new sequences are admitted
(Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024).
Pages are taken chunk by chunk, as they are written.

Everything is in order of arrival. `running` followed by `waiting` is always the queue of arrivals: a
sequence is admitted from the front of `waiting` to the end of `running`, and preempted from the end of
`running` to the front of `waiting`. A preempted sequence loses its pages and keeps its tokens; what the
prefix cache does not keep of it is computed again. The oldest sequence is therefore never held up by a
younger one for good, and since every sequence fits the pool alone, it always finishes: no starvation, no
livelock.

Where logits are wanted of many rows, a step has so few of them that their memory stays bounded: chunks are
shortened, or wait. Sequences whose prompt is pooled run through another program than those that go on; where
there are both, steps of the one and of the other take turns.

Nothing is computed twice that can be had: before each chunk of a prefill the cache is asked for what others
have computed meanwhile, and a sequence whose next rows are mostly those of one that is planned already waits
for them, a step at a time. The samples of one request wait until the first has computed their prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from ridgeline.cache.kv import KVCache
from ridgeline.config import MAX_OUTPUT_ROWS, PAGE_TOKENS
from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import Draw, Move, Segment, SequenceRows, Step, drawn_token


@dataclass(frozen=True, slots=True)
class Plan:
    """A step and the sequences whose rows it holds, in its order. For each output, `sampled` has its sequence
    and `positions` the position of the token behind its row: one that is to be sampled, or one of the prompt.

    A `pooled` step is the encoder's, and its outputs are hidden states. `moves` are made before it runs.
    """

    step: Step
    sequences: tuple[Sequence, ...]
    sampled: tuple[Sequence, ...]
    positions: tuple[int, ...]
    planned_s: float
    pooled: bool = False
    moves: tuple[Move, ...] = ()


_Chunk = tuple[Sequence, int, list[int]]
"""A sequence, how many of its next rows run, and which have an output."""


class _Budget:
    """What one step may still take; made for one call of `schedule` and thrown away."""

    __slots__ = ("chunks", "first_pages", "outputs", "planned", "pooled", "tokens")

    def __init__(self, tokens: int, pooled: bool) -> None:
        self.tokens = tokens
        self.pooled = pooled
        self.outputs = MAX_OUTPUT_ROWS  # overdrawn by sequences that want only their last row's
        self.chunks: list[_Chunk] = []
        self.planned: set[int] = set()
        self.first_pages: dict[Hashable, tuple[Sequence, int]] = {}  # of prefills, with their chunks' ends

    def take(self, sequence: Sequence, tokens: int) -> None:
        rows = sequence.outputs(sequence.computed, sequence.computed + tokens)
        self.tokens -= tokens
        self.outputs -= len(rows)
        self.chunks.append((sequence, tokens, rows))
        self.planned.add(sequence.arrival)

    def most_rows(self, sequence: Sequence) -> int:
        """How many of the sequence's next rows tokens and outputs allow."""
        rows = min(sequence.remaining, self.tokens)
        if self.pooled or not sequence.asks_many:
            return rows  # hidden states are small
        before = max(sequence.first_output - sequence.computed, 0)
        return min(rows, before + max(self.outputs, 0))


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
        self._pooled_sequences = 0
        self._pooled_last = False

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others; its tokens must fit the cache when it runs alone."""
        self.waiting.append(sequence)
        sequence.queued = True
        self._pooled_sequences += sequence.pooled

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, and free its pages. Removing twice is harmless."""
        queue = self.running if sequence in self.running else self.waiting
        if sequence in queue:
            queue.remove(sequence)
            self._pooled_sequences -= sequence.pooled
        sequence.queued = False
        self._release(sequence)

    def schedule(self, now_s: float) -> Plan:
        """Choose the next step's rows and take the pages that they are written to.

        The plan is empty only when there is no sequence, or every one awaits a token. Planning again before
        `advance`, as after an interrupt, is sound: the same tokens are simply run again.
        """
        kinds = (not self._pooled_last, self._pooled_last) if self._pooled_sequences else (False,)
        for pooled in kinds:
            budget = _Budget(self.max_num_batched_tokens, pooled)
            self._plan_decodes(budget)
            # However many decodes there are, who asks for many outputs gets on.
            budget.outputs = max(budget.outputs, PAGE_TOKENS)
            if self._left_out(budget):
                self._plan_prefills(budget)
            if self.waiting:
                self._admit(budget)
            if budget.chunks:
                break
        return _plan_of(budget, now_s, self.cache.moves)

    def advance(self, plan: Plan) -> None:
        """Note that the step is launched: its rows' keys and values are stored before any later step reads
        them, and its drawn tokens are there for the next one."""
        for sequence, rows in zip(plan.sequences, plan.step.sequences, strict=True):
            sequence.computed += len(rows.tokens)
            if sequence.computed // PAGE_TOKENS > sequence.pages.shared:
                self.cache.store(sequence.pages, sequence.token_ids, sequence.computed)
        self.cache.moved()
        self._pooled_last = plan.pooled
        draws = plan.step.draws or (None,) * len(plan.sampled)
        for output, (sequence, draw) in enumerate(zip(plan.sampled, draws, strict=True)):
            if plan.positions[output] >= sequence.prompt_length:
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
        assert self._pooled_sequences == sum(s.pooled for s in queue), "pooled sequences were miscounted"
        self.cache.check_integrity(sequence.pages for sequence in queue)

    def _plan_decodes(self, budget: _Budget) -> None:
        place = 0
        while place < len(self.running):
            sequence = self.running[place]
            place += 1
            if sequence.remaining != 1 or sequence.pooled is not budget.pooled:
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
            if not self._may_run(sequence, budget):
                continue
            while not self._take_chunk(sequence, budget):
                youngest = self.running[-1]
                if youngest is sequence or youngest.arrival in budget.planned:
                    break  # others go on in this step, and will give pages back
                self._preempt_youngest()

    def _take_chunk(self, sequence: Sequence, budget: _Budget) -> bool:
        """Plan as many of the sequence's tokens as budget and pages allow; False when no page can be had.

        A sequence for whose outputs this step has no room, or whose rows others run, counts as planned.
        """
        self._restore(sequence)
        self.cache.trim(sequence.pages, sequence.computed)
        waits = self._waits_for_others(sequence, budget) or self._fetches(sequence)
        count = 0 if waits else budget.most_rows(sequence)
        if count < 1:
            budget.planned.add(sequence.arrival)
            return True
        reachable = self.cache.reachable_slots(sequence.pages)
        if reachable is not None:
            count = min(count, reachable - sequence.computed)
        if count < 1:
            return False
        self.cache.grow(sequence.pages, sequence.computed + count)
        if count > 1 and self.cache.prefixes is not None:
            first = self.cache.prefixes.next_page(sequence.pages, sequence.token_ids)
            budget.first_pages.setdefault(first, (sequence, sequence.computed + count))
        budget.take(sequence, count)
        return True

    def _restore(self, sequence: Sequence) -> None:
        """Take on what others have computed of a prefill."""
        if sequence.remaining < 2 or sequence.awaits_sibling:
            return
        sibling = sequence.sibling
        beside = None if sibling is None else sibling.pages
        limit, computed = sequence.restorable, sequence.computed
        found = self.cache.restore(sequence.pages, sequence.token_ids, computed, limit, beside)
        if found > computed and not sequence.preemptions:
            sequence.cached_tokens += found - computed
        sequence.computed = found

    def _fetches(self, sequence: Sequence) -> bool:
        """Whether tokens of the sequence come up from a lower tier: it has no rows until they are there."""
        if sequence.remaining < 2:
            return False
        return self.cache.fetches(sequence.pages, sequence.token_ids, sequence.computed, sequence.restorable)

    def _waits_for_others(self, sequence: Sequence, budget: _Budget) -> bool:
        """Whether rows of this step, or of a sibling's, are at least half of what the sequence would run."""
        if sequence.awaits_sibling:
            return True
        if not budget.first_pages or self.cache.prefixes is None:
            return False
        one = sequence.pages, sequence.token_ids
        first = self.cache.prefixes.next_page(*one)
        if first is None or first not in budget.first_pages:
            return False
        other, end = budget.first_pages[first]
        alike = self.cache.prefixes.alike(one, (other.pages, other.token_ids), end)
        return 2 * (min(alike, sequence.restorable) - sequence.computed) >= sequence.remaining

    def _admit(self, budget: _Budget) -> None:
        # A running sequence that was left out is short of pages: whoever is younger has to wait.
        while self.waiting and budget.tokens > 0 and not self._left_out(budget):
            sequence = self.waiting[0]
            if len(self.running) == self.max_num_seqs or sequence.pooled is not budget.pooled:
                return
            self._restore(sequence)  # pages that are shared need no room
            if not self._has_room(sequence):
                self._release(sequence)
                if not sequence.preemptions:
                    sequence.cached_tokens = 0
                return
            self.running.append(self.waiting.popleft())
            self._take_chunk(sequence, budget)

    def _left_out(self, budget: _Budget) -> bool:
        """Whether a running sequence could have rows in this step and has none."""
        if len(budget.chunks) == len(self.running):
            return False
        return any(self._may_run(s, budget) for s in self.running)

    def _may_run(self, sequence: Sequence, budget: _Budget) -> bool:
        """Whether a running sequence has rows for this kind of step and is not planned."""
        if sequence.pooled is not budget.pooled or sequence.arrival in budget.planned:
            return False
        return sequence.remaining > 0

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
        self._release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)
        return sequence

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence's pages away; the cache keeps those that are full of known tokens."""
        self.cache.store(sequence.pages, sequence.token_ids, sequence.computed)
        self.cache.release(sequence.pages)
        sequence.computed = 0


def _plan_of(budget: _Budget, now_s: float, moves: tuple[Move, ...]) -> Plan:
    """The step for what the budget was spent on."""
    steps, sampled, positions = [], [], []
    draws: list[Draw | None] = []
    for sequence, count, outputs in budget.chunks:
        start, end = sequence.computed, sequence.computed + count
        chooser = sequence.chooser
        for row in outputs:
            sampled.append(sequence)
            positions.append(row + 1)
            on_host = row < sequence.prompt_length - 1 or chooser.needs_logits
            draws.append(None if on_host else chooser.draw(row + 1))
        segments = (Segment(sequence.pages.tables, end),)
        wanted = tuple(row - start for row in outputs)
        steps.append(SequenceRows(sequence.tokens(start, end), start, segments, wanted))
    step = Step(tuple(steps), () if budget.pooled else tuple(draws))
    planned = tuple(sequence for sequence, *_ in budget.chunks)
    return Plan(step, planned, tuple(sampled), tuple(positions), now_s, budget.pooled, moves)
