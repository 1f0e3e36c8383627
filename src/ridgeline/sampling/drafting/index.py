"""Where the last tokens of a text stood before.

A sequence's own text is searched, backwards: it is looked at in few steps, and going over some thousands of
bytes that lie side by side takes less than keeping an index of them with every token.

Past outputs are many more, and have one: a hash chain, as in LZ77 compressors. A table has for each hash of
two tokens the last position at which such tokens ended, and each position points to the one before it. No
keys are kept, so that a token costs some 20 bytes; what the chain leads to is compared. Taking on a token,
and looking the end of a text up, take constant time, and long texts are taken on at once by NumPy.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEAST_MATCH = 2
"""Tokens that are searched for, or hashed: a shorter match is not found."""

LONGEST_MATCH = 32
"""Tokens of a match that are compared when it is looked up."""

BREAK = -1
"""Stands between two texts: nothing matches it, and no continuation goes over it."""

_NOWHERE = -1
_LAST, _BEFORE = 0x9E3779B1, 0x85EBCA77
_WORD = 0xFFFFFFFF
_WORD_BITS = 32
_WORD_BYTES = 4
_FEW = 32  # from here on NumPy is faster
_SHORT = 4096  # up to here searching bytes is faster than NumPy
_LEAST_SLOTS = 128


def _slots_for(tokens: int) -> int:
    return max(1 << (tokens - 1).bit_length(), _LEAST_SLOTS) if tokens else _LEAST_SLOTS


class Text:
    """The tokens of a text. They are at least 0, or BREAK."""

    TOKEN_BYTES = 5
    """With an array's room to grow."""

    __slots__ = ("tokens",)

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = array("i")
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sys.getsizeof(self.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take on several tokens."""
        self.tokens.extend(array("i", tokens))

    def keep_last(self, count: int) -> None:
        """Forget all but the last `count` tokens; positions begin at 0 again."""
        self.tokens = self.tokens[len(self.tokens) - count :]

    def find(self, text: array[int], most: int) -> list[tuple[int, int]]:
        """Where the end of a text stood here: the positions after at most `most` occurrences of at least
        LEAST_MATCH tokens, the most recent first, each with how many tokens before it are the same, at most
        LONGEST_MATCH. In the text's own `tokens` the end itself does not count."""
        tokens = self.tokens
        if len(text) < LEAST_MATCH or not tokens:
            return []
        found: list[tuple[int, int]] = []
        length = min(len(text), LONGEST_MATCH)
        for at in self._ends(text, most):
            if not found:
                ending = _number(text[-length:])
            if at + 1 >= length:
                compared, wanted = length, ending
            else:
                compared, wanted = at + 1, ending >> (length - at - 1) * _WORD_BITS
            # The last tokens are the highest bits, so the highest that differs says how many agree.
            differing = (_number(tokens[at + 1 - compared : at + 1]) ^ wanted).bit_length()
            found.append((at + 1, compared - (differing + _WORD_BITS - 1) // _WORD_BITS))
        return found

    def _ends(self, text: array[int], most: int) -> list[int]:
        """Where the text's last two tokens end here, at most so many times, the last first."""
        tokens = self.tokens
        before, last = text[-2:]
        end = len(tokens) - (text is tokens)  # of what is searched
        if end > _SHORT:
            seen = np.frombuffer(tokens, np.int32)[:end]
            at = np.flatnonzero(seen[1:] == last) + 1
            ends: list[int] = at[seen[at - 1] == before][: -most - 1 : -1].tolist()
            return ends
        ends = []
        searched, pair = tokens.tobytes(), text[-2:].tobytes()
        end *= _WORD_BYTES
        while len(ends) < most:
            start = searched.rfind(pair, 0, end)
            if start < 0:
                break
            end = start + len(pair) - 1
            if start % _WORD_BYTES == 0:  # else halves of others look the same
                ends.append(start // _WORD_BYTES + 1)
        return ends

    def last_of(self, token: int) -> int:
        """The position after the last occurrence of a token before the text's end, or -1."""
        searched, word = self.tokens.tobytes(), array("i", (token,)).tobytes()
        end = len(searched) - _WORD_BYTES
        while (start := searched.rfind(word, 0, max(end, 0))) >= 0:
            if start % _WORD_BYTES == 0:
                return start // _WORD_BYTES + 1
            end = start + _WORD_BYTES - 1
        return -1

    def following(self, position: int, count: int) -> list[int]:
        """Up to `count` tokens from `position` on, until a BREAK. Beyond the end of the text it goes on as it
        went since `position`, over and over."""
        tokens = self.tokens[position : position + count].tolist()
        if len(tokens) < count and tokens:
            tokens = (tokens * (count // len(tokens) + 1))[:count]
        return tokens[: tokens.index(BREAK)] if BREAK in tokens else tokens


class TokenIndex(Text):
    """A text, and where pairs of its tokens ended."""

    TOKEN_BYTES = 2 * Text.TOKEN_BYTES + 8
    """Its place in the chain, too, and up to two slots of the table."""

    __slots__ = ("_earlier", "_heads", "_shift", "_slots")

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._clear(_slots_for(len(tokens)))
        self.extend(tokens)

    def _clear(self, slots: int) -> None:
        self.tokens = array("i")
        self._slots = slots
        self._shift = _WORD_BITS + 1 - slots.bit_length()
        self._earlier = array("i")
        self._heads = array("i", [_NOWHERE]) * slots

    @property
    def bytes(self) -> int:
        """Memory of the tables."""
        return sum(map(sys.getsizeof, (self.tokens, self._earlier, self._heads)))

    @classmethod
    def tokens_within(cls, size_bytes: int) -> int:
        """How many tokens an index of that size has room for."""
        return max(size_bytes // cls.TOKEN_BYTES, _LEAST_SLOTS)

    # ------------------------------------------------------------------------------------ taking on

    def append(self, token: int) -> None:
        """Take on the next token."""
        tokens = self.tokens
        at = len(tokens)
        if at >= self._slots:
            self._rebuild(tokens, 2 * self._slots)
            self.append(token)
            return
        before = tokens[-1] if at else BREAK
        tokens.append(token)
        slot = (before * _BEFORE + token * _LAST & _WORD) >> self._shift
        heads = self._heads
        self._earlier.append(heads[slot])
        heads[slot] = at

    def extend(self, tokens: Sequence[int]) -> None:
        """Take on several tokens."""
        if len(tokens) < _FEW:
            for token in tokens:
                self.append(token)
            return
        total = len(self) + len(tokens)
        if total > self._slots:
            self._rebuild(self.tokens, _slots_for(total))
        self._extend_at_once(np.asarray(tokens, np.int32))

    def keep_last(self, count: int) -> None:
        """Forget all but the last `count` tokens; positions begin at 0 again."""
        self._rebuild(self.tokens[len(self) - count :], _slots_for(count))

    def _rebuild(self, tokens: array[int], slots: int) -> None:
        self._clear(slots)
        if tokens:
            self._extend_at_once(np.array(tokens, np.int32))

    def _extend_at_once(self, new: NDArray[np.int32]) -> None:
        """Append to the chain what has to wait for no lookup: positions in the order of their slots."""
        start = len(self)
        before = np.empty_like(new)
        before[0] = self.tokens[-1] if start else BREAK
        before[1:] = new[:-1]
        hashes = before.astype(np.uint32) * np.uint32(_BEFORE) + new.astype(np.uint32) * np.uint32(_LAST)
        slots = hashes >> np.uint32(self._shift)
        heads = np.frombuffer(self._heads, np.int32)
        by_slot = np.argsort(slots, kind="stable")
        ordered = slots[by_slot]
        is_first = np.ones(len(ordered), bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        positions = (by_slot + start).astype(np.int32)
        previous = np.empty_like(positions)
        previous[1:] = positions[:-1]
        previous[is_first] = heads[ordered[is_first]]
        is_last = np.append(is_first[1:], True)
        heads[ordered[is_last]] = positions[is_last]
        earlier = np.empty_like(positions)
        earlier[by_slot] = previous
        self._earlier.frombytes(earlier.tobytes())
        self.tokens.frombytes(new.tobytes())

    # ----------------------------------------------------------------------------------- looking up

    def _ends(self, text: array[int], most: int) -> list[int]:
        tokens, chain = self.tokens, self._earlier
        before, last = text[-2:]
        if text is tokens:
            at = chain[-1]
        else:
            at = self._heads[(before * _BEFORE + last * _LAST & _WORD) >> self._shift]
        ends: list[int] = []
        for _ in range(2 * most):  # some are other tokens of the same slot
            if at < 1:  # at 0 no two tokens end
                break
            if tokens[at] == last and tokens[at - 1] == before:
                ends.append(at)
                if len(ends) == most:
                    break
            at = chain[at]
        return ends


def _number(tokens: array[int]) -> int:
    """Tokens as one number, the last in its highest bits, whatever the machine's order of bytes."""
    return int.from_bytes(tokens, "little")


class Trail:
    """The occurrences, in another text or in itself, of the end of a text that grows: they are looked up
    once, and followed for as long as any goes on as the text does. So one that has gone on longest is among
    them, unless `most` others were more recent when they were looked up.

    The text's length identifies its end: an occurrence is kept as the constant by which it lies before that,
    and the constant by which its match is shorter than the text.
    """

    __slots__ = ("_found", "_most", "index")

    def __init__(self, index: Text, most: int) -> None:
        self.index = index
        self._most = most
        self._found: list[tuple[int, int]] = []

    def follow(self, text: array[int], length: int, new: int) -> None:
        """The text, whose last tokens `text` has, has come to `length` tokens, the last `new` since it was
        told last. For an index's own text both are the index's tokens."""
        found = self._found
        if found:
            tokens, last = self.index.tokens, length - 1
            if new == 1:
                token = text[-1]
                found = [one for one in found if tokens[last - one[0]] == token]
            elif new:
                said = text[-new:]
                first = length - new
                found = [one for one in found if tokens[first - one[0] : length - one[0]] == said]
        if not found:
            looked_up = self.index.find(text, self._most)
            found = [(length - position, length - alike) for position, alike in looked_up]
        self._found = found

    def matches(self, length: int) -> list[tuple[int, int]]:
        """As `TokenIndex.find`, for the text's present length; a match that was followed may be longer."""
        return [(length - behind, length - shorter) for behind, shorter in self._found]
