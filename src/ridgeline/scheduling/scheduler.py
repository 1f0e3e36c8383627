"""Which tokens of which sequences run in the next step.

A step is a number of tokens per sequence; there are no phases. Service classes take their rows one after the
other, the highest first, and in each first every decode takes one, then prefills take what is left (Agrawal
et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024), those of the
tenant first that has had the least, and new sequences get seats in the same order (`waiting`). Pages are
taken chunk by chunk, as they are written.

Every class that runs gets on in every step: no ready decode of the highest class in it is ever skipped, and
lower ones keep a share, of the step's tokens and, where there is a `pace`, of its time. Where that is not
enough for all decodes of a lower class, those that have waited for the longest are next.

Seats and pages are kept by rank (`preemption`): a preempted sequence loses its pages and keeps its tokens.
Its pages stay in the prefix cache until they are needed, and then go to a lower tier, if there is one. When
it has a seat again they come back, where that is predicted to be faster than computing; meanwhile it keeps
the seat, and no newcomer gets the room that it needs. Nobody waits for ever: those that are passed by too
often, or give way too often, become overdue and rank first, the oldest of all.

Where logits are wanted of many rows, a step has so few of them that their memory stays bounded: chunks are
shortened, or wait. Sequences whose prompt is pooled run through another program than those that go on; where
there are both, steps of the one and of the other take turns.

Nothing is computed twice that can be had: before each chunk of a prefill the cache is asked for what others
have computed meanwhile, and a sequence whose next rows are mostly those of one that is planned already waits
for them, a step at a time. The samples of one request wait until the first has computed their prompt.

Where sequences have recurrent state, chunks of prompts end where others can go on from it.
"""

from __future__ import annotations

from operator import attrgetter

from ridgeline.cache.kv import KVCache
from ridgeline.config import PAGE_TOKENS
from ridgeline.scheduling.budget import Budget
from ridgeline.scheduling.drafting import Drafting
from ridgeline.scheduling.pace import Pace, StepPace
from ridgeline.scheduling.plan import Drafted, Plan, plan_of
from ridgeline.scheduling.preemption import last_to_plan, lower_classes, note_yield, sit_down, stand_up
from ridgeline.scheduling.sequence import Sequence
from ridgeline.scheduling.waiting import OUTPUT_WEIGHT, WaitingLine
from ridgeline.types import SERVICE_CLASSES, ServiceClass, drawn_token

TOKEN_SHARE = 8
"""One token in so many of a step's is kept for the prompts of lower classes."""
_LOOK_AGAIN = 16
"""Steps after which a sequence that found no room looks for it again though nobody has left."""

_LEVELS = {name: level for level, name in enumerate(SERVICE_CLASSES)}
_longest_unserved = attrgetter("served", "arrival")


