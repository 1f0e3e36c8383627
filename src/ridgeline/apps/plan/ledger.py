"""Where the memory goes, and how many sequences of which length it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ridgeline.apps.plan.host import Host
from ridgeline.apps.plan.model import FormattedModel
from ridgeline.config import EngineConfig
from ridgeline.loading import memory_demand
from ridgeline.resources.memory import (
    RESERVE_SHARE,
    Demand,
    bytes_of_sequences,
    sequences_that_fit,
)

_LENGTHS = (1024, 4096, 16_384, 65_536, 131_072)
_DEFAULT = EngineConfig()


@dataclass(frozen=True, slots=True)
class KVOfGroup:
    """What layers of one geometry keep of a token; of the last `window` tokens, or of all (None)."""

    layers: int
    bytes_per_token: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes on the whole host. `sequence_bytes` is the KV cache of one sequence as long as the workload's,
    `shared_bytes` what windows need besides for the rows of a step. `sequences` of them fit the pool that the
    engine makes unasked; `fitting` says how many of other lengths do.
    """

    weights: Mapping[str, int]
    weights_bytes: int
    activation_bytes: int
    reserve_bytes: int
    memory_bytes: int
    kv: tuple[KVOfGroup, ...]
    kv_format: str
    kv_bytes_per_token: int
    sequence_bytes: int
    shared_bytes: int
    sequences: int
    fitting: Mapping[int, int]

    @property
    def has_room_for_weights(self) -> bool:
        used = self.weights_bytes + self.activation_bytes + self.reserve_bytes
        return used < self.memory_bytes


def step_tokens(users: int) -> int:
    """The token budget of a step: the engine's own, and more where so many users decode."""
    return max(_DEFAULT.max_num_batched_tokens, 2 * users)


def demand_of(model: FormattedModel, tokens: int, users: int) -> Demand:
    """What the engine would ask of the memory for so many sequences of so many tokens."""
    config = replace(
        _DEFAULT,
        kv_format=model.kv_format,
        max_model_len=tokens,
        max_num_seqs=max(users, _DEFAULT.max_num_seqs),
        max_num_batched_tokens=max(step_tokens(users), _DEFAULT.max_num_seqs),
    )
    return memory_demand(config, model.program, model.nbytes)


def sequences(model: FormattedModel, host: Host, tokens: int, users: int) -> int:
    """How many sequences of `tokens` tokens fit beside the model."""
    return sequences_that_fit(demand_of(model, tokens, users), host.memory_bytes, host.pool_share)


def ledger_of(model: FormattedModel, host: Host, tokens: int, users: int) -> Ledger:
    demand = demand_of(model, tokens, users)
    each, shared = bytes_of_sequences(demand)
    lengths = sorted({length for length in _LENGTHS if length < model.spec.context} | {model.spec.context})
    kept = zip(model.program.groups, model.kv_bytes_per_token, strict=True)
    return Ledger(
        weights=model.weights_bytes,
        weights_bytes=model.nbytes,
        activation_bytes=demand.activation_bytes,
        reserve_bytes=int(host.memory_bytes * RESERVE_SHARE),
        memory_bytes=host.memory_bytes,
        kv=tuple(KVOfGroup(len(group.layers), size, group.window) for group, size in kept),
        kv_format=model.kv_format,
        kv_bytes_per_token=sum(model.kv_bytes_per_token),
        sequence_bytes=each,
        shared_bytes=shared,
        sequences=sequences_that_fit(demand, host.memory_bytes, host.pool_share),
        fitting={length: sequences(model, host, length, users) for length in lengths},
    )
