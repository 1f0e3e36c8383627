"""The prefix cache under the engine: what is found, what is not, and that it never changes a bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cache_machine import CacheMachine, contents, finish
from fake_executor import FakeExecutor, make_engine
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from tiny_models import VOCABULARY, TinyModel, pool_bytes

from ridgeline import LLM
from ridgeline.cache.kv import KVCache
from ridgeline.config import PAGE_TOKENS, EngineConfig
from ridgeline.engine import Engine
from ridgeline.loading import load_engine
from ridgeline.model.checkpoint import files
from ridgeline.types import Move, PoolingParams, Request, SamplingParams

LATE = pytest.mark.parametrize("late", [False, True], ids=["at once", "one step late"])
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def text(length: int, first: int = 0) -> tuple[int, ...]:
    return tuple((first + 3 * index) % 97 for index in range(length))


def engine_of(executor: FakeExecutor | None = None, **options: Any) -> Engine:
    return make_engine(executor or FakeExecutor(), **{"max_num_batched_tokens": 256, **options})


def rows_run(engine: Engine) -> int:
    return engine.stats.prefill.rows + engine.stats.decode.rows


# ------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 64, 100])
def test_the_same_prompt_again_runs_only_what_must_be_run(length: int) -> None:
    engine = engine_of()
    first = finish(engine, Request("a", text(length), GREEDY))
    again = finish(engine, Request("b", text(length), GREEDY))
    assert contents(first) == contents(again)
    whole = length // PAGE_TOKENS * PAGE_TOKENS
    assert (first.cached_tokens, again.cached_tokens) == (0, min(whole, length - 1))


def test_an_answer_is_found_in_the_next_turn() -> None:
    engine = engine_of()
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    first = finish(engine, Request("a", text(20), params))
    said = text(20) + first.outputs[0].token_ids
    second = finish(engine, Request("b", (*said, 5, 6, 7), params))
    assert second.cached_tokens == 48, "of 50 tokens the last was never run"
    assert contents(second) == contents(finish(engine_of(), Request("b", (*said, 5, 6, 7), params)))


def test_prompts_part_in_the_midst_of_an_edge() -> None:
    engine = engine_of()
    finish(engine, Request("a", text(100), GREEDY))
    for shared, found in ((70, 64), (40, 32), (10, 0), (96, 96)):
        prompt = text(shared) + text(20, first=50)
        output = finish(engine, Request(str(shared), prompt, GREEDY))
        assert output.cached_tokens == found
        assert contents(output) == contents(finish(engine_of(), Request("x", prompt, GREEDY)))
        engine.scheduler.check_integrity()


def test_without_the_cache_nothing_is_found_or_kept() -> None:
    engine = engine_of(prefix_caching=False)
    for name in ("a", "b"):
        assert finish(engine, Request(name, text(64), GREEDY)).cached_tokens == 0
    assert all(pool.evictable_pages == 0 for pool in engine.scheduler.cache.pools)


def test_a_model_without_memory_has_nothing_to_keep() -> None:
    engine = engine_of(FakeExecutor((), ()))
    for name in ("a", "b"):
        assert finish(engine, Request(name, text(64), SamplingParams(n=2, seed=1))).cached_tokens == 0


def test_salts_do_not_share() -> None:
    engine = engine_of()
    found = [
        finish(engine, Request(f"{salt}{turn}", text(64), GREEDY, salt)).cached_tokens
        for turn in range(2)
        for salt in ("", "a", "b")
    ]
    assert found == [0, 0, 0, 63, 63, 63]


# ---------------------------------------------------------------------- as soon as it is computed


def run_all(engine: Engine) -> dict[str, Any]:
    told: dict[str, Any] = {}
    while engine.has_work:
        told |= {output.request_id: output for output in engine.step() if output.finished}
        engine.scheduler.check_integrity()
    return told


@LATE
def test_requests_that_come_together_compute_their_common_prompt_once(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    engine = engine_of(FakeExecutor(pages=(200,)))
    one = SamplingParams(temperature=0, max_tokens=1)
    for index in range(8):
        engine.add(Request(str(index), (*text(200), index, index), one), stream=False)
    told = run_all(engine)
    assert [told[str(index)].cached_tokens for index in range(8)] == [0, *[192] * 7]
    assert rows_run(engine) == 202 + 7 * 10


@LATE
def test_a_prompt_that_is_being_read_is_shared_as_far_as_it_was_read(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    engine = engine_of(FakeExecutor(pages=(200,)), max_num_batched_tokens=72)
    engine.add(Request("first", text(300), GREEDY), stream=False)
    for _ in range(2):
        engine.step()
    engine.add(Request("second", text(300), GREEDY), stream=False)
    told = run_all(engine)
    assert told["second"].cached_tokens == 288
    assert contents(told["first"]) == contents(told["second"])


@LATE
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [1, 5, 16, 17, 32, 45])
@pytest.mark.parametrize("window", [None, 5, 24])
def test_samples_share_their_prompt_and_its_last_page(
    late: bool, caching: bool, length: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeExecutor, "asynchronous", late)
    groups = ((None,), (60,)) if window is None else ((None, window), (60, 40))
    engine = engine_of(FakeExecutor(*groups), prefix_caching=caching)
    params = SamplingParams(n=4, seed=2, max_tokens=20)
    several = finish(engine, Request("a", text(length), params))
    for index, choice in enumerate(several.outputs):
        alone = make_engine(FakeExecutor(*groups), prefix_caching=False)
        params = SamplingParams(n=index + 1, seed=2, max_tokens=20)
        assert finish(alone, Request("a", text(length), params)).outputs[index] == choice
    assert engine.stats.prefill.rows <= length + 3 * (1 if length > 1 else 4)
    assert len({choice.token_ids for choice in several.outputs}) == 4


# ----------------------------------------------------------------------------- what must be computed


def test_scores_of_a_prompt_are_computed_and_the_tokens_before_them_found() -> None:
    engine = engine_of()
    scored = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    alone = finish(engine_of(), Request("a", text(64), scored))
    finish(engine, Request("a", text(64), GREEDY))
    output = finish(engine, Request("b", text(64), scored))
    assert output.cached_tokens == 0
    assert contents(output) == contents(alone)
    assert finish(engine, Request("c", text(64), GREEDY)).cached_tokens == 63


def test_a_mean_needs_every_row_and_a_last_state_one() -> None:
    engine = engine_of()
    for pooling, found in (("mean", 0), ("last", 63), ("mean", 0)):
        params = PoolingParams(pooling)  # type: ignore[arg-type]
        output = finish(engine, Request(pooling, text(64), params))
        assert output.cached_tokens == found
        assert output.embedding == finish(engine_of(), Request("x", text(64), params)).embedding


# ----------------------------------------------------------------------------------------- windows


def test_a_hit_is_the_longest_start_that_every_group_restores() -> None:
    executor = FakeExecutor((None, 24), (40, 8))
    engine = engine_of(executor, max_num_batched_tokens=64)
    finish(engine, Request("a", text(160), GREEDY))
    assert engine.scheduler.cache.pools[1].evictable_pages > 0
    again = finish(engine, Request("b", text(160), GREEDY))
    assert again.cached_tokens == 159, "the last window is there, whatever was before it"
    shorter = Request("c", text(48) + text(20, first=7), GREEDY)
    before = finish(engine_of(FakeExecutor((None, 24), (40, 40))), shorter)
    found = finish(engine, shorter)
    assert contents(found) == contents(before)
    assert found.cached_tokens < 48, "the window before it is gone, though the other group has it"


# ---------------------------------------------------------------------------------------- eviction


def test_the_least_recently_used_is_evicted_first_and_from_its_end() -> None:
    engine = engine_of(FakeExecutor(pages=(16,)))
    one = SamplingParams(temperature=0, max_tokens=1)
    for first in (1, 2, 3):
        finish(engine, Request(str(first), text(80, first), one))
    finish(engine, Request("1 again", text(80, 1), one))
    finish(engine, Request("new", text(40, 4), one))
    found = [finish(engine, Request(f"{first}", text(80, first), one)).cached_tokens for first in (3, 1)]
    assert found == [79, 79]
    tree = engine.scheduler.cache.prefixes
    assert tree is not None
    assert finish(engine, Request("2", text(80, 2), one)).cached_tokens < 79


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    engine = engine_of(FakeExecutor(pages=(9,)), max_num_batched_tokens=64)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for index in range(3):
        engine.add(Request(str(index), text(20, index), params), stream=False)
    told = run_all(engine)
    assert engine.scheduler.preemptions > 0
    for index in range(3):
        alone = finish(engine_of(), Request("x", text(20, index), params))
        assert contents(told[str(index)]) == contents(alone)
        assert told[str(index)].cached_tokens == 0, "it is the first run that counts"


def test_roots_of_salts_are_dropped_with_their_pages() -> None:
    engine = engine_of(FakeExecutor(pages=(8,)))
    for index in range(50):
        finish(engine, Request(str(index), text(40), GREEDY, f"salt {index}"))
    tree = engine.scheduler.cache.prefixes
    assert tree is not None
    assert len(tree._tree._roots) <= 4
    engine.scheduler.check_integrity()


def test_a_copy_for_nobody_is_not_made() -> None:
    """Its source, which the tree keeps, must not become evictable behind what is before it."""
    cache, prompt = KVCache((None,), (5,), prefix_caching=True), text(48)
    leader, sample = cache.new_sequence(), cache.new_sequence()
    assert cache.grow(leader, 48)
    cache.store(leader, prompt, 32)
    assert cache.restore(sample, prompt, 0, 47, leader) == 47
    (copy,) = cache.moves
    assert cache.pools[0].users(copy.source) == 2
    cache.store(leader, prompt, 48)
    cache.release(leader)
    cache.release(sample)
    assert cache.moves == ()
    cache.moved()
    cache.check_integrity([])
    assert cache.pools[0].free_pages == 5
    for pages in range(1, 6):
        assert cache.grow(sample, pages * PAGE_TOKENS)  # which evicts all, one by one
        cache.check_integrity([sample])


# ------------------------------------------------------------------------------- anything, in any order

OPERATIONS = settings(
    max_examples=110,
    stateful_step_count=130,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
GROUPS = {"full": ((None,), (11,)), "windows": ((None, 24), (11, 8)), "window alone": ((20,), (7,))}


def test_ten_thousand_operations_on_an_executor_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of a tenth of what is asked for at once, of every kind, and executors of both kinds."""
    done: Counter[str] = Counter()

    known: dict[str, list[Any]] = {}

    def alone(kind: str, request: Request) -> list[Any]:
        name = repr((kind, request.prompt_token_ids, request.params))
        if name not in known:
            windows, _ = GROUPS[kind]
            engine = make_engine(FakeExecutor(windows, (60,) * len(windows)), prefix_caching=False)
            known[name] = contents(finish(engine, request))
        return known[name]

    class OnFake(CacheMachine):
        @initialize(kind=st.sampled_from(sorted(GROUPS)), late=st.booleans())
        def begin(self, kind: str, late: bool) -> None:
            monkeypatch.setattr(FakeExecutor, "asynchronous", late)
            executor = FakeExecutor(*GROUPS[kind])
            self.engine = make_engine(executor, max_num_seqs=6, max_num_batched_tokens=40)
            self.alone, self.done = partial(alone, kind), done

    run_state_machine_as_test(OnFake, settings=OPERATIONS)
    assert done["operations"] >= 10_000, done
    assert done["finished"] > 500, done
    assert done["preemptions"] > 80, done
    assert done["aborts"] > 100, done
    assert done["cached tokens"] > 2000, done


