"""From an EngineConfig to a model that is ready to run: every room, put together once."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ridgeline.config import PAGE_TOKENS, EngineConfig, pages_for
from ridgeline.types import (
    CapacityError,
    ConfigError,
    RequestError,
    RequestOutput,
    RidgelineError,
    SamplingParams,
    ServiceClass,
    SpeculationParams,
)

if TYPE_CHECKING:
    from ridgeline.cache.tiers import Tiers
    from ridgeline.engine import Engine, EngineStats
    from ridgeline.execution.base import Executor, Limits
    from ridgeline.model.chat_template import ChatTemplate
    from ridgeline.model.program import Program
    from ridgeline.model.spec import ModelSpec
    from ridgeline.model.tokenizer import Tokenizer
    from ridgeline.model.weights import Weights
    from ridgeline.precision.formats import Format
    from ridgeline.resources.ceilings import Ceilings
    from ridgeline.resources.energy import Meter
    from ridgeline.resources.memory import Demand, Ledger
    from ridgeline.resources.step_time import StepTimeModel
    from ridgeline.scheduling.drafting import Drafting
    from ridgeline.scheduling.pace import Pace
    from ridgeline.steps import StepWatcher

logger = logging.getLogger("ridgeline.loading")

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

_BUFFERS = 8
"""Activations that an executor may hold at once, as multiples of the program's widest."""
_SHORTEST_CONTEXT = 256
"""A context that nobody asked for is not made shorter than this to fit the memory."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything that the API needs of one model. `chat_template` is None for a model without one;
    `sampling_defaults` apply where a caller gives no parameters; `formats` counts the matrices that run in
    each number format."""

    config: EngineConfig
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    sampling_defaults: SamplingParams
    formats: Mapping[str, int]

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids; a text gets the special tokens that the model begins with."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_special=True))
        return tuple(prompt)

    def chat_tokens(self, messages: Sequence[Message], **options: Any) -> tuple[int, ...]:
        """The token ids of a conversation, up to where the answer begins. `options` are those of
        `ChatTemplate.encode`.

        Raises RequestError when the model has no chat template or the template refuses the messages.
        """
        if self.chat_template is None:
            raise RequestError("model has no chat template; accepted: a plain prompt, or a chat model")
        return tuple(self.chat_template.encode(messages, **options))


