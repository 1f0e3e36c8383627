"""What times steps: made-up models, engines without a tokenizer, the meter, and the fit of its timings.

The clock of the meter goes by one second with each look at it, so that a step takes a second whatever the
machine does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_plan import TWO_CORES
from tiny_models import TinyModel

from ridgeline.apps import bare_engine as bare_module
from ridgeline.apps import calibrate, step_meter
from ridgeline.apps import synthetic as synthetic_module
from ridgeline.apps.bare_engine import BareEngine, bare_engine
from ridgeline.apps.plan.host import Rates
from ridgeline.apps.step_meter import Cell, StepMeter, Turn, undisturbed
from ridgeline.apps.synthetic import SHAPE, synthetic
from ridgeline.config import PAGE_TOKENS, EngineConfig
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.precision.formats import DEVICE_FORMATS, FILE_FORMATS, FORMATS
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.step_costs import StepCosts, costs_of, load_costs
from ridgeline.resources.step_fit import Timed
from ridgeline.resources.step_time import StepTimeModel
from ridgeline.types import CapacityError, Request, SamplingParams, StepWork, Work

Tiny = Callable[[str], TinyModel]
RUN_ON_CPU = (*DEVICE_FORMATS["cpu"], *FILE_FORMATS)
SMALL = SHAPE | {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}


def config(**changes: Any) -> EngineConfig:
    settings: dict[str, Any] = {"device": "cpu", "threads": 1, "packed_cache": False}
    return EngineConfig(**settings | {"kv_cache_memory_bytes": 8 << 20} | changes)


@contextmanager
def engine_of(model: TinyModel, **changes: Any) -> Iterator[BareEngine]:
    with open_checkpoint(model.gguf) as checkpoint, bare_engine(checkpoint, config(**changes)) as bare:
        yield bare


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(step_meter, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up model has little of everything."""
    monkeypatch.setattr(synthetic_module, "SHAPE", SMALL)


# ------------------------------------------------------------------------------------ made-up models


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", RUN_ON_CPU)
def test_a_made_up_model_is_in_its_format_and_computes_numbers(name: str) -> None:
    """And the same ones each time that it is made."""
    fmt = (FORMATS | FILE_FORMATS)[name]
    made, again = synthetic(fmt), synthetic(fmt)
    for tensor, info in made.tensors.items():
        held = made.tensor(tensor)
        assert (held.shape, held.storage.name) == (info.shape, info.storage)
        assert held.data.nbytes == info.nbytes
        assert np.array_equal(held.data, again.tensor(tensor).data)
    matrices = {info.storage for info in made.tensors.values() if len(info.shape) == 2}
    assert len(matrices) == 1
    with bare_engine(made, config(weights=name if name in FORMATS else "auto")) as bare:
        logprobs = greedy_logprobs(bare, (5, 6, 7))
    assert len(logprobs) == 3
    assert np.isfinite(logprobs).all()


def greedy_logprobs(bare: BareEngine, prompt: tuple[int, ...]) -> list[float]:
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=1)
    bare.engine.add(Request("r", prompt, params), stream=False)
    found: list[float] = []
    while bare.engine.has_work:
        for output in bare.engine.step():
            found = [token.logprob for token in output.outputs[0].logprobs or ()]
    return found


def test_a_made_up_model_is_larger_than_caches_in_every_format_to_choose() -> None:
    for name in DEVICE_FORMATS["cpu"]:
        made = synthetic(FORMATS[name])
        assert sum(int(np.prod(info.shape)) for info in made.tensors.values()) == 134_515_008
        assert sum(info.nbytes for info in made.tensors.values()) > 32 << 20


# -------------------------------------------------------------------------------------- bare engines


