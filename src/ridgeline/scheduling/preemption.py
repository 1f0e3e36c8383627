"""Who gives way when seats or pages are short.

Sequences that run are kept in the order of their rank, (standing, arrival), and the last one gives way: the
lowest class first, of it the one that came last. A sequence that gave way to higher classes `MOST_YIELDS`
times without getting on by `PROGRESS_TOKENS` is *overdue*: its standing becomes that of the highest class.

So there is no livelock. A standing only ever rises, hence the sequences that rank before a given one are
finitely many, and nothing that comes later than all of them takes anything from it for good: while it ranks
lower it gives way a bounded number of times for each piece of progress, of which it can make finitely many;
after that it is overdue, and only older sequences rank before it. The oldest of the highest standing gives
way to nobody, and since every sequence fits the pool alone, it finishes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter

from ridgeline.scheduling.sequence import Sequence

MOST_YIELDS = 3
PROGRESS_TOKENS = 16

_rank = attrgetter("rank")


def sit_down(running: list[Sequence], sequence: Sequence) -> None:
    """Give a sequence a seat at its place."""
    if running and sequence.rank < running[-1].rank:
        insort(running, sequence, key=_rank)
    else:
        running.append(sequence)
    sequence.running = True


def stand_up(running: list[Sequence], sequence: Sequence) -> None:
    """Take the seat of a sequence that has one."""
    place = bisect_left(running, sequence.rank, key=_rank)
    assert running[place] is sequence
    del running[place]
    sequence.running = False


def last_to_plan(running: list[Sequence], planned: set[int]) -> Sequence | None:
    """Who gives way in a step: the last that has no rows in it yet."""
    return next((each for each in reversed(running) if each.arrival not in planned), None)


def lower_classes(running: list[Sequence], level: int) -> Iterable[Sequence]:
    """Who may lose a seat to a newcomer of a class, the last first: lower classes, but for the overdue."""
    for each in reversed(running):
        if each.standing <= level:
            return
        yield each


def note_yield(sequence: Sequence, highest: int) -> None:
    """A sequence has given way; `highest` is the highest standing of those in whose favour."""
    if highest >= sequence.standing:
        return
    if sequence.length >= sequence.yielded_length + PROGRESS_TOKENS:
        sequence.yields = 0
    sequence.yields += 1
    sequence.yielded_length = sequence.length
    if sequence.yields >= MOST_YIELDS:
        sequence.standing = 0