class LoadedFace:
    """What everybody who owns a LoadedModel shows of it."""

    _loaded: LoadedModel

    @property
    def loaded(self) -> LoadedModel:
        """The parts that the model is made of; they belong to this object."""
        return self._loaded

    @property
    def config(self) -> EngineConfig:
        """The settings, with nothing left to choose."""
        return self._loaded.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What applies where no parameters are given."""
        return self._loaded.sampling_defaults

    @property
    def stats(self) -> EngineStats:
        """Steps, time and work so far."""
        return self._loaded.engine.stats


class Sender(NamedTuple):
    """Whose requests are, and what for: what a `Request` has behind its parameters."""

    cache_salt: str
    service_class: ServiceClass
    tenant: str


def text_of(prompt: Prompt) -> str | None:
    return prompt if isinstance(prompt, str) else None


def embedding_of(output: RequestOutput) -> tuple[float, ...]:
    """The vector of a request to pool its prompt. Raises RequestError when it ended without one."""
    if output.embedding is None:
        (ended,) = output.outputs
        raise RequestError(f"prompt was not embedded: {ended.stop_reason or ended.finish_reason}")
    return output.embedding


def load_engine(config: EngineConfig) -> LoadedModel:
    """Find the model that `config` names, load it, and put an engine around it. Only on a machine whose
    ceilings are known, as by `ridgeline probe`, have its steps a budget of time.

    Raises CheckpointError, ConfigError or CapacityError; then nothing stays open.
    """
    from ridgeline.cache.kv import KVCache
    from ridgeline.engine import Engine, ModelFacts
    from ridgeline.execution.base import Limits
    from ridgeline.model.build import decoder
    from ridgeline.model.catalog import resolve
    from ridgeline.model.chat_template import ChatTemplate
    from ridgeline.model.checkpoint import open_checkpoint
    from ridgeline.model.families import read_spec
    from ridgeline.model.generation_defaults import generation_defaults
    from ridgeline.model.rewrite import with_precision
    from ridgeline.model.tokenizer import Tokenizer
    from ridgeline.model.weights import Weights
    from ridgeline.precision.formats import check_device_format
    from ridgeline.resources.cuda import choose_device
    from ridgeline.sampling.constraints import Constraints
    from ridgeline.scheduling.pace import Pace
    from ridgeline.scheduling.scheduler import Scheduler
    from ridgeline.steps import StepLog

    if config.trace is not None:
        from ridgeline.trace import check_path

        check_path(config.trace)
    with ExitStack() as on_failure, closing(open_checkpoint(resolve(config.model))) as checkpoint:
        spec = read_spec(checkpoint)
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        template = ChatTemplate.from_checkpoint(checkpoint, tokenizer)
        defaults = SamplingParams(**generation_defaults(checkpoint))
        config = replace(config, device=choose_device(config.device), kv_format=kv_format_of(config))
        check_device_format(config.weights, config.device)
        canonical = decoder(spec)
        weights = Weights(spec, canonical, checkpoint, config.weights, config.device)
        program = with_precision(canonical, weights.formats, config.kv_format)
        config, ledger = settled(config, spec, program, weights)
        pages, states = ledger.pages, ledger.states
        limits = Limits(config.max_num_batched_tokens, pages, config.kv_format, config.max_num_seqs, states)
        executor = make_executor(config, limits)
        on_failure.callback(executor.close)
        executor.load(weights)
        handle = executor.compile(program)
        formats = Counter(fmt.name for fmt in weights.formats.values())
        ceilings = device_ceilings(config, measure=config.trace is not None)
        times = _step_times(ceilings, formats)
        pace = None if times is None else Pace(handle.work, times, program.groups, config.targets)
        tiers = lower_tiers(config, program, weights, executor, ceilings, pace)
        if tiers is not None:
            on_failure.callback(tiers.ladder.close)
        watched = _watched(config, ceilings)
        on_failure.pop_all()
    assert config.max_model_len is not None
    windows = tuple(group.window for group in program.groups)
    cache = KVCache(windows, pages, config.enable_prefix_caching, tiers, states)
    drafting = None if pace is None else _drafting(config, pace, executor)
    budget = pace if config.measured_budget else None
    scheduler = Scheduler(cache, config.max_num_seqs, config.max_num_batched_tokens, budget, drafting)
    ends = frozenset(token for token in tokenizer.eos_ids if token < spec.vocabulary)
    facts = ModelFacts(spec.vocabulary, config.max_model_len, ends, tokenizer.bos_id, 1 / spec.logit_scale)
    encode = partial(compile_encoder, executor, spec, config, weights.formats)
    constraints = Constraints(tokenizer, spec.vocabulary, ends)
    detokenizer = tokenizer.detokenizer
    engine = Engine(executor, handle, scheduler, facts, detokenizer, config.seed, encode, constraints)
    engine.steps = StepLog(scheduler, times, *watched)
    return LoadedModel(config, engine, tokenizer, template, defaults, formats)


def _drafting(config: EngineConfig, pace: Pace, executor: Executor) -> Drafting:
    """What guesses tokens, of requests that do not say as the config says. Guesses need the tokens before
    them, and so cost the steps that are launched ahead: there, only who asks for them gets them."""
    from ridgeline.sampling.drafting.speculator import AUTO, Speculator
    from ridgeline.scheduling.drafting import Drafting

    default = None
    if config.speculation != "off" and not (config.speculation == AUTO and executor.asynchronous):
        default = SpeculationParams(config.speculation)
    return Drafting(Speculator.of_lookups, pace, default)


def _step_times(ceilings: Ceilings | None, formats: Mapping[str, int]) -> StepTimeModel | None:
    """What predicts the steps of a machine that was measured, on a model of these formats."""
    from ridgeline.resources.step_costs import costs_here
    from ridgeline.resources.step_time import StepTimeModel

    costs = None if ceilings is None else costs_here(ceilings, max(formats, key=formats.__getitem__))
    return None if ceilings is None or costs is None else StepTimeModel.of(ceilings, costs)


def _watched(config: EngineConfig, ceilings: Ceilings | None) -> tuple[Meter | None, StepWatcher | None]:
    """What counts the energy of a settled config's steps and writes them down, where there is any. Raises
    ConfigError when the trace cannot be written."""
    from ridgeline.resources.energy import open_meter

    meter, energy = open_meter(config.device)
    if config.trace is None:
        return meter, None
    from ridgeline.trace import Trace

    labels = {"model": config.model, "device": config.device, "energy": str(energy)}
    if ceilings is not None:
        labels |= {"machine": ceilings.machine, "read": f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s"}
    return meter, Trace(config.trace, labels)


def device_ceilings(config: EngineConfig, measure: bool) -> Ceilings | None:
    """The ceilings of a config's device, None where nobody has measured them; with `measure`, as a trace asks
    for it, they are then measured quickly, in about a second, and kept. The reference executor is nowhere
    near any."""
    from ridgeline.resources import probe
    from ridgeline.resources.cuda import choose_device

    if config.device == "reference":
        return None
    read = probe.quick_ceilings if measure else probe.known_ceilings
    try:
        return read(config.threads, device=choose_device(config.device))
    except RidgelineError:
        return None  # an answer is worth more than a figure


def compile_encoder(
    executor: Executor, spec: ModelSpec, config: EngineConfig, formats: Mapping[str, Format]
) -> Any:
    """A handle for the model's hidden states, on an executor that holds its weights and decoder.

    Raises CapacityError when there is too little memory for its buffers.
    """
    from ridgeline.model.build import encoder
    from ridgeline.model.rewrite import with_precision
    from ridgeline.resources.cuda import cuda_free_memory_bytes
    from ridgeline.resources.machine import free_memory_bytes

    program = with_precision(encoder(spec), formats, config.kv_format)
    wanted = _buffer_bytes(config, program)
    free = cuda_free_memory_bytes() if config.device == "cuda" else free_memory_bytes()
    with suppress(MemoryError):
        if wanted <= free:
            return executor.compile(program)
    raise CapacityError(
        f"embeddings need {wanted / 2**20:.0f} MiB for buffers and {free / 2**20:.0f} MiB are free; "
        "accepted: a smaller max_num_batched_tokens or KV cache"
    )


def settled(
    config: EngineConfig, spec: ModelSpec, program: Program, weights: Weights
) -> tuple[EngineConfig, Ledger]:
    """The config with nothing left to choose, and where the memory goes.

    The device has been chosen already. Raises ConfigError when the model cannot do what was asked,
    CapacityError when the memory cannot.
    """
    return settled_by(config, spec, lambda chosen: memory_ledger(chosen, program, weights))


def settled_by(
    config: EngineConfig, spec: ModelSpec, ledger_of: Callable[[EngineConfig], Ledger]
) -> tuple[EngineConfig, Ledger]:
    """The same where `ledger_of` says what fits. A context that was not asked for is the model's, halved
    until one sequence of it fits the memory."""
    from ridgeline.resources.machine import usable_cores

    longest = min(spec.context, spec.learned_positions or spec.context)
    asked = config.max_model_len
    if asked is not None and asked > longest:
        raise ConfigError(f"max_model_len is {asked}; accepted: up to {longest}, the model's context")
    config = replace(
        config,
        kv_format=kv_format_of(config),
        threads=config.threads or usable_cores(),
        max_model_len=asked or longest,
    )
    while True:
        try:
            ledger = ledger_of(config)
        except CapacityError:
            context = (config.max_model_len or 0) // 2
            if asked is not None or context < _SHORTEST_CONTEXT:
                raise
            config = replace(config, max_model_len=context)
            continue
        return replace(config, kv_cache_memory_bytes=ledger.kv_bytes), ledger


def kv_format_of(config: EngineConfig) -> str:
    """The format of keys and values that a config means."""
    if config.kv_format != "auto":
        return config.kv_format
    return "KV32" if config.weights == "W32A32" else "KV16"


def memory_ledger(config: EngineConfig, program: Program, weights: Weights) -> Ledger:
    """Where the memory goes for a config that names its context, KV format and device."""
    from ridgeline.resources.cuda import cuda_free_memory_bytes
    from ridgeline.resources.machine import free_memory_bytes
    from ridgeline.resources.memory import GPU_POOL_SHARE, plan_memory

    widened = sum(4 * math.prod(weight.shape) for weight in program.weights())
    demand = memory_demand(config, program, widened if config.device == "reference" else weights.nbytes)
    if config.device == "cuda":
        return plan_memory(
            demand,
            cuda_free_memory_bytes(),
            config.kv_cache_memory_bytes,
            pool_share=GPU_POOL_SHARE,
            memory="GPU memory",
        )
    return plan_memory(demand, free_memory_bytes(), config.kv_cache_memory_bytes)


def memory_demand(config: EngineConfig, program: Program, weights_bytes: int) -> Demand:
    """What a model asks of the memory under a config that names its context and KV format."""
    from ridgeline.execution.base import page_bytes, state_bytes
    from ridgeline.resources.memory import Demand, KVGroup

    assert config.max_model_len is not None
    return Demand(
        weights_bytes=weights_bytes,
        activation_bytes=_buffer_bytes(config, program) + 4 * program.output.width * config.max_num_seqs,
        groups=tuple(KVGroup(page_bytes(g, config.kv_format), g.window) for g in program.groups),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        state_bytes=state_bytes(program.states),
    )


def _buffer_bytes(config: EngineConfig, program: Program) -> int:
    """What the values of a step may take, its outputs aside."""
    widest = max(op.out.width * op.out.experts for op in program.operations if not op.out.selected)
    return _BUFFERS * 4 * widest * config.max_num_batched_tokens


def lower_tiers(
    config: EngineConfig,
    program: Program,
    weights: Weights,
    executor: Executor,
    ceilings: Ceilings | None,
    pace: Pace | None,
) -> Tiers | None:
    """Where pages of the prefix cache go when there is no room for them; None where nobody asked for it. They
    come back where `pace` predicts that computing them again takes longer.

    Raises ConfigError when the folder cannot be used.
    """
    kept = program.groups or program.states
    if not kept or (config.cache_dir is None and config.cache_memory_bytes is None):
        return None
    from ridgeline.cache.disk import DiskTier
    from ridgeline.cache.ladder import QUEUE_BYTES, Ladder
    from ridgeline.cache.memory import MemoryTier
    from ridgeline.cache.tiers import Tiers
    from ridgeline.resources.installation import build_digest
    from ridgeline.resources.machine import free_memory_bytes
    from ridgeline.resources.transfers import FetchChoice

    model = weights.identity()
    if model is None and config.cache_dir is not None:
        logger.warning("the model's file changed a moment ago; its KV cache is not kept on disk this time")
    disk = memory = None
    if config.cache_dir is not None and model is not None:
        disk = DiskTier(Path(config.cache_dir).expanduser() / "kv", config.cache_disk_bytes)
    memory_bytes = config.cache_memory_bytes
    if memory_bytes is None and config.device == "cuda":
        memory_bytes = free_memory_bytes() // 4
    if memory_bytes is not None:
        memory = MemoryTier(memory_bytes)
    if disk is None and memory is None:
        return None
    parts = (model, build_digest(), program, config.kv_format, PAGE_TOKENS, executor.numerics)
    identity = hashlib.sha256(repr(parts).encode()).digest()
    windows = tuple(group.window for group in program.groups)
    choice = FetchChoice(0.0 if ceilings is None else ceilings.host_to_device_bytes_per_s)
    # What one step evicts, for as many rows and a page more for each sequence, must find room at once.
    step_pages = pages_for(config.max_num_batched_tokens) + config.max_num_seqs
    queue_bytes = max(QUEUE_BYTES, step_pages * sum(executor.host_page_bytes))
    ladder = Ladder(executor.host_page_bytes, memory, disk, choice, queue_bytes)
    compute_s = None
    if pace is not None:
        compute_s = partial(pace.computing_s, at_once=config.max_num_batched_tokens)
    return Tiers(ladder, identity, windows, compute_s, states=bool(program.states))


def make_executor(config: EngineConfig, limits: Limits) -> Executor:
    """The executor of a settled config's device."""
    if config.device == "reference":
        from ridgeline.execution.reference import ReferenceExecutor

        return ReferenceExecutor(limits)
    if config.device == "cuda":
        from ridgeline.execution.cuda.device import Gpu
        from ridgeline.execution.cuda.executor import CudaExecutor

        return CudaExecutor(limits, Gpu())
    from ridgeline.execution.cpu.executor import CpuExecutor

    assert config.threads is not None
    if not config.packed_cache:
        return CpuExecutor(limits, config.threads)
    from ridgeline.execution.cpu.packed_cache import PackedCache

    return CpuExecutor(limits, config.threads, cache=PackedCache())