def test_a_bare_engine_says_what_its_weights_took(tiny: Tiny) -> None:
    used = iter([1000, 1750])
    with open_checkpoint(tiny("llama3").gguf) as checkpoint:
        with bare_engine(checkpoint, config(), lambda: next(used)) as bare:
            assert (bare.before_bytes, bare.weights_bytes) == (1000, 750)
            assert bare.config.max_model_len == bare.engine.model.max_model_len == 512
            assert bare.config.kv_format in ("KV16", "KV32")
            assert greedy_logprobs(bare, (1, 2)) == greedy_logprobs(bare, (1, 2))
        assert checkpoint.tensors  # its opener's to close


def test_an_executor_is_closed_whatever_fails_behind_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Failing:
        def load(self, weights: object) -> None:
            raise CapacityError("no room")

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(bare_module, "make_executor", lambda *_: Failing())
    with (
        open_checkpoint(tiny("llama3").gguf) as checkpoint,
        pytest.raises(CapacityError, match="no room"),
        bare_engine(checkpoint, config()),
    ):
        raise AssertionError("nothing was loaded")
    assert closed == [True]


# ------------------------------------------------------------------------------------------ the meter


def test_cells_have_names_and_keep_whole_pages() -> None:
    assert [Cell(4, 256).name, Cell(0, 512).name] == ["decode, batch 4, context 256", "prefill 512"]
    assert Cell(0, 512).kept_tokens == 0
    for context in range(1, 200):
        kept = Cell(1, context).kept_tokens
        assert kept % PAGE_TOKENS == 0
        assert 0 <= kept < context <= kept + 2 * PAGE_TOKENS


def test_only_cells_fit_that_context_and_pools_hold(tiny: Tiny) -> None:
    with engine_of(tiny("llama3"), max_model_len=256, kv_cache_memory_bytes=1 << 20) as bare:
        meter = StepMeter(bare.engine, 64)
        pages = bare.engine.scheduler.cache.pools[0].pages
        assert meter.fits(Cell(1, 256 - 2 * PAGE_TOKENS))
        assert not meter.fits(Cell(1, 257 - 2 * PAGE_TOKENS))
        assert meter.fits(Cell(pages, PAGE_TOKENS))
        assert not meter.fits(Cell(pages + 1, PAGE_TOKENS))


@pytest.mark.usefixtures("clock")
def test_decodes_have_the_batch_and_context_that_were_asked_for(tiny: Tiny) -> None:
    """The contexts are found, not computed, and the middle one of the timed steps has the cell's."""
    cells = [Cell(1, 200), Cell(3, 100), Cell(2, 40)]
    with engine_of(tiny("llama3")) as bare:
        engine, meter = bare.engine, StepMeter(bare.engine, 64)
        meter.warm()
        meter.keep(cells)
        for cell in cells:
            seen = steps_of(bare, lambda cell=cell: meter.seconds(cell, 5))
            decodes = [step for step in seen if all(count == 1 for count, _ in step)]
            timed = decodes[-5:]
            assert [len(step) for step in timed] == [cell.batch] * 5
            assert {length for _, length in timed[2]} == {cell.context}
            computed = sum(count for step in seen for count, _ in step)
            assert computed <= cell.batch * (2 * PAGE_TOKENS + 8)
            assert not engine.has_work
        assert meter.seconds(cells[0], 4) == 1.0
        alone = steps_of(bare, lambda: meter.seconds(cells[0], 4))
        settling = steps_of(bare, lambda: meter.seconds(cells[0], 4, 40.0))
        assert settling in (times * alone for times in range(2, 12))


class Watched:
    """An executor with another `run`."""

    def __init__(self, executor: Any, run: Callable[..., Any]) -> None:
        self._executor, self.run = executor, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


def steps_of(bare: BareEngine, run: Callable[[], object]) -> list[list[tuple[int, int]]]:
    """Of each step that is launched meanwhile, and each of its sequences: the rows, and the tokens behind
    them."""
    executor: Any = bare.engine.executor
    launch, seen = executor.run, []

    def watched(handle: Any, step: Any) -> Any:
        seen.append([(len(one.tokens), one.start + len(one.tokens)) for one in step.sequences])
        return launch(handle, step)

    bare.engine.executor = Watched(executor, watched)  # type: ignore[assignment]
    try:
        run()
    finally:
        bare.engine.executor = executor
    return seen


