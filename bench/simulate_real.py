"""A trace as it is simulated and as it is served: the simulator's prediction beside what this machine does.

    python bench/simulate_real.py [--model smollm2] [--generate shared-prompts] [--load 0.5 0.9] [--count 40]

The engine serves the trace in real time, in this process, and the simulator replays it with the steps that
the step-time model predicts here; nothing of the run is told to it. `--load` is a share of the requests that
the machine is predicted to answer at most: a simulation of all of them at once says how many. Requests come
at random times, with ShareGPT's lengths or those given. Prints one line of JSON for each load: of the real
run and of the simulated one TTFT and inter-token times in ms, and their ratios. The machine must have been
measured (`ridgeline probe`), and should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ridgeline.apps.load.report import gaps_ms, request_times_ms, spread
from ridgeline.apps.plan.host import host_here
from ridgeline.apps.plan.model import open_model
from ridgeline.apps.simulate.generate import KINDS, Workload, generate
from ridgeline.apps.simulate.replay import Served, replay, serve
from ridgeline.apps.simulate.report import PERCENTILES
from ridgeline.apps.simulate.setting import Simulation, simulation
from ridgeline.apps.simulate.trace import TraceRequest
from ridgeline.config import EngineConfig
from ridgeline.loading import LoadedModel, load_engine
from ridgeline.model.catalog import resolve
from ridgeline.resources.probe import quick_ceilings


def times_ms(served: Sequence[Served]) -> dict[str, Any]:
    done = [each for each in served if each.refused is None]
    return {
        "ttft_ms": spread((request_times_ms(each)["ttft"] for each in done), PERCENTILES),
        "itl_ms": spread((gap for each in done for gap in gaps_ms(each)), PERCENTILES),
        "cached_tokens": sum(each.cached_tokens for each in done),
        "duration_s": max(each.end_s for each in done),
    }


def simulated(loaded: LoadedModel) -> Simulation:
    """The same model on this machine, with the settings and the memory that the engine has."""
    config = loaded.config
    ceilings = quick_ceilings(config.threads, device=config.device)
    assert config.kv_cache_memory_bytes is not None
    with open_model(resolve(config.model)) as source:
        model = source.in_format(config.weights, config.device, config.kv_format)
        host = host_here(ceilings, 4 * (model.nbytes + config.kv_cache_memory_bytes + (1 << 30)))
        return simulation(model, host, config)


def compared(loaded: LoadedModel, trace: Sequence[TraceRequest]) -> dict[str, Any]:
    engine = loaded.engine
    said = times_ms(replay(simulated(loaded), trace).served)
    pace = engine.scheduler.pace
    seen = times_ms(serve(engine, trace, None if pace is None else pace.times).served)
    ratios = {
        f"{name} {key}": said[name][key] / seen[name][key]
        for name in ("ttft_ms", "itl_ms")
        for key in ("mean", *(f"p{number}" for number in PERCENTILES))
    }
    return {"requests": len(trace), "real": seen, "simulated": said, "simulated_to_real": ratios}


def results(loaded: LoadedModel, work: Workload, loads: Sequence[float]) -> Iterator[dict[str, Any]]:
    warm = [replace(each, id=f"warm {each.id}") for each in generate(replace(work, count=2, kind="poisson"))]
    serve(loaded.engine, warm)
    crowd = generate(replace(work, kind="poisson", rate_per_s=float("inf")))
    most_per_s = len(crowd) / replay(simulated(loaded), crowd).duration_s
    for number, load in enumerate(loads):
        trace = generate(replace(work, rate_per_s=load * most_per_s, seed=work.seed + 1))
        # Names of its own, so that nothing is found that another load has left.
        named = [replace(each, prompt=tuple((f"{number} {n}", t) for n, t in each.prompt)) for each in trace]
        yield {"load": load, "rate_per_s": load * most_per_s, **compared(loaded, named)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the simulator with the engine, on this machine.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--generate", choices=[kind for kind in KINDS if kind != "chats"], default="shared-prompts"
    )
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--output-tokens", type=int)
    chosen = parser.parse_args()
    work = Workload(
        chosen.generate,
        count=chosen.count,
        seed=chosen.seed,
        prompt_tokens=chosen.prompt_tokens,
        output_tokens=chosen.output_tokens,
        shared_tokens=128,
    )
    loaded = load_engine(
        EngineConfig(model=chosen.model, device="cpu", threads=chosen.threads, seed=1, speculation="off")
    )
    try:
        for result in results(loaded, work, chosen.load):
            print(json.dumps(result), flush=True)
    finally:
        loaded.engine.close()


if __name__ == "__main__":
    main()
