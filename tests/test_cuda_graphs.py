"""CUDA graphs on a device that is none: which bucket serves a step, when it is recorded, and that steps give
the same bits with graphs and without, waited for and not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from msgspec import structs
from running import load_program

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.base import Limits
from ridgeline.execution.cuda import binding, launches
from ridgeline.execution.cuda.arrays import A8, Packed
from ridgeline.execution.cuda.device import Emulated
from ridgeline.execution.cuda.executor import CudaExecutor, CudaHandle
from ridgeline.execution.cuda.graphs import MAX_GRAPH_ROWS, GraphBook, mixed_buckets, single_row_buckets
from ridgeline.execution.cuda.inputs import StepSize
from ridgeline.types import Draw, Segment, SequenceRows, Step, StepResult, drawn_token

LIMITS = [(512, 64), (8192, 256), (16, 16), (1, 1), (100, 7), (8, 64), (513, 1)]


def book(max_rows: int, max_sequences: int) -> GraphBook:
    return GraphBook(max_rows, max_sequences, lambda run: run)


# ---------------------------------------------------------------------------------------- the buckets


def sizes(max_rows: int, max_sequences: int) -> list[StepSize]:
    """Steps of every number of rows, with few outputs, the most that are usual, one more, and all."""
    found = []
    for rows in range(1, max_rows + 1):
        for outputs in {0, 1, max_sequences - 1, max_sequences, max_sequences + 1, rows}:
            if 0 <= outputs <= rows:
                found += [StepSize(rows, outputs, single) for single in (True, False)]
    return found


@pytest.mark.parametrize(("max_rows", "max_sequences"), LIMITS)
def test_the_smallest_bucket_that_holds_a_step_serves_it(max_rows: int, max_sequences: int) -> None:
    graphs, most = book(max_rows, max_sequences), min(max_rows, max_sequences)
    buckets = [StepSize(n, n, True) for n in single_row_buckets(most)]
    buckets += [StepSize(n, outputs, False) for n in mixed_buckets(max_rows) for outputs in (0, most)]
    served = set()
    for size in sizes(max_rows, max_sequences):
        holding = [
            bucket
            for bucket in buckets
            if bucket.single == size.single and bucket.rows >= size.rows and bucket.outputs >= size.outputs
        ]
        smallest = min(holding, key=lambda bucket: (bucket.rows, bucket.outputs), default=None)
        assert graphs.bucket(size) == smallest, size
        served.add(smallest)
        eager = size.outputs > most or size.rows > (most if size.single else min(MAX_GRAPH_ROWS, max_rows))
        assert (smallest is None) == eager, size
    assert set(buckets) <= served  # none is there for nothing
    assert len(buckets) <= most // 8 + 4 + 12


def test_sizes_of_buckets() -> None:
    assert single_row_buckets(64) == [1, 2, 4, *range(8, 65, 8)]
    assert single_row_buckets(7) == [1, 2, 4, 7]
    assert single_row_buckets(1) == [1]
    assert mixed_buckets(8192) == [16, 32, 64, 128, 256, 512]
    assert mixed_buckets(100) == [16, 32, 64, 100]
    assert mixed_buckets(1) == [1]


def test_runs_once_then_records_then_replays() -> None:
    log: list[tuple[str, StepSize | None]] = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        log.append(("capture", None))
        run()
        return lambda: log.append(("replay", None))

    def launch(size: StepSize) -> None:
        log.append(("launch", size))

    graphs = GraphBook(512, 64, capture)
    bucket = graphs.bucket(StepSize(3, 3, True))
    assert bucket == StepSize(4, 4, True)
    other = StepSize(16, 0, False)
    recorded = [("capture", None), ("launch", bucket), ("replay", None)]
    for expected in ([("launch", bucket)], recorded, [("replay", None)], [("replay", None)]):
        log.clear()
        graphs.run(bucket, launch)
        assert log == expected
    assert graphs.recorded == [bucket]

    log.clear()
    graphs.run(other, launch)
    assert log == [("launch", other)]  # a bucket of its own
    assert graphs.recorded == [bucket]

    graphs.clear()
    assert graphs.recorded == []
    for expected in ([("launch", bucket)], recorded):
        log.clear()
        graphs.run(bucket, launch)
        assert log == expected


# ----------------------------------------------------------------------------------------- end to end

LAUNCHERS = tuple(
    (module, name)
    for module, names in (
        (launches, "embed residual_norm quantise linear rope_store attention activate softcap draw"),
        (binding, "rope_table"),
    )
    for name in names.split()
)


class Recorder(Emulated):
    """Its graphs keep the very tensors that kernels were launched with, as CUDA's keep their addresses."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        calls: list[tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]] = []

        def recording(launcher: Callable[..., None]) -> Callable[..., None]:
            return lambda *args, **named: calls.append((launcher, args, named))

        with pytest.MonkeyPatch.context() as patch:
            for module, name in LAUNCHERS:
                patch.setattr(module, name, recording(getattr(module, name)))
            run()

        def replay() -> None:
            for launcher, args, named in calls:
                launcher(*args, **named)

        return replay


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: the interpreter takes its time."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.MODELS, "small", lambda: tiny_models._llama(**sizes))
        return tiny_models.make("small", tmp_path_factory.mktemp("graphs")).folder


