"""Who gets the next seat: the order of sequences that wait, by service class, tenant and arrival.

A higher class goes before a lower one. Inside a class tenants share tokens fairly, by virtual token counters
(Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): the tenant that has had the least is
next. It is charged for prompts as they are computed, what others or a cache have computed being free, and
for output as it is generated. Who comes, or comes back, begins at least where the tenant is that has had the
least of those who are there. A tenant's own sequences go by arrival.

Nobody starves: a class that higher ones have passed by `PATIENCE` times while it waited has its next sequence
made *overdue*, and overdue sequences go before everybody, the oldest first. A new tenant cannot pass by an
old one for ever either: it begins where the least served one is, and between equals arrival decides.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from operator import attrgetter

from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import SERVICE_CLASSES

PATIENCE = 16
"""Sequences of higher classes that may get a seat before the next one of a class that waits."""
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""What a tenant is charged for a token; the paper's own, as an output token takes a step by itself."""
_MOST_IDLE = 1024

_rank = attrgetter("rank")
_arrival = attrgetter("arrival")


class Account:
    """What a tenant has had of one class. `used` is the virtual counter; `sequences` counts those that the
    scheduler has, `waiting` are those without a seat, by arrival."""

    __slots__ = ("sequences", "tenant", "used", "waiting")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.used = 0
        self.sequences = 0
        self.waiting: deque[Sequence] = deque()

    def charge_prompt(self, sequence: Sequence, end: int) -> None:
        """A sequence's rows up to `end` are to be run; those that are run again are free."""
        end = min(end, sequence.prompt_length)
        self.used += PROMPT_WEIGHT * max(end - max(sequence.charged, sequence.computed), 0)
        sequence.charged = max(sequence.charged, end)

    def push(self, sequence: Sequence) -> None:
        """Let it wait. New sequences are the last to come; those that had a seat are among the first."""
        if not self.waiting or self.waiting[-1].arrival < sequence.arrival:
            self.waiting.append(sequence)
        else:
            self.waiting.insert(bisect_left(self.waiting, sequence.arrival, key=_arrival), sequence)


class _Class:
    """The accounts of one service class."""

    __slots__ = ("accounts", "active", "passed", "waiting")

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.active = 0  # accounts with sequences
        self.waiting = 0
        self.passed = 0  # seats that higher classes got since the last one of a sequence of this class

    def enter(self, tenant: str) -> Account:
        account = self.accounts.get(tenant)
        if account is None:
            account = self.accounts[tenant] = Account(tenant)
        if not account.sequences:
            account.used = max(account.used, self._least())
            self.active += 1
        account.sequences += 1
        return account

    def leave(self, account: Account) -> None:
        account.sequences -= 1
        if account.sequences:
            return
        self.active -= 1
        if not self.active:
            self.accounts.clear()  # nobody has to wait for anybody: no debts are kept
        elif len(self.accounts) - self.active > _MOST_IDLE:
            least = self._least()
            for tenant in [t for t, a in self.accounts.items() if not a.sequences and a.used <= least]:
                del self.accounts[tenant]

    def _least(self) -> int:
        """What the least served tenant has had of those who are there."""
        return min((account.used for account in self.accounts.values() if account.sequences), default=0)

    def head(self) -> Sequence | None:
        """Who is next: of the tenant that has had the least; between equals, who came first."""
        if not self.waiting:
            return None
        if len(self.accounts) == 1:
            return next(iter(self.accounts.values())).waiting[0]
        heads = ((a.used, a.waiting[0].arrival, a.waiting[0]) for a in self.accounts.values() if a.waiting)
        return min(heads)[2]


class WaitingLine:
    """The sequences that wait for a seat, and the accounts of all that the scheduler has."""

    def __init__(self) -> None:
        self._classes = tuple(_Class() for _ in SERVICE_CLASSES)
        self._overdue: list[Sequence] = []

    def __len__(self) -> int:
        return sum([each.waiting for each in self._classes]) + len(self._overdue)

    def __iter__(self) -> Iterator[Sequence]:
        """By rank."""
        line = [*self._overdue]
        for each in self._classes:
            line += [sequence for account in list(each.accounts.values()) for sequence in account.waiting]
        return iter(sorted(line, key=_rank))

    def enter(self, sequence: Sequence, tenant: str) -> None:
        """A new sequence of a tenant, which waits."""
        sequence.account = self._classes[sequence.level].enter(tenant)
        self.push(sequence)

    def leave(self, sequence: Sequence, waits: bool) -> None:
        """A sequence is gone, from here or from its seat."""
        if waits:
            self._discard(sequence)
        self._classes[sequence.level].leave(sequence.account)

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait that has no seat, or no longer."""
        if sequence.standing < sequence.level:
            insort(self._overdue, sequence, key=_arrival)
        else:
            sequence.account.push(sequence)
            self._classes[sequence.level].waiting += 1

    def head(self, level: int) -> Sequence | None:
        """The next sequence of a class, but for overdue ones."""
        return self._classes[level].head()

    @property
    def overdue(self) -> Sequence | None:
        """Who goes before everybody, if there is somebody."""
        return self._overdue[0] if self._overdue else None

    def take(self, sequence: Sequence) -> None:
        """A sequence gets a seat."""
        self._discard(sequence)
        self._classes[sequence.level].passed = 0
        for lower in self._classes[sequence.level + 1 :]:
            if lower.waiting:
                lower.passed += 1
                if lower.passed >= PATIENCE and (head := lower.head()) is not None:
                    self._discard(head)
                    head.standing = lower.passed = 0
                    self.push(head)

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raise AssertionError unless counts and orders are right."""
        waiting = list(self)
        assert len(waiting) == len(self), "waiting sequences were miscounted"
        assert not any(sequence.running for sequence in waiting), "a sequence waits on a seat"
        everyone = [*waiting, *running]
        assert len({sequence.arrival for sequence in everyone}) == len(everyone), "a sequence is there twice"
        for level, each in enumerate(self._classes):
            own = [sequence for sequence in everyone if sequence.level == level]
            for account in each.accounts.values():
                arrivals = [sequence.arrival for sequence in account.waiting]
                assert arrivals == sorted(arrivals), "a tenant's sequences are out of order of arrival"
                count = sum(sequence.account is account for sequence in own)
                assert account.sequences == count, "a tenant's sequences were miscounted"
            assert all(each.accounts.get(s.account.tenant) is s.account for s in own), "an account was lost"
            assert each.active == sum(a.sequences > 0 for a in each.accounts.values()), (
                "who is there is wrong"
            )

    def _discard(self, sequence: Sequence) -> None:
        if sequence.standing < sequence.level:
            self._overdue.remove(sequence)
        else:
            sequence.account.waiting.remove(sequence)
            self._classes[sequence.level].waiting -= 1
