"""What drafters look up, against plain searches of the same texts."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence

import pytest
from drafted import Drafted, root_paths
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.sampling.drafting.histories import Histories
from ridgeline.sampling.drafting.index import BREAK, LONGEST_MATCH, Text, TokenIndex, Trail
from ridgeline.sampling.drafting.ngram import NgramDrafter
from ridgeline.sampling.drafting.outputs import PastOutputs
from ridgeline.sampling.drafting.suffix import SuffixDrafter, grow

ALL = 1000
"""More occurrences than any text here has."""
TEXTS = st.lists(st.integers(0, 3), max_size=150)


def alike(text: Sequence[int], end: int, other: Sequence[int], other_end: int) -> int:
    """How many tokens before two positions are the same."""
    count = 0
    while min(end, other_end) > count and text[end - 1 - count] == other[other_end - 1 - count]:
        count += 1
    return count


def occurrences(text: Sequence[int], ending: Sequence[int], before: int) -> list[tuple[int, int]]:
    """Positions up to `before` of a text, the last first, behind at least two tokens of the ending."""
    counts = [(at, alike(text, at, ending, len(ending))) for at in range(before, 0, -1)]
    return [(at, count) for at, count in counts if count >= 2]


def capped(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(at, min(count, LONGEST_MATCH)) for at, count in found]


# --------------------------------------------------------------------------------------------- index


@pytest.mark.parametrize("kind", [Text, TokenIndex])
@given(parts=st.lists(TEXTS, max_size=4))
def test_an_index_finds_what_a_search_finds(kind: type[Text], parts: list[list[int]]) -> None:
    index, text = kind(), []
    for part in parts:
        index.extend(part)  # long parts go another way than short ones
        text += part
        assert index.tokens.tolist() == text
        found = index.find(index.tokens, ALL)
        assert found == capped(occurrences(text, text, len(text) - 1))
        assert index.find(index.tokens, 3) == found[:3]


@given(st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=5), TEXTS)
def test_another_texts_end_is_found_and_never_over_a_break(outputs: list[list[int]], text: list[int]) -> None:
    index, indexed = TokenIndex(), []
    for output in outputs:
        index.extend([*output, BREAK])
        indexed += [*output, BREAK]
    own = TokenIndex(text)
    found = index.find(own.tokens, ALL)
    assert found == (capped(occurrences(indexed, text, len(indexed))) if len(text) > 1 else [])
    for at, _ in found:
        rest = index.following(at, 10)
        assert BREAK not in rest
        assert rest == indexed[at : at + len(rest)]
        assert len(rest) == 10 or indexed[at + len(rest)] == BREAK


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300), st.integers(1, 300))
def test_an_index_that_was_cut_is_that_of_what_is_left(text: list[int], kept: int) -> None:
    kept = min(kept, len(text))
    index = TokenIndex(text)
    index.keep_last(kept)
    fresh = TokenIndex()
    for token in text[len(text) - kept :]:
        fresh.append(token)
    assert index.tokens == fresh.tokens
    for token in (text[-1], 5, text[0]):
        index.append(token)
        fresh.append(token)
        assert index.find(index.tokens, ALL) == fresh.find(fresh.tokens, ALL)


def test_what_stood_at_the_end_goes_on_as_it_went() -> None:
    index = TokenIndex([9, 1, 2, 3])
    assert index.following(1, 7) == [1, 2, 3, 1, 2, 3, 1]
    assert index.following(0, 2) == [9, 1]
    assert index.following(4, 3) == []


def test_an_indexs_size_is_what_is_said() -> None:
    most = 1 << 20
    index = TokenIndex(range(TokenIndex.tokens_within(most)))
    assert most / 3 < index.bytes <= most
    grown = TokenIndex()
    for token in range(TokenIndex.tokens_within(1 << 16)):
        grown.append(token)
    assert grown.bytes <= 1 << 16


@pytest.mark.parametrize("halves", [1, 256])
def test_long_texts_are_searched_as_short_ones_are(halves: int) -> None:
    """Tokens that differ by whole bytes look the same where one ends and the next begins."""
    rng = random.Random(halves)
    text = [rng.randrange(3) * halves for _ in range(6000)]
    long, short = Text(text), Text(text[-4000:])
    for size in (6000, 5999, 5998):
        del long.tokens[size:], short.tokens[size - 2000 :]
        found = long.find(long.tokens, 5)
        assert [(at - 2000, count) for at, count in found] == short.find(short.tokens, 5)
        assert found == capped(occurrences(text[:size], text[:size], size - 1))[:5]
        before = [at for at, token in enumerate(long.tokens[:-1], 1) if token == long.tokens[-1]]
        assert long.last_of(long.tokens[-1]) == before[-1]


@given(TEXTS, st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=40))
def test_a_trail_has_the_longest_match_and_no_false_one(text: list[int], steps: list[list[int]]) -> None:
    own = Text(text)
    elsewhere = TokenIndex([*[0, 1, 2, 3, 0, 1] * 4, BREAK, *text[::-1], BREAK])
    trails = [Trail(own, ALL), Trail(elsewhere, ALL)]
    new = len(text)
    for said in [[], *steps]:
        own.extend(said)
        text = [*text, *said]
        new += len(said)
        for trail in trails:
            trail.follow(own.tokens, len(text), new)
            limit = len(text) - 1 if trail.index is own else len(elsewhere)
            there = occurrences(trail.index.tokens, text, limit)
            found = trail.matches(len(text))
            assert {at for at, _ in found} <= {at for at, _ in there}
            true = dict(there)
            assert all(count <= true[at] for at, count in found)
            longest = max((count for _, count in there), default=0)
            assert min(max((true[at] for at, _ in found), default=0), 32) == min(longest, 32)
        new = 0


# --------------------------------------------------------------------------------------------- n-gram


def drafts(
    drafter: NgramDrafter | SuffixDrafter, text: Sequence[int], budget: int, tenant: str = ""
) -> dict[tuple[int, ...], float]:
    """What is proposed for a text, by root path."""
    sequence = Drafted(0, list(text), tenant=tenant)
    (tree,) = drafter.propose([sequence], [budget])
    tree.check_integrity()
    assert len(tree) <= budget
    if isinstance(drafter, NgramDrafter):
        drafter.forget(sequence)
    return dict(zip(root_paths(tree), tree.probabilities, strict=True))


def test_the_longest_ngram_is_taken() -> None:
    drafter = NgramDrafter(Histories(), max_tokens=3)
    text = [1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]
    assert drafts(drafter, text, 2) == {(7,): 1, (7, 9): 1}
    assert drafts(drafter, [0, *text[5:8], 2, 3], 1) == {(8,): 1}
    assert drafts(drafter, [5, 6, 5], 3) == {(6,): 1, (6, 5): 1, (6, 5, 6): 1}  # one token, and over the end
    assert drafts(drafter, [5, 6, 7], 3) == {}
    assert drafts(NgramDrafter(Histories(), min_tokens=2), [5, 6, 5], 3) == {}


def test_the_most_recent_and_the_most_frequent_continuations_are_branches() -> None:
    text = [x for token in (4, 4, 4, 5, 6, 6, 7) for x in (1, 2, token, 0)] + [1, 2]
    drafter = NgramDrafter(Histories(), branches=3, max_tokens=2)
    assert drafts(drafter, text, 3) == {(4,): 3 / 7, (4, 0): 3 / 7, (6,): 2 / 7}
    both = drafts(drafter, text, 48)
    assert {path[0] for path in both} == {7, 4, 6}
    assert both[6, 0, 1] == 2 / 7
    alone = drafts(NgramDrafter(Histories(), branches=1, max_tokens=2), text, 3)
    assert list(alone) == [(7,), (7, 0), (7, 0, 1)]


def test_what_varies_in_a_template_is_passed_over() -> None:
    items = [x for number in (21, 22, 23) for x in (1, 2, number, 3, 4, 5, 30 + number)]
    drafter = NgramDrafter(Histories())
    text = [*items, 1, 2]
    behind = {(3,): 1, (3, 4): 1, (3, 4, 5): 1}
    assert drafts(drafter, [24, 8, 9, *text, 24], 8) == behind  # though what followed it elsewhere is 8
    assert drafts(drafter, [*text, 24], 2) == {(3,): 1, (3, 4): 1}
    assert drafts(drafter, [*text[7:], 24], 8) == {}  # twice is no template
    assert drafts(drafter, [*text[:3], 6, *text[4:10], 7, *text[11:], 24], 8) == {}  # nor is what differs
    assert list(drafts(drafter, [*text[:3], 6, *text[4:], 24], 1)) == [(3,)]  # but for once
    assert drafts(NgramDrafter(Histories(), min_tokens=4), [*text, 24], 8) == {}
    assert list(drafts(drafter, [*text, 21], 1)) == [(3,)]  # two tokens stood before, it varies no longer


def repeated(text: list[int], budget: int) -> list[int]:
    """What goes on alike behind most of the tokens that came where the text's last one is."""
    before = [at for at, _ in occurrences(text, text[:-1], len(text) - 2)][:8]
    behind = [(text[at + 1 :] * budget)[:budget] for at in before]
    agreed = [tokens for tokens in behind if tokens[0] == behind[0][0]]
    if len(behind) < 3 or len(agreed) <= len(behind) / 2:
        return []
    same = [a == b for a, b in zip(*agreed[:2], strict=True)]
    return agreed[0][: [*same, False].index(False)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(1, 8))
