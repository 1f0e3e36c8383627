"""How much is drafted: on made-up curves of time and acceptance, and along texts that are known."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from drafted import Drafted, follow_text
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler_classes import pace_of

from ridgeline.cache.kv import KVCache
from ridgeline.cache.radix import Scope
from ridgeline.cache.table import SequencePages
from ridgeline.sampling.drafting.acceptance import MOST, Acceptance, trials
from ridgeline.sampling.drafting.controller import LONGEST_REST, MOST_NODES, Controller, DraftTime
from ridgeline.sampling.drafting.costs import Curve, Curves, StepCost, best_size, expected_tokens
from ridgeline.sampling.drafting.drafter import DraftedSequence
from ridgeline.sampling.drafting.histories import Histories
from ridgeline.sampling.drafting.ngram import NgramDrafter
from ridgeline.sampling.drafting.outputs import PastOutputs
from ridgeline.sampling.drafting.speculator import Speculator
from ridgeline.sampling.drafting.suffix import SuffixDrafter
from ridgeline.sampling.drafting.tree import NO_DRAFT, DraftTree, merge
from ridgeline.sampling.sampler import Chooser
from ridgeline.scheduling.drafting import Drafting
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import SamplingParams, SpeculationParams

STEP_S = 0.02


def hinge(rows: int) -> float:
    """A step that takes as long with up to 13 rows, and then longer by a twenty-fifth with each: a machine
    that is limited by memory, and then by arithmetic."""
    return STEP_S * (1 + 0.04 * max(rows - 13, 0))


@dataclass
class Batch:
    """Sequences whose drafts are chains, each token of which is accepted with a probability by itself."""

    controller: Controller
    sequences: list[Drafted]
    acceptance: Callable[[Drafted], float]
    seconds: Callable[[int], float] = hinge
    match: int = 8
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    tokens: int = 0
    elapsed_s: float = 0.0
    plain_s: float = 0.0  # the same steps without drafts

    def step(self, room: int = 10_000) -> list[int]:
        """One step; how many tokens of each sequence were verified."""
        count = len(self.sequences)
        cost = StepCost(count, count, room, self.seconds)
        limits = self.controller.limits(self.sequences, [DraftTime()] * count, cost)
        trees = [
            DraftTree.chain([1] * limit, 1.0, "ngram", self.match) if limit else NO_DRAFT for limit in limits
        ]
        chosen = self.controller.choose(self.sequences, limits, trees, cost)
        for sequence, limit, tree in zip(self.sequences, limits, chosen, strict=True):
            assert len(tree) <= limit
            if len(tree):
                nodes = range(self._accepted(len(tree), self.acceptance(sequence)))
                self.controller.observe(sequence, tree, nodes)
                self.tokens += len(nodes)
        sizes = [len(tree) for tree in chosen]
        self.tokens += count
        self.elapsed_s += self.seconds(count + sum(sizes))
        self.plain_s += self.seconds(count)
        return sizes

    def _accepted(self, size: int, share: float) -> int:
        for accepted in range(size):
            if self.rng.random() >= share:
                return accepted
        return size

    def mean_size(self, steps: int) -> float:
        return sum(sum(self.step()) for _ in range(steps)) / steps / len(self.sequences)


def batch(count: int, acceptance: float | Callable[[Drafted], float], **more: object) -> Batch:
    says = acceptance if callable(acceptance) else lambda _: acceptance
    sequences = [Drafted(i, [1, 2, 3]) for i in range(count)]
    return Batch(Controller(), sequences, says, **more)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("sequences", "size"), [(1, 12), (4, 3), (16, 1), (64, 0)])
def test_the_best_size_falls_as_the_batch_fills(sequences: int, size: int) -> None:
    assert best_size(0.7, sequences, hinge, 0.0, 64) == size


def test_drafting_that_takes_time_drafts_less() -> None:
    sizes = [best_size(0.7, 1, hinge, draft_s * STEP_S, 64) for draft_s in (0, 0.01, 0.1, 0.5, 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 12
    assert sizes[-1] == 0
    assert best_size(1.0, 1, lambda rows: 1.0, 0.0, 9) == 9


@given(st.floats(0, 0.99), st.integers(0, 20))
def test_expected_tokens_are_the_sum_of_path_products(acceptance: float, size: int) -> None:
    assert expected_tokens(acceptance, size) == pytest.approx(sum(acceptance**i for i in range(size + 1)))
    assert expected_tokens(1.0, size) == size + 1


@given(st.integers(0, 500), st.integers(1, 64))
def test_a_curve_is_the_time_that_it_was_told(extra: int, rows: int) -> None:
    curve = Curve(StepCost(rows, rows, 100, hinge))
    assert curve.at(extra) == pytest.approx(hinge(rows + extra), rel=1e-3)
    sizes = [size for size, _ in curve.sizes(extra)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1:] == ([extra] if extra else [])
    assert all(seconds == curve.at(size) for size, seconds in curve.sizes(extra))


def test_later_curves_have_what_steps_of_so_many_rows_took() -> None:
    """By as much as it is wrong all the time; of many rows, and by steps that were disturbed, nothing."""
    cost, curves = StepCost(1, 1, 100, lambda rows: STEP_S * (1 + 0.3 * rows)), Curves()
    told = curves.of(cost)
    for _ in range(200):
        told.took(5, 0.9 * told.at(5))
        told.took(6, 1.1 * told.at(6))
        told.took(40, 0.5 * told.at(40))
    told.took(7, 100 * told.at(7))
    assert curves.of(cost) is told
    for _ in range(64):
        curves.of(cost)
    learned = curves.of(cost)
    assert learned is not told
    for extra, ratio in ((4, 1.0), (5, 0.9), (6, 1.1), (40, 1.0)):
        assert learned.at(extra) == pytest.approx(ratio * told.at(extra), rel=0.05)
    assert learned.at(7) < 1.1 * told.at(7)
    assert curves.of(StepCost(2, 2, 100, hinge)).at(5) == pytest.approx(hinge(7))


# ---------------------------------------------------------------------------------------- acceptance


def test_trials_count_what_was_expected_where_the_target_went() -> None:
    chain = DraftTree.chain([1, 2, 3], 1.0)
    assert trials(chain, ()) == (1, 0)
    assert trials(chain, (0,)) == (2, 1)
    assert trials(chain, (0, 1, 2)) == (3, 3)
    assert trials(DraftTree.chain([1, 2], 0.25), (0,)) == (1.25, 1)
    tree = merge([DraftTree.chain([1, 2], 0.5), DraftTree.chain([1, 3], 0.25), DraftTree.chain([4], 0.25)])
    assert trials(tree, ()) == (0.75, 0)
    assert trials(tree, (0,)) == (0.75 + 1.5, 1)


def test_estimates_come_near_what_is_seen_and_never_to_certainty() -> None:
    common = Acceptance()
    one, other = Acceptance(common), Acceptance(common)
    kind = ("suffix", 4)
    before = one.of(kind)
    for trial in range(30):
        one.add(kind, 1.0, trial % 20 != 10)
    assert before < other.of(kind) < one.of(kind) < MOST  # what one has shown is a hint for the other
    for _ in range(200):
        one.add(kind, 1.0, 1)
    assert one.of(kind) == MOST
    for _ in range(60):
        one.add(kind, 1.0, 0)
    assert one.of(kind) < 0.1
    assert other.of(("suffix", 1)) < other.of(("suffix", 5))  # longer matches are believed more


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=20), st.integers(0, 40))
def test_values_fall_along_every_path(ratios: list[float], match: int) -> None:
    probabilities = [1.0]
    for ratio in ratios:
        probabilities.append(probabilities[-1] * ratio)
    tree = DraftTree([1] * len(probabilities), range(-1, len(ratios)), probabilities, "suffix", match)
    values = Acceptance().values(tree)
    assert len(values) == len(tree)
    assert all(below < above for above, below in pairwise(values))
    as_tree = DraftTree([1] * len(probabilities), list(tree.parents), probabilities, "suffix", match)
    assert Acceptance().values(as_tree) == pytest.approx(values)


# ---------------------------------------------------------------------------------------- controller


def test_a_batch_drafts_as_much_as_pays() -> None:
    """By nodes of a whole batch, so that sizes need not be even."""
    sizes = []
    for count in (1, 4, 16, 64):
        run = batch(count, 0.7)
        run.mean_size(100)
        sizes.append(run.mean_size(100))
    assert 10 <= sizes[0] <= 16
    assert 1.5 <= sizes[1] <= 4
    assert 0.2 <= sizes[2] <= 2
    assert sizes[3] < 0.2
    assert sizes == sorted(sizes, reverse=True)


def test_what_taking_guesses_on_takes_makes_them_fewer_until_it_is_forgotten() -> None:
    run = batch(4, 0.9)
    run.mean_size(200)
    before = run.mean_size(100)
    for _ in range(20):
        run.controller.handled(8, 8 * STEP_S)  # each as long as a step; a token's part of it counts
    assert run.mean_size(20) < 0.2 * before
    run.mean_size(8000)
    assert run.mean_size(100) > 0.8 * before


def test_what_steps_take_longer_than_predicted_counts_as_the_price_of_a_guess() -> None:
    run = batch(4, 0.9)
    run.mean_size(200)
    before = run.mean_size(100)
    for _ in range(40):
        run.controller.handled(8, 0.0, step_s=9 * STEP_S)
    assert run.mean_size(20) < 0.8 * before
    for _ in range(200):
        run.controller.handled(8, 0.0, step_s=0.0)
    assert run.mean_size(20) > 0.9 * before


def test_steps_that_are_over_sooner_than_predicted_make_no_guess_cheaper() -> None:
    run = batch(4, 0.9)
    run.mean_size(200)
    for _ in range(40):
        run.controller.handled(8, 8 * STEP_S, step_s=0.0)
    assert run.mean_size(20) < 0.5


def test_who_costs_more_than_it_brings_is_asked_about_ever_more_rarely() -> None:
    controller, cost = Controller(), StepCost(1, 1, 99, hinge)
    first, second = Drafted(0, [1]), Drafted(1, [1])
    time = DraftTime(ask_s=0.05 * hinge(1))
    rests = []
    for _ in range(12):
        limits = controller.limits([first], [time], cost)
        controller.choose([first], limits, [NO_DRAFT], cost)
        rests.append(controller.rest(first))
    assert rests == sorted(rests)
    assert set(rests) == {0, 1, 3, LONGEST_REST}
    controller.observe(first, DraftTree.chain([1, 2], 1.0, "ngram", 4), [0, 1])
    assert controller.rest(first) == 0
    for arrival in range(2, 80):  # others end in debt: new ones begin with it
        other = Drafted(arrival, [1])
        controller.observe(other, DraftTree.chain([1], 1.0, "ngram", 4), ())
        for _ in range(40):
            controller.choose([other], controller.limits([other], [time], cost), [NO_DRAFT], cost)
        controller.forget(other)
    assert controller.rest(second) > 0


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 5, 16, 64]), st.sampled_from([0.3, 0.7, 0.9]))
def test_it_is_as_fast_as_the_best_even_size(count: int, acceptance: float) -> None:
    run = batch(count, acceptance)
    for _ in range(200):
        run.step()
    sizes = range(MOST_NODES + 1)
    best = max(count * expected_tokens(acceptance, k) / hinge(count * (k + 1)) for k in sizes)
    assert run.tokens / run.elapsed_s > 0.9 * best


def test_the_sequences_that_gain_most_get_most() -> None:
    run = batch(32, lambda sequence: 0.95 if sequence.arrival < 4 else 0.05)
    for _ in range(150):
        run.step()
    sizes = [sum(each) / 50 for each in zip(*(run.step() for _ in range(50)), strict=True)]
    assert min(sizes[:4]) > 2
    assert max(sizes[4:]) < 0.5


@pytest.mark.parametrize("count", [1, 8, 64])
def test_drafts_that_fail_cost_a_share_that_is_bounded(count: int) -> None:
    run = batch(count, 0.0, seconds=lambda rows: STEP_S * (1 + rows / 4))
    sizes = [run.step() for _ in range(60)]
    begun_s = run.elapsed_s - run.plain_s
    assert begun_s < 5 * (1 + count / 4) * STEP_S  # while it is not known yet
    for _ in range(2000):
        run.step()
    share = run.controller.allowance_share
    assert run.elapsed_s - run.plain_s - begun_s <= share * run.plain_s + STEP_S
    assert any(map(any, sizes))


@pytest.mark.parametrize("count", [1, 8])
def test_it_ends_where_it_does_not_pay_and_comes_back_where_it_does(count: int) -> None:
    share = 0.0
    run = batch(count, lambda _: share, seconds=lambda rows: STEP_S * (1 + 0.05 * rows))
    for _ in range(300):
        run.step()
    assert run.mean_size(100) < 0.5
    share = 0.97
    for _ in range(400):
        run.step()
    assert run.mean_size(50) > 4
    share = 0.0
    for _ in range(100):
        run.step()
    assert run.mean_size(100) < 0.5


def test_drafts_shrink_while_a_batch_fills_and_grow_when_it_empties() -> None:
    run = batch(64, 0.9, seconds=lambda rows: STEP_S * (1 + 0.1 * max(rows - 16, 0)))
    everyone, sizes = run.sequences, []
    for count in (1, 8, 64, 8, 1):
        run.sequences = everyone[:count]
        run.mean_size(50)
        sizes.append(run.mean_size(50))
    assert sizes[0] > 10
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 0.3
    assert sizes[2] < sizes[3] < sizes[4]
    assert sizes[4] > 10


def test_no_more_is_drafted_than_there_is_room_for() -> None:
    run = batch(4, 1.0, seconds=lambda rows: STEP_S)
    run.sequences[0].limit = 5  # three known: one more guess, and the target's own
    run.sequences[1].speculation = None
    run.sequences[2].speculation = SpeculationParams(max_tokens=2)
    for _ in range(40):
        run.step()
    assert run.step() == [1, 0, 2, MOST_NODES]
    for _ in range(40):
        sizes = run.step(room=3)
        assert 1 <= sum(sizes) <= 3
    assert run.step(room=0) == [0, 0, 0, 0]
    run.sequences[0].token_ids.append(4)
    assert run.step()[0] == 0


def test_a_request_may_ask_for_more_than_is_usual() -> None:
    run = batch(1, 1.0, seconds=lambda rows: STEP_S)
    run.sequences[0].speculation = SpeculationParams(max_tokens=40)
    for _ in range(30):
        sizes = run.step()
    assert sizes == [40]


def test_rows_of_prompts_do_not_make_drafts_seem_free() -> None:
    """In a step that is long for its prompts, a draft has to gain more than its own rows take."""
    controller, sequence = Controller(), Drafted(0, [1])
    tree = DraftTree.chain([1] * 8, 1.0, "ngram", 1)
    for _ in range(60):
        controller.observe(sequence, tree, ())
    alone = StepCost(1, 1, 99, lambda rows: STEP_S * rows)
    beside = StepCost(400, 1, 99, lambda rows: STEP_S * rows)
    for cost in (alone, beside):
        assert controller.choose([sequence], [8], [tree], cost) == [NO_DRAFT]


def test_what_was_forgotten_begins_anew() -> None:
    controller, sequence = Controller(), Drafted(0, [1])
    controller.observe(sequence, DraftTree.chain([1], 1.0, "ngram", 4), ())
    controller.forget(sequence)
    controller.forget(sequence)
    assert not controller._records


# ---------------------------------------------------------------------------------------- speculator


class Slow:
    """A drafter that takes its time, has nothing, or guesses wrong, and notes what it is told."""

    name = "ngram"

    def __init__(self, ask_s: float, guesses: Tokens[int] = ()) -> None:
        self.now_s, self.asked, self.told = 0.0, 0, 0
        self._ask_s, self._guesses = ask_s, guesses

    def propose(self, sequences: Tokens[DraftedSequence], budgets: Tokens[int]) -> list[DraftTree]:
        self.asked += len(sequences)
        self.now_s += self._ask_s * len(sequences)
        return [DraftTree.chain(self._guesses[:budget], 1.0, self.name, 2) for budget in budgets]

    def accepted(self, sequence: DraftedSequence, tree: DraftTree, nodes: Tokens[int]) -> None:
        self.told += 1

    def forget(self, sequence: DraftedSequence) -> None:
        self.told = -1


def test_a_drafter_that_has_nothing_is_asked_ever_more_rarely() -> None:
    drafter = Slow(ask_s=0.1 * STEP_S)
    speculator = Speculator([drafter], clock=lambda: drafter.now_s)
    sequences = [Drafted(i, [1, 2]) for i in range(8)]
    for _ in range(2000):
        assert speculator.draft(sequences, StepCost(8, 8, 99, hinge)) == [NO_DRAFT] * 8
    assert drafter.now_s < (0.02 * 2000 + 40) * STEP_S
    assert drafter.asked > 100  # but is asked
    assert speculator.totals["ngram"].elapsed_s == pytest.approx(drafter.now_s)
    assert speculator.totals["ngram"].tokens_per_pass == 1


def test_a_batch_at_rest_is_asked_about_in_the_same_steps() -> None:
    cost = StepCost(8, 8, 99, hinge)
    asked = []
    for looks in (False, True):
        drafter = Slow(ask_s=0.001 * STEP_S)
        speculator = Speculator([drafter], clock=lambda drafter=drafter: drafter.now_s)
        sequences = [Drafted(i, [1, 2]) for i in range(8)]
        calls, steps = 0, []
        for step in range(200):
            before = drafter.asked
            if not (looks and speculator.rests(cost.rows)):
                calls += 1
                speculator.draft(sequences, cost)
            if drafter.asked > before:
                steps.append(step)
        asked.append(steps)
        assert calls < 60 if looks else calls == 200
        assert not speculator.rests(cost.rows + 1)  # another batch is looked at
    assert asked[0] == asked[1]


def test_an_answer_with_a_form_leaves_no_batch_at_rest() -> None:
    drafter = Slow(ask_s=0.001 * STEP_S)
    speculator = Speculator([drafter], clock=lambda: drafter.now_s)
    sequences = [Drafted(0, [1, 2]), Drafted(1, [1, 2], forced=())]
    for _ in range(100):
        assert not speculator.rests(2)
        speculator.draft(sequences, StepCost(2, 2, 99, hinge))


def test_totals_count_what_was_emitted() -> None:
    drafter = Slow(0.0, guesses=[5, 6, 7])
    speculator = Speculator([drafter], clock=lambda: drafter.now_s)
    sequence = Drafted(0, [1, 2])
    (tree,) = speculator.draft([sequence], StepCost(1, 1, 99, hinge))
    assert list(tree.tokens) == [5, 6, 7]
    nodes = follow_text(tree, lambda i: (5, 6, 8)[i])
    assert nodes == [0, 1]
    speculator.verified(sequence, tree, nodes)
    totals = speculator.totals["ngram"]
    assert (totals.drafted, totals.accepted, totals.passes, totals.tokens_per_pass) == (3, 2, 1, 3.0)
    assert drafter.told == 1
    speculator.forget(sequence)
    assert drafter.told == -1


def lookups() -> Speculator:
    histories = Histories()
    return Speculator((SuffixDrafter(histories, PastOutputs()), NgramDrafter(histories)))


def test_the_schedulers_sequences_are_drafted_for() -> None:
    """What the scheduler has of a sequence is what drafters look at."""
    ngrams = SpeculationParams("ngram")

    def sequence(params: SamplingParams, default: SpeculationParams | None = ngrams) -> Sequence:
        prompt = (1, 2, 3, 4, 1, 2)
        pages = SequencePages(1, Scope(salt="key"))
        wanted = Sequence(5, prompt, Chooser(params, 0, 0, prompt, ()), pages, limit=9)
        drafting = Drafting(Speculator.of_lookups, pace_of(0.01, 0.001), default)
        Scheduler(KVCache((None,), (4,)), 1, 8, drafting=drafting).add(wanted)
        return wanted

    wanted = sequence(SamplingParams(speculation=SpeculationParams("suffix", max_tokens=2)))
    assert (wanted.tenant, wanted.limit) == ("key", 9)
    (tree,) = lookups().draft([wanted], StepCost(1, 1, 99, lambda rows: STEP_S))
    assert (tree.drafter, list(tree.tokens)) == ("suffix", [3, 4])
    assert sequence(SamplingParams(speculation=False)).speculation is None
    assert sequence(SamplingParams(speculation=True), None).speculation == SpeculationParams()
    assert sequence(SamplingParams()).speculation == ngrams
    assert sequence(SamplingParams(), None).speculation is None


def test_requests_are_drafted_for_as_they_ask() -> None:
    text = [1, 2, 3, 4, 1, 2]
    sequences = [
        Drafted(0, text, speculation=SpeculationParams()),
        Drafted(1, text, speculation=SpeculationParams("ngram", max_tokens=1)),
        Drafted(2, text, speculation=SpeculationParams("suffix")),
        Drafted(3, text, speculation=None),
        Drafted(4, [1, 2, 1], speculation=SpeculationParams("suffix")),
        Drafted(5, [1, 2, 1], speculation=SpeculationParams()),
    ]
    trees = lookups().draft(sequences, StepCost(6, 6, 999, lambda rows: STEP_S))
    assert [tree.drafter for tree in trees] == ["suffix", "ngram", "suffix", "", "", "ngram"]
    assert [list(tree.tokens)[:2] for tree in trees] == [[3, 4], [3], [3, 4], [], [], [2, 1]]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=60), min_size=1, max_size=5),
    st.sampled_from(["auto", "ngram", "suffix"]),
)
def test_drafts_change_no_text(texts: list[list[int]], drafter: str) -> None:
    """A text that is known beforehand, which repeats itself, is said as it is, in fewer steps."""
    speculator = lookups()
    texts = [text * 3 for text in texts]
    sequences = [
        Drafted(i, text[:2], 2, len(text), speculation=SpeculationParams(drafter))
        for i, text in enumerate(texts)
    ]
    going, steps = list(sequences), 0
    while going:
        count, steps = len(going), steps + 1
        trees = speculator.draft(going, StepCost(count, count, 256, lambda rows: STEP_S))
        for sequence, tree in zip(list(going), trees, strict=True):
            text, said = texts[sequence.arrival], sequence.token_ids
            known = len(said)
            nodes = follow_text(tree, lambda i, text=text, known=known: text[known + i])
            said += [*(tree.tokens[node] for node in nodes), text[known + len(nodes)]]
            if len(tree):
                tree.check_integrity()
                speculator.verified(sequence, tree, nodes)
            assert said == text[: len(said)]
            if len(said) == sequence.limit:
                speculator.forget(sequence)
                going.remove(sequence)
    totals = speculator.totals.values()
    emitted = sum(map(len, texts)) - 2 * len(texts)
    assert sum(t.accepted for t in totals) <= sum(t.drafted for t in totals)
    assert steps <= max(map(len, texts)) - 2
    assert emitted >= sum(t.accepted + t.passes for t in totals)