@pytest.fixture(autouse=True)
def products_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply row by row: a float32 product of PyTorch's on the CPU depends on how many rows there are."""
    of_all = launches.linear

    def of_each(x: Any, matrix: Packed, out: Any, bias: Any = None) -> None:
        assert not isinstance(x, A8)
        for row in range(len(out)):
            of_all(x[row : row + 1], matrix, out[row : row + 1], bias)

    monkeypatch.setattr(launches, "linear", of_each)


class Running:
    """An executor, and sequences of tokens that grow on pages of their own."""

    PAGES = 4

    def __init__(self, folder: Path, graphs: bool, sequences: int = 4) -> None:
        program, store = load_program(folder, "W32A32")
        limits = Limits(32, (self.PAGES * sequences,), "KV32", max_sequences=4)
        self.executor = CudaExecutor(limits, Recorder(), graphs)
        self.executor.load(store)
        store.close()
        self.handle: CudaHandle = self.executor.compile(program)
        self.lengths = [0] * sequences

    def rows(
        self, sequence: int, tokens: list[int], outputs: list[int], spare_pages: int = 0
    ) -> SequenceRows:
        """The next tokens of a sequence; its table may name more pages than it needs."""
        start = self.lengths[sequence]
        self.lengths[sequence] += len(tokens)
        assert self.lengths[sequence] <= self.PAGES * PAGE_TOKENS
        first = sequence * self.PAGES
        table = (*range(first, first + self.PAGES), *[first] * spare_pages)
        return SequenceRows(tokens, start, (Segment((table,), self.lengths[sequence]),), outputs)

    def launch(self, step: Step) -> Any:
        return self.executor.run(self.handle, step)

    def run(self, step: Step) -> StepResult:
        result = self.launch(step).result()
        return replace(result, logits=result.logits.copy())


SAMPLED = Draw(temperature=0.9, min_p=0.02, seed=11)  # the search for other floors takes seconds here


