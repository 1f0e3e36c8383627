"""Tokenizers from the vocabulary that a GGUF carries.

`tokenizer.ggml.model` names the kind of vocabulary and, for byte-level ones, `tokenizer.ggml.pre` the rules
by which text is cut into words (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A built tokenizer
is kept in the user's cache, because reading it back takes less than decoding the arrays and building it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ridgeline.model.checkpoint.files import shown
from ridgeline.model.special_tokens import END_TOKENS, SpecialTokens, well_known_ends
from ridgeline.model.tokenizer_cache import CachedTokenizer
from ridgeline.model.tokenizer_library import library_call
from ridgeline.model.tokenizer_sentencepiece import (
    Kind,
    Pieces,
    SpaceRules,
    build_piece_tokenizer,
    checked_pieces,
    stripped_tokens,
    unknown_id,
)
from ridgeline.model.tokenizer_words import WORD_RULES, WordRules
from ridgeline.types import CheckpointError

Metadata = Mapping[str, Any]


def read_gguf_tokenizer(path: Path, metadata: Metadata) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    """The tokenizer of a GGUF and its special tokens.

    Raises CheckpointError when there is no vocabulary, when it is damaged or of a kind that is not read.
    """
    kind, rules = _kind(path, metadata)
    cached = CachedTokenizer.of(path)
    library = cached.load() if cached else None
    if library is None:
        library, lasting = _build(path, metadata, kind, rules)
        if cached and lasting:
            cached.store(library)
    return library, _special_tokens(path, metadata, library, kind, rules)


class _Kind(Enum):
    """The kinds of vocabulary: what characters tokens are made of, and what says how they merge."""

    BYTES = "gpt2"
    SCORED_PIECES = "llama"
    MERGED_PIECES = "gemma4"


# Word rules under which a "gpt2" vocabulary is of pieces all the same.
_RULES_OF_PIECES = ("gemma4", "sarvam-moe")


def _kind(path: Path, metadata: Metadata) -> tuple[_Kind, WordRules]:
    """Rules are empty where text is not cut into words."""
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise CheckpointError(f"{path} has no vocabulary; accepted: a GGUF with tokenizer.ggml.model")
    if model in (_Kind.SCORED_PIECES.value, _Kind.MERGED_PIECES.value):
        return _Kind(model), WordRules((), add_bos=True)
    if model != _Kind.BYTES.value:
        raise CheckpointError(
            f"{path}: the vocabulary's kind, tokenizer.ggml.model, is {shown(model)}; accepted: 'gpt2' "
            "(byte-level BPE), 'llama' (SentencePiece BPE), 'gemma4', or a folder with tokenizer.json"
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name in _RULES_OF_PIECES:
        return _Kind.MERGED_PIECES, WordRules((), add_bos=name == "gemma4")
    rules = WORD_RULES.get(name) if isinstance(name, str) else None
    if rules is None:
        accepted = ", ".join(sorted([*WORD_RULES, *_RULES_OF_PIECES]))
        raise CheckpointError(
            f"{path}: the vocabulary's word rules, tokenizer.ggml.pre, are {shown(name)}; "
            f"accepted: {accepted}"
        )
    return _Kind.BYTES, rules


# -------------------------------------------------------------------------------------------- build


def _build(
    path: Path, metadata: Metadata, kind: _Kind, rules: WordRules
) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether it can be written to a tokenizer.json."""
    tokens = _strings(path, metadata, "tokenizer.ggml.tokens")
    if kind is not _Kind.BYTES:
        return build_piece_tokenizer(path, _pieces(path, metadata, kind, tokens))
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
    return library, True


def _pieces(path: Path, metadata: Metadata, kind: _Kind, tokens: Sequence[str]) -> Pieces:
    kinds = _token_types(path, metadata, len(tokens)) or [_guessed_type(token) for token in tokens]
    scored = kind is _Kind.SCORED_PIECES
    scores = _scores(path, metadata) if scored else [0.0] * len(tokens)
    texts = checked_pieces(path, tokens, scores, kinds)
    named = _token_id(path, metadata, "unknown", len(tokens))
    spaces = SpaceRules(
        _flag(path, metadata, "add_space_prefix", scored),
        _flag(path, metadata, "remove_extra_whitespaces", False),
    )
    return Pieces(
        texts,
        scores,
        kinds,
        spaces,
        unknown_id(kinds, named),
        None if scored else _merges(path, metadata),
        stripped_tokens(metadata.get("general.name"), texts, kinds) if scored else frozenset(),
    )


def _guessed_type(token: str) -> int:
    """The type of a token in a file that has no types."""
    if token == "<unk>":
        return Kind.UNKNOWN
    if token in ("<s>", "</s>", "<bos>", "<eos>", "<pad>"):
        return Kind.CONTROL
    return Kind.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else Kind.NORMAL


def _scores(path: Path, metadata: Metadata) -> list[float]:
    values = metadata.get("tokenizer.ggml.scores")
    if not isinstance(values, list) or not all(type(value) in (float, int) for value in values):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.scores is missing or not a list of numbers; accepted: one for each token"
        )
    return [float(value) for value in values]


def _token_types(path: Path, metadata: Metadata, count: int) -> list[int]:
    """One for each token, or none at all."""
    key = "tokenizer.ggml.token_type"
    types = metadata.get(key, [])
    if key in metadata and (not isinstance(types, list) or len(types) != count):
        raise CheckpointError(f"{path}: {key} does not list a type for each of the {count} tokens")
    return list(types)


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
    types = _token_types(path, metadata, len(tokens))
    special = {index for index, kind in enumerate(types) if kind in (Kind.CONTROL, Kind.UNKNOWN)}
    special |= {index for index, token in enumerate(tokens) if token in END_TOKENS}
    if not types:
        named = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom"))
        special |= {index for index in named if isinstance(index, int) and 0 <= index < len(tokens)}
    defined = {index for index, kind in enumerate(types) if kind == Kind.USER_DEFINED} - special
    return [
        AddedToken(tokens[index], special=index in special, normalized=False)
        for index in sorted(special | defined)
        if tokens[index]
    ]


# ---------------------------------------------------------------------------------------- meanings


def _special_tokens(
    path: Path, metadata: Metadata, library: tokenizers.Tokenizer, kind: _Kind, rules: WordRules
) -> SpecialTokens:
    size = library.get_vocab_size()
    roles = ("bos", "eos", "eot", "eom", "padding", "unknown")
    ids = {name: _token_id(path, metadata, name, size) for name in roles}
    named = [ids[name] for name in ("eos", "eot", "eom")]
    added = ((index, token.content) for index, token in library.get_added_tokens_decoder().items())
    bos, eos = ids["bos"], ids["eos"]
    adds_bos = _flag(path, metadata, "add_bos_token", rules.add_bos)
    # Gemma 4's first files say no, but the model was trained with it.
    adds_bos = adds_bos or (kind is _Kind.MERGED_PIECES and rules.add_bos)
    return SpecialTokens(
        bos_id=bos,
        eos_id=eos,
        pad_id=ids["padding"],
        unk_id=ids["unknown"],
        end_ids=well_known_ends(added) | {index for index in named if index is not None},
        prefix=(bos,) if bos is not None and adds_bos else (),
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
