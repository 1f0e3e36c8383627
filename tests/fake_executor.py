"""An executor without a model: it checks what the engine asks of it, and answers from the whole context.

It keeps real paged memory, one array per memory group, in which a slot holds the token written to it and
its position. Each step it checks that every slot that a row can see holds what that sequence wrote there,
and derives the row's logits from what it read. Tokens therefore depend on the whole visible history, and a
page that was lost, shared, or read through a stale table shows up as an error or as different tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ridgeline.cache.kv import KVCache
from ridgeline.config import PAGE_TOKENS
from ridgeline.engine import Engine, ModelFacts
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.types import Float32Array, Step, StepResult, Work

POISON = -1
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class FakeFuture:
    step_result: StepResult

    def result(self) -> StepResult:
        return self.step_result


class FakeExecutor:
    """`windows[g]` and `pages[g]` describe memory group g; `edit(logits, tokens)` may change a row's logits,
    given the tokens that its sequence has written so far."""

    def __init__(
        self,
        windows: tuple[int | None, ...] = (None,),
        pages: tuple[int, ...] = (64,),
        vocabulary: int = 97,
        max_rows: int = 512,
        edit: Callable[[Float32Array, list[int]], None] | None = None,
    ) -> None:
        self.windows = windows
        self.vocabulary = vocabulary
        self.max_rows = max_rows
        self.edit = edit
        self.memory = [np.full((count, PAGE_TOKENS, 2), POISON, np.int64) for count in pages]
        self.steps: list[Step] = []
        self.closed = False
        self.fail: Exception | None = None
        self._logits = np.zeros((0, vocabulary), np.float32)

    def run(self, handle: Any, step: Step) -> FakeFuture:
        assert handle == "handle"
        assert not self.closed, "run after close"
        assert 0 < step.rows <= self.max_rows, f"{step.rows} rows in a step of at most {self.max_rows}"
        if self.fail is not None:
            raise self.fail
        self._logits.fill(np.nan)  # logits of the previous step may no longer be read
        self.steps.append(step)
        self._write(step)
        rows: list[Float32Array] = []
        for sequence in step.sequences:
            outputs = set(sequence.outputs)
            assert list(sequence.outputs) == sorted(outputs)
            for row in range(len(sequence.tokens)):
                logits = self._attend(sequence, sequence.start + row)
                if row in outputs:
                    rows.append(logits)
        self._logits = np.array(rows, np.float32).reshape(len(rows), self.vocabulary)
        work = Work(int8_ops=step.rows, read_bytes=1)
        return FakeFuture(StepResult(self._logits, 0.001, work))

    def transfer(self, copies: Sequence[Any]) -> None:
        for copy in copies:
            self.memory[copy.group][copy.target] = self.memory[copy.group][copy.source]

    def close(self) -> None:
        self.closed = True

    def _write(self, step: Step) -> None:
        written: set[tuple[int, int, int]] = set()
        for sequence in step.sequences:
            (segment,) = sequence.segments
            assert segment.length == sequence.start + len(sequence.tokens)
            assert len({len(table) for table in segment.tables}) <= 1
            assert len(segment.tables) == len(self.memory)
            for group, table in enumerate(segment.tables):
                for slot, token in enumerate(sequence.tokens, start=sequence.start):
                    place = (group, table[slot // PAGE_TOKENS], slot % PAGE_TOKENS)
                    assert place not in written, "two rows write one slot"
                    assert 0 <= token < self.vocabulary
                    written.add(place)
                    page = self.memory[group][place[1]]
                    if slot % PAGE_TOKENS == 0:
                        page[:] = POISON  # a page that is begun anew holds nothing of its last owner
                    page[place[2]] = (token, slot)

    def _attend(self, sequence: Any, slot: int) -> Float32Array:
        """Logits of the row in `slot`: a hash chain over the tokens that each group lets it see."""
        (segment,) = sequence.segments
        state = np.uint64(slot)
        history: list[int] = []
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, slot - window + 1)
            slots = np.arange(first, slot + 1)
            table = np.array(segment.tables[group], np.int64)
            seen = self.memory[group][table[slots // PAGE_TOKENS], slots % PAGE_TOKENS]
            assert (seen[:, 1] == slots).all(), (
                f"slots {slots[seen[:, 1] != slots]} of group {group} hold others"
            )
            with np.errstate(over="ignore"):
                keyed = (seen[:, 0].astype(np.uint64) + np.uint64(1)) * (
                    slots.astype(np.uint64) * _MIX | np.uint64(1)
                )
                state = np.bitwise_xor.reduce(keyed ^ (keyed >> np.uint64(31))) ^ state * _MIX
            if window is None:
                history = seen[:, 0].tolist()
        noise = np.random.Generator(np.random.PCG64(int(state)))
        logits = (noise.standard_normal(self.vocabulary) * 3).astype(np.float32)
        if self.edit is not None:
            self.edit(logits, history)
        return logits


class FakeDetokenizer:
    """Token t reads as the letter number t, so texts can be compared; U+2026 for what was held back."""

    def __init__(self, skip_special_tokens: bool) -> None:
        self.skip_special_tokens = skip_special_tokens

    def push(self, token_id: int) -> str:
        return chr(0x100 + token_id)

    def finish(self) -> str:
        return ""


def make_engine(executor: FakeExecutor, **settings: Any) -> Engine:
    """An engine on a fake executor. Settings: max_num_seqs, max_num_batched_tokens, max_model_len,
    end_token_ids, begin_token_id, seed, detokenizer."""
    cache = KVCache(executor.windows, tuple(len(memory) for memory in executor.memory))
    scheduler = Scheduler(cache, settings.get("max_num_seqs", 8), settings.get("max_num_batched_tokens", 64))
    model = ModelFacts(
        vocabulary_size=executor.vocabulary,
        max_model_len=settings.get("max_model_len", 512),
        end_token_ids=frozenset(settings.get("end_token_ids", ())),
        begin_token_id=settings.get("begin_token_id"),
    )
    detokenizer = settings.get("detokenizer", FakeDetokenizer)
    return Engine(executor, "handle", scheduler, model, detokenizer, settings.get("seed"))
