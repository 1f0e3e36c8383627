"""An executor without a model: it checks what the engine asks of it, and answers from the whole context.

It keeps real paged memory, one array per memory group, in which a slot holds the token written to it, its
position, and a hash of all tokens up to it. Each step it checks that every slot that a row can see continues
the chain of that sequence's own tokens, and derives the row's logits from what it read. A page that was
lost, shared, or read through a stale table is an error here, or makes different tokens. A slot of recurrent
state holds how many tokens it has seen, and a hash of them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from msgspec import structs

from ridgeline.cache.kv import KVCache
from ridgeline.config import PAGE_TOKENS
from ridgeline.engine import Engine, ModelFacts
from ridgeline.execution.draw import Drawer, undrawn
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.types import (
    MAX_DRAFT_TOKENS,
    NO_STATE,
    Float32Array,
    PageCopy,
    PageFill,
    SequenceRows,
    SlotCopy,
    Step,
    StepResult,
    StepWork,
    Work,
)

_SLOT = np.dtype([("token", np.int64), ("position", np.int64), ("chain", np.uint64)])
_POISON = np.array((-1, -1, 0xDEAD), _SLOT)
_STATE = np.dtype([("tokens", np.int64), ("chain", np.uint64)])
_ROOT = 0x243F6A8885A308D3
_OFFSETS = 2**13
HIDDEN = 8
NO_WORK = StepWork(Work(), Work(), rows=0, outputs=0, sequences=0, launches=0)


def _chained(chain: Any, token: Any) -> Any:
    """A hash of a prefix from the hash of the prefix before it."""
    with np.errstate(over="ignore"):
        mixed = (np.uint64(chain) ^ np.uint64(token) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return mixed ^ mixed >> np.uint64(29)


@dataclass(frozen=True)
class FakeFuture:
    step_result: StepResult

    def result(self) -> StepResult:
        return self.step_result


class FakeExecutor:
    """`windows[g]` and `pages[g]` describe memory group g; with `states`, its model is recurrent too, and it
    has so many slots. `edit(logits, tokens)` may change a row's logits, given the tokens that it sees in
    group 0. Results are kept back until they are asked for, and until one more step was run at most."""

    asynchronous = False
    numerics = "fake"

    def __init__(
        self,
        windows: tuple[int | None, ...] = (None,),
        pages: tuple[int, ...] = (64,),
        vocabulary: int = 97,
        max_rows: int = 512,
        edit: Callable[[Float32Array, list[int]], None] | None = None,
        states: int = 0,
    ) -> None:
        self.windows = windows
        self.vocabulary = vocabulary
        self.max_rows = max_rows
        self.edit = edit
        self.memory = [np.full((count, PAGE_TOKENS), _POISON, _SLOT) for count in pages]
        self.states = np.full(states, np.array((-7, 0xDEAD), _STATE), _STATE)
        self.steps: list[Step] = []
        self.encoders = 0
        self.fail: Exception | None = None
        self.closed = False
        self._logits = self._older = np.zeros((0, vocabulary), np.float32)
        self._drawn = self._older_drawn = np.zeros(0, np.int32)
        noise = np.random.default_rng(1)
        self.drawer = Drawer()
        self._noise = (noise.standard_normal((2, _OFFSETS + vocabulary)) * 2).astype(np.float32)

    def load(self, weights: Any) -> None:
        """There are none."""

    def compile(self, program: Any) -> str:
        return "handle"

    def compile_encoder(self) -> str:
        """The handle of a program whose outputs are `HIDDEN` of a row's logits."""
        self.encoders += 1
        return "encoder"

    def run(self, handle: Any, step: Step) -> FakeFuture:
        assert handle in ("handle", "encoder")
        assert not self.closed, "run after close"
        assert 0 < step.rows <= self.max_rows, f"{step.rows} rows in a step of at most {self.max_rows}"
        if self.fail is not None:
            raise self.fail
        step = self._known(step)
        self._older.fill(np.nan)  # results of the second step before may no longer be read
        self._older_drawn.fill(-7)
        self._older, self._older_drawn = self._logits, self._drawn
        self.steps.append(step)
        written: set[tuple[int, int, int]] = set()
        for sequence in step.sequences:
            self._write(sequence, written)
        for sequence in step.sequences:
            self._check(sequence)
        chains = self._move_states_on(step)
        rows = [
            self._answer(s, row, chain[row] if chain else _ROOT)
            for s, chain in zip(step.sequences, chains, strict=True)
            for row in s.outputs
        ]
        self._logits = np.array(rows, np.float32).reshape(len(rows), self.vocabulary)
        if handle == "encoder":
            assert not step.draws
            self._logits = self._logits[:, :HIDDEN].copy()
        self._drawn = self.drawer.rows(self._logits, step.draws)
        logits = undrawn(self._logits, step.draws)
        dense = Work(int8_ops=step.rows, read_bytes=1)
        work = StepWork(dense, Work(), step.rows, step.outputs, len(step.sequences), 1)
        return FakeFuture(StepResult(logits, self._drawn, 0.001, work))

    def _known(self, step: Step) -> Step:
        """The step with the tokens in it that this executor has drawn in the one before."""
        sequences = []
        for sequence in step.sequences:
            # Where none could be drawn, the sequence is about to end, and any token will do.
            tokens = [max(int(self._drawn[-1 - t]), 0) if t < 0 else t for t in sequence.tokens]
            sequences.append(structs.replace(sequence, tokens=tokens))
        return replace(step, sequences=tuple(sequences))

    def transfer(self, moves: Sequence[Any]) -> None:
        for move in moves:
            memory = (*self.memory, self.states)[move.group]
            if isinstance(move, PageCopy):
                memory[move.target] = memory[move.source]
            elif isinstance(move, SlotCopy):
                slots = memory.reshape(-1)
                slots[np.array(move.targets)] = slots[np.array(move.sources)]
            elif isinstance(move, PageFill):
                assert move.source.shape == (self.host_page_bytes[move.group],)
                held = move.source.view(memory.dtype)
                memory[move.target] = held if memory.ndim == 2 else held[0]
            else:
                spilled = memory[move.source : move.source + 1].copy().view(np.uint8).reshape(-1)
                move.target.put(lambda spilled=spilled: spilled)

    @property
    def host_page_bytes(self) -> tuple[int, ...]:
        pages = (PAGE_TOKENS * _SLOT.itemsize,) * len(self.memory)
        return (*pages, _STATE.itemsize) if len(self.states) else pages

    def close(self) -> None:
        self.closed = True

    def _write(self, sequence: SequenceRows, written: set[tuple[int, int, int]]) -> None:
        (segment,) = sequence.segments
        assert segment.length == sequence.start + len(sequence.tokens)
        assert len(segment.tables) == len(self.memory)
        assert list(sequence.outputs) == sorted(set(sequence.outputs))
        for group, table in enumerate(segment.tables):
            # A page more, once and again, is left of guesses that went further.
            assert 0 <= len(table) - -(-segment.length // PAGE_TOKENS) <= MAX_DRAFT_TOKENS // PAGE_TOKENS
            for row, token in enumerate(sequence.tokens):
                assert 0 <= token < self.vocabulary
                path = _path(sequence, row)
                slot = int(path[-1])
                page, offset = table[slot // PAGE_TOKENS], slot % PAGE_TOKENS
                assert (group, page, offset) not in written, "two rows write one slot"
                written.add((group, page, offset))
                if offset == 0:
                    self.memory[group][page] = _POISON  # what the last owner left must not matter
                before = self._at(group, table, path[-2:-1])["chain"]
                chain = _chained(before[0] if len(before) else _ROOT, token)
                self.memory[group][page, offset] = (token, len(path) - 1, chain)

    def _at(self, group: int, table: Sequence[int], slots: Any) -> Any:
        pages = np.array(table, np.int64)[slots // PAGE_TOKENS]
        return self.memory[group][pages, slots % PAGE_TOKENS]

    def _visible(self, sequence: SequenceRows, group: int, row: int) -> tuple[Any, Any]:
        """The positions that a row sees, and what its slots hold."""
        window, path = self.windows[group], _path(sequence, row)
        first = 0 if window is None else max(0, len(path) - window)
        slots = path[first:]
        return np.arange(first, len(path)), self._at(group, sequence.segments[0].tables[group], slots)

    def _check(self, sequence: SequenceRows) -> None:
        """What each row sees must be one unbroken chain of this sequence's own tokens."""
        rows = range(len(sequence.tokens)) if sequence.parents else [0, len(sequence.tokens) - 1]
        for group, row in itertools.product(range(len(self.memory)), rows):
            positions, seen = self._visible(sequence, group, row)
            assert (seen["position"] == positions).all(), f"group {group}: a slot holds another position"
            follows = _chained(seen["chain"][:-1], seen["token"][1:])
            assert (seen["chain"][1:] == follows).all(), (
                f"group {group}: a slot holds another sequence's token"
            )
            assert seen["token"][-1] == sequence.tokens[row]

    def _move_states_on(self, step: Step) -> list[list[Any]]:
        """The hash behind each row of each sequence."""
        if not len(self.states):
            assert all(sequence.state is None for sequence in step.sequences)
            return [[] for _ in step.sequences]
        pairs = [sequence.state for sequence in step.sequences]
        written = [pair[1] for pair in pairs if pair is not None]
        assert len(set(written)) == len(pairs), "two sequences write one state"
        chains, after = [], []
        for sequence in step.sequences:
            assert sequence.state is not None
            read, own = sequence.state
            assert 0 <= own < len(self.states)
            assert (read == NO_STATE) == (sequence.start == 0), (
                "a state is missing, or begins amid the tokens"
            )
            assert read == own or read not in written, "a state is read that another sequence writes"
            tokens, chain = self.states[read] if read != NO_STATE else (0, _ROOT)
            assert tokens == sequence.start, "a state is behind other tokens than the row before"
            if self.memory and read != NO_STATE:
                page, offset = divmod(sequence.start - 1, PAGE_TOKENS)
                before = self.memory[0][sequence.segments[0].tables[0][page], offset]
                assert chain == before["chain"], "a state is another sequence's"
            behind = [chain := _chained(chain, token) for token in sequence.tokens]
            chains.append(behind)
            after.append((own, (tokens + len(behind), chain)))
        for own, state in after:
            self.states[own] = state
        return chains

    def _answer(self, sequence: SequenceRows, row: int, chain: Any) -> Float32Array:
        """Logits of a row, from the tokens that it sees in each group and their places, and from the state
        behind it."""
        state = np.uint64(len(_path(sequence, row)) - 1)
        with np.errstate(over="ignore"):
            if len(self.states):
                state = _chained(state, chain)
            for group in range(len(self.memory)):
                positions, seen = self._visible(sequence, group, row)
                hashed = _chained(positions.astype(np.uint64) * np.uint64(0xD1342543DE82EF95), seen["token"])
                state = _chained(state, np.bitwise_xor.reduce(hashed))
        first, second = int(state) % _OFFSETS, int(state >> np.uint64(32)) % _OFFSETS
        logits = (
            self._noise[0, first : first + self.vocabulary]
            + self._noise[1, second : second + self.vocabulary]
        )
        if self.edit is not None:
            self.edit(logits, self._visible(sequence, 0, row)[1]["token"].tolist())
        return logits


def _path(sequence: SequenceRows, row: int) -> Any:
    """The slot of each position that a row sees, up to its own."""
    if not sequence.parents:
        return np.arange(sequence.start + row + 1)
    rows = []
    while row >= 0:
        rows.append(sequence.start + row)
        row = sequence.parents[row]
    return np.array([*range(sequence.start), *reversed(rows)])


class FakeDetokenizer:
    """Token t reads as one letter; token 0 joins the letter after it, and is held back until then."""

    def __init__(self, skip_special_tokens: bool = True) -> None:
        self._held = ""

    def push(self, token_id: int) -> str:
        if token_id == 0:
            self._held += letter(0)
            return ""
        text, self._held = self._held + letter(token_id), ""
        return text

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text


def letter(token_id: int) -> str:
    """What the fake detokenizer makes of a token."""
    return chr(0x21 + token_id)


def make_engine(executor: FakeExecutor, **settings: Any) -> Engine:
    """An engine on a fake executor. Settings: max_num_seqs, max_num_batched_tokens, max_model_len,
    end_token_ids, begin_token_id, seed, prefix_caching, tiers, drafting."""
    pages = tuple(len(memory) for memory in executor.memory)
    caching, tiers = settings.pop("prefix_caching", True), settings.pop("tiers", None)
    cache = KVCache(executor.windows, pages, caching, tiers, len(executor.states))
    seats, budget = settings.pop("max_num_seqs", 8), settings.pop("max_num_batched_tokens", 64)
    scheduler = Scheduler(cache, seats, budget, drafting=settings.pop("drafting", None))
    seed = settings.pop("seed", None)
    model = ModelFacts(executor.vocabulary, settings.pop("max_model_len", 512), **settings)
    return Engine(executor, "handle", scheduler, model, FakeDetokenizer, seed, executor.compile_encoder)
