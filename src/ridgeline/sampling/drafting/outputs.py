"""Past outputs of each tenant, to draft from; the oldest go when there are too many."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ridgeline.sampling.drafting.index import BREAK, TokenIndex

LEAD_TOKENS = 8
"""Tokens of the prompt that are kept before an output, so that its beginning can be found."""

MAX_BYTES = 64 << 20
MAX_TENANT_BYTES = 8 << 20


class _Shelf:
    """One tenant's outputs, in two indices: when the new one is full it becomes the old one, and what the old
    one had, the oldest of all, is gone."""

    __slots__ = ("_max_bytes", "bytes", "indices")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.indices: tuple[TokenIndex, ...] = (TokenIndex(),)  # the new one first
        self.bytes = self.indices[0].bytes

    def add(self, tokens: Sequence[int]) -> None:
        """Take on an output. Of one that is longer than half of the room, the last part is kept."""
        most = TokenIndex.tokens_within(self._max_bytes // 2)
        if len(self.indices[0]) + len(tokens) + 1 > most and len(self.indices[0]):
            self.indices = (TokenIndex(), self.indices[0])
        self.indices[0].extend([*tokens[-(most - 1) :], BREAK])
        self.bytes = sum(index.bytes for index in self.indices)


class PastOutputs:
    """Owns what finished sequences have said, apart for each tenant. All of it takes at most `max_bytes`, one
    tenant's at most `max_tenant_bytes`; beyond that, the outputs of the tenants that have been silent for
    longest go, and of one tenant the oldest."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_tenant_bytes: int = MAX_TENANT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._max_tenant_bytes = min(max_tenant_bytes, max_bytes)
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()
        self.bytes = 0

    @property
    def tenants(self) -> tuple[str, ...]:
        """Those of whom there are outputs, the longest silent first."""
        return tuple(self._shelves)

    def of(self, tenant: str) -> tuple[TokenIndex, ...]:
        """The indices of a tenant's outputs, the newer ones first."""
        shelf = self._shelves.get(tenant)
        return () if shelf is None else shelf.indices

    def add(self, tenant: str, tokens: Sequence[int]) -> None:
        """Keep an output."""
        shelf = self._shelves.pop(tenant, None)
        if shelf is None:
            shelf = _Shelf(self._max_tenant_bytes)
        else:
            self.bytes -= shelf.bytes
        shelf.add(tokens)
        self._shelves[tenant] = shelf
        self.bytes += shelf.bytes
        while self.bytes > self._max_bytes and self._shelves:
            self.bytes -= self._shelves.popitem(last=False)[1].bytes
