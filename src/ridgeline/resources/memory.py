"""The memory ledger: what a model takes on this machine, and how large its KV pools become.

Recurrent states count among the KV pools: a few slots for each sequence, whatever its length.

The stated default: the KV pools hold `max_num_seqs` sequences of `max_model_len` tokens, or as many as fit
a share of the memory that is free beside the weights; one such sequence may take all of it but a reserve.
In the system's memory the share is a half: pools are taken page by page as they are used, so a large pool
costs nothing at first, but other programs live there too. A GPU's memory is taken at once and serves little
else, so a pool takes all of it but the reserve: PyTorch's workspaces and captured graphs live in that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ridgeline.config import pages_for
from ridgeline.types import CapacityError

POOL_SHARE = 0.5
GPU_POOL_SHARE = 1.0
"""Share of what is free beside the weights and the reserve that pools take unasked."""

RESERVE_SHARE = 0.1
"""Share of the free memory that stays untouched: the process itself, its stack of libraries, the system."""


STATES_PER_SEQUENCE = 3
"""Slots of recurrent state: one that a sequence goes on from, one that it may write to, and one that is kept
for others."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers of equal geometry with one pool: the bytes of a page in all of them, and how many tokens back
    they look (None: all)."""

    page_bytes: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """What the model and the settings ask for; sizes in bytes and tokens. A slot of recurrent state has
    `state_bytes`, 0 for a model that has none."""

    weights_bytes: int
    activation_bytes: int
    groups: tuple[KVGroup, ...]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    state_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where the memory goes. `pages[g]` is the size of group g's pool, `states` the number of slots of
    recurrent state; `kv_bytes` are of both."""

    weights_bytes: int
    activation_bytes: int
    kv_bytes: int
    pages: tuple[int, ...]
    free_bytes: int
    states: int = 0

    @property
    def bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes + self.kv_bytes


def plan_memory(
    demand: Demand,
    free_bytes: int,
    kv_cache_memory_bytes: int | None = None,
    *,
    pool_share: float = POOL_SHARE,
    memory: str = "memory",
) -> Ledger:
    """Size the KV pools in `free_bytes`, or in `kv_cache_memory_bytes` where that is given.

    `free_bytes` are of the memory that weights, buffers and pools lie in, which errors call `memory`.
    Raises CapacityError when the weights, or the pages and states of one sequence of `max_model_len`, do not
    fit.
    """
    fixed = demand.weights_bytes + demand.activation_bytes
    available = int(free_bytes * (1 - RESERVE_SHARE)) - fixed
    if available <= 0:
        raise CapacityError(
            f"the weights need {_gib(demand.weights_bytes)} and the step's buffers "
            f"{_gib(demand.activation_bytes)}, and {_gib(free_bytes)} of {memory} are free; "
            "accepted: a smaller model or format (--weights), or fewer sequences at once"
        )
    if kv_cache_memory_bytes is not None and kv_cache_memory_bytes > available:
        raise CapacityError(
            f"kv_cache_memory_bytes is {kv_cache_memory_bytes}; accepted: at most {available}, "
            f"what {memory} is free beside the weights"
        )
    limit = available if kv_cache_memory_bytes is None else kv_cache_memory_bytes
    least = _pool_bytes(replace(demand, max_model_len=0), 1.0)
    if least > limit:
        raise CapacityError(
            f"one sequence needs {_gib(least)} for its recurrent state and {_gib(limit)} of {memory} can be "
            "had; accepted: a smaller model, or more memory"
        )
    one = _pool_bytes(demand, 1.0)
    if one > limit:
        raise CapacityError(
            f"one sequence of {demand.max_model_len} tokens needs {_gib(one)} of KV cache and {_gib(limit)} "
            f"of {memory} can be had; accepted: --max-model-len up to {_longest(demand, limit)}"
        )
    share = limit if kv_cache_memory_bytes is not None else available * pool_share
    sequences = _sequences(demand, max(int(share), one))
    pages = _pages(demand, sequences)
    kv_bytes = _pool_bytes(demand, sequences)
    states = _states(demand, sequences)
    return Ledger(demand.weights_bytes, demand.activation_bytes, kv_bytes, pages, free_bytes, states)


def sequences_that_fit(demand: Demand, free_bytes: int, pool_share: float = POOL_SHARE) -> int:
    """How many sequences of `max_model_len` tokens the pools hold that `plan_memory` would make if none were
    too many; 0 where not even the weights, or the pages of one, fit."""
    available = int(free_bytes * (1 - RESERVE_SHARE)) - demand.weights_bytes - demand.activation_bytes
    one = _pool_bytes(demand, 1.0)
    if available <= 0 or one > available:
        return 0
    each, shared = bytes_of_sequences(demand)
    return int((max(int(available * pool_share), one) - shared) / each)


def _page_rule(demand: Demand, group: KVGroup) -> tuple[int, int]:
    """(pages for each sequence, pages that all share) of a group's pool.

    A window group holds the window, whose ends lie inside pages, and the rows of the step, which all
    sequences together bound by the token budget.
    """
    whole = pages_for(demand.max_model_len)
    if group.window is None:
        return whole, 0
    each = min(pages_for(group.window) + 2, whole)
    return each, min(pages_for(demand.max_num_batched_tokens), whole - each)


def _pages(demand: Demand, sequences: float) -> tuple[int, ...]:
    rules = [_page_rule(demand, group) for group in demand.groups]
    return tuple(int(each * sequences) + shared for each, shared in rules)


def _pool_bytes(demand: Demand, sequences: float) -> int:
    pages = _pages(demand, sequences)
    paged = sum(n * group.page_bytes for n, group in zip(pages, demand.groups, strict=True))
    return paged + _states(demand, sequences) * demand.state_bytes


def _states(demand: Demand, sequences: float) -> int:
    return int(STATES_PER_SEQUENCE * sequences) if demand.state_bytes else 0


def _sequences(demand: Demand, budget_bytes: int) -> float:
    """How many sequences of full length the budget holds; a fraction is as good, pages are shared freely."""
    each, shared = bytes_of_sequences(demand)
    fits = (budget_bytes - shared) / each if each else float(demand.max_num_seqs)
    return min(max(fits, 1.0), float(demand.max_num_seqs))


def bytes_of_sequences(demand: Demand) -> tuple[int, int]:
    """Bytes of the pages and states of each sequence, and of the pages that all share."""
    rules = [(group.page_bytes, *_page_rule(demand, group)) for group in demand.groups]
    states = STATES_PER_SEQUENCE * demand.state_bytes
    return states + sum(size * n for size, n, _ in rules), sum(size * n for size, _, n in rules)


def _longest(demand: Demand, limit_bytes: int) -> int:
    """The greatest max_model_len of which one sequence fits."""
    low, high = 0, demand.max_model_len
    while high - low > 1:
        middle = (low + high) // 2
        fits = _pool_bytes(replace(demand, max_model_len=middle), 1.0) <= limit_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**28 else f"{size_bytes / 2**20:.1f} MiB"
