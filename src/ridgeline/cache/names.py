"""What pages are called outside of this process: SHA-256 over everything that their contents depend on.

A page's name covers the tokens in it by way of the name before it, and so all tokens before them; the first
one's covers the scope, with the salt, and the identity: model, formats, layout, build. Two pages have one
name only where their bytes would be the same and may be shared, and a name tells nothing of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from ridgeline.cache.radix import NAME_BYTES, PAGE_BYTES, Scope

KEY_BYTES = NAME_BYTES + 1


def root_name(identity: bytes, scope: Scope) -> bytes:
    """The name before a scope's first page."""
    texts = (scope.salt.encode("utf-8", "surrogatepass"), scope.adapter.encode("utf-8", "surrogatepass"))
    position = scope.first_position.to_bytes(8, "little", signed=True)
    return _digest((identity, *texts, position, *scope.preceding))


def name_on(name: bytes, key: bytes | bytearray) -> bytes:
    """The names, one behind the other, of the pages of tokens in `key`, behind the page called `name`."""
    names = bytearray()
    for begin in range(0, len(key), PAGE_BYTES):
        name = hashlib.sha256(name + key[begin : begin + PAGE_BYTES]).digest()
        names += name
    return bytes(names)


def key_of(name: bytes | bytearray, group: int) -> bytes:
    """Names the page of one memory group."""
    return bytes(name) + bytes([group])


def group_of(key: bytes) -> int:
    return key[NAME_BYTES]


def _digest(parts: Iterable[bytes]) -> bytes:
    """Of parts whose lengths are written out, so that nothing moves from one to its neighbour."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()
