"""Find what steps cost on this machine: time steps of a made-up model, and fit the model of steps to them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from ridgeline.apps.bare_engine import BareEngine, bare_engine
from ridgeline.apps.plan.host import Rates
from ridgeline.apps.plan.steps import load_of, prompt_loads
from ridgeline.apps.step_meter import Cell, StepMeter, undisturbed
from ridgeline.apps.synthetic import synthetic
from ridgeline.config import EngineConfig
from ridgeline.native import tile_rows
from ridgeline.precision.formats import FILE_FORMATS, FORMATS
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.cpu_probe import measure_cache
from ridgeline.resources.step_costs import StepCosts, costs_of_device, load_costs, save_costs
from ridgeline.resources.step_fit import Timed, fit
from ridgeline.types import CapacityError, StepWork

CELLS = (
    *(Cell(batch, 128) for batch in (1, 2, 4, 6, 8, 16, 32)),
    Cell(1, 1024),
    *(Cell(batch, 2048) for batch in (1, 8, 32)),
    *(Cell(0, prompt) for prompt in (64, 512, 1536)),
)
ROUNDS = 3
_CELL_S = 0.15


def fitted_costs(
    config: EngineConfig, weights: str, ceilings_now: Callable[[], Ceilings], force: bool = False
) -> StepCosts:
    """Those of a config's device and threads for a weight format: kept ones, or where there are none, or they
    are not wanted (`force`), fitted ones, which are then kept. Fitting takes about ninety seconds.

    `ceilings_now` measures them. Raises CapacityError where there is too little memory.
    """
    ceilings = ceilings_now()
    known = None if force else load_costs(ceilings, weights)
    if known is not None:
        return known
    timed = time_steps(config, weights, ceilings_now)
    source = f"fitted on this machine to steps of a made-up {weights} model, {ceilings.measured_at}"
    costs = fit(timed, _start(ceilings), source)
    with suppress(CapacityError):  # where nothing can be written, the next process fits again
        save_costs(costs, ceilings, weights)
    return costs


def _start(ceilings: Ceilings) -> StepCosts:
    """What a fit begins with: those of the kind of device; of a CPU what its cache was measured to be,
    and how many rows its kernels take at a time."""
    start = costs_of_device(ceilings)
    if ceilings.device != "cpu":
        return start
    cache_bytes, cache_speed = measure_cache(ceilings)
    rows = tile_rows(ceilings.isa)
    return replace(start, cache_bytes=cache_bytes, cache_speed=cache_speed, tile_rows=rows)


def time_steps(
    config: EngineConfig, weights: str, ceilings_now: Callable[[], Ceilings], rounds: int = ROUNDS
) -> list[Timed]:
    """Steps of the made-up model in all cells that were not disturbed, with the ceilings around each."""
    fmt = (FORMATS | FILE_FORMATS)[weights]
    config = replace(
        config,
        weights=weights if weights in FORMATS else "auto",
        max_model_len=max(cell.context for cell in CELLS) + 64,
        max_num_seqs=max(cell.batch for cell in CELLS) + 8,
        kv_cache_memory_bytes=None,
        enable_prefix_caching=True,
    )
    with bare_engine(synthetic(fmt), config) as bare:
        meter = StepMeter(bare.engine, bare.config.max_num_batched_tokens)
        cells = [cell for cell in CELLS if meter.fits(cell)]
        meter.warm()
        meter.keep(cells)
        return [
            Timed(_works(bare, turn.cell), turn.seconds, Rates.between(turn.before, turn.after))
            for turn in undisturbed(meter.turns(cells, rounds, _CELL_S, ceilings_now))
        ]


def _works(bare: BareEngine, cell: Cell) -> tuple[StepWork, ...]:
    """Of one decode, or of all steps that read the prompt."""
    if cell.batch:
        return (bare.work.parts(load_of(bare, 1, cell.context, cell.batch)),)
    loads = prompt_loads(bare, cell.context, bare.config.max_num_batched_tokens)
    return tuple(map(bare.work.parts, loads))