Tiny = Callable[[str], TinyModel]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tiny: Tiny) -> TinyModel:
    return tiny(request.param)


def loaded(model: TinyModel, **options: Any) -> Engine:
    options = {"threads": 1, "device": "cpu", "max_model_len": 128, **options}
    return load_engine(EngineConfig(model=str(model.folder), **options)).engine


def test_the_python_api_tells_what_was_found(model: TinyModel) -> None:
    prompt = list(range(3, 53))
    for caching, found in ((True, [0, 48, 0, 48]), (False, [0] * 4)):
        with LLM(str(model.folder), max_model_len=128, enable_prefix_caching=caching) as llm:
            outputs = [llm.generate([prompt], GREEDY, salt)[0] for salt in ("", "", "mine", "mine")]
            assert [output.cached_tokens for output in outputs] == found
            assert len({output.outputs[0].token_ids for output in outputs}) == 1
            if caching:
                vectors = [llm.embed([prompt], "last", cache_salt=salt)[0].tobytes() for salt in ("", "new")]
                assert vectors[0] == vectors[1], "the decoder's pages serve the encoder, to the bit"


def test_operations_on_the_cpu_are_bit_identical_to_each_request_alone(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lower tiers and without."""
    monkeypatch.setattr(files, "_SETTLED_S", -60.0)
    done: Counter[str] = Counter()
    tight = {"kv_cache_memory_bytes": pool_bytes(model, 128), "max_num_seqs": 6}
    some = {"cache_memory_bytes": pool_bytes(model, 80), "cache_disk_bytes": 1 << 20}
    with closing(loaded(model, enable_prefix_caching=False)) as fresh:
        known: dict[str, list[Any]] = {}

        def alone(request: Request) -> list[Any]:
            name = repr((request.prompt_token_ids, request.params))
            if name not in known:
                known[name] = contents(finish(fresh, request))
            return known[name]

        class OnCpu(CacheMachine):
            vocabulary = VOCABULARY

            @initialize(tiers=st.booleans())
            def begin(self, tiers: bool) -> None:
                done["engines"] += 1
                lower = {**some, "cache_dir": str(tmp_path / str(done["engines"]))} if tiers else {}
                self.engine = loaded(model, max_num_batched_tokens=40, **tight, **lower)
                self.alone, self.done = alone, done
                transfer = self.engine.executor.transfer

                def counted(moves: Sequence[Move]) -> None:
                    done.update(type(move).__name__ for move in moves)
                    transfer(moves)

                self.engine.executor.transfer = counted  # type: ignore[method-assign]

            def teardown(self) -> None:
                try:
                    super().teardown()
                finally:
                    self.engine.close()

        run_state_machine_as_test(
            OnCpu, settings=settings(OPERATIONS, max_examples=14, stateful_step_count=60)
        )
    assert done["cached tokens"] > 200, done
    assert done["finished"] > 50, done
    assert done["preemptions"] > 0, done
    assert done["PageSpill"] > 20, done
    assert done["PageFill"] > 5, done
