"""The promise: the same request gives the same bits, whatever else the machine does at the time.

Alone, in a batch, with the prompt split anywhere, on any pages, after preemption, at one thread or two, on
every instruction-set level that this machine has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs
from running import PAGES, Loaded, load
from tiny_models import VOCABULARY, TinyModel, pool_bytes

from ridgeline import LLM, SamplingParams
from ridgeline.native import isa_levels
from ridgeline.types import SequenceRows

Tiny = Callable[[str], TinyModel]
ISA_LEVELS = isa_levels()
QUICK = settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
PROMPTS = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=70)

# ---------------------------------------------------------------------- one step at a time, to the bit


FORMATS = [("llama", "W4A8-g32", "KV16"), ("gemma3", "W4A8-g32", "KV16"), ("llama", "W16A16", "KV16")]
FORMATS += [("llama", "W8A8-g32", "KV8"), ("gemma3", "W16A16", "KV8")]
MODELS = [(*formats, isa) for formats in FORMATS for isa in ISA_LEVELS]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def pair(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[tuple[Loaded, Loaded]]:
    """The same model at one and at two threads."""
    family, weights, kv_format, isa = request.param
    both = tuple(load(tiny(family).folder, isa, weights, kv_format, threads) for threads in (1, 2))
    yield both[0], both[1]
    for loaded in both:
        loaded.executor.close()


@QUICK
@given(data=st.data())
def test_logits_do_not_depend_on_splits_pages_or_company(
    pair: tuple[Loaded, Loaded], data: st.DataObject
) -> None:
    """Nor on which rows' are wanted."""
    alone, other = pair
    prompts = data.draw(st.lists(PROMPTS, min_size=1, max_size=4))
    expected = [alone.run(prompt) for prompt in prompts]
    order = data.draw(st.permutations(range(PAGES)))
    pages = [order[i * 8 : (i + 1) * 8] for i in range(len(prompts))]
    done = [0] * len(prompts)
    while any(done[i] < len(prompts[i]) for i in range(len(prompts))):
        rows: list[SequenceRows] = []
        wanted: list[np.ndarray] = []
        for i in data.draw(st.permutations(range(len(prompts)))):
            count = data.draw(st.integers(0, min(30, len(prompts[i]) - done[i])))
            if count:
                some = data.draw(st.sampled_from([(), (count - 1,), range(count), range(0, count, 2)]))
                chunk = other.rows(prompts[i][done[i] : done[i] + count], done[i], pages[i])
                rows.append(structs.replace(chunk, outputs=tuple(some)))
                wanted.append(expected[i][[done[i] + row for row in some]])
                done[i] += count
        if not rows:
            continue
        np.testing.assert_array_equal(other.logits(*rows), np.concatenate(wanted))


# ------------------------------------------------------------------------ whole requests, to the token

MAX_LEN = 128


def params(draw: st.DrawFn) -> SamplingParams:
    seeded = draw(st.booleans())
    return SamplingParams(
        temperature=draw(st.sampled_from([0.3, 0.8, 1.2])) if seeded else 0.0,
        seed=draw(st.integers(0, 2**64 - 1)),
        top_p=draw(st.sampled_from([1.0, 0.9])),
        top_k=draw(st.sampled_from([0, 20])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        max_tokens=draw(st.integers(1, 20)),
        n=draw(st.sampled_from([1, 1, 2])),
        ignore_eos=True,
    )


REQUESTS = st.composite(lambda draw: (tuple(draw(PROMPTS)), params(draw)))()


def tokens_of(llm: LLM, batch: list[tuple[tuple[int, ...], SamplingParams]]) -> list[list[tuple[int, ...]]]:
    outputs = llm.generate([list(prompt) for prompt, _ in batch], [each for _, each in batch])
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


@pytest.fixture(scope="module", params=ISA_LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIDGELINE_ISA", request.param)
        yield request.param


@pytest.fixture(scope="module")
def solo(isa: str, tiny: Tiny) -> Iterator[LLM]:
    with LLM(str(tiny("gemma3").folder), threads=1, max_model_len=MAX_LEN) as llm:
        yield llm


def crowded(
    folder: Path, threads: int, budget: int, memory_bytes: int | None, measured_budget: bool = True
) -> LLM:
    return LLM(
        str(folder),
        threads=threads,
        max_model_len=MAX_LEN,
        max_num_seqs=min(32, budget),
        max_num_batched_tokens=budget,
        kv_cache_memory_bytes=memory_bytes,
        measured_budget=measured_budget,
    )


@QUICK
@given(
    batch=st.lists(REQUESTS, min_size=1, max_size=32),
    threads=st.sampled_from([1, 2]),
    budget=st.integers(3, 200),
    tight=st.booleans(),
)
def test_tokens_do_not_depend_on_load(
    solo: LLM,
    tiny: Tiny,
    batch: list[tuple[tuple[int, ...], SamplingParams]],
    threads: int,
    budget: int,
    tight: bool,
) -> None:
    expected = [tokens_of(solo, [request])[0] for request in batch]
    memory_bytes = 2 * pool_bytes(tiny("gemma3"), MAX_LEN) if tight else None
    with crowded(tiny("gemma3").folder, threads, budget, memory_bytes) as llm:
        assert tokens_of(llm, batch) == expected


def test_preemption_happens_and_changes_nothing(solo: LLM, tiny: Tiny) -> None:
    random = np.random.default_rng(11)
    greedy = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    batch = [(tuple(random.integers(3, VOCABULARY, 60).tolist()), greedy) for _ in range(8)]
    expected = [tokens_of(solo, [request])[0] for request in batch]
    memory_bytes = 2 * pool_bytes(tiny("gemma3"), MAX_LEN)
    # Whether all come together must not depend on how long steps take.
    with crowded(tiny("gemma3").folder, 2, 64, memory_bytes, measured_budget=False) as llm:
        assert tokens_of(llm, batch) == expected
        scheduler = llm._loaded.engine.scheduler
        assert scheduler.preemptions > 0
        assert all(pool.free_pages == pool.pages for pool in scheduler.cache.pools)


def test_a_batch_of_32_is_32_requests_alone(solo: LLM, tiny: Tiny) -> None:
    random = np.random.default_rng(5)
    batch = [
        (
            tuple(random.integers(3, VOCABULARY, random.integers(1, 70)).tolist()),
            SamplingParams(temperature=0.0 if i % 2 else 0.9, seed=i, max_tokens=12, ignore_eos=True),
        )
        for i in range(32)
    ]
    expected = [tokens_of(solo, [request])[0] for request in batch]
    with crowded(tiny("gemma3").folder, 2, 37, None) as llm:
        assert tokens_of(llm, batch) == expected
