"""Perplexity against a plain computation, on an executor whose logits depend on the whole visible context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_executor import NO_WORK
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.apps.perplexity import Perplexity, Scorer, score_text
from ridgeline.config import MAX_OUTPUT_ROWS, PAGE_TOKENS
from ridgeline.types import PageCopy, RequestError, Step, StepResult

VOCABULARY = 37


def logits_after(history: Sequence[int]) -> np.ndarray:
    """What the made-up model says after a history: a hash of its last eight tokens."""
    seed = 0
    for token in history[-8:]:
        seed = (seed * 31 + token + 1) % 2**32
    return np.random.default_rng(seed).normal(0, 3, VOCABULARY).astype(np.float32)


@dataclass
class PagedExecutor:
    """Keeps tokens where keys would be and reads every history back through the page table."""

    pages: tuple[int, ...]
    windows: tuple[int | None, ...]
    rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pools = [np.full((n, PAGE_TOKENS), -1) for n in self.pages]

    def run(self, handle: Any, step: Step) -> Any:
        (sequence,) = step.sequences
        (segment,) = sequence.segments
        assert segment.length == sequence.start + len(sequence.tokens)
        self.rows.append(len(sequence.tokens))
        for pool, table in zip(self.pools, segment.tables, strict=True):
            for slot, token in enumerate(sequence.tokens, sequence.start):
                pool[table[slot // PAGE_TOKENS], slot % PAGE_TOKENS] = token
        logits = [
            logits_after(self.history(segment.tables, sequence.start + row)) for row in sequence.outputs
        ]
        array = np.array(logits, np.float32).reshape(-1, VOCABULARY)
        return Done(StepResult(array, np.full(len(array), -1, np.int32), 0.001, NO_WORK))

    def history(self, tables: Sequence[Sequence[int]], position: int) -> list[int]:
        for pool, table, window in zip(self.pools, tables, self.windows, strict=True):
            first = 0 if window is None else max(position - window + 1, 0)
            seen = [int(pool[table[s // PAGE_TOKENS], s % PAGE_TOKENS]) for s in range(first, position + 1)]
            if window is None:
                whole = seen
            else:
                assert seen == whole[-window:]
        return whole

    def transfer(self, moves: Sequence[PageCopy]) -> None: ...

    def load(self, weights: Any) -> None: ...

    def compile(self, program: Any) -> Any: ...

    def close(self) -> None: ...


@dataclass
class Done:
    step_result: StepResult

    def result(self) -> StepResult:
        return self.step_result


def scorer(
    max_rows: int = 16, pages: tuple[int, ...] = (64,), windows: tuple[int | None, ...] = (None,)
) -> Scorer:
    return Scorer(PagedExecutor(pages, windows), None, pages, max_rows)


def text(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCABULARY, length)]


def plain_nll(chunk: Sequence[int], first: int) -> list[float]:
    scores = []
    for position in range(first, len(chunk) - 1):
        logits = [float(x) for x in logits_after(chunk[: position + 1])]
        scores.append(math.log(math.fsum(math.exp(x) for x in logits)) - logits[chunk[position + 1]])
    return scores


def plain(tokens: Sequence[int], context: int, chunks: int, begin: int | None = None) -> Perplexity:
    scores: list[float] = []
    for index in range(chunks):
        chunk = list(tokens[index * context : (index + 1) * context])
        if begin is not None:
            chunk[0] = begin
        scores += plain_nll(chunk, context // 2)
    mean = math.fsum(scores) / len(scores)
    spread = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / len(scores) / (len(scores) - 1))
    return Perplexity(math.exp(mean), math.exp(mean) * spread, len(scores), chunks)


def same(a: Perplexity, b: Perplexity) -> None:
    assert (a.tokens_scored, a.chunks) == (b.tokens_scored, b.chunks)
    assert a.perplexity == pytest.approx(b.perplexity, rel=1e-5)
    assert a.error == pytest.approx(b.error, rel=1e-4)


@pytest.mark.parametrize("begin", [None, 1])
def test_figure_equals_the_plain_computation(begin: int | None) -> None:
    tokens = text(40 * 3 + 7)
    same(score_text(scorer(), tokens, 40, begin_token=begin), plain(tokens, 40, 3, begin))


def test_second_half_of_each_chunk_is_scored() -> None:
    result = score_text(scorer(), text(64 * 2), 64)
    assert (result.chunks, result.tokens_scored) == (2, 2 * (64 - 1 - 32))


@given(context=st.integers(8, 90), max_rows=st.integers(1, 100), seed=st.integers(0, 9))
def test_any_size_of_step_gives_the_same_figure(context: int, max_rows: int, seed: int) -> None:
    tokens = text(context, seed)
    same(score_text(scorer(max_rows), tokens, context), plain(tokens, context, 1))


def test_steps_stay_within_the_rows_that_there_is_room_for() -> None:
    run = scorer(max_rows=400, pages=(80,))
    score_text(run, text(1200), 1200)
    assert isinstance(run.executor, PagedExecutor)
    assert run.executor.rows[:2] == [400, 200]
    assert max(run.executor.rows[2:]) <= MAX_OUTPUT_ROWS
    assert sum(run.executor.rows) == 1199


def test_window_group_with_a_small_pool_is_walked_round() -> None:
    run = scorer(max_rows=16, pages=(20, 4), windows=(None, 24))
    tokens = text(300)
    same(score_text(run, tokens, 300), plain(tokens, 300, 1))


def test_number_of_chunks_and_running_figures() -> None:
    tokens = text(30 * 5)
    seen: list[Perplexity] = []
    last = score_text(scorer(), tokens, 30, chunks=2, on_chunk=seen.append)
    assert [s.chunks for s in seen] == [1, 2]
    assert seen[-1] == last
    same(seen[0], plain(tokens, 30, 1))
    assert score_text(scorer(), tokens, 30, chunks=99).chunks == 5


def test_too_little_text_or_context() -> None:
    with pytest.raises(RequestError, match="the text has 29 tokens; accepted: at least one chunk of 30"):
        score_text(scorer(), text(29), 30)
    with pytest.raises(RequestError, match="accepted: at least 8"):
        score_text(scorer(), text(29), 7)
