"""Simulations of small models that are nothing but a configuration, on machines that are made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ridgeline.apps.plan.host import Host, Rates
from ridgeline.apps.plan.model import FormattedModel, open_model
from ridgeline.apps.simulate.executor import StepTimes
from ridgeline.apps.simulate.replay import Replay, replay
from ridgeline.apps.simulate.setting import Simulation, simulation
from ridgeline.apps.simulate.trace import TraceRequest
from ridgeline.config import EngineConfig
from ridgeline.resources.step_costs import StepCosts
from ridgeline.resources.step_time import Prediction
from ridgeline.types import StepWork

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
WINDOWED = LLAMA | {"model_type": "mistral", "sliding_window": 40}
HOST = Host(
    name="made up",
    count=1,
    device="cpu",
    rates=Rates(1e9, 20e9, 10e9, 5e9),
    costs=StepCosts(0.8, 0.5, 0.8, 0.5, "made up", step_s=1e-3, launch_s=1e-6, output_s=1e-4),
    memory_bytes=1 << 30,
    power_w=None,
    usd_per_hour=None,
    source="made up",
)
AHEAD = replace(HOST, device="cuda")
"""A machine whose executor is a step ahead of its results."""
UNPACED = EngineConfig(measured_budget=False)


@dataclass(frozen=True)
class Constant:
    """Every step takes as long."""

    seconds: float = 1.0

    def predict(self, work: StepWork) -> Prediction:
        return Prediction(self.seconds, "overhead")


def configured(folder: Path, config: dict[str, Any]) -> FormattedModel:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    with open_model(path) as source:
        return source.in_format("auto", "cpu", "KV16")


def run(
    model: FormattedModel,
    trace: Sequence[TraceRequest],
    config: EngineConfig = UNPACED,
    host: Host = HOST,
    times: StepTimes | None = None,
    jump: bool = True,
) -> Replay:
    """A replay after which nothing is left behind."""
    done = replay(simulation(model, host, config, times), trace, jump)
    check_end(done.simulation)
    return done


def check_end(done: Simulation) -> None:
    scheduler = done.scheduler
    scheduler.check_integrity()
    assert not done.engine.has_work
    assert not scheduler.running
    assert not scheduler.waiting
    assert not done.executor.answers
    assert all(pool.used_pages == 0 for pool in scheduler.cache.pools)
