"""A plan's predictions beside what this machine does: steps are run, and memory is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ridgeline.apps.plan.timing import TimedModel, timed_model
from ridgeline.apps.step_meter import Cell
from ridgeline.config import EngineConfig
from ridgeline.execution.base import page_bytes
from ridgeline.loading import memory_demand
from ridgeline.resources.machine import resident_bytes
from ridgeline.types import ConfigError

CELLS = (
    *(Cell(batch, context) for context in (128, 2048) for batch in (1, 8, 32)),
    *(Cell(0, context) for context in (128, 512, 2048)),
)
ROUNDS = 5
_CELL_S = 0.2


@dataclass(frozen=True, slots=True)
class Checked:
    """A prediction and its measurement, both in `unit`."""

    name: str
    predicted: float
    measured: float
    unit: str

    @property
    def error(self) -> float:
        """How much the prediction is above the measurement, as a share of it."""
        return self.predicted / self.measured - 1


def check(
    path: Path, config: EngineConfig, rounds: int = ROUNDS, cells: Sequence[Cell] = CELLS
) -> list[Checked]:
    """Load the model at `path` as `config` says, whose device has been chosen, and compare.

    Where nothing is known yet of what steps cost on this machine, that is found first. Of a GPU only the
    times are checked. Raises CheckpointError, ConfigError and CapacityError as loading does.
    """
    with timed_model(path, config, cells) as timed:
        memory = list(_check_memory(timed))
        times = list(_check_times(timed, rounds))
    return times + (memory if config.device == "cpu" else [])


def cells_named(part: str) -> list[Cell]:
    """Those of CELLS with `part` in their names; raises ConfigError where there are none."""
    found = [cell for cell in CELLS if part in cell.name]
    if not found:
        raise ConfigError(f"cells is {part!r}; accepted: part of {', '.join(cell.name for cell in CELLS)}")
    return found


def _check_times(timed: TimedModel, rounds: int) -> Iterator[Checked]:
    """Of a cell's pairs of prediction and measurement the one with the median error counts."""
    for cell, pairs in timed.pairs(rounds, _CELL_S).items():
        pair = sorted(pairs, key=lambda pair: pair.error)[len(pairs) // 2]
        yield Checked(cell.name, pair.expected_s, pair.measured_s, "s")


def _check_memory(timed: TimedModel) -> Iterator[Checked]:
    """Fills the contexts, and looks at the memory that this takes."""
    bare, meter, model = timed.bare, timed.meter, timed.model
    meter.warm()
    few, before = _kv_bytes(timed), resident_bytes()
    meter.keep(timed.cells)
    many, after = _kv_bytes(timed), resident_bytes()
    demand = memory_demand(bare.config, model.program, model.nbytes)
    yield Checked("weights", model.nbytes, bare.weights_bytes, "B")
    if many == few:  # prompts alone are not kept, and no step of the largest size was run
        return
    yield Checked("KV cache", many - few, after - before, "B")
    whole = model.nbytes + many + demand.activation_bytes
    yield Checked("weights, KV cache and activations", whole, after - bare.before_bytes, "B")


def _kv_bytes(timed: TimedModel) -> int:
    """What the pages take that hold something."""
    kept = zip(timed.model.program.groups, timed.meter.pages, strict=True)
    return sum(pages * page_bytes(group, timed.model.kv_format) for group, pages in kept)