def test_a_proposal_is_what_followed_the_longest_ngram(text: list[int], budget: int) -> None:
    proposed = drafts(NgramDrafter(Histories(), max_tokens=4), text, budget)
    counts = [(at, alike(text, at, text, len(text))) for at in range(len(text) - 1, 0, -1)]
    longest = min(max((count for _, count in counts), default=0), 4)
    found = [at for at, count in counts if count >= max(longest, 1)]
    if longest > 1:
        assert proposed
        recent = found[:8]
        firsts = [text[at] for at in recent]
        for path, probability in proposed.items():
            assert probability == firsts.count(path[0]) / len(recent)
            assert any(
                list(path) == (text[at:] * (len(path) // len(text[at:]) + 1))[: len(path)] for at in recent
            )
    elif template := repeated(text, budget):
        assert max(proposed, key=len) == tuple(template)
    elif found:
        assert next(iter(proposed)) == (text[found[0]],)
    else:
        assert not proposed


def test_bad_ranges_are_refused() -> None:
    for bad in ({"min_tokens": 0}, {"min_tokens": 5}, {"branches": 0}, {"max_tokens": 100}):
        with pytest.raises(ValueError, match="n-grams"):
            NgramDrafter(Histories(), **bad)
    for bad in ({"factor": 0.0}, {"least": 0.0}, {"least": 2.0}, {"factor": -1.0}):
        with pytest.raises(ValueError, match="factor"):
            SuffixDrafter(Histories(), PastOutputs(), **bad)


# --------------------------------------------------------------------------------------------- suffix


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=5), min_size=1, max_size=8),
    st.integers(1, 9),
    st.sampled_from([0.01, 0.1, 0.3]),
)
def test_what_is_grown_has_the_greatest_products_of_shares(
    continuations: list[list[int]], budget: int, least: float
) -> None:
    tree = grow(continuations, budget, least)
    tree.check_integrity()
    shares: dict[tuple[int, ...], float] = {}
    for member in continuations:
        for end in range(1, len(member) + 1):
            path = tuple(member[:end])
            count = sum(tuple(other[:end]) == path for other in continuations)
            parents = sum(tuple(other[: end - 1]) == path[:-1] for other in continuations)
            shares[path] = shares.get(path[:-1], 1.0) * count / parents
    for path, probability in zip(root_paths(tree), tree.probabilities, strict=True):
        assert probability == pytest.approx(shares[path])
    best = sorted((share for share in shares.values() if share >= least * (1 + 1e-9)), reverse=True)[:budget]
    assert sorted(tree.probabilities, reverse=True)[: len(best)] == pytest.approx(best)


