"""What sampling asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class Words(Protocol):
    """A vocabulary: its tokens' bytes, and a text's tokens. `is_bytewise` says that each token stands for
    bytes of its own, whatever its neighbours are."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def special_ids(self) -> Collection[int]: ...
    @property
    def is_bytewise(self) -> bool: ...
    @property
    def bos_id(self) -> int | None: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def encode(self, text: str) -> list[int]: ...
