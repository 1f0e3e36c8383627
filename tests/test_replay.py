"""Drafting replayed over known texts: what is right is seen in them, and steps take what is predicted."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from drafted import Drafted, follow_text
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler_classes import pace_of

from ridgeline.sampling.drafting.costs import Seconds, StepCost
from ridgeline.sampling.drafting.replay import Guesses, KnownText, Pass, replay
from ridgeline.sampling.drafting.speculator import Speculator
from ridgeline.scheduling.drafting import seconds_by_rows
from ridgeline.types import SpeculationParams

PHRASE = tuple(range(100, 130))


def flat(contexts: Sequence[int]) -> Seconds:
    """A machine that is limited by memory: every row after a step's first 1,000 costs."""
    return lambda rows: 0.01 * (1 + max(rows - 1000, 0))


def steep(contexts: Sequence[int]) -> Seconds:
    """A machine that is limited by arithmetic: a row more costs what a token is worth."""
    return lambda rows: 0.01 * rows


def repeating(count: int) -> KnownText:
    return KnownText(PHRASE, (PHRASE * (count // len(PHRASE) + 1))[:count])


def novel(seed: int, count: int) -> KnownText:
    tokens = random.Random(seed).sample(range(1 << 20), 40 + count)
    return KnownText(tokens[:40], tokens[40:])


def test_a_text_that_repeats_itself() -> None:
    found = Guesses.of(list(replay([repeating(121)], 1, 64, flat)))
    assert found is not None
    assert found.accepted == 120 - found.passes  # what is not guessed, a pass says
    assert found.share > 0.9
    assert found.tokens_per_pass == pytest.approx(120 / found.passes)
    assert found.slowdown == 1
    assert found.gain == pytest.approx(found.tokens_per_pass)
    assert found.gain > 4


def test_a_text_that_never_does() -> None:
    assert Guesses.of(list(replay([novel(1, 50)], 1, 64, flat))) is None
    assert Guesses.of([]) is None
    assert list(replay([KnownText((1, 2), (3,)), KnownText((1, 2), ())], 1, 64, flat)) == []


def test_what_does_not_pay_is_not_guessed() -> None:
    """All the machine's arithmetic is taken: a few trials, and no more."""
    passes = list(replay([repeating(200)] * 4, 4, 64, steep))
    assert sum(one.drafted for one in passes) < 0.1 * sum(one.sequences for one in passes)


def test_what_past_answers_said_is_found() -> None:
    """By "suffix", which looks there, when the first is done; not by "ngram"."""
    texts = [novel(5, 80), KnownText((7,), novel(5, 80).answer)]
    by = {
        name: Guesses.of(list(replay(texts, 1, 64, flat, SpeculationParams(name))))
        for name in ("suffix", "ngram")
    }
    assert by["ngram"] is None
    assert by["suffix"] is not None
    assert by["suffix"].accepted > 60


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), max_size=6),
    batch=st.integers(1, 4),
    room=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_every_token_is_written_once(shapes: list[tuple[int, int]], batch: int, room: int, seed: int) -> None:
    rng = random.Random(seed)
    texts = [
        KnownText([rng.randrange(4) for _ in range(prompt)], [rng.randrange(4) for _ in range(answer)])
        for prompt, answer in shapes
    ]
    passes = list(replay(texts, batch, room, flat))
    assert sum(one.sequences + one.accepted for one in passes) == sum(
        max(len(text.answer) - 1, 0) for text in texts
    )
    assert all(one.sequences <= batch and one.accepted <= one.drafted <= room for one in passes)
    assert passes == list(replay(texts, batch, room, flat))


def test_replay_guesses_what_the_engine_would() -> None:
    """Step by step what a speculator drafts for a sequence that grows along the text."""
    text = repeating(90)
    whole = [*text.prompt, *text.answer]
    pace = pace_of(0.01, 0.0001)
    sequence = Drafted(0, whole[: len(PHRASE) + 1], len(PHRASE), len(whole))
    speculator = Speculator.of_lookups(clock=lambda: 0.0)
    expected = []
    while len(sequence.token_ids) < len(whole):
        written = len(sequence.token_ids)
        seconds = seconds_by_rows(pace, [written])
        (tree,) = speculator.draft([sequence], StepCost(1, 1, 40, seconds))
        nodes = follow_text(tree, lambda i, at=written: whole[at + i] if at + i < len(whole) else -1)
        if len(tree):
            speculator.verified(sequence, tree, nodes)
        sequence.token_ids += whole[written : written + len(nodes) + 1]
        expected.append(Pass(1, len(tree), len(nodes), seconds(1 + len(tree)), seconds(1)))
    assert list(replay([text], 1, 40, lambda contexts: seconds_by_rows(pace, contexts))) == expected
    assert sum(one.accepted for one in expected) > 40


def test_passes_add_up() -> None:
    """Two of a pair of sequences: 3 tokens in 3 s in place of 1.5 · 2 s, 2 in 2 s."""
    found = Guesses.of([Pass(2, 4, 1, 3.0, 2.0), Pass(2, 0, 0, 2.0, 2.0)])
    assert found is not None
    assert (found.passes, found.drafted, found.accepted, found.share) == (2, 4, 1, 0.25)
    assert found.tokens_per_pass == 1.25
    assert found.slowdown == 5 / 4
    assert found.gain == pytest.approx((1.5 * 2 + 2) / 5)