def test_equally_probable_branches_grow_side_by_side() -> None:
    tree = grow([[1, 1, 1, 1], [2, 2, 2, 2]], 4, 0.1)
    assert sorted(tree.depths()) == [1, 1, 2, 2]
    assert grow([[1, 2], [1, 2]], 4, 0.1).is_chain
    assert len(grow([[], []], 4, 0.1)) == len(grow([[]], 4, 0.1)) == 0


def test_a_longer_match_drafts_more() -> None:
    drafter = SuffixDrafter(Histories(), PastOutputs(), factor=1.0)
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    sequence = Drafted(0, [*text, 0, 3, 4])
    assert drafter.propose([sequence], [16])[0].tokens == [5, 6]
    sequence.token_ids += [5, 6]
    (tree,) = drafter.propose([sequence], [16])
    assert (tree.tokens, tree.match) == ([7, 8, 0, 3], 4)
    assert drafter.propose([sequence], [2])[0].tokens == [7, 8]
    assert len(drafter.propose([sequence], [0])[0]) == 0


def test_the_candidate_of_the_greatest_summed_probability_is_taken() -> None:
    """A match of three tokens that went on in as many ways as it has occurrences, against those of two that
    mostly went on in one."""
    common = [x for _ in range(5) for x in (7, 1, 2, 60, 61)]
    drafter = SuffixDrafter(Histories(), PastOutputs(), factor=2.0)
    (tree,) = drafter.propose([Drafted(0, [9, 1, 2, 50, *common, 9, 1, 2])], [16])
    assert (tree.match, tree.tokens[0], len(tree)) == (3, 50, 6)  # alone, so certain
    rare = [x for i in range(3) for x in (9, 1, 2, 50 + i)]
    (tree,) = drafter.propose([Drafted(1, [*rare, *common, 9, 1, 2])], [16])
    assert (tree.match, list(tree.tokens)) == (2, [60, 61, 7, 1])
    assert list(tree.probabilities) == [5 / 8, 5 / 8, 1 / 2, 1 / 2]


