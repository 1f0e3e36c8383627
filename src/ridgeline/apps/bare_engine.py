"""An engine around a checkpoint's weights alone, without a tokenizer: for measuring steps and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Self

from ridgeline.cache.kv import KVCache
from ridgeline.config import EngineConfig
from ridgeline.engine import Engine, ModelFacts
from ridgeline.execution.base import Limits
from ridgeline.execution.lowering import WorkModel
from ridgeline.loading import kv_format_of, make_executor, settled
from ridgeline.model.build import decoder
from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families import read_spec
from ridgeline.model.program import Program
from ridgeline.model.rewrite import with_precision
from ridgeline.model.weights import Weights
from ridgeline.scheduling.scheduler import Scheduler


class Silent:
    """Implements `Detokenizer` for tokens that nobody reads."""

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""

    def copy(self) -> Self:
        return self


@dataclass(frozen=True, slots=True)
class BareEngine:
    """`config` has nothing left to choose; `program` and `work` are those of `engine`'s steps. While weights
    were loaded, memory in use grew by `weights_bytes`, from `before_bytes`."""

    config: EngineConfig
    engine: Engine
    program: Program
    work: WorkModel
    before_bytes: int
    weights_bytes: int


@contextmanager
def bare_engine(
    checkpoint: Checkpoint, config: EngineConfig, used_bytes: Callable[[], int] = lambda: 0
) -> Iterator[BareEngine]:
    """The engine of a config whose device has been chosen; it is closed at the end. The checkpoint is left
    open. `used_bytes` says how much memory is in use.

    Raises CheckpointError, ConfigError and CapacityError as `loading.load_engine`.
    """
    with ExitStack() as stack:
        spec = read_spec(checkpoint)
        canonical = decoder(spec)
        weights = Weights(spec, canonical, checkpoint, config.weights, config.device)
        config = replace(config, kv_format=kv_format_of(config))
        program = with_precision(canonical, weights.formats, config.kv_format)
        config, ledger = settled(config, spec, program, weights)
        pages, states = ledger.pages, ledger.states
        limits = Limits(config.max_num_batched_tokens, pages, config.kv_format, config.max_num_seqs, states)
        executor = make_executor(config, limits)
        stack.callback(executor.close)
        before = used_bytes()
        executor.load(weights)
        weights_bytes = used_bytes() - before
        handle = executor.compile(program)
        windows = tuple(group.window for group in program.groups)
        cache = KVCache(windows, pages, prefix_caching=True, state_slots=states)
        scheduler = Scheduler(cache, config.max_num_seqs, config.max_num_batched_tokens)
        assert config.max_model_len is not None
        facts = ModelFacts(spec.vocabulary, config.max_model_len)
        engine = Engine(executor, handle, scheduler, facts, lambda _: Silent())
        stack.callback(engine.close)
        yield BareEngine(config, engine, program, handle.work, before, weights_bytes)
