"""SentencePiece's byte-pair vocabularies: pieces with scores, spaces as "▁", unknown characters as bytes.

Llama 2, Mistral, Phi-3 and Gemma have such ones. The merging is left to the `tokenizers` library wherever a
list of merges says the same as the scores, which is so for every vocabulary that was trained.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ridgeline.model.checkpoint.files import shown
from ridgeline.model.special_tokens import END_TOKENS
from ridgeline.model.tokenizer_cutting import PieceCutter
from ridgeline.model.tokenizer_library import library_call
from ridgeline.types import CheckpointError

WORD_START = "▁"
# SentencePiece's own limit is 16 unless told otherwise; the longest in use are runs of some 30 spaces.
_LONGEST_PIECE = 512


class Kind(IntEnum):
    """What a token is; GGUF and SentencePiece number them alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class SpaceRules:
    """`prefix` puts a space before the text, and before what follows a special or user-defined token;
    `collapse` first makes one space of several and none of those at both ends."""

    prefix: bool = True
    collapse: bool = False


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary, checked. `texts` are unique; user-defined ones are written with plain spaces.

    With `merges` (pairs in the order of their rank) the scores are not used. `stripped` are the special
    tokens that take the spaces after them.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    spaces: SpaceRules
    unknown: int | None = None
    merges: Sequence[tuple[str, str]] | None = None
    stripped: frozenset[str] = frozenset()


def checked_pieces(
    path: Path, texts: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[str]:
    """`texts` as `Pieces` wants them. Raises CheckpointError for a vocabulary that cannot be one."""
    for what, values in (("score", scores), ("type", kinds)):
        if len(values) != len(texts):
            raise CheckpointError(
                f"{path}: the vocabulary has {len(values)} {what}s for {len(texts)} tokens; accepted: as many"
            )
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(f"{path}: the vocabulary has a score that is not finite; accepted: numbers")
    longest = max(texts, key=len, default="")
    if len(longest) > _LONGEST_PIECE:
        raise CheckpointError(
            f"{path}: token {shown(longest)} has {len(longest)} characters; accepted: up to {_LONGEST_PIECE}"
        )
    counts = Counter(texts)
    if len(counts) != len(texts):
        twice = next(text for text, count in counts.items() if count > 1)
        raise CheckpointError(f"{path}: token {shown(twice)} stands twice; accepted: unique tokens")
    plain = (text.replace(WORD_START, " ") for text in texts)
    return [
        spaced if kind == Kind.USER_DEFINED and spaced not in counts else text
        for text, spaced, kind in zip(texts, plain, kinds, strict=True)
    ]


def build_piece_tokenizer(path: Path, pieces: Pieces) -> tuple[tokenizers.Tokenizer, bool]:
    """The library's tokenizer, and whether it can be written to a tokenizer.json.

    Raises CheckpointError when an unknown character could become neither bytes nor the unknown token.
    """
    vocabulary = {text: index for index, text in enumerate(pieces.texts)}
    unknown = None if pieces.unknown is None else pieces.texts[pieces.unknown]
    if unknown is None and not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        raise CheckpointError(
            f"{path}: the vocabulary has no unknown token and not all 256 bytes; accepted: one of the two"
        )
    with library_call(path, "the vocabulary"):
        cutter, merges = None, pieces.merges
        if merges is None:
            scores = _scores(pieces)
            cutter = _cutter(pieces, scores)
            merges = [] if cutter else _merges(scores)
        library = tokenizers.Tokenizer(
            models.BPE(
                vocabulary,
                list(merges),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=True,
                ignore_merges=cutter is not None,
            )
        )
        library.normalizer = _normalizer(pieces.spaces)
        if cutter is not None:
            library.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(cutter)
        library.decoder = _decoder(pieces.spaces)
        library.add_tokens(_added_tokens(pieces))
    return library, cutter is None


def _scores(pieces: Pieces) -> dict[str, float]:
    """The pieces that characters of a text may merge to. What is found whole, or is a byte, is not merged."""
    usable = {int(Kind.NORMAL), int(Kind.UNUSED)}
    return {
        text: score
        for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True)
        if kind in usable and text not in END_TOKENS
    }


def _cutter(pieces: Pieces, scores: Mapping[str, float]) -> PieceCutter | None:
    """None where merges in the order of their scores give the same."""
    longer = [text for text in scores if len(text) > 1]
    unused = frozenset(
        text for text, kind in zip(pieces.texts, pieces.kinds, strict=True) if kind == Kind.UNUSED
    )
    ranked = len({scores[text] for text in longer}) == len(longer)
    # A character without a piece of its own can be part of a merge only where scores alone decide.
    if ranked and set("".join(longer)) <= scores.keys() and not unused & scores.keys() & set(longer):
        return None
    return PieceCutter(scores, unused, frozenset(pieces.texts) - scores.keys())


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, the best score first."""
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    return [
        (left, right)
        for text in ranked
        for at in range(len(text) - 1, 0, -1)
        if (left := text[:at]) in scores and (right := text[at:]) in scores
    ]


def _normalizer(spaces: SpaceRules) -> Any:
    steps: list[Any] = []
    if spaces.collapse:
        steps.append(normalizers.Replace(Regex(r"\A +|[ ▁]+\z| +(?= )"), ""))
    if spaces.prefix:
        steps.append(normalizers.Prepend(WORD_START))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", WORD_START)])


def _decoder(spaces: SpaceRules) -> Any:
    steps: list[Any] = [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spaces.prefix else steps)


def _added_tokens(pieces: Pieces) -> list[AddedToken]:
    found = []
    for text, kind in zip(pieces.texts, pieces.kinds, strict=True):
        special = kind in (Kind.CONTROL, Kind.UNKNOWN) or text in END_TOKENS
        if text and (special or kind == Kind.USER_DEFINED):
            stripped = text in pieces.stripped
            found.append(AddedToken(text, special=special, normalized=False, rstrip=stripped))
    return found


def stripped_tokens(name: object, texts: Sequence[str], kinds: Sequence[int]) -> frozenset[str]:
    """The tokens of a GGUF that take the spaces after them, which only the model's name tells: Phi-3's."""
    lowered = name.lower() if isinstance(name, str) else ""
    if "phi-3" not in lowered and "phi3" not in lowered:
        return frozenset()
    whole = (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
    found = {text for text, kind in zip(texts, kinds, strict=True) if kind in whole}
    return frozenset(found | {"</s>"}) - {"<unk>", "<s>", "<|endoftext|>"}


def unknown_id(kinds: Sequence[int], named: int | None) -> int | None:
    """The unknown token: the one that is named, else the first of that kind."""
    if named is not None and 0 <= named < len(kinds):
        return named
    return next((index for index, kind in enumerate(kinds) if kind == Kind.UNKNOWN), None)
