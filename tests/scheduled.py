"""A scheduler whose model answers 7 to everything, and what a test may want to know of its steps."""

from __future__ import annotations

from ridgeline.cache.kv import KVCache
from ridgeline.sampling.sampler import Chooser
from ridgeline.scheduling.pace import Pace
from ridgeline.scheduling.plan import Plan
from ridgeline.scheduling.preemption import sit_down
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import SamplingParams, ServiceClass

GREEDY = SamplingParams(temperature=0)


class Run:
    """Time goes on by a second in each step."""

    def __init__(
        self, seqs: int, tokens: int, pages: int = 1000, window: int | None = None, pace: Pace | None = None
    ) -> None:
        self.scheduler = Scheduler(KVCache((window,), (pages,)), seqs, tokens, pace)
        self.added = 0
        self.now_s = 0.0

    def add(
        self,
        tokens: int,
        service_class: ServiceClass = "interactive",
        tenant: str = "",
        outputs: int = 10_000,
    ) -> Sequence:
        """A new sequence, which ends after so many outputs."""
        prompt = tuple(range(tokens))
        pages = self.scheduler.cache.new_sequence()
        chooser = Chooser(GREEDY, 0, 0, prompt, ())
        sequence = Sequence(self.added, prompt, chooser, pages, tokens + outputs)
        self.added += 1
        self.scheduler.add(sequence, service_class, tenant, self.now_s)
        return sequence

    def seat(self, sequence: Sequence) -> None:
        """Give a sequence a seat whether there is room for it or not."""
        self.scheduler.waiting.take(sequence)
        sit_down(self.scheduler.running, sequence)

    def step(self) -> dict[int, int]:
        """Run a step; rows by the sequence's arrival number."""
        plan = self.plan()
        self.commit(plan)
        return rows_of(plan)

    def plan(self) -> Plan:
        plan = self.scheduler.schedule(self.now_s)
        self.scheduler.check_integrity()
        return plan

    def commit(self, plan: Plan) -> None:
        self.now_s += 1
        self.scheduler.advance(plan)
        for sequence in plan.sampled:
            sequence.append(7)
            if sequence.length >= sequence.limit:
                self.scheduler.remove(sequence)


def rows_of(plan: Plan) -> dict[int, int]:
    return {s.arrival: len(r.tokens) for s, r in zip(plan.sequences, plan.step.sequences, strict=True)}
