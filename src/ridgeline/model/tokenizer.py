"""Text to token ids and back, exactly as the model was trained.

The work is Hugging Face's `tokenizers`; this is about where a tokenizer comes from, and about what in a text
may become a control token. Text of a user never does: the texts of special tokens are plain characters in it
unless the caller asks otherwise (`parse_special`), as a chat template's own markup needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import AddedToken

from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.checkpoint.files import read_sidecar
from ridgeline.model.detokenizer import ByteDetokenizer, Detokenizer, TokenBytes, WindowDetokenizer
from ridgeline.model.special_tokens import SpecialTokens
from ridgeline.model.tokenizer_gguf import read_gguf_tokenizer
from ridgeline.model.tokenizer_json import read_folder_tokenizer
from ridgeline.types import CheckpointError, RequestError

__all__ = ["Detokenizer", "Tokenizer"]


_FILES = ("tokenizer.json", "tokenizer.model")


class TokenizerSource(Protocol):
    """What a tokenizer needs of a checkpoint."""

    @property
    def path(self) -> Path: ...
    @property
    def kind(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    def sidecar(self, name: str) -> bytes | None: ...


class Tokenizer:
    """A model's vocabulary. Safe to share between threads."""

    def __init__(self, library: tokenizers.Tokenizer, special: SpecialTokens) -> None:
        self._library = library
        self._roles = special
        self._added: dict[int, AddedToken] = library.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in self._added.items() if token.special)
        self.vocab_size: int = max(library.get_vocab_size(), max(self._added, default=-1) + 1)

    @staticmethod
    def from_checkpoint(checkpoint: TokenizerSource) -> Tokenizer:
        """The tokenizer that comes with a model. Raises CheckpointError when it is missing or damaged."""
        if checkpoint.kind == "gguf":
            return Tokenizer(*read_gguf_tokenizer(checkpoint.path, checkpoint.metadata))
        return Tokenizer(*read_folder_tokenizer(checkpoint.path, checkpoint.sidecar))

    @staticmethod
    def from_file(path: str | Path) -> Tokenizer:
        """The tokenizer in a `tokenizer.json` or `tokenizer.model`, in a folder with one, or in a GGUF, be it
        without tensors.

        Raises CheckpointError when there is none or it is damaged.
        """
        path = Path(path)
        folder = path.parent if path.name in _FILES else path
        if path.suffix in (".json", ".model") and path == folder:
            raise CheckpointError(
                f"{path} is not a tokenizer.json; accepted: one, a tokenizer.model, their folder, or a GGUF"
            )
        if any((folder / name).is_file() for name in _FILES):
            return Tokenizer(*read_folder_tokenizer(folder, lambda name: read_sidecar(folder, name)))
        with open_checkpoint(path) as checkpoint:
            return Tokenizer.from_checkpoint(checkpoint)

    # ---------------------------------------------------------------------------------- special tokens

    @property
    def bos_id(self) -> int | None:
        return self._roles.bos_id

    @property
    def eos_id(self) -> int | None:
        """The end token that the model's files name first; `eos_ids` has all that end an answer."""
        return self._roles.eos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._roles.end_ids

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """The texts of `bos_token`, `eos_token`, `pad_token` and `unk_token`, of those that the model has."""
        roles = self._roles
        ids = {"bos": roles.bos_id, "eos": roles.eos_id, "pad": roles.pad_id, "unk": roles.unk_id}
        return {f"{name}_token": self.token_text(index) for name, index in ids.items() if index is not None}

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts that become control tokens where special tokens are parsed, longest first."""
        return tuple(sorted((self._added[i].content for i in self.special_ids), key=len, reverse=True))

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for an id that it does not have."""
        return (self._library.id_to_token(token_id) if 0 <= token_id < 2**32 else None) or ""

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells so."""
        found: int | None = self._library.token_to_id(text)
        return found

    # -------------------------------------------------------------------------------------------- encode

    def encode(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        `parse_special` turns the texts of special tokens into those tokens; otherwise they are text like any
        other. `add_special` adds the begin (and end) token if this tokenizer does so, never a second one.
        Raises RequestError for text that is not Unicode (lone surrogates).
        """
        if parse_special:
            ids = _ids(self._library, text)
        else:
            library, renamed = self._plain
            ids = _renamed(_ids(library, text), renamed)
        if not add_special:
            return ids
        suffix = list(self._roles.suffix)
        return self.begun(ids) + ([] if suffix and ids[-len(suffix) :] == suffix else suffix)

    def begun(self, ids: list[int]) -> list[int]:
        """`ids` after the begin token, if this tokenizer adds one and it is not there already."""
        prefix = list(self._roles.prefix)
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def encode_masked(self, text: str, masks: Mapping[str, str]) -> list[int]:
        """Token ids of markup with masked text: special tokens are parsed, and each character in `masks`
        stands for the text that it maps to, which stays text whatever it looks like.

        Without masked characters this is `encode(text, parse_special=True)`.
        """
        if not any(mask in text for mask in masks):
            return self.encode(text, parse_special=True)
        flag = unused_character(text + "".join(masks) + "".join(masks.values()))
        flagged = self._flag_special(text, flag)
        library, renamed = _sibling(self._library, self._added, flag)
        return _renamed(
            _ids(library, flagged.translate({ord(mask): masked for mask, masked in masks.items()})), renamed
        )

    def _flag_special(self, text: str, flag: str) -> str:
        """`text` with `flag` before each special token that the tokenizer finds in it."""
        found = _encoding(self._library, text)
        pieces, done = [], 0
        for token_id, (start, end) in zip(found.ids, found.offsets, strict=True):
            span = text[start:end]
            # An unknown character also gives a special token, but does not spell it.
            if token_id in self.special_ids and span.strip() == self._added[token_id].content.strip():
                at = start + span.index(self._added[token_id].content)
                pieces += [text[done:at], flag]
                done = at
        return "".join([*pieces, text[done:]])

    @cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, Mapping[int, int]]:
        return _sibling(self._library, self._added, None)

    # -------------------------------------------------------------------------------------------- decode

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        if self._token_bytes is None:
            known = [index for index in ids if 0 <= index < 2**32]
            text: str = self._library.decode(known, skip_special_tokens=skip_special)
            return text
        stream = self.detokenizer(skip_special)
        pieces = [stream.push(index) for index in ids]
        return "".join(pieces) + stream.finish()

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        """A stream of text for one sequence of tokens."""
        skipped = self.special_ids if skip_special else frozenset[int]()
        if self._token_bytes is None:
            return WindowDetokenizer(self._library, skipped)
        return ByteDetokenizer(self._token_bytes, skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, part of a character included; none for an unknown id."""
        if self._token_bytes is None:
            return self.decode([token_id], skip_special=False).encode()
        return self._token_bytes(token_id)

    @property
    def is_bytewise(self) -> bool:
        """Whether each token stands for bytes of its own, whatever its neighbours are."""
        return self._token_bytes is not None

    @cached_property
    def _token_bytes(self) -> TokenBytes | None:
        return TokenBytes.of(self._library)


# Noncharacters and private-use characters: never in a vocabulary's words, hardly ever in a text.
_SPARE = (range(0xFDD0, 0xFDF0), range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))


def unused_character(text: str) -> str:
    """A character that is not in `text` and means nothing. RequestError when the text has used them all."""
    used = set(text)
    for spare in _SPARE:
        for code in spare:
            if chr(code) not in used:
                return chr(code)
    raise RequestError("text uses every private-use character; accepted: text that leaves one unused")


_LONG = 10_000
"""Characters from which on a text is encoded as a batch of one."""


def _encoding(library: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        if isinstance(text, str) and len(text) > _LONG:
            # Only for batches does the library let Python's other threads go on meanwhile.
            return library.encode_batch([text], add_special_tokens=False)[0]
        return library.encode(text, add_special_tokens=False)
    except TypeError:
        # Also the library's word for a string that UTF-8 cannot hold.
        if not isinstance(text, str):
            raise
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
    raise RequestError(f"text has a lone surrogate at character {at}; accepted: text that is valid Unicode")


def _ids(library: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = _encoding(library, text).ids
    return ids


def _sibling(
    library: tokenizers.Tokenizer, added: Mapping[int, AddedToken], flag: str | None
) -> tuple[tokenizers.Tokenizer, Mapping[int, int]]:
    """A tokenizer over the same model that does not find special tokens (flag None), or only where `flag`
    stands before them; and the ids to replace in what it gives.

    The library could skip special tokens itself (`encode_special_tokens`), but then it also misses an
    ordinary added token that overlaps the text of a special one.
    """
    sibling = tokenizers.Tokenizer(library.model)
    if library.normalizer is not None:
        sibling.normalizer = library.normalizer
    if library.pre_tokenizer is not None:
        sibling.pre_tokenizer = library.pre_tokenizer
    wanted = {}
    for index, token in sorted(added.items()):
        if not token.special:
            wanted[index] = token
        elif flag is not None:
            wanted[index] = AddedToken(
                flag + token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=True,
            )
    sibling.add_tokens(list(wanted.values()))
    pairs = ((sibling.token_to_id(token.content), index) for index, token in wanted.items())
    return sibling, {theirs: ours for theirs, ours in pairs if theirs is not None and theirs != ours}


def _renamed(ids: list[int], renamed: Mapping[int, int]) -> list[int]:
    return [renamed.get(index, index) for index in ids] if renamed else ids
