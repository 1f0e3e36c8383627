"""Byte-level BPE tokenizers from the vocabulary that a GGUF carries.

`tokenizer.ggml.model` names the kind of vocabulary and `tokenizer.ggml.pre` the rules by which text is cut
into words before any merge (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A built tokenizer is
kept in the user's cache, because reading it back takes less than decoding the arrays and building it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ridgeline.model.checkpoint.files import shown
from ridgeline.model.special_tokens import END_TOKENS, SpecialTokens, well_known_ends
from ridgeline.model.tokenizer_library import library_call
from ridgeline.resources.paths import cache_dir, write_atomic
from ridgeline.types import CapacityError, CheckpointError

Metadata = Mapping[str, Any]

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


@dataclass(frozen=True, slots=True)
class WordRules:
    """How `tokenizer.ggml.pre` cuts text: each expression isolates its matches in what the one before left.

    `ignore_merges` takes a word that is itself a token whole; `nfc` normalises the text first; `add_bos`
    holds where the file does not say.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _gpt4(digits: str) -> str:
    """The word pattern of cl100k and its descendants, which differ in how many digits they keep together."""
    return (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_DEFAULT = WordRules((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_PLAIN_GPT2 = WordRules((_GPT2,))
_SINGLE_DIGITS = WordRules((r"\p{N}", _GPT2))
_LLAMA3 = WordRules((_gpt4("{1,3}"),), ignore_merges=True, add_bos=True)

# A vocabulary without a name is cut as "default", llama.cpp's guess for files from before names were given.
WORD_RULES: Mapping[str, WordRules] = {
    "default": _DEFAULT,
    "gpt-2": _PLAIN_GPT2,
    "phi-2": _PLAIN_GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": WordRules((_gpt4(""),), nfc=True),
}


def read_gguf_tokenizer(path: Path, metadata: Metadata) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    """The tokenizer of a GGUF and its special tokens.

    Raises CheckpointError when there is no vocabulary, when it is damaged or of a kind that is not read.
    """
    rules = _word_rules(path, metadata)
    cached = _CachedTokenizer.of(path)
    library = cached.load() if cached else None
    if library is None:
        library = _build(path, metadata, rules)
        if cached:
            cached.store(library)
    return library, _special_tokens(path, metadata, library, rules)


def _word_rules(path: Path, metadata: Metadata) -> WordRules:
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise CheckpointError(f"{path} has no vocabulary; accepted: a GGUF with tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(
            f"{path}: the vocabulary's kind, tokenizer.ggml.model, is {shown(model)}; "
            "accepted: 'gpt2' (byte-level BPE), or a folder with tokenizer.json"
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    rules = WORD_RULES.get(name) if isinstance(name, str) else None
    if rules is None:
        raise CheckpointError(
            f"{path}: the vocabulary's word rules, tokenizer.ggml.pre, are {shown(name)}; "
            f"accepted: {', '.join(WORD_RULES)}"
        )
    return rules


# -------------------------------------------------------------------------------------------- build


def _build(path: Path, metadata: Metadata, rules: WordRules) -> tokenizers.Tokenizer:
    tokens = _strings(path, metadata, "tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise CheckpointError(f"{path}: token {shown(twice)} stands twice; accepted: unique tokens")
    with library_call(path, "the vocabulary"):
        merges = _merges(path, metadata)
        library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rules.ignore_merges))
        if rules.nfc:
            library.normalizer = normalizers.NFC()
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(expression), "isolated") for expression in rules.expressions]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        library.decoder = decoders.ByteLevel()
        library.add_tokens(_added_tokens(path, metadata, tokens))
    return library


def _strings(path: Path, metadata: Metadata, key: str) -> Sequence[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{path}: {key} is missing or not a list of strings; accepted: such a list")
    return values


def _merges(path: Path, metadata: Metadata) -> list[tuple[str, str]]:
    """Pairs in the order of their rank. A part may itself begin with a space, never hold one further on."""
    pairs = []
    for merge in _strings(path, metadata, "tokenizer.ggml.merges"):
        at = merge.find(" ", 1)
        if at < 0:
            raise CheckpointError(f"{path}: merge {shown(merge)} is not two parts with a space between them")
        pairs.append((merge[:at], merge[at + 1 :]))
    return pairs


def _added_tokens(path: Path, metadata: Metadata, tokens: Sequence[str]) -> list[AddedToken]:
    """Tokens that are found in text whole. Control tokens are special; so are the well-known ends of an
    answer, which some files list as ordinary tokens."""
    key = "tokenizer.ggml.token_type"
    types = metadata.get(key, [])
    if key in metadata and (not isinstance(types, list) or len(types) != len(tokens)):
        raise CheckpointError(f"{path}: {key} does not list a type for each of the {len(tokens)} tokens")
    special = {index for index, kind in enumerate(types) if kind in (_CONTROL, _UNKNOWN)}
    special |= {index for index, token in enumerate(tokens) if token in END_TOKENS}
    if not types:
        named = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom"))
        special |= {index for index in named if isinstance(index, int) and 0 <= index < len(tokens)}
    defined = {index for index, kind in enumerate(types) if kind == _USER_DEFINED} - special
    return [
        AddedToken(tokens[index], special=index in special, normalized=False)
        for index in sorted(special | defined)
        if tokens[index]
    ]


# ---------------------------------------------------------------------------------------- meanings


def _special_tokens(
    path: Path, metadata: Metadata, library: tokenizers.Tokenizer, rules: WordRules
) -> SpecialTokens:
    size = library.get_vocab_size()
    roles = ("bos", "eos", "eot", "eom", "padding", "unknown")
    ids = {name: _token_id(path, metadata, name, size) for name in roles}
    named = [ids[name] for name in ("eos", "eot", "eom")]
    added = ((index, token.content) for index, token in library.get_added_tokens_decoder().items())
    bos, eos = ids["bos"], ids["eos"]
    return SpecialTokens(
        bos_id=bos,
        eos_id=eos,
        pad_id=ids["padding"],
        unk_id=ids["unknown"],
        end_ids=well_known_ends(added) | {index for index in named if index is not None},
        prefix=(bos,) if bos is not None and _flag(path, metadata, "add_bos_token", rules.add_bos) else (),
        suffix=(eos,) if eos is not None and _flag(path, metadata, "add_eos_token", False) else (),
    )


def _token_id(path: Path, metadata: Metadata, name: str, size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    # Converters write all ones for a token that the model does not have.
    if value is None or value == 2**32 - 1:
        return None
    if not isinstance(value, int) or not 0 <= value < size:
        raise CheckpointError(f"{path}: {key} is {shown(value)}; accepted: token ids 0 to {size - 1}")
    return value


def _flag(path: Path, metadata: Metadata, name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: tokenizer.ggml.{name} is {shown(value)}; accepted: a boolean")
    return value


# -------------------------------------------------------------------------------------------- cache

# Part of every cached file's name: raise it when the same GGUF builds another tokenizer than before.
_FORMAT = 1
_KEPT_FILES = 32
_HEADER_BYTES = 65
# A file changed this recently could change again without its time of change moving.
_SETTLED_S = 2.0


@dataclass(frozen=True, slots=True)
class _CachedTokenizer:
    """A tokenizer.json with its SHA-256 before it, named after the identity of the GGUF it was built from."""

    file: Path

    @staticmethod
    def of(source: Path) -> _CachedTokenizer | None:
        """Where the tokenizer of `source` is kept; None if that is too new to be told from the next."""
        try:
            real = source.resolve(strict=True)
            status = real.stat()
        except OSError:
            return None
        if time.time() - status.st_mtime < _SETTLED_S:
            return None
        identity = (
            _FORMAT, tokenizers.__version__, str(real),
            status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev,
        )  # fmt: skip
        name = hashlib.sha256(repr(identity).encode("utf-8", "surrogateescape")).hexdigest()
        return _CachedTokenizer(cache_dir() / "tokenizers" / f"{name}.json")

    def load(self) -> tokenizers.Tokenizer | None:
        """None when it is not there, or is not what was stored."""
        try:
            content = self.file.read_bytes()
        except OSError:
            return None
        payload = content[_HEADER_BYTES:]
        if content[:_HEADER_BYTES] != _header(payload):
            return None
        with suppress(CheckpointError), library_call(self.file, "the cached tokenizer"):
            return tokenizers.Tokenizer.from_buffer(payload)
        return None

    def store(self, library: tokenizers.Tokenizer) -> None:
        """Keep it for the next start. A cache that cannot be written to costs time, nothing else."""
        payload = _fast_json(library)
        with suppress(CapacityError, OSError):
            write_atomic(self.file, _header(payload) + payload)
            entries = self.file.parent.glob("*.json")
            kept = sorted(entries, key=lambda entry: entry.stat().st_mtime, reverse=True)
            for old in kept[_KEPT_FILES:]:
                old.unlink(missing_ok=True)


def _header(payload: bytes) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode() + b"\n"


def _fast_json(library: tokenizers.Tokenizer) -> bytes:
    """The tokenizer.json with merges as "left right", which the library reads a third faster than pairs."""
    described = json.loads(library.to_str())
    merges = described["model"]["merges"]
    if not any(" " in part for pair in merges for part in pair):
        described["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