class Scheduler:
    """Owns the queues, and through `cache` the pages of every running sequence.

    `max_num_batched_tokens` bounds the rows of a step, `max_num_seqs` the sequences that run at once; those
    that the cache has state for are not exceeded. With a `pace`, streams keep their class's time between
    tokens, as far as steps can be predicted. With `drafting`, decodes run with guesses of what comes next
    behind their rows, but not of a recurrent model: what was wrong could not be taken back.
    """

    def __init__(
        self,
        cache: KVCache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        pace: Pace | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(f"{max_num_seqs} sequences in steps of {max_num_batched_tokens} tokens")
        self.cache = cache
        self.max_num_seqs = min(max_num_seqs, cache.max_sequences or max_num_seqs)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.pace = pace
        self.drafting = drafting
        self.running: list[Sequence] = []  # by rank
        self.waiting = WaitingLine()
        self.preemptions = 0
        self.steps = 0
        # By arrival, how many tokens lay in their places before guesses that were right were to move there.
        self._moving: dict[int, int] = {}
        self._pooled_sequences = 0
        self._pooled_last = False
        self._departures = 0  # of sequences from their pages
        self._roomless: tuple[Sequence, int, int] | None = None  # who found no room after which departure

    def add(
        self,
        sequence: Sequence,
        service_class: ServiceClass = "interactive",
        tenant: str = "",
        now_s: float = 0.0,
    ) -> None:
        """Queue a new sequence, which came last of all; its tokens must fit the cache when it runs alone."""
        sequence.level = sequence.standing = _LEVELS[service_class]
        sequence.arrived_s = now_s
        sequence.queued = True
        if self.drafting is not None and not sequence.pooled and self.cache.states is None:
            sequence.speculation = self.drafting.wanted(sequence.chooser.speculation)
        self.waiting.enter(sequence, tenant)
        self._pooled_sequences += sequence.pooled

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, and free its pages. Removing twice is harmless."""
        was_queued, sequence.queued = sequence.queued, False
        if was_queued:
            self._pooled_sequences -= sequence.pooled
            if sequence.running:
                stand_up(self.running, sequence)
                self.waiting.leave(sequence, waits=False)
            else:
                self.waiting.leave(sequence, waits=True)
        self._release(sequence)
        if was_queued and self.drafting is not None:
            self.drafting.forget(sequence)  # last, as keeping its output may take memory that is not there

    def schedule(self, now_s: float) -> Plan:
        """Choose the next step's rows and take the pages that they are written to.

        The plan is empty only when there is no sequence, or every one awaits a token. Planning again before
        `advance`, as after an interrupt, is sound: the same tokens are simply run again.
        """
        kinds = (not self._pooled_last, self._pooled_last) if self._pooled_sequences else (False,)
        for pooled in kinds:
            budget = self._spend(pooled, now_s)
            if budget.chunks:
                break
        if self.cache.states is not None:
            for sequence, count, _ in budget.chunks:
                self.cache.states.plan(sequence.pages, sequence.computed, sequence.computed + count)
        elif self.drafting is not None and not budget.pooled:
            self._draft(self.drafting, budget)
        recurrent = self.cache.states is not None
        return plan_of(budget.chunks, budget.pooled, now_s, self.cache.moves, budget.drafts, recurrent)

    def advance(self, plan: Plan) -> None:
        """Note that the step is launched: its rows' keys and values are stored before any later step reads
        them, and its drawn tokens are there for the next one."""
        self.steps += 1
        recurrent = self.cache.states is not None
        guesses = {each.sequence.arrival: len(each.tree) for each in plan.drafted}
        draws, output, steps = plan.step.draws, -1, self.steps
        for sequence, rows in zip(plan.sequences, plan.step.sequences, strict=True):
            sequence.served = steps
            before, count = sequence.computed, len(rows.tokens)
            guessed = guesses.get(sequence.arrival) if guesses else None
            sequence.computed = computed = before + count - (guessed or 0)
            if recurrent:
                self.cache.launched(sequence.pages, sequence.token_ids, before, computed)
            # A page's last token is known a step after its row was launched at the latest; guesses that were
            # right move on without a launch.
            elif (computed % PAGE_TOKENS <= count or sequence.speculation is not None) and (
                computed // PAGE_TOKENS > sequence.pages.shared
            ):
                self.cache.store(sequence.pages, sequence.token_ids, computed)
            output += len(rows.outputs)
            # Of a sequence's outputs only the last is behind its prompt, but for those of guesses: who has
            # any awaits what becomes of them.
            if rows.outputs and guessed is None and plan.positions[output] >= sequence.prompt_length:
                sequence.account.used += OUTPUT_WEIGHT
                # Guesses only come behind a token that is known: who may have any is not launched ahead.
                ahead = sequence.speculation is None and draws and draws[output] is not None
                sequence.await_token(drawn_token(output) if ahead else None)
        self.cache.moved()
        self._moving.clear()
        self._pooled_last = plan.pooled

    def settle(self, drafted: Drafted, nodes: list[int]) -> None:
        """These guesses of a step were right, and the sequence has taken them on: their keys and values are
        its own, and those of the others as if they had never been. Settling twice is harmless."""
        sequence = drafted.sequence
        if self.drafting is not None:
            self.drafting.verified(drafted, nodes)
        if sequence.preemptions != drafted.preemptions or sequence.computed != drafted.start + 1:
            return  # it has lost its pages meanwhile, or was settled before an interrupt
        if nodes != [*range(len(nodes))]:
            self._moving[sequence.arrival] = drafted.start + 1
            self.cache.compact(sequence.pages, drafted.start + 1, nodes)
        sequence.account.used += OUTPUT_WEIGHT * (1 + len(nodes))
        sequence.computed += len(nodes)

    def relaunch(self, plan: Plan) -> None:
        """An interrupt struck while a step and its moves were launched, and nobody knows which were made.
        Those of right guesses cannot be made twice: these tokens are run again instead. Nor may states move
        on twice: the step's sequences begin again."""
        for sequence in self.running:
            sequence.computed = min(sequence.computed, self._moving.get(sequence.arrival, sequence.computed))
        self._moving.clear()
        self.cache.drop_compactions()
        if self.cache.states is not None:
            for sequence in plan.sequences:
                self.cache.states.drop(sequence.pages)
                self._release(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues and pages agree."""
        waiting = list(self.waiting)
        ranks = [sequence.rank for sequence in self.running]
        assert ranks == sorted(set(ranks)), "the running sequences are out of order"
        assert len(self.running) <= self.max_num_seqs, "too many sequences are running"
        assert all(s.running and s.queued for s in self.running), "a sequence runs that has no seat"
        assert all(s.queued for s in waiting), "a sequence waits that is gone"
        assert all(s.computed == 0 and s.pages.length == 0 for s in waiting), "a sequence waits with pages"
        assert all(s.computed <= s.pages.slots for s in self.running), "tokens were computed without pages"
        queue = [*self.running, *waiting]
        if self.cache.states is not None:
            stateful = all((s.computed in s.pages.states) == (s.computed > 0) for s in queue)
            assert stateful, "a sequence has computed tokens and no state, or a state and no tokens"
        assert self._pooled_sequences == sum(s.pooled for s in queue), "pooled sequences were miscounted"
        self.waiting.check_integrity(self.running)
        self.cache.check_integrity(sequence.pages for sequence in queue)

    # --------------------------------------------------------------------------------------- one step

    def _spend(self, pooled: bool, now_s: float) -> Budget:
        """The rows of one kind of step."""
        budget = Budget(self.max_num_batched_tokens, pooled)
        self._find_ready(budget)
        budget.preemptions = self.preemptions
        while not budget.closed and (overdue := self.waiting.overdue) is not None:
            if overdue.pooled is pooled and self._seat(overdue, budget):
                budget.begun[overdue.level].append(overdue)
            else:
                budget.closed = True
        if self.pace is not None:
            streams: list[Sequence] = []
            if pooled:
                streams = [s for s in self.running if not s.pooled and s.remaining == 1]
            highest = min((sequence.level for sequence in streams), default=0)
            contexts = [sequence.computed + 1 for sequence in streams]
            budget.pace = StepPace(self.pace, budget.chunks, contexts, highest)
        for level in range(len(SERVICE_CLASSES)):
            if budget.decodes[level] or budget.begun[level] or self.waiting.head(level) is not None:
                self._plan_class(level, budget, now_s)
        return budget

    def _find_ready(self, budget: Budget) -> None:
        """The sequences that have rows to run, by class: decodes, each with the page that its row is written
        to, and prefills. Who lacks a page takes it from the last of all."""
        cache, running = self.cache, self.running
        decodes, begun, pooled, trims = budget.decodes, budget.begun, budget.pooled, cache.has_windows
        for sequence in running:  # those that give way are behind it
            computed, known = sequence.computed, sequence.length
            left = (known if known < sequence.limit else sequence.limit - 1) - computed
            if left < 1 or sequence.pooled is not pooled:
                continue
            if left > 1:
                begun[sequence.level].append(sequence)
                continue
            if trims:
                cache.trim(sequence.pages, computed)
            # Tables end where pages do: all other rows have their page already.
            if computed % PAGE_TOKENS == 0:
                # The victim is never one that was found already: those rank before this sequence.
                while not cache.grow(sequence.pages, computed + 1):
                    victim = running[-1]
                    self._preempt(victim, sequence)
                    if victim is sequence:
                        return
            decodes[sequence.level].append(sequence)

    def _plan_class(self, level: int, budget: Budget, now_s: float) -> None:
        """The rows of one class, behind those of the higher ones."""
        decodes, pace = budget.decodes[level], budget.pace
        if self.preemptions > budget.preemptions:
            decodes = [sequence for sequence in decodes if sequence.running]
        count = len(decodes)
        if budget.chunks:
            if pace is not None:
                hurried = any(rows > 1 for _, rows, _ in budget.chunks)
                pace.begin(level, hurried, self._is_late(level, budget, now_s))
            decodes = sorted(decodes, key=_longest_unserved)
            count = min(len(decodes), budget.tokens)
            if pace is not None and count:
                count = pace.decodes_that_fit([s.computed + 1 for s in decodes[:count]])
        budget.decode(decodes if count == len(decodes) else decodes[:count])
        if pace is not None and count > 0:
            pace.add_streams(level)
        if budget.tokens > 0 and (budget.begun[level] or self.waiting.head(level) is not None):
            budget.begin_prefills(level, self._kept(level, budget))
            self._plan_prefills(level, budget)

    def _kept(self, level: int, budget: Budget) -> int:
        """Tokens that prompts of a class leave to lower ones."""
        share, kept = max(self.max_num_batched_tokens // TOKEN_SHARE, 1), 0
        for lower in range(level + 1, len(SERVICE_CLASSES)):
            wanted = len(budget.decodes[lower]) + (share if budget.begun[lower] else 0)
            kept += wanted if budget.pace is None else min(wanted, share)
        return kept

    def _is_late(self, level: int, budget: Budget, now_s: float) -> bool:
        """Whether a class has not kept its target for a first token."""
        assert self.pace is not None
        head = self.waiting.head(level)
        arrivals = [s.arrived_s for s in budget.begun[level] if not s.generated]
        arrivals += [head.arrived_s] if head is not None else []
        return now_s - min(arrivals, default=now_s) > self.pace.targets[level].first_token_s

    # --------------------------------------------------------------------------------------- prefills

    def _plan_prefills(self, level: int, budget: Budget) -> None:
        """Prompts of a class, those of the tenant first that has had the least; begun before new ones."""
        for sequence in sorted(budget.begun[level], key=lambda s: (s.account.used, s.arrival)):
            self._admit(level, budget, sequence.account.used)
            if budget.open and sequence.running and sequence.arrival not in budget.planned:
                self._give_rows(sequence, budget)
        self._admit(level, budget)

    def _admit(self, level: int, budget: Budget, below: int | None = None) -> None:
        """Give seats to sequences that wait, of tenants that have had less than `below`, and rows."""
        # Who runs and is short of pages comes before newcomers.
        while budget.open and not (budget.short or budget.closed):
            sequence = self.waiting.head(level)
            if sequence is None or (below is not None and sequence.account.used >= below):
                return
            if self.waiting.overdue is not None:  # since a moment ago
                budget.closed = True
                return
            if sequence.pooled is not budget.pooled or not self._seat(sequence, budget):
                budget.closed = True  # nobody overtakes it
                return
            self._give_rows(sequence, budget)

    def _give_rows(self, sequence: Sequence, budget: Budget) -> None:
        """Plan as many of a prefill's tokens as may be; for pages, the last that has no rows gives way."""
        while not self._take_chunk(sequence, budget):
            victim = last_to_plan(self.running, budget.planned)
            if victim is None or victim.rank <= sequence.rank:
                budget.short = True  # others go on in this step, and will give pages back
                return
            self._preempt(victim, sequence)

    def _take_chunk(self, sequence: Sequence, budget: Budget) -> bool:
        """Plan as many of the sequence's tokens as budget and pages allow; False when no page can be had.

        A sequence for whose rows this step has no room, or whose rows others run, counts as planned.
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
        if self.cache.states is not None:
            computed, end = sequence.computed, sequence.computed + count
            count = self.cache.chunk_end(sequence.pages, computed, end, sequence.length) - computed
        self.cache.grow(sequence.pages, sequence.computed + count)
        self.cache.shrink(sequence.pages, sequence.computed + count)
        if count > 1 and self.cache.prefixes is not None:
            first = self.cache.prefixes.next_page(sequence.pages, sequence.token_ids)
            budget.first_pages.setdefault(first, (sequence, sequence.computed + count))
        sequence.account.charge_prompt(sequence, sequence.computed + count)
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

    def _waits_for_others(self, sequence: Sequence, budget: Budget) -> bool:
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
        if self.cache.states is not None and alike < end:
            return False  # the other's state will be behind tokens that are not this one's
        return 2 * (min(alike, sequence.restorable) - sequence.computed) >= sequence.remaining

    # -------------------------------------------------------------------------------------- guesses

    def _draft(self, drafting: Drafting, budget: Budget) -> None:
        """Put guesses behind decodes, as far as they pay, in the room and on the pages that are left."""
        if drafting.rests(self.max_num_batched_tokens - budget.tokens):
            return
        decodes = [s for s, count, rows in budget.chunks if count == 1 and rows and s.speculation is not None]
        decodes = [s for s in decodes if s.drawn is None and s.computed + 1 == s.length]
        room = min(budget.tokens, budget.outputs)
        if not decodes or room < 1:
            return
        for sequence, tree in zip(decodes, drafting.draft(decodes, budget.chunks, room), strict=True):
            if not len(tree):
                continue
            reachable = self.cache.reachable_slots(sequence.pages)
            if reachable is not None:
                tree = tree.head(reachable - sequence.computed - 1)
            if len(tree):
                self.cache.grow(sequence.pages, sequence.computed + 1 + len(tree))
                budget.draft(sequence, tree)

    # ------------------------------------------------------------------------------------------ seats

    def _seat(self, sequence: Sequence, budget: Budget) -> bool:
        """Give a waiting sequence a seat, if there is one and room for it, or lower classes can make some."""
        if self._found_no_room(sequence):
            return False
        self._restore(sequence)  # pages that are shared need no room
        if not self._make_room(sequence, budget):
            self._release(sequence)
            if not sequence.preemptions:
                sequence.cached_tokens = 0
            self._roomless = (sequence, self._departures, self.steps)
            return False
        self.waiting.take(sequence)
        sit_down(self.running, sequence)
        return True

    def _found_no_room(self, sequence: Sequence) -> bool:
        """Whether it looked in vain a moment ago, and nobody has left since: looking is not cheap."""
        if self._roomless is None:
            return False
        who, departures, step = self._roomless
        return who is sequence and departures == self._departures and self.steps - step < _LOOK_AGAIN

    def _make_room(self, sequence: Sequence, budget: Budget) -> bool:
        """See that there is a seat and room for a sequence; where that is all it takes, of lower classes the
        last sequences give way."""
        while True:
            missing = self._missing_pages(sequence)
            if len(self.running) < self.max_num_seqs and not any(missing):
                return True
            lower = [
                s for s in lower_classes(self.running, sequence.level) if s.arrival not in budget.planned
            ]
            for group, wanted in enumerate(missing):
                wanted -= sum(s.pages.length - s.pages.first_live[group] for s in lower)
                if wanted > 0:
                    return False
            if not lower:
                return False
            self._preempt(lower[0], sequence)

    def _missing_pages(self, sequence: Sequence) -> list[int]:
        """Pages, per group, that are missing for the sequence's known tokens beside what the running ones
        need soon.

        Only a forecast, nothing is reserved: it keeps a sequence from being admitted, preempted, and
        recomputed over and over.
        """
        if not self.running:
            return []
        free = [pool.free_pages for pool in self.cache.pools]
        for other in [sequence, *self.running]:
            soon = len(other.token_ids) + (PAGE_TOKENS if other is not sequence else 0)
            wanted = self.cache.pages_wanted(other.pages, soon)
            free = [left - want for left, want in zip(free, wanted, strict=True)]
        return [max(-left, 0) for left in free]

    def _preempt(self, sequence: Sequence, other: Sequence) -> None:
        """Take a seat away, in favour of another sequence; this one waits for the next."""
        stand_up(self.running, sequence)
        highest = min(self.running[0].standing, other.standing) if self.running else other.standing
        note_yield(sequence, highest)
        self._release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.push(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence's pages away; the cache keeps those that are full of known tokens.

        The last one, full in part, is let go of: its rows are fewer than a page has, and run beside the next
        one, which has to be run in any case, in a step that takes hardly longer for them.
        """
        in_place = self._moving.pop(sequence.arrival, sequence.computed)
        self.cache.store(sequence.pages, sequence.token_ids, min(sequence.computed, in_place))
        self.cache.release(sequence.pages)
        sequence.computed = 0
        self._departures += 1
