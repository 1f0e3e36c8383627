"""Every knob of the engine, once. What is left to "auto" is settled in `loading.py`, in one function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ridgeline.types import DRAFTERS, SERVICE_CLASSES, ConfigError, ServiceClass

DEVICES = ("auto", "cpu", "cuda", "reference")
KV_FORMATS = ("auto", "KV8", "KV16", "KV32")
WEIGHT_FORMATS = ("auto", "W4A8-g32", "W8A8-g32", "W4A16-g32", "W8A16-g32", "W16A16", "W32A32")
MAX_THREADS = 4096
PAGE_TOKENS = 16
"""KV slots in a page: one attention tile of every executor."""

MAX_TARGET_S = 3600

MAX_OUTPUT_ROWS = 128
"""Rows whose logits are asked for at once where many are wanted: bounds memory with large vocabularies."""


def pages_for(tokens: int) -> int:
    """Pages that `tokens` slots fill, the last one perhaps in part."""
    return -(-tokens // PAGE_TOKENS)


def _check(ok: bool, name: str, seen: object, accepted: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {seen!r}; accepted: {accepted}")


def _positive_or_none(name: str, value: object) -> None:
    ok = value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
    _check(ok, name, value, "a positive number, or none to choose it from the machine")


@dataclass(frozen=True, slots=True)
class ClassTarget:
    """What a service class aims at: seconds to the first token, and between tokens."""

    first_token_s: float
    inter_token_s: float

    def __post_init__(self) -> None:
        for name in ("first_token_s", "inter_token_s"):
            value = getattr(self, name)
            ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_TARGET_S
            _check(ok, name, value, f"a number of seconds above 0, up to {MAX_TARGET_S}")


CLASS_TARGETS: Mapping[ServiceClass, ClassTarget] = {
    "keystroke": ClassTarget(0.2, 0.05),
    "interactive": ClassTarget(1.0, 0.1),
    "batch": ClassTarget(60.0, 1.0),
}
"""Where a config says nothing else: a letter must not lag, a text must come as fast as it is read."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine. None and "auto" mean: measured or read from the model.

    `device` "auto" is a GPU that the CUDA executor can use, if there is one, else the CPU.
    `weights` is the format of linear layers ("auto": with the bits that a quantised file has; for floats
    W8A8-g32 on a CPU and W16A16 on a GPU).
    `kv_format` is that of stored keys and values ("auto": KV16, and KV32 beside float32 weights).
    `max_model_len` bounds prompt and output together (default: the model's context, or what fits).
    `max_num_batched_tokens` is a step's token budget, `max_num_seqs` how many sequences run at once.
    `kv_cache_memory_bytes` is the KV pool's size (default: from the memory that is free).
    `packed_cache` lets the CPU executor keep packed weights on disk where that makes the next start faster.
    `enable_prefix_caching` keeps what was computed, for prompts that begin alike, until memory is needed.
    `cache_dir` keeps what has no room there any more, and what an engine has computed when it ends, in files
    of at most `cache_disk_bytes` (default: up to a tenth of the disk), so that the next engine starts warm.
    Before it goes there it stays in host memory, in `cache_memory_bytes` (default: none on a CPU, where the
    KV pool is host memory; else a quarter of what is free, if there is a `cache_dir`).
    `seed` makes requests without a seed of their own repeatable.
    `trace` is a file for a timeline of steps and requests, as Perfetto reads it.
    `class_targets` has, for service classes that aim at something else than CLASS_TARGETS, the seconds to the
    first token and between tokens. With `measured_budget`, a step takes no more than running streams can wait
    for by these targets; without, as many tokens as it may.
    `speculation` is how the tokens of requests that do not say are guessed, to verify several in one step:
    "grammar", "ngram", "suffix" or "off"; "auto" is by any drafter where steps are not launched ahead, so on
    a CPU.
    """

    model: str = "smollm2"
    device: str = "auto"
    weights: str = "auto"
    kv_format: str = "auto"
    threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    cache_dir: str | None = None
    cache_memory_bytes: int | None = None
    cache_disk_bytes: int | None = None
    seed: int | None = None
    packed_cache: bool = True
    trace: str | None = None
    class_targets: Mapping[str, Sequence[float]] = field(default_factory=dict)
    measured_budget: bool = True
    speculation: str = "auto"

    def __post_init__(self) -> None:
        _check(isinstance(self.model, str) and bool(self.model), "model", self.model, "a name or a path")
        _check(self.device in DEVICES, "device", self.device, ", ".join(DEVICES))
        _check(self.weights in WEIGHT_FORMATS, "weights", self.weights, ", ".join(WEIGHT_FORMATS))
        _check(self.kv_format in KV_FORMATS, "kv_format", self.kv_format, ", ".join(KV_FORMATS))
        within = self.threads is None or (type(self.threads) is int and 1 <= self.threads <= MAX_THREADS)
        _check(within, "threads", self.threads, f"1 to {MAX_THREADS}, or none for one per usable core")
        for name in ("max_model_len", "kv_cache_memory_bytes", "cache_memory_bytes", "cache_disk_bytes"):
            _positive_or_none(name, getattr(self, name))
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            _check(getattr(self, name) is not None, name, None, "a positive number")
            _positive_or_none(name, getattr(self, name))
        budget = self.max_num_batched_tokens
        _check(
            budget >= self.max_num_seqs,
            "max_num_batched_tokens",
            budget,
            f"at least max_num_seqs ({self.max_num_seqs})",
        )
        for name in ("packed_cache", "enable_prefix_caching", "measured_budget"):
            value = getattr(self, name)
            _check(isinstance(value, bool), name, value, "True or False")
        folder = self.cache_dir
        _check(folder is None or (isinstance(folder, str) and bool(folder)), "cache_dir", folder, "a folder")
        disk = self.cache_disk_bytes
        _check(disk is None or folder is not None, "cache_disk_bytes", disk, "with a cache_dir")
        wanted = folder is None and self.cache_memory_bytes is None
        _check(wanted or self.enable_prefix_caching, "enable_prefix_caching", False, "True with lower tiers")
        _check(self.seed is None or isinstance(self.seed, int), "seed", self.seed, "a whole number or none")
        guessing = (*DRAFTERS, "off")
        _check(self.speculation in guessing, "speculation", self.speculation, ", ".join(guessing))
        named = self.trace is None or (isinstance(self.trace, str) and bool(self.trace))
        _check(named, "trace", self.trace, "a file, or none")
        _ = self.targets

    @property
    def targets(self) -> tuple[ClassTarget, ...]:
        """Each service class's, the highest class first."""
        given = self.class_targets
        known = isinstance(given, Mapping) and set(given) <= set(SERVICE_CLASSES)
        accepted = f"targets by the names {', '.join(SERVICE_CLASSES)}"
        _check(known, "class_targets", given, accepted)
        for name, target in given.items():
            pair = isinstance(target, Sequence) and not isinstance(target, str) and len(target) == 2
            _check(pair, f"class_targets of {name}", target, "two numbers of seconds")
        return tuple(
            ClassTarget(*given[name]) if name in given else CLASS_TARGETS[name] for name in SERVICE_CLASSES
        )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Build from keyword options; raises ConfigError for a name that is no setting."""
        known = [f.name for f in fields(cls)]
        for name in options:
            _check(name in known, "engine setting", name, ", ".join(known))
        return cls(**options)
