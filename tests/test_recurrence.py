"""The gated recurrence and a hybrid model around it on the reference executor: attention, attention through a
window, and recurrent layers of two widths."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from cache_machine import CacheMachine, finish
from fake_executor import FakeDetokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from recurrent_programs import HIDDEN, VOCABULARY, WIDTHS, RandomWeights, hybrid, hybrid_spec

from ridgeline.apps.perplexity import Scorer
from ridgeline.cache.kv import KVCache
from ridgeline.engine import Engine, ModelFacts
from ridgeline.execution.base import Limits, check_memory_kinds, state_bytes
from ridgeline.execution.reference import ReferenceExecutor
from ridgeline.model.program import (
    Embed,
    GatedRecurrence,
    Program,
    Select,
    StateGroup,
    StepLoad,
    Value,
    Weight,
)
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.types import (
    NO_STATE,
    CheckpointError,
    Float32Array,
    HostPage,
    PageCopy,
    PageFill,
    PageSpill,
    Request,
    RequestOutput,
    SamplingParams,
    Segment,
    SequenceRows,
    Step,
)

WIDTH = 5


# --------------------------------------------------------------------------------- the operation


def bare_program() -> Program:
    """x and gate of a row are its token's rows of two tables; the output is the state behind it."""
    tokens = Value("tokens", "tokens", 1)
    x, gate, state = (Value(name, "f32", WIDTH) for name in ("x", "gate", "state"))
    out = Value("out", "f32", WIDTH, selected=True)
    tables = [Weight(name, (11, WIDTH)) for name in ("xs", "gates")]
    operations = (
        Embed(x, tokens, tables[0]),
        Embed(gate, tokens, tables[1]),
        GatedRecurrence(state, x, gate, layer=3, group=0),
        Select(out, state),
    )
    return Program("bare", operations, (), out, (StateGroup((3,), WIDTH),))


def bare() -> tuple[ReferenceExecutor, Program, RandomWeights]:
    program = bare_program()
    weights = RandomWeights(program)
    executor = ReferenceExecutor(Limits(64, (), states=6))
    executor.load(weights)  # type: ignore[arg-type]
    executor.compile(program)
    return executor, program, weights


def rows_of(tokens: list[int], start: int, read: int, written: int) -> SequenceRows:
    segment = Segment((), start + len(tokens))
    return SequenceRows(tokens, start, (segment,), range(len(tokens)), state=(read, written))


def states_of(executor: ReferenceExecutor, program: Program, *rows: SequenceRows) -> Float32Array:
    return executor.run(program, Step(rows)).result().logits.copy()


def recurrence(weights: RandomWeights, tokens: list[int]) -> list[list[float]]:
    """By Python's own floats, one number at a time, rounded as the state is kept."""
    xs, gates = weights.vector("xs").tolist(), weights.vector("gates").tolist()
    state, behind = [0.0] * WIDTH, []
    for token in tokens:
        forget = [1 / (1 + math.exp(-gate)) for gate in gates[token]]
        state = [
            float(np.float32(f * h + (1 - f) * x)) for f, h, x in zip(forget, state, xs[token], strict=True)
        ]
        behind.append(state)
    return behind


def test_the_recurrence_is_its_formula() -> None:
    executor, program, weights = bare()
    tokens = [index * 7 % 11 for index in range(40)]
    states = states_of(executor, program, rows_of(tokens, 0, NO_STATE, 2))
    np.testing.assert_allclose(states, recurrence(weights, tokens), rtol=2e-7)


@settings(max_examples=60, deadline=None)
@given(cuts=st.sets(st.integers(1, 39)), apart=st.booleans())
def test_chunks_in_any_slots_beside_others_give_the_bits_of_the_whole(cuts: set[int], apart: bool) -> None:
    executor, program, _ = bare()
    tokens, other = [index * 7 % 11 for index in range(40)], [index * 3 % 11 for index in range(40)]
    whole = states_of(executor, program, rows_of(tokens, 0, NO_STATE, 0))
    read, got = NO_STATE, []
    ends = sorted(cuts | {40})
    for turn, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        written = 1 + turn % 2 if apart else 1
        beside = rows_of(other[begin:end], 0, NO_STATE, 5)
        got += [states_of(executor, program, beside, rows_of(tokens[begin:end], begin, read, written))]
        got[-1] = got[-1][end - begin :]
        read = written
    np.testing.assert_array_equal(np.concatenate(got), whole)


