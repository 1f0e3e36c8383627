"""The executor's protocol: five methods between the engine and a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ridgeline.config import PAGE_TOKENS
from ridgeline.execution.draw import RowDrawer
from ridgeline.model.program import MemoryGroup, Program, StateGroup
from ridgeline.model.weights import Weights
from ridgeline.types import CheckpointError, Move, Step, StepFuture, StepResult


@dataclass(frozen=True, slots=True)
class KVStorage:
    """Bytes of a number of a stored key or value, and those of a scale for each of a token's KV heads."""

    value_bytes: int
    scale_bytes: int = 0


KV_STORAGES = {"KV8": KVStorage(1, 4), "KV16": KVStorage(2), "KV32": KVStorage(4)}
"""By the cache's format: KV8 is int8 with float32 scales, KV16 is bfloat16, KV32 is float32."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an executor makes room for: rows in a step, pages in the pool of each memory group, and slots of
    recurrent state.

    A step usually has at most `max_sequences` sequences and outputs; one with more may be slower.
    """

    max_rows: int
    pages: tuple[int, ...]
    kv_format: str = "KV16"
    max_sequences: int = 64
    states: int = 0


def slot_bytes(group: MemoryGroup, kv_format: str) -> int:
    """Memory of one token's keys and values, or of its latent vector, in one layer of a group."""
    storage = KV_STORAGES[kv_format]
    each = 1 if group.kind == "latent" else 2
    return each * group.kv_heads * (group.head_dim * storage.value_bytes + storage.scale_bytes)


def page_bytes(group: MemoryGroup, kv_format: str) -> int:
    """Memory of one page of a group, all of its layers together."""
    return len(group.layers) * PAGE_TOKENS * slot_bytes(group, kv_format)


def state_bytes(groups: Sequence[StateGroup]) -> int:
    """Memory of one slot of recurrent state, all layers of all groups together: float32 whatever the format
    of keys and values."""
    return sum(4 * len(group.layers) * group.width for group in groups)


class Executor(Protocol):
    """Runs programs over weights and sequence memory that it owns.

    `asynchronous` says whether `run` returns before the step is done, so that time is won by launching the
    next step first; `drawer` draws from logits that are on the host. `numerics` names all that the bits of a
    result depend on beside program, weights and KV format, such as the instruction set. `host_page_bytes[g]`
    is the size of a page of memory group g outside of the pools, known once a program is compiled; behind
    those stands the size of a slot of recurrent state, where the program has any.

    The order of use is load, compile, then run and transfer at will. `run` checks nothing that the engine
    guarantees but refuses a step that contradicts itself. It may return before the step is done, and the
    next step may be run before this one's result is asked for: steps and transfers take effect in the order
    in which they were launched. After `close` nothing may be called but `close`.
    """

    asynchronous: bool

    @property
    def drawer(self) -> RowDrawer: ...

    @property
    def numerics(self) -> str: ...

    @property
    def host_page_bytes(self) -> tuple[int, ...]: ...

    def load(self, weights: Weights) -> None:
        """Read and pack every weight; the store may be closed afterwards."""

    def compile(self, program: Program) -> Any:
        """A handle for `run`: the program lowered to this machine's launches."""

    def run(self, handle: Any, step: Step) -> StepFuture:
        """Launch one pass of the program."""

    def transfer(self, moves: Sequence[Move]) -> None:
        """Move sequence memory, in the order given, after the steps that were launched before. What is filled
        in may be used again at once, and what is spilled is there when it is taken."""

    def close(self) -> None:
        """Give back memory and threads. Idempotent."""


class FinishedStep(msgspec.Struct, frozen=True):
    """The future of an executor that has already run the step."""

    step_result: StepResult

    def result(self) -> StepResult:
        return self.step_result


def check_memory_kinds(program: Program, executor: str, state: bool = False) -> None:
    """Raise CheckpointError for a memory kind that an executor does not keep: all keep full and window, and
    recurrent `state` those that say so."""
    accepted = ["full", "window", *(["state"] if state else [])]
    for kind in (*(group.kind for group in program.groups), *("state" for _ in program.states)):
        if kind not in accepted:
            raise CheckpointError(
                f"layer memory is {kind!r}; the {executor} executor accepts: {', '.join(accepted)}"
            )