@pytest.mark.usefixtures("clock")
def test_a_prompt_is_read_whole_each_time(tiny: Tiny) -> None:
    with engine_of(tiny("llama3"), max_num_batched_tokens=64) as bare:
        meter = StepMeter(bare.engine, 64)
        for _ in range(2):
            seen = steps_of(bare, lambda: meter.seconds(Cell(0, 150)))
            assert [step[0] for step in seen] == [(64, 64), (64, 128), (22, 150)]
        assert meter.seconds(Cell(0, 150)) == 1.0


def test_no_sequence_keeps_more_than_its_cells_need(tiny: Tiny) -> None:
    """A long context of one sequence is not kept for a whole batch."""
    cells = [Cell(1, 400), Cell(4, 100)]
    with engine_of(tiny("llama3"), kv_cache_memory_bytes=4 << 20) as bare:
        meter = StepMeter(bare.engine, 64)
        meter.warm()
        before = meter.pages
        meter.keep(cells)
        kept = cells[0].kept_tokens + 3 * cells[1].kept_tokens
        assert [after - had for after, had in zip(meter.pages, before, strict=True)] == [kept // PAGE_TOKENS]


def test_contexts_that_have_no_room_are_refused(tiny: Tiny) -> None:
    with engine_of(tiny("llama3"), kv_cache_memory_bytes=1 << 18) as bare:
        meter = StepMeter(bare.engine, 64)
        meter.seconds(Cell(0, 16))
        with pytest.raises(CapacityError, match="KV cache does not hold"):
            meter.keep([Cell(1, 480)])
        assert not any(pool.used_pages for pool in bare.engine.scheduler.cache.pools)


# ------------------------------------------------------------------------------------------ turns


def turns_of(peaks: list[float], rounds: int, cells: list[Cell]) -> list[Turn]:
    """Turns on a machine whose arithmetic goes through these peaks, the last of which stays."""
    shares = itertools.chain(peaks, itertools.repeat(peaks[-1]))
    meter = StepMeter.__new__(StepMeter)
    taken = itertools.count(1)
    meter.seconds = lambda cell, steps=1, settle_s=0.0: next(taken) * 1e-3  # type: ignore[method-assign]

    def ceilings_now() -> Ceilings:
        return replace(TWO_CORES, fp32_flops_per_s=next(shares) * TWO_CORES.fp32_flops_per_s)

    return meter.turns(cells, rounds, 0.1, ceilings_now)


def test_cells_take_turns_between_ceilings() -> None:
    cells = [Cell(1, 64), Cell(2, 64)]
    turns = turns_of([0.9, 0.95, 1.0], 3, cells)
    assert [turn.cell for turn in turns] == cells * 3
    assert all(one.after is two.before for one, two in itertools.pairwise(turns))
    assert undisturbed(turns) == turns


def test_what_other_work_disturbed_is_timed_again() -> None:
    cells = [Cell(1, 64), Cell(2, 64)]
    turns = turns_of([1.0, 1.0, 0.5, 0.5, 1.0], 2, cells)
    # Before and after: the second, third and fourth are disturbed, and what is needed is timed again.
    assert [turn.cell for turn in turns] == [*cells, *cells, cells[0], cells[1], cells[1]]
    assert sorted(turns.index(turn) for turn in undisturbed(turns)) == [0, 4, 5, 6]


def test_a_machine_that_is_never_left_alone_is_timed_twice_as_often_at_most() -> None:
    cells = [Cell(1, 64), Cell(2, 64)]
    turns = turns_of([1.0, *[0.5] * 20], 2, cells)
    assert len(turns) == 8
    assert undisturbed(turns) == turns
    assert undisturbed([]) == []


# --------------------------------------------------------------------------------------- calibration


@pytest.mark.usefixtures("small")
def test_every_cell_is_timed_with_the_work_that_its_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = (Cell(2, 64), Cell(0, 100))
    monkeypatch.setattr(calibrate, "CELLS", cells)
    timed = calibrate.time_steps(config(max_num_batched_tokens=64), "W8A8-g32", lambda: TWO_CORES, 2)
    assert [[(work.rows, work.sequences) for work in one.works] for one in timed] == [
        [(2, 2)],
        [(64, 1), (36, 1)],
    ] * 2
    assert {one.limits for one in timed} == {Rates.of(TWO_CORES, 1)}
    assert all(one.seconds > 0 for one in timed)


def test_costs_are_fitted_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To times that known costs predict, these come out; what the cache is was measured."""
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure_cache", lambda _: (30e6, 1.9))
    monkeypatch.setattr(calibrate, "tile_rows", lambda _: 6)
    known = replace(costs_of("cpu"), memory=0.7, arithmetic=0.4, step_s=1e-3, source="known")
    known = replace(known, cache_bytes=30e6, cache_speed=1.9, tile_rows=6, tile_share=0.3)
    asked = []

    def time_steps(_: EngineConfig, weights: str, ceilings_now: Callable[[], Ceilings]) -> list[Timed]:
        asked.append(weights)
        return [timed_by(known, size, ceilings_now()) for size in (1, 2, 4, 6, 7, 16, 64, 256, 1024)]

    monkeypatch.setattr(calibrate, "time_steps", time_steps)
    found = calibrate.fitted_costs(config(), "W4A8-g32", lambda: TWO_CORES)
    assert asked == ["W4A8-g32"]
    assert found.source.startswith("fitted on this machine to steps of a made-up W4A8-g32 model, 2026-11-01")
    assert (found.cache_bytes, found.cache_speed, found.tile_rows) == (30e6, 1.9, 6)
    assert found.arithmetic == pytest.approx(known.arithmetic, rel=0.15)
    assert found.tile_share == pytest.approx(known.tile_share, abs=0.15)
    for one in time_steps(config(), "again", lambda: TWO_CORES):
        predicted = StepTimeModel.of(TWO_CORES, found).predict(one.works[0]).seconds
        assert predicted == pytest.approx(one.seconds, rel=0.05)
    assert calibrate.fitted_costs(config(), "W4A8-g32", lambda: TWO_CORES) == found
    assert asked == ["W4A8-g32", "again"]
    assert load_costs(TWO_CORES, "W4A8-g32") == found
    assert load_costs(TWO_CORES, "W8A8-g32") is None
    calibrate.fitted_costs(config(), "W4A8-g32", lambda: TWO_CORES, force=True)
    assert len(asked) == 3


def timed_by(costs: StepCosts, size: int, ceilings: Ceilings) -> Timed:
    dense = Work(int8_ops=size * 270_000_000, read_bytes=80_000_000)
    attention = Work(fp32_flops=size * 10**7, read_bytes=size * 3 * 10**6)
    work = StepWork(dense, attention, size, size, size, 150, 80_000_000)
    return Timed((work,), StepTimeModel.of(ceilings, costs).predict(work).seconds, Rates.of(ceilings, 1))


def test_where_nothing_can_be_kept_costs_are_fitted_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise CapacityError("the disk is full")

    monkeypatch.setattr(calibrate, "measure_cache", lambda _: (0.0, 1.0))
    monkeypatch.setattr(calibrate, "tile_rows", lambda _: 1)
    monkeypatch.setattr(calibrate, "load_costs", lambda *_: None)
    monkeypatch.setattr(calibrate, "save_costs", full)
    monkeypatch.setattr(calibrate, "time_steps", lambda *_: [timed_by(costs_of("cpu"), 8, TWO_CORES)])
    assert calibrate.fitted_costs(config(), "W8A8-g32", lambda: TWO_CORES).memory == pytest.approx(
        costs_of("cpu").memory, rel=0.01
    )
