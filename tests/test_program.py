"""Programs and their arithmetic: single assignment, closed forms against counting, the precision rewrite."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.model.build import decoder
from ridgeline.model.program import Linear, MemoryGroup, Quantise, Route, StepLoad
from ridgeline.model.rewrite import with_precision
from ridgeline.model.spec import (
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)
from ridgeline.precision.formats import FORMATS
from ridgeline.types import Segment, SequenceRows, Step


def small_spec(**changes: object) -> ModelSpec:
    rope = RopeSpec((1.0, 0.5, 0.25, 0.125))
    full = LayerSpec(AttentionSpec(4, 2, 8, 8**-0.5, rope), FeedForwardSpec(64, "silu", gated=True))
    window = LayerSpec(
        AttentionSpec(4, 2, 8, 8**-0.5, rope, window=5), FeedForwardSpec(64, "silu", gated=True)
    )
    sizes = {
        "hidden": 32,
        "vocabulary": 50,
        "context": 128,
        "layers": (full, window, full),
        "tied_head": True,
    }
    return ModelSpec(family="test", norm=NormSpec("rms", 1e-5), **(sizes | changes))  # type: ignore[arg-type]


@st.composite
def sequences(draw: st.DrawFn) -> SequenceRows:
    """Rows of one sequence over up to three segments."""
    count = draw(st.integers(1, 9))
    start = draw(st.integers(0, 12))
    others = draw(
        st.lists(
            st.builds(
                Segment,
                tables=st.just(((0,), (0,))),
                length=st.integers(1, 12),
                first_position=st.integers(0, 8),
                causal=st.booleans(),
            ),
            max_size=2,
        )
    )
    own = Segment(((0,), (0,)), start + count, draw(st.integers(0, 8)))
    parents = tuple(draw(st.integers(-1, row - 1)) for row in range(count)) if draw(st.booleans()) else ()
    outputs = draw(st.sampled_from([(), (count - 1,), tuple(range(count)), tuple(range(count // 2, count))]))
    return SequenceRows([1] * count, start, (*others, own), outputs, parents)


def visible(sequence: SequenceRows, window: int | None) -> list[list[tuple[int, int]]]:
    """For each row the (segment, slot) pairs that it sees, by the definition."""
    own, last = sequence.segments[-1], len(sequence.segments) - 1
    rows = []
    for i in range(len(sequence.tokens)):
        path = [i]
        while path[0] >= 0:
            path.insert(0, sequence.parents[path[0]] if sequence.parents else path[0] - 1)
        places = [*range(sequence.start), *(sequence.start + node for node in path[1:])]
        row = own.first_position + len(places) - 1
        seen = [
            (s, j)
            for s, segment in enumerate(sequence.segments)
            for place, j in enumerate(places if s == last else range(segment.length))
            for position in [segment.first_position + place]
            if (not segment.causal or position <= row) and (window is None or position > row - window)
        ]
        rows.append(seen)
    return rows


@given(st.lists(sequences(), min_size=1, max_size=3), st.integers(1, 10))
def test_load_counts_what_rows_see(batch: list[SequenceRows], window: int) -> None:
    groups = (MemoryGroup("full", (0,), 1, 8), MemoryGroup("window", (1,), 1, 8, window))
    load = StepLoad.of(Step(tuple(batch)), groups)
    for g, limit in enumerate((None, window)):
        seen = [visible(sequence, limit) for sequence in batch]
        assert load.pairs[g] == sum(len(row) for rows in seen for row in rows)
        assert load.slots[g] == sum(len({pair for row in rows for pair in row}) for rows in seen)
        wanted = [[rows[i] for i in each.outputs] for each, rows in zip(batch, seen, strict=True)]
        assert load.of_outputs.pairs[g] == sum(len(row) for rows in wanted for row in rows)
        if not any(each.parents and 0 < len(each.outputs) < len(each.tokens) for each in batch):
            distinct = [len({pair for row in rows for pair in row}) for rows in wanted]
            assert load.of_outputs.slots[g] == sum(distinct)


def test_groups_follow_geometry() -> None:
    program = decoder(small_spec())
    assert [(g.kind, g.layers, g.window) for g in program.groups] == [
        ("full", (0, 2), None),
        ("window", (1,), 5),
    ]


def test_work_of_a_decoder_is_the_textbook_count() -> None:
    spec = small_spec()
    program = decoder(spec)
    step = Step((SequenceRows([1] * 6, 0, (Segment(((0,), (0,)), 6),), (5,)),))
    load = StepLoad.of(step, program.groups)
    linear = sum(op.work(load).ops for op in program.operations if isinstance(op, Linear))
    per_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert linear == 2 * 6 * 3 * per_layer + 2 * 1 * 32 * 50


def test_precision_shares_one_quantised_copy() -> None:
    program = decoder(small_spec())
    formats = {w.name: FORMATS["W8A8-g32"] for w in program.weights() if len(w.shape) == 2}
    rewritten = with_precision(program, formats)
    quantised = [op for op in rewritten.operations if isinstance(op, Quantise)]
    assert len(quantised) == 4 * 3 + 1  # q/k/v, o, gate/up, down of each layer, and the head
    assert all(op.x.kind == "A8-g32" for op in rewritten.operations if isinstance(op, Linear))


def test_assigning_twice_is_refused() -> None:
    program = decoder(small_spec())
    with pytest.raises(ValueError, match="assigns twice"):
        type(program)(
            program.name, program.operations + program.operations[-1:], program.groups, program.output
        )


def test_experts_are_chosen_multiplied_and_combined() -> None:
    """A program with experts, run by hand on the reference executor's rules."""
    experts = ExpertsSpec(
        4, 2, FeedForwardSpec(64, "silu", gated=True), shared=FeedForwardSpec(96, "silu", gated=True)
    )
    rope = RopeSpec((1.0, 0.5, 0.25, 0.125))
    layer = LayerSpec(AttentionSpec(4, 2, 8, 8**-0.5, rope, sinks=True), experts)
    program = decoder(small_spec(layers=(layer,)))
    kinds = [type(op).__name__ for op in program.operations]
    assert kinds.count("Route") == 1
    assert kinds.count("ExpertLinear") == 3
    shapes = {weight.name: weight.shape for weight in program.weights()}
    assert shapes["layers.0.router"] == (4, 32)
    assert shapes["layers.0.experts.down"] == (4, 32, 64)
    assert shapes["layers.0.shared.gate"] == (96, 32)
    assert shapes["layers.0.shared_gate"] == (1, 32)
    assert shapes["layers.0.sinks"] == (4,)
    formats = dict.fromkeys(shapes, FORMATS["W8A8-g32"])
    quantised = with_precision(program, formats)
    between = [op for op in quantised.operations if isinstance(op, Quantise) and op.out.experts == 2]
    assert [op.x.name for op in between] == ["layers.0.experts.activation"]
    routes = next(op for op in quantised.operations if isinstance(op, Route))
    assert routes.x.kind == "f32"
    load = StepLoad(3, 1, (3,), (3,))
    down = next(op for op in quantised.operations if op.out.name == "layers.0.experts.down")
    assert down.work(load).int8_ops == 2 * 3 * 2 * 32 * 64


@pytest.mark.parametrize(("count", "chosen", "rows"), [(8, 2, 1), (8, 2, 3), (128, 8, 5), (4, 4, 2)])
def test_experts_used_is_the_mean_over_even_choices(count: int, chosen: int, rows: int) -> None:
    rng = np.random.default_rng(count + rows)
    used = [
        len({e for _ in range(rows) for e in rng.choice(count, chosen, replace=False)}) for _ in range(4000)
    ]
    expected = StepLoad(rows, 0, (), ()).experts_used(count, chosen) * count
    assert expected == pytest.approx(np.mean(used), rel=0.02)
