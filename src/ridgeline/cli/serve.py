"""`ridgeline serve`: the OpenAI-compatible server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ridgeline.cli import options
from ridgeline.cli.options import flag, given

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        envvar="RIDGELINE_MODEL",
        show_envvar=False,
        help="Catalog name, path, or hf.co/<org>/<repo>[:<file or quant>] (default: smollm2).",
    ),
]
Host = Annotated[str | None, flag("host", "Address to listen on (default: 127.0.0.1).")]
Port = Annotated[int | None, flag("port", "Port to listen on (default: 8000; 0 takes a free one).")]
ApiKeys = Annotated[
    list[str] | None, flag("api-key", "Key that clients must send; several between commas, or repeated.")
]
ApiKeyFile = Annotated[Path | None, flag("api-key-file", "TOML or JSON file of keys and their limits.")]
ServedNames = Annotated[
    list[str] | None, flag("served-model-name", "Name that clients use; the first is the answers'.")
]
Template = Annotated[str | None, flag("chat-template", "Chat template: a file, or Jinja.")]
Hosts = Annotated[list[str] | None, flag("allowed-hosts", "Names that a Host header may have; `*` for any.")]
Origins = Annotated[list[str] | None, flag("allowed-origins", "Web pages that may call; `*` for any.")]
MaxSeqs = Annotated[int | None, flag("max-num-seqs", "Sequences that run at once (default: 64).")]
MaxBatched = Annotated[
    int | None, flag("max-num-batched-tokens", "Tokens that a step runs at most (default: 512).")
]
KvMemory = Annotated[
    str | None, flag("kv-cache-memory", "Memory for keys and values, as 2G or 512M (default: what is free).")
]
PrefixCaching = Annotated[
    bool | None,
    flag(
        "enable-prefix-caching/--no-enable-prefix-caching",
        "Keep what was computed, for prompts that begin alike (default: yes).",
    ),
]
CacheDir = Annotated[
    str | None, flag("cache-dir", "Folder that keeps what was computed, so that a restart begins warm.")
]
CacheDisk = Annotated[
    str | None, flag("cache-disk", "Most that the folder takes, as 20G (default: up to a tenth of the disk).")
]
CacheMemory = Annotated[
    str | None,
    flag("cache-memory", "Host memory between the KV cache and the folder, as 8G (default: GPUs only)."),
]
ClassTargets = Annotated[
    str | None,
    flag(
        "class-targets",
        "Seconds to the first token and between tokens, as keystroke=0.2/0.05,batch=60/1; "
        "`off` for steps of any length.",
    ),
]
MaxQueue = Annotated[int | None, flag("max-queue", "Sequences that may wait (default: 256).")]
MaxQueueTokens = Annotated[int | None, flag("max-queue-tokens", "Prompt tokens that may wait.")]
QueueTimeout = Annotated[
    float | None, flag("queue-timeout", "Seconds that a request may wait to begin (default: 60).")
]
DrainTimeout = Annotated[
    float | None, flag("drain-timeout", "Seconds that open requests get on SIGTERM (default: 30).")
]
LogFormat = Annotated[str | None, flag("log-format", "text or json.")]
LogPrompts = Annotated[bool, flag("log-prompts", "Log what is asked (default: never).")]


def serve(
    model: Model = None,
    host: Host = None,
    port: Port = None,
    api_key: ApiKeys = None,
    api_key_file: ApiKeyFile = None,
    served_model_name: ServedNames = None,
    chat_template: Template = None,
    allowed_hosts: Hosts = None,
    allowed_origins: Origins = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxBatched = None,
    kv_cache_memory: KvMemory = None,
    enable_prefix_caching: PrefixCaching = None,
    cache_dir: CacheDir = None,
    cache_memory: CacheMemory = None,
    cache_disk: CacheDisk = None,
    device: options.Device = None,
    weights: options.WeightFormat = None,
    kv_format: options.KVFormat = None,
    threads: options.Threads = None,
    no_packed_cache: options.NoPackedCache = False,
    seed: options.Seed = None,
    trace: options.Trace = None,
    speculation: options.Speculation = None,
    class_targets: ClassTargets = None,
    max_queue: MaxQueue = None,
    max_queue_tokens: MaxQueueTokens = None,
    queue_timeout: QueueTimeout = None,
    drain_timeout: DrainTimeout = None,
    log_format: LogFormat = None,
    log_prompts: LogPrompts = False,
) -> None:
    """Serve MODEL over HTTP, as OpenAI's API. SIGTERM or Ctrl-C lets open requests end; a second one does
    not wait for them."""
    from ridgeline.cli.progress import fetch
    from ridgeline.config import EngineConfig
    from ridgeline.server.config import ServerConfig, keys_of, read_keys
    from ridgeline.server.run import serve as run

    engine = EngineConfig(
        **given(
            model=model,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=memory_bytes("kv_cache_memory", kv_cache_memory),
            enable_prefix_caching=enable_prefix_caching,
            cache_dir=cache_dir,
            cache_memory_bytes=memory_bytes("cache_memory", cache_memory),
            cache_disk_bytes=memory_bytes("cache_disk", cache_disk),
            device=device,
            weights=weights,
            kv_format=kv_format,
            threads=threads,
            packed_cache=options.packed_cache(no_packed_cache),
            seed=seed,
            trace=options.trace_file(trace),
            speculation=speculation,
            **({} if class_targets is None else targets(class_targets)),
        )
    )
    keys = keys_of(api_key or ())
    config = ServerConfig(
        api_keys=keys if api_key_file is None else keys + read_keys(api_key_file),
        served_model_names=listed(served_model_name),
        allowed_hosts=listed(allowed_hosts),
        allowed_origins=listed(allowed_origins),
        log_prompts=log_prompts,
        **given(
            host=host,
            port=port,
            chat_template=chat_template,
            max_queue=max_queue,
            max_queue_tokens=max_queue_tokens,
            queue_timeout_s=queue_timeout,
            drain_timeout_s=drain_timeout,
            log_format=log_format,
        ),
    )
    fetch(model)
    run(engine, config)


def listed(texts: list[str] | None) -> tuple[str, ...]:
    """What may be repeated, and may have several between commas."""
    return tuple(part.strip() for text in texts or () for part in text.split(",") if part.strip())


def targets(text: str) -> dict[str, Any]:
    """Settings of the engine for what `--class-targets` says. Raises ConfigError."""
    from ridgeline.types import ConfigError

    if text == "off":
        return {"measured_budget": False}
    found = {}
    for part in listed([text]):
        name, _, seconds = part.partition("=")
        try:
            found[name.strip()] = tuple(float(each) for each in seconds.split("/"))
        except ValueError:
            accepted = "off, or classes with two numbers of seconds each, as batch=60/1"
            raise ConfigError(f"class_targets is {text!r}; accepted: {accepted}") from None
    return {"class_targets": found}


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def memory_bytes(name: str, text: str | None) -> int | None:
    """Bytes in a text such as 512M or 2GiB, if there is one. Raises ConfigError, with the setting's name."""
    from ridgeline.types import ConfigError

    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{name} is {text!r}; accepted: bytes, or a number with K, M, G or T")
    return int(float(found[1]) * _UNITS[found[2].upper()])
