"""Engines on fake executors with lower tiers, and the files that these keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fake_executor import FakeExecutor, make_engine

from ridgeline.cache.disk import DiskTier
from ridgeline.cache.ladder import Ladder
from ridgeline.cache.memory import MemoryTier
from ridgeline.cache.tiers import Tiers
from ridgeline.engine import Engine


def tiered_engine(
    folder: Path | None,
    executor: FakeExecutor | None = None,
    identity: bytes = b"model",
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    queue_bytes: int = 1 << 20,
    **options: Any,
) -> Engine:
    """An engine whose pages go to host memory, where it may take `memory_bytes`, and to `folder`."""
    executor = executor or FakeExecutor()
    memory = None if memory_bytes is None else MemoryTier(memory_bytes)
    disk = None if folder is None else DiskTier(folder, disk_bytes)
    ladder = Ladder(executor.host_page_bytes, memory, disk, queue_bytes=queue_bytes)
    tiers = Tiers(ladder, identity, executor.windows)
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
