"""A model's steps timed here, each beside what a plan says of it: for `plan --check`, and for benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ridgeline.apps.bare_engine import BareEngine, bare_engine
from ridgeline.apps.calibrate import fitted_costs
from ridgeline.apps.plan.host import Host, Rates, host_here
from ridgeline.apps.plan.model import FormattedModel, open_model
from ridgeline.apps.plan.steps import load_of, prompt_loads, step_time
from ridgeline.apps.step_meter import Cell, StepMeter, undisturbed
from ridgeline.config import PAGE_TOKENS, EngineConfig
from ridgeline.loading import kv_format_of
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.machine import resident_bytes
from ridgeline.resources.probe import QUICK_PROBE_S, measure

_SPARE_TOKENS = 4 * PAGE_TOKENS
_SPARE_SEQUENCES = 8


@dataclass(frozen=True, slots=True)
class Pair:
    """A cell that was timed once, beside a plan of it for the machine as it was then: what to expect, and the
    least that the roofline allows. `limits` are the middle of the ceilings right before and after."""

    cell: Cell
    measured_s: float
    expected_s: float
    least_s: float
    limits: Rates

    @property
    def error(self) -> float:
        """How much the expectation is above the measurement, as a share of it."""
        return self.expected_s / self.measured_s - 1


@dataclass(frozen=True, slots=True)
class TimedModel:
    """A model that is loaded to be timed, and the plan of it; `cells` are those that fit."""

    bare: BareEngine
    meter: StepMeter
    model: FormattedModel
    host: Host
    cells: Sequence[Cell]
    ceilings_now: Callable[[], Ceilings]

    def pairs(self, rounds: int, cell_s: float) -> dict[Cell, list[Pair]]:
        """`rounds` of each cell, in turns, about `cell_s` seconds each; their contexts must be kept.

        A prediction takes the ceilings measured right before and after its steps, so that a machine that
        others use meanwhile is predicted as it was then; turns that they disturbed count where there are no
        others.
        """
        found: dict[Cell, list[Pair]] = {cell: [] for cell in self.cells}
        for turn in undisturbed(self.meter.turns(self.cells, rounds, cell_s, self.ceilings_now)):
            limits = Rates.between(turn.before, turn.after)
            expected_s, least_s = self._planned(turn.cell, replace(self.host, rates=limits))
            found[turn.cell].append(Pair(turn.cell, turn.seconds, expected_s, least_s, limits))
        return found

    def _planned(self, cell: Cell, host: Host) -> tuple[float, float]:
        """What a plan expects of one decode step, or of all that read the prompt, and the least of it."""
        if cell.batch:
            loads = [load_of(self.model, 1, cell.context, cell.batch)]
        else:
            loads = prompt_loads(self.model, cell.context, self.bare.config.max_num_batched_tokens)
        times = [step_time(self.model, load, host) for load in loads]
        return sum(time.expected_s for time in times), sum(time.bound_s for time in times)


@contextmanager
def timed_model(path: Path, config: EngineConfig, cells: Sequence[Cell]) -> Iterator[TimedModel]:
    """Load the model at `path` as `config` says, whose device has been chosen, with room for the cells.

    Where nothing is known yet of what steps cost on this machine, that is found first. Raises
    CheckpointError, ConfigError and CapacityError as loading does.
    """
    ceilings_now = partial(measure, config.threads, seconds=QUICK_PROBE_S, device=config.device)
    with ExitStack() as stack:
        source = stack.enter_context(open_model(path))
        model = source.in_format(config.weights, config.device, kv_format_of(config))
        fitted_costs(config, model.main_format, ceilings_now)
        host = host_here(ceilings_now(), 0)
        longest = max((cell.context for cell in cells), default=0) + _SPARE_TOKENS
        config = replace(
            config,
            max_model_len=min(longest, source.spec.context),
            max_num_seqs=max((cell.batch for cell in cells), default=0) + _SPARE_SEQUENCES,
            packed_cache=False,
        )
        checkpoint = stack.enter_context(open_checkpoint(path))
        bare = stack.enter_context(bare_engine(checkpoint, config, resident_bytes))
        meter = StepMeter(bare.engine, bare.config.max_num_batched_tokens)
        fitting = [cell for cell in cells if meter.fits(cell)]
        yield TimedModel(bare, meter, model, host, fitting, ceilings_now)
