"""Tokenizers from a Hugging Face folder: `tokenizer.json`, or SentencePiece's `tokenizer.model` where that is
all there is, and what the files beside it say of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ridgeline.model.checkpoint.files import parse_json_object, shown
from ridgeline.model.special_tokens import SpecialTokens, well_known_ends
from ridgeline.model.tokenizer_library import library_call
from ridgeline.model.tokenizer_protobuf import read_sentencepiece_model
from ridgeline.model.tokenizer_sentencepiece import build_piece_tokenizer
from ridgeline.types import CheckpointError

Sidecar = Callable[[str], bytes | None]


def read_folder_tokenizer(path: Path, sidecar: Sidecar) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    """The tokenizer of the folder `path`, whose files `sidecar` reads, and its special tokens.

    Raises CheckpointError when it has none, or one that is damaged or of a kind that is not read.
    """
    content = sidecar("tokenizer.json")
    if content is None:
        return _read_model(path, sidecar)
    with library_call(path, "tokenizer.json"):
        library = tokenizers.Tokenizer.from_buffer(content)
        # Some are saved with the settings of a training run; a prompt is never cut or padded.
        library.no_truncation()
        library.no_padding()
        return library, _special_tokens(path, sidecar, library, _Defaults(*_surroundings(library)))


def _read_model(path: Path, sidecar: Sidecar) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    content = sidecar("tokenizer.model")
    if content is None:
        raise CheckpointError(
            f"{path} has no tokenizer.json and no tokenizer.model; accepted: a folder with one, or a GGUF"
        )
    model = read_sentencepiece_model(path, content)
    library, _ = build_piece_tokenizer(path, model.pieces)
    _add_declared(path, sidecar, library)
    ids = {"bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id, "unk": model.pieces.unknown}
    prefix = () if model.bos_id is None else (model.bos_id,)
    return library, _special_tokens(path, sidecar, library, _Defaults(prefix, (), ids))


def _add_declared(path: Path, sidecar: Sidecar, library: tokenizers.Tokenizer) -> None:
    """The tokens that were added to a SentencePiece model later, which tokenizer_config.json lists by id."""
    listed = json_sidecar(path, sidecar, "tokenizer_config.json").get("added_tokens_decoder")
    if listed is None:
        older = json_sidecar(path, sidecar, "added_tokens.json")
        listed = {str(index): {"content": text} for text, index in older.items()}
    with library_call(path, "added_tokens_decoder"):
        tokens = sorted((int(index), dict(token)) for index, token in listed.items())
        for index, token in tokens:
            flags = {
                name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")
            }
            content = token["content"]
            known = library.token_to_id(content)
            expected = library.get_vocab_size() if known is None else known
            if index != expected:
                raise CheckpointError(
                    f"{path}: added token {shown(content)} has id {index}; accepted: {expected}"
                )
            library.add_tokens([AddedToken(content, normalized=False, **flags)])


def json_sidecar(path: Path, sidecar: Sidecar, name: str) -> Mapping[str, Any]:
    """The JSON object in a file beside the weights; empty when there is no such file."""
    content = sidecar(name)
    return {} if content is None else parse_json_object(content, path, name)


def token_ids(value: object) -> tuple[int, ...]:
    """The ids in a field that holds one token id or a list of them; a Boolean is none."""
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What the tokenizer itself says, before the files beside it: what it puts around a text, and roles."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    ids: Mapping[str, int | None] = field(default_factory=dict)


def _special_tokens(
    path: Path, sidecar: Sidecar, library: tokenizers.Tokenizer, defaults: _Defaults
) -> SpecialTokens:
    config = json_sidecar(path, sidecar, "tokenizer_config.json")
    model_files = [json_sidecar(path, sidecar, name) for name in ("generation_config.json", "config.json")]

    def ids_of(role: str) -> list[int]:
        """The tokenizer's own choice first. Ids outside the vocabulary, often defaults, are left out."""
        text = config.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        named = library.token_to_id(text) if isinstance(text, str) else None
        listed = [index for file in model_files for index in token_ids(file.get(f"{role}_token_id"))]
        own = defaults.ids.get(role)
        found = [*([] if named is None else [named]), *listed, *([] if own is None else [own])]
        return [index for index in found if 0 <= index < 2**32 and library.id_to_token(index) is not None]

    def first(ids: list[int]) -> int | None:
        return ids[0] if ids else None

    added = ((index, token.content) for index, token in library.get_added_tokens_decoder().items())
    bos, ends = first(ids_of("bos")), ids_of("eos")
    return SpecialTokens(
        bos_id=bos,
        eos_id=first(ends),
        pad_id=first(ids_of("pad")),
        unk_id=first(ids_of("unk")),
        end_ids=well_known_ends(added).union(ends),
        prefix=_chosen(defaults.prefix, bos, config.get("add_bos_token")),
        suffix=_chosen(defaults.suffix, first(ends), config.get("add_eos_token")),
    )


def _surroundings(library: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer's post-processor puts before and after a text, seen on a short one."""
    bare = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


def _chosen(found: tuple[int, ...], token: int | None, wanted: object) -> tuple[int, ...]:
    """The post-processor's tokens, unless tokenizer_config.json says otherwise of this one."""
    if token is None or not isinstance(wanted, bool) or wanted == (token in found):
        return found
    return (token, *found) if wanted else tuple(index for index in found if index != token)
