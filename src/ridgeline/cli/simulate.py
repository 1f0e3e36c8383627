"""`ridgeline simulate`: what users would see under a load, by the scheduler and the cache themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ridgeline.cli import options, serve
from ridgeline.cli.hosts import Device, Machine, Threads, host_of
from ridgeline.cli.options import flag, given
from ridgeline.cli.output import print_json

if TYPE_CHECKING:
    from ridgeline.apps.simulate.trace import TraceRequest

Trace = Annotated[Path | None, flag("trace", "File of requests: JSON lines, ours or Mooncake's.")]
Generate = Annotated[
    str | None,
    flag("generate", "Make a trace up instead: poisson, bursty, shared-prompts, chats or documents."),
]
WriteTrace = Annotated[Path | None, flag("write-trace", "File for the trace, as JSON lines.")]
Rate = Annotated[float | None, flag("rate", "Requests per second that are made up (default: 1).")]
Count = Annotated[int | None, flag("count", "Requests that are made up (default: 1000).")]
Seed = Annotated[int | None, flag("seed", "Of what is made up (default: 0).")]
Burstiness = Annotated[
    float | None,
    flag("burstiness", "Shape of the gaps: 1 is Poisson, less is in bursts (bursty's default: 0.25)."),
]
PromptTokens = Annotated[
    int | None,
    flag("prompt-tokens", "Median of prompts, or of messages (default: ShareGPT's).", "-p"),
]
OutputTokens = Annotated[
    int | None, flag("output-tokens", "Median of answers (default: ShareGPT's, or arXiv's).", "-n")
]
SharedTokens = Annotated[
    int | None,
    flag("shared-tokens", "Tokens of a shared system prompt, or the median of documents."),
]
SystemPrompts = Annotated[int | None, flag("system-prompts", "How many shared ones there are (default: 8).")]
Turns = Annotated[
    float | None, flag("turns", "Turns of a chat, or questions about a document, in the mean (default: 4).")
]
Think = Annotated[
    float | None, flag("think", "Seconds between an answer and the next turn, in the mean (default: 20).")
]
Classes = Annotated[
    str | None, flag("classes", "Shares of service classes, as interactive=4,batch=1 (default: interactive).")
]


def simulate(
    model: options.Model = None,
    machine: Machine = None,
    trace: Trace = None,
    generate: Generate = None,
    write_trace: WriteTrace = None,
    rate: Rate = None,
    count: Count = None,
    seed: Seed = None,
    burstiness: Burstiness = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    shared_tokens: SharedTokens = None,
    system_prompts: SystemPrompts = None,
    turns: Turns = None,
    think: Think = None,
    classes: Classes = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: serve.MaxSeqs = None,
    max_num_batched_tokens: serve.MaxBatched = None,
    kv_cache_memory: serve.KvMemory = None,
    enable_prefix_caching: serve.PrefixCaching = None,
    class_targets: serve.ClassTargets = None,
    weights: options.WeightFormat = None,
    kv_format: options.KVFormat = None,
    device: Device = None,
    threads: Threads = None,
    json: options.Json = False,
) -> None:
    """Replay a trace of requests on the scheduler and the cache, with steps as long as a machine is predicted
    to take, and say what users would see. No weights are loaded."""
    from ridgeline.apps.plan.model import open_model
    from ridgeline.apps.simulate.replay import replay
    from ridgeline.apps.simulate.report import figures
    from ridgeline.apps.simulate.setting import simulation
    from ridgeline.apps.simulate.trace import write_trace as write
    from ridgeline.cli.simulate_report import show
    from ridgeline.config import EngineConfig
    from ridgeline.loading import kv_format_of
    from ridgeline.model.catalog import resolve_metadata
    from ridgeline.precision.formats import check_device_format

    made_up = given(
        rate_per_s=rate,
        count=count,
        seed=seed,
        burstiness=burstiness,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        shared_tokens=shared_tokens,
        system_prompts=system_prompts,
        turns=turns,
        think_s=think,
        classes=None if classes is None else _shares(classes),
    )
    config = EngineConfig(
        **given(
            model=model,
            device=device,
            threads=threads,
            weights=weights,
            kv_format=kv_format,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=serve.memory_bytes("kv_cache_memory", kv_cache_memory),
            enable_prefix_caching=enable_prefix_caching,
            **({} if class_targets is None else serve.targets(class_targets)),
        )
    )
    requests = _requests(trace, generate, made_up)
    if write_trace is not None:
        write(write_trace, requests)
    with open_model(resolve_metadata(config.model)) as source:
        host, _ = host_of(machine, config, device)
        check_device_format(config.weights, host.device)
        formatted = source.in_format(config.weights, host.device, kv_format_of(config))
        found = figures(replay(simulation(formatted, host, config), requests))
    if json:
        print_json({"model": config.model, "machine": host.name, "devices": host.count, **found})
    else:
        show(config.model, host, found)


def _requests(trace: Path | None, kind: str | None, made_up: dict[str, Any]) -> list[TraceRequest]:
    """Those of a file, or made up. Raises ConfigError."""
    from ridgeline.apps.simulate.generate import Workload, generate
    from ridgeline.apps.simulate.trace import read_trace
    from ridgeline.types import ConfigError

    if (trace is None) == (kind is None):
        seen = "neither is" if trace is None else "both are"
        raise ConfigError(f"{seen} given of --trace and --generate; accepted: one of them")
    if trace is None:
        assert kind is not None
        return generate(Workload(kind, **made_up))
    if made_up:
        flags = ", ".join(
            "--" + name.removesuffix("_per_s").removesuffix("_s").replace("_", "-") for name in made_up
        )
        raise ConfigError(f"{flags} given beside --trace; accepted: with --generate, which makes requests up")
    return read_trace(trace)


def _shares(text: str) -> dict[str, float]:
    """Numbers by service class out of "interactive=4,batch=1". Raises ConfigError."""
    from ridgeline.types import ConfigError

    found = {}
    for part in serve.listed([text]):
        name, _, share = part.partition("=")
        try:
            found[name.strip()] = float(share)
        except ValueError:
            raise ConfigError(
                f"classes are {text!r}; accepted: classes with a share each, as interactive=4,batch=1"
            ) from None
    return found
