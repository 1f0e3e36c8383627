"""From an EngineConfig to a model that is ready to run: every room, put together once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ridgeline.config import EngineConfig
from ridgeline.types import ConfigError, RequestError, SamplingParams

if TYPE_CHECKING:
    from ridgeline.engine import Engine
    from ridgeline.execution.base import Executor, Limits
    from ridgeline.model.chat_template import ChatTemplate
    from ridgeline.model.program import Program, Weight
    from ridgeline.model.spec import ModelSpec
    from ridgeline.model.tokenizer import Tokenizer
    from ridgeline.model.weights import Weights

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything that the API needs of one model. `chat_template` is None for a model without one;
    `sampling_defaults` apply where a caller gives no parameters."""

    config: EngineConfig
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    sampling_defaults: SamplingParams

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids; a text gets the special tokens that the model begins with."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_special=True))
        return tuple(prompt)

    def chat_tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The token ids of a conversation, up to where the answer begins.

        Raises RequestError when the model has no chat template or the template refuses the messages.
        """
        if self.chat_template is None:
            raise RequestError("model has no chat template; accepted: a plain prompt, or a chat model")
        return tuple(self.chat_template.encode(messages))


def text_of(prompt: Prompt) -> str | None:
    return prompt if isinstance(prompt, str) else None


def load_engine(config: EngineConfig) -> LoadedModel:
    """Find the model that `config` names, load it, and put an engine around it.

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
    from ridgeline.scheduling.scheduler import Scheduler

    checkpoint = open_checkpoint(resolve(config.model))
    try:
        spec = read_spec(checkpoint)
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        canonical = decoder(spec)
        weights = Weights(spec, canonical, checkpoint, config.weights)
        program = with_precision(canonical, weights.formats)
        config = settled(config, spec)
        pages = pool_pages(config, program, weights)
        executor = make_executor(config, Limits(config.max_num_batched_tokens, pages))
        executor.load(weights)
        handle = executor.compile(program)
        template = ChatTemplate.from_checkpoint(checkpoint, tokenizer)
        defaults = SamplingParams(**generation_defaults(checkpoint))
    finally:
        checkpoint.close()
    cache = KVCache(tuple(group.window for group in program.groups), pages)
    scheduler = Scheduler(cache, config.max_num_seqs, config.max_num_batched_tokens)
    context = config.max_model_len or spec.context
    facts = ModelFacts(spec.vocabulary, context, tokenizer.eos_ids, tokenizer.bos_id)
    engine = Engine(executor, handle, scheduler, facts, tokenizer.detokenizer, config.seed)
    return LoadedModel(config, engine, tokenizer, template, defaults)


def settled(config: EngineConfig, spec: ModelSpec) -> EngineConfig:
    """The config with nothing left to choose but the size of the KV pool, which is the ledger's.

    Raises ConfigError when `max_model_len` is beyond what the model can do.
    """
    from ridgeline.resources.machine import usable_cores

    longest = min(spec.context, spec.learned_positions or spec.context)
    asked = config.max_model_len
    if asked is not None and asked > longest:
        raise ConfigError(f"max_model_len is {asked}; accepted: up to {longest}, the model's context")
    return replace(
        config,
        device="cpu" if config.device == "auto" else config.device,
        threads=config.threads or usable_cores(),
        max_model_len=asked or longest,
    )


def pool_pages(config: EngineConfig, program: Program, weights: Weights) -> tuple[int, ...]:
    """Pages in the pool of each memory group, from the memory that is free beside the weights."""
    from ridgeline.execution.base import Limits, page_bytes
    from ridgeline.resources.machine import free_memory_bytes
    from ridgeline.resources.memory import Demand, KVGroup, plan_memory

    kv_format = Limits(1, ()).kv_format
    widest = max(op.out.width for op in program.operations if not op.out.selected)
    demand = Demand(
        weights_bytes=sum(_weight_bytes(weight, weights, config.device) for weight in program.weights()),
        activation_bytes=8 * widest * 4 * config.max_num_batched_tokens
        + 4 * program.output.width * config.max_num_seqs,
        groups=tuple(KVGroup(page_bytes(group, kv_format), group.window) for group in program.groups),
        max_model_len=config.max_model_len or 1,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    return plan_memory(demand, free_memory_bytes(), config.kv_cache_memory_bytes).pages


def _weight_bytes(weight: Weight, weights: Weights, device: str) -> int:
    """What a weight takes once it is loaded; the reference executor widens everything to float32."""
    values = math.prod(weight.shape)
    fmt = weights.formats.get(weight.name)
    if fmt is None or not fmt.group or device == "reference":
        return 4 * values
    # A group has its values, a float16 scale, and with 4 bits a float16 minimum.
    group_bits = fmt.group * fmt.weight_bits + (32 if fmt.weight_bits == 4 else 16)
    return values * group_bits // (8 * fmt.group)


def make_executor(config: EngineConfig, limits: Limits) -> Executor:
    """The executor of a settled config's device."""
    if config.device == "reference":
        from ridgeline.execution.reference import ReferenceExecutor

        return ReferenceExecutor(limits)
    from ridgeline.execution.cpu.executor import CpuExecutor

    assert config.threads is not None
    return CpuExecutor(limits, config.threads)