def test_outputs_become_the_past_of_their_tenant_alone() -> None:
    outputs, histories = PastOutputs(), Histories()
    drafter = SuffixDrafter(histories, outputs)
    prompt, output = [1, 2, 3], [40, 41, 42, 43, 44]
    first = Drafted(1, [*prompt, *output], prompt_length=3, tenant="a")
    assert len(drafter.propose([first], [8])[0]) == 0
    drafter.forget(first)
    assert (len(histories), outputs.tenants) == (0, ("a",))

    def proposed(arrival: int, tenant: str) -> Sequence[int]:
        sequence = Drafted(arrival, [7, 2, 3], prompt_length=3, tenant=tenant)
        return drafter.propose([sequence], [8])[0].tokens

    assert proposed(2, "a") == [40, 41, 42, 43]  # the beginning is found by the prompt's last tokens
    assert len(proposed(3, "b")) == len(proposed(4, "")) == 0
    drafter.forget(Drafted(5, [1, 2, 3, 90, 91], prompt_length=3, tenant="b"))
    assert proposed(6, "a") == [40, 41, 42, 43]
    assert proposed(3, "b") == [90, 91]  # noticed by a sequence that is under way
    drafter.forget(Drafted(9, prompt, prompt_length=3, tenant="c"))  # it has said nothing
    assert outputs.tenants == ("a", "b")


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), max_size=30)), max_size=30))
def test_tenants_never_see_each_others_outputs(said: list[tuple[str, list[int]]]) -> None:
    """Each tenant speaks in a range of its own; so whose words are proposed is seen."""
    drafter = SuffixDrafter(Histories(), PastOutputs())
    base = {"a": 100, "b": 200, "c": 300}
    for arrival, (tenant, output) in enumerate(said):
        own = [base[tenant] + token for token in output]
        sequence = Drafted(arrival, [5, 6, *own, 5, 6], prompt_length=2, tenant=tenant)
        (tree,) = drafter.propose([sequence], [16])
        assert all(token < 100 or token // 100 * 100 == base[tenant] for token in tree.tokens)
        drafter.forget(sequence)


def test_memory_stays_bounded_over_many_outputs() -> None:
    outputs = PastOutputs(max_bytes=1 << 18, max_tenant_bytes=1 << 16)
    most = 0
    for number in range(100_000):
        outputs.add("a", range(4 * number, 4 * number + 4))
        most = max(most, outputs.bytes)
    assert most <= 1 << 16
    newest, *_ = outputs.of("a")
    assert newest.find(TokenIndex([399_997, 399_998]).tokens, 9) == [(len(newest) - 2, 2)]
    assert not any(index.find(TokenIndex([1, 2, 3]).tokens, 9) for index in outputs.of("a"))
    for number in range(2_000):
        outputs.add(str(number), range(10))
        assert outputs.bytes <= 1 << 18
    assert outputs.tenants[-1] == "1999"  # the longest silent have gone
    assert "a" not in outputs.tenants
    assert outputs.bytes == sum(index.bytes for name in outputs.tenants for index in outputs.of(name))


def test_outputs_that_were_dropped_are_let_go_of_by_who_drafts_from_them() -> None:
    outputs = PastOutputs(max_bytes=1 << 14, max_tenant_bytes=1 << 13)
    drafter = SuffixDrafter(Histories(), outputs)
    sequence = Drafted(0, [7, 2, 3], prompt_length=3, tenant="a")
    outputs.add("a", [2, 3, 40, 41])
    assert drafter.propose([sequence], [4])[0].tokens == [40, 41]
    (dropped,) = outputs.of("a")
    for number in range(20):
        outputs.add(str(number), range(500))
    assert not outputs.of("a")
    assert not len(drafter.propose([sequence], [4])[0])
    del sequence
    gc.collect()
    assert [each for each in gc.get_referrers(dropped) if isinstance(each, tuple | Trail)] == []


def test_of_an_output_that_is_too_long_the_end_is_kept() -> None:
    outputs = PastOutputs(max_tenant_bytes=1 << 14)
    outputs.add("a", [1, 2, 3])
    outputs.add("a", range(100_000))
    assert outputs.bytes <= 1 << 14
    assert outputs.of("a")[0].find(TokenIndex([99_997, 99_998]).tokens, 9)


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=80), min_size=1, max_size=60))
def test_an_output_is_found_whether_it_is_indexed_by_then_or_not(said: list[list[int]]) -> None:
    outputs = PastOutputs(max_tenant_bytes=1 << 16)
    for output in said:
        outputs.add("a", output)
        held = outputs.of("a")
        assert held is outputs.of("a")
        assert outputs.bytes == sum(each.bytes for each in held)
    told = [token for each in reversed(outputs.of("a")) for token in each.tokens]
    assert told == [token for output in said for token in (*output, -1)]


# ------------------------------------------------------------------------------------------ histories


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=90), min_size=1, max_size=12))
def test_histories_keep_up_however_rarely_they_are_asked(parts: list[list[int]]) -> None:
    histories, text = Histories(window_tokens=100), []
    for part in parts:
        text += part
        history = histories.of(Drafted(3, text))
        known = history.text.tokens.tolist()
        assert known == text[len(text) - len(known) :]
        assert min(len(text), 100) <= len(known) <= 200
        before = [at for at, token in enumerate(known[:-1], 1) if token == known[-1]]
        assert history.alone == (before[-1] if before else -1)
        for at, count in history.trail.matches(len(known)):
            assert known[at - count : at] == known[len(known) - count :]
    histories.forget(Drafted(3, []))
    histories.forget(Drafted(3, []))
    assert (len(histories), histories.bytes) == (0, 0)
