"""Token ids back to text, whole or token by token as they are sampled.

Most vocabularies map each token to bytes, whatever its neighbours are: text is then the UTF-8 reading of the
bytes, in which what is not UTF-8 becomes U+FFFD: one for each beginning of a character that is cut short, and
one for each byte where bytes are tokens of their own, as SentencePiece has it. Other decoders (WordPiece and
such) are asked for the text of a short window instead.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from typing import Any, Protocol, Self

import tokenizers

_WORD_START = "▁"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else a character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("ridgeline.each_byte", _each_byte)


class TokenBytes:
    """The bytes of each token, for the decoders that map tokens to bytes one by one.

    `leading_spaces` is how many spaces are taken off the start of the text; `bare_start` says that the first
    token loses its word starts.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, byte_level: bool, fallback: bool, spaces: int, bare: bool
    ) -> None:
        self.leading_spaces = spaces
        self.bare_start = bare
        self._library = library
        self._byte_level = byte_level
        self._fallback = fallback
        self._added = frozenset(library.get_added_tokens_decoder()) if byte_level else frozenset[int]()
        self._known: dict[int, bytes] = {}
        self.errors = "ridgeline.each_byte" if fallback else "replace"

    @staticmethod
    def of(library: tokenizers.Tokenizer) -> TokenBytes | None:
        """None when the tokenizer's decoder is not such a mapping."""
        if library.decoder is None:
            return None
        decoder = json.loads(library.decoder.__getstate__())
        if decoder["type"] == "ByteLevel":
            return TokenBytes(library, True, False, 0, False)
        if decoder["type"] == "Metaspace" and decoder["replacement"] == _WORD_START:
            return TokenBytes(library, False, False, 0, decoder["prepend_scheme"] != "never")
        if decoder["type"] == "Sequence":
            return TokenBytes._of_pieces(library, decoder["decoders"])
        return None

    @staticmethod
    def _of_pieces(library: tokenizers.Tokenizer, steps: list[Mapping[str, Any]]) -> TokenBytes | None:
        """SentencePiece's rules as converters write them: word starts to spaces, <0x0A> to bytes, and perhaps
        one space less at the start."""
        types = [step["type"] for step in steps]
        replace = {"type": "Replace", "pattern": {"String": _WORD_START}, "content": " "}
        if not steps or steps[0] != replace or types[1:3] != ["ByteFallback", "Fuse"]:
            return None
        if types[3:] == []:
            return TokenBytes(library, False, True, 0, False)
        strip = steps[3]
        if types[3:] != ["Strip"] or strip["content"] != " " or strip["stop"]:
            return None
        return TokenBytes(library, False, True, strip["start"], False)

    def __call__(self, token_id: int) -> bytes:
        """The token's bytes; none for an id that the vocabulary does not have."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._read(token_id)
        return found

    def first(self, token_id: int) -> bytes:
        """The token's bytes where it opens the text."""
        return self._read(token_id, "") if self.bare_start else self(token_id)

    def _read(self, token_id: int, space: str = " ") -> bytes:
        text = self._library.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if text is None:
            return b""
        if token_id in self._added:
            return text.encode()
        if self._byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in text)
            except KeyError:
                return text.encode()
        if self._fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes.fromhex(text[3:5])
            except ValueError:
                return text.encode()
        return text.replace(_WORD_START, space).encode()


class Detokenizer(Protocol):
    """Text of one growing sequence. All pieces together are what decoding all tokens at once gives."""

    def push(self, token_id: int) -> str:
        """The text that this token completes, often none, never half a character."""
        ...

    def finish(self) -> str:
        """What was held back: a character that never became whole, as U+FFFD. Nothing may follow."""
        ...

    def copy(self) -> Self:
        """Another one with the same tokens before it."""
        ...


class ByteDetokenizer:
    """For vocabularies of bytes: each token costs the same, however long the text has grown."""

    def __init__(self, token_bytes: TokenBytes, skipped: frozenset[int]) -> None:
        self._bytes = token_bytes
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(token_bytes.errors)
        self._spaces = token_bytes.leading_spaces
        self._started = False

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        data = self._bytes(token_id) if self._started else self._bytes.first(token_id)
        self._started = True
        return self._without_start(self._utf8.decode(data))

    def finish(self) -> str:
        return self._without_start(self._utf8.decode(b"", final=True))

    def copy(self) -> Self:
        other = type(self)(self._bytes, self._skipped)
        other._utf8.setstate(self._utf8.getstate())
        other._spaces, other._started = self._spaces, self._started
        return other

    def _without_start(self, text: str) -> str:
        while self._spaces and text:
            if text[0] != " ":
                self._spaces = 0
                break
            self._spaces -= 1
            text = text[1:]
        return text


class WindowDetokenizer:
    """For other decoders: a token's text is what it adds to that of the few tokens before it."""

    def __init__(self, library: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        self._library = library
        self._skipped = skipped
        self._window: list[int] = []
        self._given = 0  # how many of the window's tokens, its first, have had their text given out
        self._text = ""  # the text of those

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or token_id < 0:
            return ""
        self._window.append(token_id)
        text = self._decode()
        # A trailing U+FFFD may be the start of a character that the next token completes.
        if len(text) <= len(self._text) or text.endswith("\ufffd"):
            return ""
        return self._give(text)

    def finish(self) -> str:
        return self._give(self._decode())

    def copy(self) -> Self:
        other = type(self)(self._library, self._skipped)
        other._window, other._given, other._text = [*self._window], self._given, self._text
        return other

    def _give(self, text: str) -> str:
        piece = text[len(self._text) :]
        self._window = self._window[self._given :]
        self._given = len(self._window)
        self._text = self._decode()
        return piece

    def _decode(self) -> str:
        return self._library.decode(self._window, skip_special_tokens=False)