def test_a_state_that_is_read_is_there_for_others_and_a_slot_that_was_used_begins_at_zero() -> None:
    executor, program, _ = bare()
    states_of(executor, program, rows_of([1, 2, 3], 0, NO_STATE, 0))
    rows = [rows_of([4], 3, 0, slot) for slot in (1, 2)]
    one, two = states_of(executor, program, *rows)
    np.testing.assert_array_equal(one, two)
    again = states_of(executor, program, rows_of([1, 2, 3, 4], 0, NO_STATE, 0))
    np.testing.assert_array_equal(again[3], one)


def test_states_of_all_layers_are_copied_spilled_and_filled_to_the_bit() -> None:
    executor = hybrid_engine().executor
    held: Any = executor._states  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    for layers in held.values():
        layers[...] = rng.standard_normal(layers.shape)
    group, host = len(DECODER.groups), [HostPage(), HostPage()]
    expected = [layers[3].copy() for layers in held.values()]
    executor.transfer([PageCopy(group, 3, 5), PageSpill(group, 3, host[0])])
    for layers in held.values():
        layers[3] = np.nan
    executor.transfer([PageFill(group, host[0].take(), 9), PageSpill(group, 9, host[1])])
    for slot in (5, 9):
        for layers, values in zip(held.values(), expected, strict=True):
            np.testing.assert_array_equal(layers[slot], values)
    np.testing.assert_array_equal(host[1].take(), host[0].take())
    assert executor.host_page_bytes[group] == len(host[0].take()) == state_bytes(DECODER.states)
    assert len(executor.host_page_bytes) == group + 1


def test_what_it_counts_and_takes() -> None:
    program = bare_program()
    assert program.work(StepLoad(7, 2, (), ())).fp32_flops == 7 * 5 * WIDTH
    assert state_bytes(program.states) == 4 * WIDTH
    assert state_bytes((StateGroup((0, 2), 10), StateGroup((1,), 3))) == 4 * 23


def test_executors_that_keep_no_state_refuse_in_one_line() -> None:
    for name in ("CPU", "CUDA"):
        with pytest.raises(
            CheckpointError,
            match=f"^layer memory is 'state'; the {name} executor accepts: full, window$",
        ):
            check_memory_kinds(bare_program(), name)


def test_the_cpu_executor_refuses() -> None:
    from ridgeline.execution.cpu.executor import CpuExecutor

    executor = CpuExecutor(Limits(8, (), states=4), 1)
    with pytest.raises(CheckpointError, match="layer memory is 'state'"):
        executor.compile(bare_program())
    executor.close()


# ---------------------------------------------------------------------------------- a hybrid model

SPEC = hybrid_spec()
DECODER, ENCODER = hybrid(SPEC)
WEIGHTS = RandomWeights(DECODER, ENCODER)


def hybrid_engine(
    pages: tuple[int, ...] = (60, 60), slots: int = 24, caching: bool = True, **options: int
) -> Engine:
    rows = options.get("max_num_batched_tokens", 256)
    executor = ReferenceExecutor(Limits(rows, pages, "KV32", states=slots))
    executor.load(WEIGHTS)  # type: ignore[arg-type]
    handle = executor.compile(DECODER)
    windows = tuple(group.window for group in DECODER.groups)
    cache = KVCache(windows, pages, caching, state_slots=slots)
    scheduler = Scheduler(cache, options.get("max_num_seqs", 8), rows)
    facts = ModelFacts(VOCABULARY, 256)
    return Engine(
        executor, handle, scheduler, facts, FakeDetokenizer, encoder=lambda: executor.compile(ENCODER)
    )


