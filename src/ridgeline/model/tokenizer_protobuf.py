"""SentencePiece's own model files, `tokenizer.model`: a protobuf message, of which a few fields are read.

The message is `ModelProto` of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto,
the encoding https://protobuf.dev/programming-guides/encoding/. Every length is checked against the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ridgeline.model.checkpoint.files import shown
from ridgeline.model.tokenizer_sentencepiece import Kind, Pieces, SpaceRules, checked_pieces, unknown_id
from ridgeline.types import CheckpointError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_BPE = 2

Value = int | bytes


@dataclass(slots=True)
class _Message:
    """A message's fields by number; of a field that stands several times, the last counts."""

    values: dict[int, Value] = field(default_factory=dict)

    def number(self, at: int, default: int) -> int:
        value = self.values.get(at, default)
        if not isinstance(value, int):
            raise ValueError(f"field {at} is not a number")
        # Negative numbers are written as their two's complement of 64 bits.
        return value - 2**64 if value >= 2**63 else value

    def content(self, at: int) -> bytes:
        value = self.values.get(at, b"")
        if not isinstance(value, bytes):
            raise ValueError(f"field {at} is not bytes")
        return value


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A model file's vocabulary and the ids of its special tokens, None for those it does not have."""

    pieces: Pieces
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


def read_sentencepiece_model(path: Path, content: bytes) -> SentencePieceModel:
    """The model in `content`, which is the file `tokenizer.model` of the folder `path`.

    Raises CheckpointError when it is damaged, or of a kind other than byte-pair encoding.
    """
    try:
        return _read_model(path, content)
    except (ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path}: tokenizer.model is not a whole SentencePiece model: {error}; "
            "accepted: one, or tokenizer.json"
        ) from None


def _read_model(path: Path, content: bytes) -> SentencePieceModel:
    texts: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    parts: dict[int, bytes] = {}
    for at, value in _fields(content):
        if not isinstance(value, bytes):
            continue
        if at != 1:
            parts[at] = value
            continue
        piece = _message(value)
        texts.append(piece.content(1).decode())
        scores.append(struct.unpack("<f", piece.content(2) or bytes(4))[0])
        kinds.append(piece.number(3, Kind.NORMAL))
    if not texts:
        raise ValueError("it has no pieces")
    trainer, normalizer = _message(parts.get(2, b"")), _message(parts.get(3, b""))
    _check_rules(path, trainer, normalizer)
    texts = checked_pieces(path, texts, scores, kinds)
    spaces = SpaceRules(bool(normalizer.number(3, 1)), bool(normalizer.number(4, 1)))

    def token(at: int, default: int) -> int | None:
        value = trainer.number(at, default)
        return value if 0 <= value < len(texts) else None

    unknown = unknown_id(kinds, token(40, 0))
    return SentencePieceModel(
        Pieces(texts, scores, kinds, spaces, unknown),
        bos_id=token(41, 1),
        eos_id=token(42, 2),
        pad_id=token(43, -1),
    )


def _check_rules(path: Path, trainer: _Message, normalizer: _Message) -> None:
    kind = trainer.number(3, 1)
    if kind != _BPE:
        raise CheckpointError(
            f"{path}: tokenizer.model is of type {_MODEL_TYPES.get(kind, str(kind))}; "
            "accepted: bpe, or a tokenizer.json beside it"
        )
    table = shown(normalizer.content(1).decode(errors="replace"))
    for what, found in (
        (f"the normalizer {table}", normalizer.content(2)),
        ("unescaped spaces", not normalizer.number(5, 1)),
        ("spaces after words", trainer.number(24, 0)),
    ):
        if found:
            raise CheckpointError(
                f"{path}: tokenizer.model has {what}; accepted: the identity normalizer with spaces before "
                "words, or a tokenizer.json beside it"
            )


# -------------------------------------------------------------------------------------------- wire


def _message(data: bytes) -> _Message:
    return _Message(dict(_fields(data)))


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a message: their numbers, and numbers or bytes. ValueError for what is none."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"byte {at} starts a field of kind {kind}")
        if length > len(data) - at:
            raise ValueError(f"a field of {length} bytes at byte {at} passes its end")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next field starts."""
    value = 0
    for index in range(10):
        if at + index >= len(data):
            raise ValueError("it ends inside a number")
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & (2**64 - 1), at + index + 1
    raise ValueError(f"the number at byte {at} is too long")
