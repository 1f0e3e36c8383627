"""Past outputs of each tenant, to draft from; the oldest go when there are too many."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ridgeline.sampling.drafting.index import BREAK, Text, TokenIndex

LEAD_TOKENS = 8
"""Tokens of the prompt that are kept before an output, so that its beginning can be found."""

MAX_BYTES = 64 << 20
MAX_TENANT_BYTES = 8 << 20

_FRESH_TOKENS = 2048
_FRESH_SHARE = 16
"""Of a shelf's bytes, one in so many is for the fresh outputs at most."""


class _Shelf:
    """One tenant's outputs. The last ones are searched as they are: indexing one alone, the moment that it
    ends, takes longer than all else that is done then. When there are enough they are indexed at once. Of the
    two indices the new one, when it is full, becomes the old one, and what that had, the oldest of all, is
    gone."""

    __slots__ = ("_fresh", "_indexed", "_max_bytes", "bytes", "indices")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._fresh = Text()
        self._indexed: tuple[TokenIndex, ...] = ()
        self.indices: tuple[Text, ...] = ()  # the newer ones first
        self.bytes = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Take on an output. Of one that is longer than half of the room, the last part is kept."""
        fresh_bytes = min(_FRESH_TOKENS * Text.TOKEN_BYTES, self._max_bytes // _FRESH_SHARE)
        most = TokenIndex.tokens_within((self._max_bytes - fresh_bytes) // 2)
        self._fresh.extend([*tokens[-(most - 1) :], BREAK])
        if self._fresh.bytes > fresh_bytes:
            self._index(most)
        shown = (self._fresh, *self._indexed) if len(self._fresh) else self._indexed
        if shown != self.indices:  # who draws on them sees by the tuple that they have changed
            self.indices = shown
        self.bytes = sum(index.bytes for index in shown)

    def _index(self, most: int) -> None:
        """Move the fresh outputs to an index, of up to `most` tokens."""
        new = self._fresh.tokens[-most:]
        if self._indexed and len(self._indexed[0]) + len(new) <= most:
            self._indexed[0].extend(new)
        else:
            self._indexed = (TokenIndex(new), *self._indexed[:1])
        self._fresh = Text()


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

    def of(self, tenant: str) -> tuple[Text, ...]:
        """The texts of a tenant's outputs, the newer ones first; another tuple when they are others."""
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
