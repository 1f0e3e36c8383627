"""Service classes, fair shares, and steps that keep time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scheduled import Run, rows_of

from ridgeline.config import CLASS_TARGETS, PAGE_TOKENS
from ridgeline.model.program import MemoryGroup, StepLoad
from ridgeline.resources.step_costs import StepCosts
from ridgeline.resources.step_time import StepTimeModel
from ridgeline.scheduling.pace import LATE_SHARE, LEAST_ROWS, SHARE, Pace
from ridgeline.scheduling.preemption import MOST_YIELDS
from ridgeline.scheduling.sequence import Sequence
from ridgeline.scheduling.waiting import PATIENCE
from ridgeline.types import SERVICE_CLASSES, ServiceClass, StepWork, Work

# ------------------------------------------------------------------------------------- who goes first


def test_a_higher_class_takes_the_seat_of_the_last_of_the_lowest() -> None:
    run = Run(seqs=3, tokens=64)
    first, second, third = run.add(4, "batch"), run.add(4, "interactive"), run.add(4, "batch")
    run.step()
    letter = run.add(4, "keystroke")
    assert run.step() == {letter.arrival: 4, second.arrival: 1, first.arrival: 1}
    assert (first.preemptions, second.preemptions, third.preemptions) == (0, 0, 1)
    run.scheduler.remove(letter)
    assert run.step()[third.arrival] == 5


def test_no_seat_is_taken_within_a_class_or_from_a_higher_one() -> None:
    run = Run(seqs=2, tokens=64)
    run.add(4, "interactive")
    run.add(4, "keystroke")
    run.step()
    run.add(4, "interactive")
    run.add(4, "batch")
    for _ in range(5):
        assert set(run.step()) == {0, 1}
    assert run.scheduler.preemptions == 0


def test_pages_are_taken_from_the_lowest_class_though_it_came_first() -> None:
    run = Run(seqs=4, tokens=256, pages=8)
    batch = run.add(5 * PAGE_TOKENS, "batch")
    run.step()
    letter = run.add(4 * PAGE_TOKENS, "keystroke")
    assert run.step() == {letter.arrival: 4 * PAGE_TOKENS}
    assert batch.preemptions == 1


def test_prompts_of_a_higher_class_leave_a_share_of_the_tokens_to_a_lower_one() -> None:
    run = Run(seqs=4, tokens=80)
    batch = run.add(1000, "batch")
    run.step()
    letter = run.add(1000, "keystroke")
    for _ in range(5):
        assert run.step() == {letter.arrival: 70, batch.arrival: 10}


def test_what_gave_way_too_often_without_getting_on_is_overdue_and_gives_way_no_more() -> None:
    run = Run(seqs=1, tokens=32)
    batch = run.add(30, "batch")
    for _ in range(MOST_YIELDS):
        run.step()
        letter = run.add(20, "keystroke", outputs=1)
        run.step()
        assert letter.generated == 1
    assert (batch.yields, batch.standing) == (MOST_YIELDS, 0)
    run.step()
    waiting = run.add(20, "keystroke")
    for _ in range(20):
        assert run.step().keys() == {batch.arrival}
    run.scheduler.remove(batch)
    assert run.step() == {waiting.arrival: 20}


def test_what_gets_on_between_may_give_way_again() -> None:
    run = Run(seqs=1, tokens=64)
    batch = run.add(30, "batch")
    for _ in range(2 * MOST_YIELDS):
        for _ in range(20):
            run.step()
        run.add(20, "keystroke", outputs=1)
        run.step()
    assert batch.standing == batch.level
    assert batch.preemptions == 2 * MOST_YIELDS


@pytest.mark.parametrize("seats", [1, 2, 5])
def test_a_batch_sequence_gets_on_under_an_endless_load_of_keystrokes(seats: int) -> None:
    run = Run(seqs=seats, tokens=32, pages=12)
    batch = run.add(40, "batch", outputs=40)
    steps = 0
    while batch.queued:
        while len(run.scheduler.waiting) < 3:
            run.add(30, "keystroke", outputs=3)
        run.step()
        steps += 1
        assert steps < 60 * PATIENCE, "it starves"
    assert batch.generated == 40


def test_nobody_overtakes_what_became_overdue_in_the_same_step() -> None:
    run = Run(seqs=PATIENCE + 2, tokens=1000)
    first, second = run.add(30, "batch"), run.add(30, "batch")
    for _ in range(PATIENCE):
        run.add(4, "keystroke")
    assert not run.step().keys() & {first.arrival, second.arrival}
    assert (first.standing, second.standing) == (0, second.level)
    assert run.step().keys() >= {first.arrival, second.arrival}


# --------------------------------------------------------------------------------------- fair shares


def tokens_by_tenant(run: Run, steps: int) -> dict[str, int]:
    """Rows that each tenant had in so many steps."""
    tenants: dict[str, int] = {}
    for _ in range(steps):
        plan = run.plan()
        for sequence, count in zip(plan.sequences, rows_of(plan).values(), strict=True):
            tenant = sequence.account.tenant
            tenants[tenant] = tenants.get(tenant, 0) + count
        run.commit(plan)
    return tenants


@pytest.mark.parametrize(("prompt", "outputs", "steps"), [(64, 4, 80), (8, 24, 200), (200, 1, 200)])
def test_one_who_asks_ten_times_as_often_gets_no_more(prompt: int, outputs: int, steps: int) -> None:
    run = Run(seqs=8, tokens=64)
    for index in range(550):
        run.add(prompt, tenant="light" if index % 11 == 0 else "heavy", outputs=outputs)
    shares = tokens_by_tenant(run, steps)
    assert any(s.account.tenant == "light" for s in run.scheduler.waiting), "it had work all the time"
    assert shares["light"] >= 0.45 * sum(shares.values())


def test_a_newcomer_has_no_claim_on_what_it_did_not_use() -> None:
    run = Run(seqs=2, tokens=64)
    for _ in range(200):
        run.add(16, tenant="early", outputs=2)
    tokens_by_tenant(run, 60)
    for _ in range(200):
        run.add(16, tenant="late", outputs=2)
    shares = tokens_by_tenant(run, 60)
    assert 0.4 < shares["late"] / sum(shares.values()) < 0.6


def test_the_prompt_of_a_light_tenant_overtakes_the_begun_ones_of_a_heavy_one() -> None:
    run = Run(seqs=8, tokens=50)
    for _ in range(4):
        run.add(1000, tenant="heavy")
    run.step()
    light = run.add(45, tenant="light")
    run.step()
    assert run.step()[light.arrival] == 45


def test_accounts_of_those_who_left_are_forgotten() -> None:
    run = Run(seqs=4, tokens=64)
    stays = run.add(4, tenant="stays")
    for index in range(3000):
        run.scheduler.remove(run.add(4, tenant=f"tenant {index}"))
    assert len(run.scheduler.waiting._classes[stays.level].accounts) < 1100
    run.scheduler.remove(stays)
    assert not run.scheduler.waiting._classes[stays.level].accounts


# ---------------------------------------------------------------------------------------------- time


class Rates:
    """A machine of round numbers."""

    read_bytes_per_s = int8_ops_per_s = bf16_flops_per_s = fp32_flops_per_s = 1.0


class RowCosts:
    """A program whose steps take a base, so much for each row, and something for what is attended to."""

    def __init__(self, base_s: float, row_s: float, pair_s: float = 0.0) -> None:
        self.base_s, self.row_s, self.pair_s = base_s, row_s, pair_s

    def parts(self, load: StepLoad) -> StepWork:
        micros = self.base_s + self.row_s * load.rows + self.pair_s * sum(load.pairs)
        work = Work(read_bytes=round(micros * 1e6))
        return StepWork(work, Work(), load.rows, load.outputs, load.sequences, 0)


def pace_of(
    base_s: float, row_s: float, pair_s: float = 0.0, windows: tuple[int | None, ...] = (None,)
) -> Pace:
    groups = tuple(
        MemoryGroup("full" if window is None else "window", (0,), 1, 64, window) for window in windows
    )
    rates = Rates()
    rates.read_bytes_per_s = 1e6
    times = StepTimeModel.of(rates, StepCosts(1.0, 1.0, 1.0, 1.0, "made up"))
    return Pace(RowCosts(base_s, row_s, pair_s), times, groups, tuple(CLASS_TARGETS.values()))


def taken_s(pace: Pace, plan: Any) -> float:
    return pace.seconds(StepLoad.of(plan.step, pace.groups))


def test_computing_is_what_it_adds_to_the_row_behind_it() -> None:
    pace = pace_of(0.01, 0.001)
    assert pace.computing_s(0, 32, 512) == pytest.approx(0.032)
    assert pace.computing_s(64, 128, 65) == pytest.approx(0.064)
    assert pace.computing_s(64, 128, 64) == pytest.approx(0.064 + 0.01), "two steps"
    assert pace_of(0.0, 0.0, 1.0).computing_s(2, 4, 8) == pytest.approx(3 + 4)


def test_a_step_is_as_long_as_streams_of_its_class_can_wait() -> None:
    pace = pace_of(0.01, 0.001, 0.000001)
    run = Run(seqs=8, tokens=512, pace=pace)
    streams = [run.add(4) for _ in range(4)]
    run.step()
    prompt = run.add(2000)
    target_s = CLASS_TARGETS["interactive"].inter_token_s
    while prompt.remaining > 200:
        plan = run.plan()
        rows = rows_of(plan)
        assert all(rows[stream.arrival] == 1 for stream in streams)
        assert 0.9 * target_s < taken_s(pace, plan) <= target_s
        run.commit(plan)


def test_a_batch_has_no_steps_that_a_keystroke_must_not_wait_for() -> None:
    pace = pace_of(0.01, 0.001)
    run = Run(seqs=8, tokens=512, pace=pace)
    stream = run.add(4, "batch")
    run.step()
    prompt = run.add(2000, "batch")
    plan = run.plan()
    assert rows_of(plan)[stream.arrival] == 1
    assert rows_of(plan)[prompt.arrival] > 50
    assert taken_s(pace, plan) <= CLASS_TARGETS["keystroke"].first_token_s / 2


def test_without_streams_a_step_is_as_long_as_it_may_be() -> None:
    run = Run(seqs=8, tokens=512, pace=pace_of(1.0, 1.0))
    run.add(2000)
    assert run.step() == {0: 512}


def test_prompts_go_on_where_the_target_is_out_of_reach() -> None:
    pace = pace_of(1.0, 0.01)
    run = Run(seqs=8, tokens=512, pace=pace)
    run.add(4)
    run.step()
    run.add(2000)
    plan = run.plan()
    assert rows_of(plan)[1] > 90, "half of the time is the prompt's"
    slow = Run(seqs=8, tokens=512, pace=pace_of(0.0, 1.0))
    slow.add(4)
    slow.step()
    slow.add(2000)
    assert slow.step()[1] == LEAST_ROWS


@pytest.mark.parametrize("late", [False, True])
def test_a_lower_class_lengthens_steps_by_its_share(late: bool) -> None:
    pace = pace_of(0.01, 0.0005)
    run = Run(seqs=32, tokens=512, pace=pace)
    for _ in range(16):
        run.add(4)
    run.step()
    alone_s = taken_s(pace, run.plan())
    batch = run.add(6000, "batch")
    run.now_s += 100 * late
    share = LATE_SHARE if late else SHARE
    for _ in range(5):
        plan = run.plan()
        assert rows_of(plan)[batch.arrival] > 1
        assert taken_s(pace, plan) <= (1 + share) * alone_s + 1e-9
        run.commit(plan)


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_a_share_is_used_to_the_row(rows: int) -> None:
    pace = pace_of(0.01, 0.0005)
    run = Run(seqs=32, tokens=512, pace=pace)
    for _ in range(16):
        run.add(4)
    run.step()
    alone_s = taken_s(pace, run.plan())
    row_s = SHARE * alone_s / (rows + 0.5)
    run.scheduler.pace = replace(pace, work=RowCosts(alone_s - 16 * row_s, row_s, 0.0))
    batch = run.add(6000, "batch")
    for _ in range(3):
        assert run.step()[batch.arrival] == rows


def test_while_a_keystroke_reads_its_prompt_others_keep_their_share_and_take_turns() -> None:
    pace = pace_of(0.01, 0.001)
    run = Run(seqs=65, tokens=512, pace=pace)
    batches = [run.add(4, "batch") for _ in range(64)]
    run.step()
    run.step()
    letter = run.add(100, "keystroke")
    rows = run.step()
    assert rows[letter.arrival] == 100
    assert 1 < len(rows) - 1 < 64
    run.scheduler.remove(letter)
    served: set[int] = set()
    for _ in range(40):
        typed = run.add(20, "keystroke", outputs=1)
        served |= run.step().keys() - {typed.arrival}
    assert served == {batch.arrival for batch in batches}


def test_beside_streams_decodes_of_a_lower_class_fill_what_the_target_leaves() -> None:
    pace = pace_of(0.01, 0.001)
    run = Run(seqs=65, tokens=512, pace=pace)
    stream = run.add(4, "keystroke")
    for _ in range(64):
        run.add(1, "batch")
    for _ in range(70):
        plan = run.plan()
        run.commit(plan)
    assert rows_of(plan)[stream.arrival] == 1
    target_s = CLASS_TARGETS["keystroke"].inter_token_s
    assert 0.9 * target_s < taken_s(pace, plan) <= target_s


@pytest.mark.parametrize("windows", [(None,), (100,), (None, 30)])
def test_the_load_of_decodes_is_what_their_step_has(windows: tuple[int | None, ...]) -> None:
    pace = pace_of(0.01, 0.001, 0.0001, windows)
    one_by_one = [pace.load_of(context - 1, 1, 1) for context in (1, 29, 30, 31, 99, 500)]
    total = one_by_one[0]
    for load in one_by_one[1:]:
        total += load
    assert pace.load_of_decodes((1, 29, 30, 31, 99, 500)) == total


# ------------------------------------------------------------------------------------------- anything


class ClassMachine(RuleBasedStateMachine):
    """Sequences of all classes and several tenants come, go on and are aborted in any order, on few seats and
    few pages, with and without a limit of time."""

    seats, tokens, pages = 4, 24, 10

    def __init__(self) -> None:
        super().__init__()
        self.runs = [self._run(pace) for pace in (None, pace_of(0.01, 0.002), pace_of(0.01, 0.002))]
        self.waited: dict[int, int] = {}

    def _run(self, pace: Pace | None) -> Run:
        return Run(self.seats, self.tokens, self.pages, pace=pace)

    @rule(
        tokens=st.integers(1, 100),
        outputs=st.integers(1, 50),
        service_class=st.sampled_from(SERVICE_CLASSES),
        tenant=st.sampled_from("abc"),
    )
    def add(self, tokens: int, outputs: int, service_class: ServiceClass, tenant: str) -> None:
        outputs = min(outputs, self.pages * PAGE_TOKENS - tokens)
        for run in self.runs:
            if len(run.scheduler.waiting) < 8:
                run.add(tokens, service_class, tenant, outputs)

    @precondition(lambda self: self.runs[0].added)
    @rule(which=st.integers(0, 1000))
    def abort(self, which: int) -> None:
        for run in self.runs:
            queue = [*run.scheduler.running, *run.scheduler.waiting]
            if queue:
                run.scheduler.remove(queue[which % len(queue)])

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            plans = [self._step(run) for run in self.runs]
            assert plans[1] == plans[2], "a plan depends on something else than the queues"

    def _step(self, run: Run) -> list[Any]:
        before = list(run.scheduler.running)
        plan = run.plan()
        rows = rows_of(plan)
        assert sum(rows.values()) <= self.tokens
        assert rows or not (run.scheduler.running or run.scheduler.waiting), "nobody gets on"
        self._check_decodes(run, rows)
        self._check_victims(run, before, rows)
        run.commit(plan)
        return [*rows.items()]

    def _check_decodes(self, run: Run, rows: dict[int, int]) -> None:
        ready = [s for s in run.scheduler.running if s.remaining == 1]
        highest = min((s.level for s in run.scheduler.running if s.arrival in rows), default=0)
        for sequence in ready:
            if sequence.level == highest or run.scheduler.pace is None:
                assert sequence.arrival in rows, "a decode of the highest class is skipped"

    def _check_victims(self, run: Run, before: list[Sequence], rows: dict[int, int]) -> None:
        """Who has lost a seat ranks behind everybody that was there and kept one without rows."""
        gone = [s for s in before if not s.running]
        for sequence in gone:
            for other in run.scheduler.running:
                idle = other in before and other.arrival not in rows
                assert not idle or other.level <= sequence.level, "a lower class keeps a seat"

    @invariant()
    def agrees(self) -> None:
        for run in self.runs:
            run.scheduler.check_integrity()

    def teardown(self) -> None:
        for run in self.runs:
            left = 6000
            while left and (run.scheduler.running or run.scheduler.waiting):
                self._step(run)
                left -= 1
            assert left, "somebody never ends"
            assert run.scheduler.cache.usage == 0


def test_any_order_of_operations_keeps_the_promises() -> None:
    quick = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(ClassMachine, settings=quick)
