"""The scheduler's rules, one by one; that they never change a token is tested with the engine."""

from __future__ import annotations

import pytest
from scheduled import Run

from ridgeline.cache.kv import KVCache
from ridgeline.config import PAGE_TOKENS
from ridgeline.scheduling.scheduler import Scheduler


def test_only_the_row_that_completes_the_known_tokens_wants_logits() -> None:
    run = Run(seqs=2, tokens=8)
    sequence = run.add(20)
    starts, outputs = [], []
    for _ in range(4):
        plan = run.plan()
        (rows,) = plan.step.sequences
        starts.append(rows.start)
        outputs.append(tuple(rows.outputs))
        assert plan.sampled == ((sequence,) if rows.outputs else ())
        assert list(rows.tokens) == sequence.token_ids[rows.start : rows.start + len(rows.tokens)]
        assert rows.segments[0].length == rows.start + len(rows.tokens)
        run.commit(plan)
    assert starts == [0, 8, 16, 20]
    assert outputs == [(), (), (3,), (0,)]


def test_budget_and_number_of_sequences_bound_a_step() -> None:
    run = Run(seqs=3, tokens=5)
    for _ in range(6):
        run.add(4)
    seen = set()
    for _ in range(6):
        rows = run.step()
        assert sum(rows.values()) <= 5
        seen |= rows.keys()
    assert seen == {0, 1, 2}, "the others wait for a place"


def test_admission_is_in_order_of_arrival() -> None:
    run = Run(seqs=8, tokens=16, pages=6)
    run.add(10)
    run.step()
    big, small = run.add(90), run.add(2)
    run.step()
    assert list(run.scheduler.waiting) == [big, small], "what comes later does not overtake what has no room"


def test_pages_are_taken_chunk_by_chunk() -> None:
    run = Run(seqs=2, tokens=PAGE_TOKENS)
    sequence = run.add(5 * PAGE_TOKENS)
    taken = []
    for _ in range(5):
        run.step()
        taken.append(sequence.pages.length)
    assert taken == [1, 2, 3, 4, 5]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    run = Run(seqs=3, tokens=64, pages=6)
    first, second, third = run.add(PAGE_TOKENS), run.add(PAGE_TOKENS - 2), run.add(PAGE_TOKENS - 2)
    run.step()
    waiting = run.add(1)
    while second.preemptions + third.preemptions == 0:
        run.step()
    assert (first.preemptions, second.preemptions, third.preemptions) == (0, 0, 1)
    assert list(run.scheduler.waiting) == [third, waiting]
    assert (third.computed, third.pages.length) == (0, 0)
    assert third.generated > 0, "its tokens are kept"
    known = len(third.token_ids)
    run.scheduler.remove(first)
    assert run.step()[third.arrival] == known, "and run again as one prompt"


def test_a_decode_that_is_the_youngest_steps_back_itself() -> None:
    run = Run(seqs=2, tokens=64, pages=4)
    first, second = run.add(2 * PAGE_TOKENS), run.add(PAGE_TOKENS)
    run.step()
    assert run.step() == {0: 1}
    assert (first.preemptions, second.preemptions) == (0, 1)


def test_no_ready_decode_is_skipped_while_there_are_pages() -> None:
    run = Run(seqs=8, tokens=8)
    for _ in range(7):
        run.add(1)
    run.step()
    run.add(500)
    for _ in range(20):
        rows = run.step()
        assert all(rows[arrival] == 1 for arrival in range(7))


def test_two_prefills_that_fill_the_pool_do_not_wait_for_each_other() -> None:
    run = Run(seqs=2, tokens=64, pages=8)
    old, young = run.add(6 * PAGE_TOKENS), run.add(6 * PAGE_TOKENS)
    # Both are made to hold half of the pool, which admission by forecast would not do.
    for sequence in (old, young):
        run.seat(sequence)
        assert run.scheduler.cache.grow(sequence.pages, 4 * PAGE_TOKENS)
        sequence.computed = 4 * PAGE_TOKENS
    assert run.step() == {0: 2 * PAGE_TOKENS}
    assert young.preemptions == 1


def test_a_prefill_without_pages_waits_for_decodes_and_lets_nobody_overtake_it() -> None:
    run = Run(seqs=4, tokens=64, pages=5)
    old, young = run.add(6 * PAGE_TOKENS), run.add(1)
    for sequence, slots in ((old, 4 * PAGE_TOKENS), (young, 1)):
        run.seat(sequence)
        assert run.scheduler.cache.grow(sequence.pages, slots)
    old.computed = 4 * PAGE_TOKENS
    late = run.add(1)
    assert run.step() == {1: 1}
    assert list(run.scheduler.waiting) == [late]
    run.scheduler.remove(young)
    assert run.step() == {0: PAGE_TOKENS}


def test_a_sequence_is_not_admitted_only_to_be_preempted() -> None:
    run = Run(seqs=4, tokens=256, pages=10)
    run.add(6 * PAGE_TOKENS)
    run.step()
    second = run.add(5 * PAGE_TOKENS)
    for _ in range(PAGE_TOKENS):
        run.step()
    assert second.preemptions == 0
    assert run.scheduler.preemptions == 0


def test_window_groups_give_pages_back_while_a_prompt_is_read() -> None:
    window = 2 * PAGE_TOKENS
    run = Run(seqs=1, tokens=PAGE_TOKENS, pages=4, window=window)
    sequence = run.add(20 * PAGE_TOKENS)
    for _ in range(40):
        run.step()
        assert run.scheduler.cache.pools[0].used_pages <= 4
        assert sequence.pages.length == -(-sequence.computed // PAGE_TOKENS)
    assert sequence.generated == 21


def test_removing_is_idempotent_wherever_the_sequence_is() -> None:
    run = Run(seqs=1, tokens=16)
    running, waiting = run.add(4), run.add(4)
    run.step()
    for sequence in (waiting, running, running, waiting):
        run.scheduler.remove(sequence)
        run.scheduler.check_integrity()
    assert run.plan().step.sequences == ()
    assert run.scheduler.cache.usage == 0


def test_planning_twice_without_running_gives_the_same_step() -> None:
    run = Run(seqs=4, tokens=16, pages=5)
    for _ in range(4):
        run.add(9)
    for _ in range(10):
        first, second = run.plan(), run.plan()
        assert first.step == second.step
        run.commit(second)


def test_a_scheduler_that_could_not_decode_everyone_is_refused() -> None:
    with pytest.raises(ValueError, match="8 sequences in steps of 4"):
        Scheduler(KVCache((None,), (4,)), 8, 4)