def random_step(run: Running, random: np.random.Generator, most_rows: int, spare_pages: int) -> Step:
    """Three or four sequences with up to so many rows each; for most of them an output, from which a token
    is drawn, or not."""
    sequences, draws = [], []
    for sequence in random.permutation(4)[: random.integers(3, 5)].tolist():
        count = int(random.integers((most_rows + 1) // 2, most_rows + 1))
        tokens = random.integers(3, tiny_models.VOCABULARY, count).tolist()
        outputs = [count - 1] if random.random() < 0.8 else []
        draws += [
            None if random.random() < 0.4 else structs.replace(SAMPLED, position=tokens[0]) for _ in outputs
        ]
        sequences.append(run.rows(sequence, tokens, outputs, spare_pages))
    return Step(tuple(sequences), tuple(draws))


def test_graphs_change_no_bit(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where tables had to move in between; a graph that was recorded before then would read the old."""
    eager, graphed = Running(small_model, graphs=False), Running(small_model, graphs=True)
    book, forgotten = graphed.handle.graphs, []
    forget = book.clear
    monkeypatch.setattr(book, "clear", lambda: (forgotten.append(book.recorded), forget()))
    random = np.random.default_rng(0)
    for most_rows, spare_pages in ((1, 0), (4, 0), (1, 0), (3, 0), (1, 20), (4, 0), (1, 0), (1, 0), (5, 200)):
        step = random_step(eager, random, most_rows, spare_pages)
        expected, seen = eager.run(step), graphed.run(step)
        np.testing.assert_array_equal(seen.logits, expected.logits)
        np.testing.assert_array_equal(seen.tokens, expected.tokens)
        assert seen.work == expected.work
    assert len(forgotten) == 2
    assert all(forgotten), "tables moved before a graph was recorded"
    assert {bucket.single for before in forgotten for bucket in before} == {True, False}
    assert eager.handle.graphs.recorded == []


# ------------------------------------------------------------------------------------------- the turns


def decoding(run: Running, waits: bool, steps: int) -> list[list[int]]:
    """Prompts of three sequences, then tokens that are drawn; a step may be launched before the tokens of
    the step before are known. Two sequences change places, so that an output is not its reader's row."""
    prompts = [[5, 9, 200, 31], [77], [3, 4]]
    draws = tuple(structs.replace(SAMPLED, choice=i) if i else Draw() for i in range(3))
    first = Step(tuple(run.rows(i, p, [len(p) - 1]) for i, p in enumerate(prompts)), draws)
    futures = [run.launch(first)]
    order, found = [0, 1, 2], []
    for place in range(steps):
        if waits:
            found.append(futures[-1].result().tokens.tolist())
        turned = [order[1], order[0], order[2]]
        tokens = [found[-1][order.index(i)] if waits else drawn_token(order.index(i)) for i in turned]
        rows = tuple(run.rows(i, [token], [0]) for i, token in zip(turned, tokens, strict=True))
        futures.append(
            run.launch(Step(rows, tuple(structs.replace(draws[i], position=place) for i in turned)))
        )
        order = turned
        if not waits:
            found.append(futures[-2].result().tokens.tolist())
    found.append(futures[-1].result().tokens.tolist())
    return found


@pytest.mark.parametrize("graphs", [False, True])
def test_tokens_may_stay_on_the_device(small_model: Path, graphs: bool) -> None:
    expected = decoding(Running(small_model, graphs), waits=True, steps=4)
    assert decoding(Running(small_model, graphs), waits=False, steps=4) == expected
    assert len({token for tokens in expected for token in tokens}) > 3


def test_results_outlive_the_next_step(small_model: Path) -> None:
    """Logits stay until the second step after; what is asked for late is as good."""
    run = Running(small_model, graphs=False)
    steps = [
        Step((run.rows(0, [t], [0]), run.rows(1, [t + 7], [0])), (None, Draw())) for t in (3, 50, 90, 120)
    ]
    run.lengths = [0] * 4
    alone = [run.run(step) for step in steps]
    early = run.launch(steps[0])
    soon = early.result()
    for before, (first, second) in enumerate(zip(steps[1:], alone[1:], strict=True)):
        late = run.launch(first)
        np.testing.assert_array_equal(soon.logits, alone[before].logits)
        np.testing.assert_array_equal(early.result().logits, alone[before].logits)
        assert early.result().tokens.tolist() == alone[before].tokens.tolist()
        early, soon = late, late.result()
        assert soon.tokens.tolist() == second.tokens.tolist()
    assert not np.array_equal(alone[0].logits, alone[1].logits)
