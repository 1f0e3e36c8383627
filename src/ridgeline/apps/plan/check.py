"""A plan's predictions beside what this machine does: steps are run, and memory is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ridgeline.apps.bare_engine import BareEngine, bare_engine
from ridgeline.apps.calibrate import fitted_costs
from ridgeline.apps.plan.host import Host, Rates, host_here
from ridgeline.apps.plan.model import FormattedModel, open_model
from ridgeline.apps.plan.steps import load_of, prompt_loads, step_time
from ridgeline.apps.step_meter import Cell, StepMeter
from ridgeline.config import PAGE_TOKENS, EngineConfig
from ridgeline.execution.base import page_bytes
from ridgeline.loading import kv_format_of, memory_demand
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.machine import resident_bytes
from ridgeline.resources.probe import BESIDE_PROBE_S, measure

CELLS = (
    *(Cell(batch, context) for context in (128, 2048) for batch in (1, 8, 32)),
    *(Cell(0, context) for context in (128, 512, 2048)),
)
ROUNDS = 5
_CELL_S = 0.2
_LONGEST = 2048 + 4 * PAGE_TOKENS
_SEQUENCES = 40


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


def check(path: Path, config: EngineConfig, rounds: int = ROUNDS) -> list[Checked]:
    """Load the model at `path` as `config` says, whose device has been chosen, and compare.

    Where nothing is known yet of what steps cost on this machine, that is found first. Of a GPU only the
    times are checked. Raises CheckpointError, ConfigError and CapacityError as loading does.
    """
    ceilings_now = partial(measure, config.threads, seconds=BESIDE_PROBE_S, device=config.device)
    with ExitStack() as stack:
        source = stack.enter_context(open_model(path))
        model = source.in_format(config.weights, config.device, kv_format_of(config))
        fitted_costs(config, model.main_format, ceilings_now)
        host = host_here(ceilings_now(), 0)
        config = replace(
            config,
            max_model_len=min(_LONGEST, source.spec.context),
            max_num_seqs=_SEQUENCES,
            packed_cache=False,
        )
        checkpoint = stack.enter_context(open_checkpoint(path))
        bare = stack.enter_context(bare_engine(checkpoint, config, resident_bytes))
        meter = StepMeter(bare.engine, bare.config.max_num_batched_tokens)
        cells = [cell for cell in CELLS if meter.fits(cell)]
        memory = list(_check_memory(bare, meter, model, cells))
        times = list(_check_times(bare, meter, model, host, cells, ceilings_now, rounds))
    return times + (memory if config.device == "cpu" else [])


def _check_times(
    bare: BareEngine,
    meter: StepMeter,
    model: FormattedModel,
    host: Host,
    cells: list[Cell],
    ceilings_now: Callable[[], Ceilings],
    rounds: int,
) -> Iterator[Checked]:
    """A prediction takes the ceilings measured right before and after its steps, so that a machine that
    others use meanwhile is predicted as it was then. Of a cell's pairs of prediction and measurement the one
    with the median error counts."""
    pairs: dict[Cell, list[Checked]] = {cell: [] for cell in cells}
    for turn in meter.turns(cells, rounds, _CELL_S, ceilings_now):
        there = replace(host, rates=Rates.between(turn.before, turn.after))
        predicted = _predicted_s(model, there, turn.cell, bare.config.max_num_batched_tokens)
        pairs[turn.cell].append(Checked(turn.cell.name, predicted, turn.seconds, "s"))
    for found in pairs.values():
        yield sorted(found, key=lambda pair: pair.error)[len(found) // 2]


def _predicted_s(model: FormattedModel, host: Host, cell: Cell, max_rows: int) -> float:
    """What a plan expects of one decode step, or of all that read the prompt."""
    if cell.batch:
        loads = [load_of(model, 1, cell.context, cell.batch)]
    else:
        loads = prompt_loads(model, cell.context, max_rows)
    return sum(step_time(model, load, host).expected_s for load in loads)


def _check_memory(
    bare: BareEngine, meter: StepMeter, model: FormattedModel, cells: list[Cell]
) -> Iterator[Checked]:
    """Fills the contexts, and looks at the memory that this takes."""
    meter.warm()
    few, before = _kv_bytes(meter, model), resident_bytes()
    meter.keep(cells)
    many, after = _kv_bytes(meter, model), resident_bytes()
    demand = memory_demand(bare.config, model.program, model.nbytes)
    yield Checked("weights", model.nbytes, bare.weights_bytes, "B")
    yield Checked("KV cache", many - few, after - before, "B")
    whole = model.nbytes + many + demand.activation_bytes
    yield Checked("weights, KV cache and activations", whole, after - bare.before_bytes, "B")


def _kv_bytes(meter: StepMeter, model: FormattedModel) -> int:
    """What the pages take that hold something."""
    kept = zip(model.program.groups, meter.pages, strict=True)
    return sum(pages * page_bytes(group, model.kv_format) for group, pages in kept)
