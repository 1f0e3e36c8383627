"""Engines on fake executors with lower tiers, and the files that these keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fake_executor import FakeExecutor, make_engine

from ridgeline.cache.disk import DiskTier
from ridgeline.cache.ladder import Fetch, Ladder
from ridgeline.cache.memory import MemoryTier
from ridgeline.cache.tiers import Tiers
from ridgeline.engine import Engine
from ridgeline.resources.transfers import FetchChoice


class LadderInTurns(Ladder):
    """A ladder without a thread, which does what its thread would do when it is told to, or waited for. So
    the same operations do the same again."""

    def _work(self) -> None:
        """The thread ends at once."""

    def turn(self) -> bool:
        return self._carry()

    def wait(self, fetches: Sequence[Fetch], timeout_s: float) -> None:
        self.turn()

    def drain(self, timeout_s: float, all_saved: bool = False) -> bool:
        while self.turn():
            pass
        return super().drain(0, all_saved)


class SomeChoice(FetchChoice):
    """Computes every fifth time what could be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def pays(self, nbytes: Mapping[str, int], compute_s: float | None) -> bool:
        self.asked += 1
        return self.asked % 5 != 0


def tiered_engine(
    folder: Path | None,
    executor: FakeExecutor | None = None,
    identity: bytes = b"model",
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    queue_bytes: int = 1 << 20,
    in_turns: bool = False,
    compute_s: Callable[[int, int], float] | None = None,
    choice: FetchChoice | None = None,
    **options: Any,
) -> Engine:
    """An engine whose pages go to host memory, where it may take `memory_bytes`, and to `folder`; with
    `in_turns`, when `LadderInTurns` is told to. `compute_s` predicts what computing takes, and `choice`
    chooses by it; that of `in_turns` is `SomeChoice`."""
    executor = executor or FakeExecutor()
    memory = None if memory_bytes is None else MemoryTier(memory_bytes)
    disk = None if folder is None else DiskTier(folder, disk_bytes)
    kind = LadderInTurns if in_turns else Ladder
    if choice is None and in_turns:
        choice = SomeChoice()
    ladder = kind(executor.host_page_bytes, memory, disk, choice, queue_bytes)
    tiers = Tiers(ladder, identity, executor.windows, compute_s, states=len(executor.states) > 0)
    return make_engine(executor, tiers=tiers, **{"max_num_batched_tokens": 256, **options})


def settle(engine: Engine) -> None:
    """Let an idle engine save all that it may."""
    tiers = engine.scheduler.cache.tiers
    assert tiers is not None
    while engine.idle():
        assert tiers.ladder.drain(10.0)
    tiers.ladder.check_integrity()
    engine.scheduler.check_integrity()


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))