def told(output: RequestOutput) -> list[Any]:
    """What must be the same to the bit; of embeddings, which are sums of many rows, all but the last bits."""
    each: list[Any] = [(o.token_ids, o.text, o.finish_reason) for o in output.outputs]
    if output.embedding is not None:
        each.append([round(value, 5) + 0.0 for value in output.embedding])
    return each


def prompt_of(length: int, first: int = 0) -> tuple[int, ...]:
    return tuple((first + 3 * index) % VOCABULARY for index in range(length))


def test_a_hybrid_has_groups_of_each_kind() -> None:
    assert [group.kind for group in DECODER.groups] == ["full", "window"]
    assert [group.width for group in DECODER.states] == list(WIDTHS)
    assert DECODER.output.width == VOCABULARY
    assert ENCODER.output.width == HIDDEN


def test_its_answers_depend_on_its_states() -> None:
    """Else nothing here would show anything."""
    engine = hybrid_engine()
    request = Request("a", prompt_of(20), SamplingParams(temperature=0, max_tokens=20))
    before = finish(engine, request).outputs[0].token_ids
    forgetful = hybrid_engine(caching=False)
    executor: Any = forgetful.executor
    run = executor.run

    def run_and_forget(handle: Any, step: Step) -> Any:
        result = run(handle, step)
        for held in executor._states.values():
            held[...] = 0
        return result

    executor.run = run_and_forget
    assert finish(forgetful, request).outputs[0].token_ids != before


@pytest.mark.parametrize("length", [1, 16, 17, 33, 70])
def test_a_prompt_again_a_turn_and_samples_are_what_they_are_alone(length: int) -> None:
    engine = hybrid_engine()
    params = SamplingParams(temperature=0, max_tokens=30)
    first = finish(engine, Request("a", prompt_of(length), params))
    again = finish(engine, Request("b", prompt_of(length), params))
    assert told(first) == told(again)
    assert again.cached_tokens == (length - 1) // 16 * 16
    said = prompt_of(length) + first.outputs[0].token_ids + (7, 8, 9)
    turn = finish(engine, Request("c", said, params))
    assert turn.cached_tokens == (length + 29) // 16 * 16
    fresh = hybrid_engine(caching=False)
    assert told(turn) == told(finish(fresh, Request("c", said, params)))
    several = SamplingParams(n=3, seed=4, max_tokens=12)
    assert told(finish(engine, Request("d", said, several))) == told(
        finish(fresh, Request("d", said, several))
    )
    engine.scheduler.check_integrity()


OPERATIONS = settings(
    max_examples=14,
    stateful_step_count=70,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_operations_on_a_hybrid_give_what_each_request_gives_alone() -> None:
    done: Counter[str] = Counter()
    known: dict[str, list[Any]] = {}
    fresh = hybrid_engine(caching=False)

    def alone(request: Request) -> list[Any]:
        name = repr((request.prompt_token_ids, request.params))
        if name not in known:
            known[name] = told(finish(fresh, request))
        return known[name]

    class OnHybrid(CacheMachine):
        vocabulary = VOCABULARY
        contents = staticmethod(told)

        @initialize(slots=st.sampled_from([4, 12, 30]))
        def begin(self, slots: int) -> None:
            self.engine = hybrid_engine((9, 7), slots, max_num_seqs=6, max_num_batched_tokens=40)
            self.alone, self.done = alone, done

    run_state_machine_as_test(OnHybrid, settings=OPERATIONS)
    assert done["finished"] > 50, done
    assert done["preemptions"] > 5, done
    assert done["cached tokens"] > 100, done


def test_perplexity_of_a_hybrid_does_not_depend_on_the_steps() -> None:
    engine = hybrid_engine()
    scorers = [Scorer(engine.executor, engine.handle, (60, 60), rows) for rows in (100, 7)]
    one, two = (scorer.negative_log_likelihood(prompt_of(80, first=5), 40) for scorer in scorers)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert len(one) == 39
