"""The engine of a simulation: the real one, with its scheduler and its cache, around a modelled executor."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ridgeline.apps.bare_engine import Silent
from ridgeline.apps.plan.host import Host
from ridgeline.apps.plan.model import FormattedModel
from ridgeline.apps.simulate.executor import Clock, ModelledExecutor, StepTimes
from ridgeline.apps.simulate.usage import Usage
from ridgeline.cache.kv import KVCache
from ridgeline.config import EngineConfig
from ridgeline.engine import Engine, ModelFacts
from ridgeline.loading import memory_demand, settled_by
from ridgeline.resources.memory import Ledger, plan_memory
from ridgeline.resources.step_time import StepTimeModel
from ridgeline.scheduling.pace import Pace
from ridgeline.scheduling.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Simulation:
    """An engine in simulated time. `config` has nothing left to choose; `pace` predicts loads, whether or not
    the scheduler asks it."""

    config: EngineConfig
    model: FormattedModel
    host: Host
    engine: Engine
    executor: ModelledExecutor
    clock: Clock
    pace: Pace

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler


def simulation(
    model: FormattedModel, host: Host, config: EngineConfig, times: StepTimes | None = None
) -> Simulation:
    """A model on a machine under a server's settings, but for lower tiers of the cache. `times` take the
    place of what is predicted of steps; the scheduler's targets are kept by predictions all the same.

    Raises ConfigError when the model cannot do what was asked, CapacityError when the memory cannot.
    """

    def ledger_of(chosen: EngineConfig) -> Ledger:
        demand = memory_demand(chosen, model.program, model.nbytes)
        asked = chosen.kv_cache_memory_bytes
        return plan_memory(demand, host.memory_bytes, asked, pool_share=host.pool_share)

    config = replace(config, device=host.device, kv_format=model.kv_format)
    config, ledger = settled_by(config, model.spec, ledger_of)
    assert config.max_model_len is not None
    groups = model.program.groups
    windows, caching = tuple(group.window for group in groups), config.enable_prefix_caching
    cache = KVCache(windows, ledger.pages, caching, state_slots=ledger.states)
    predicted = StepTimeModel.of(host.rates, host.costs_of(model.main_format))
    pace = Pace(model.work, predicted, groups, config.targets)
    limits = config.max_num_seqs, config.max_num_batched_tokens
    scheduler = Scheduler(cache, *limits, pace if config.measured_budget else None)
    # A GPU's executor is one step ahead of its results.
    clock, ahead = Clock(), host.device == "cuda"
    executor = ModelledExecutor(clock, times or predicted, model.work, groups, ahead, Usage(scheduler))
    facts = ModelFacts(model.spec.vocabulary, config.max_model_len)
    engine = Engine(executor, model.program, scheduler, facts, lambda _: Silent())
    engine.clock = clock
    return Simulation(config, model, host, engine, executor, clock, pace)
