"""Tokenizers from a Hugging Face folder: `tokenizer.json`, and what the files beside it say of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from ridgeline.model.checkpoint.files import parse_json_object
from ridgeline.model.special_tokens import SpecialTokens, well_known_ends
from ridgeline.model.tokenizer_library import library_call
from ridgeline.types import CheckpointError

Sidecar = Callable[[str], bytes | None]


def read_json_tokenizer(path: Path, sidecar: Sidecar) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
    """The tokenizer of the folder `path`, whose files `sidecar` reads, and its special tokens.

    Raises CheckpointError when `tokenizer.json` is missing or damaged.
    """
    content = sidecar("tokenizer.json")
    if content is None:
        raise CheckpointError(f"{path} has no tokenizer.json; accepted: a folder with one, or a GGUF")
    with library_call(path, "tokenizer.json"):
        library = tokenizers.Tokenizer.from_buffer(content)
        # Some are saved with the settings of a training run; a prompt is never cut or padded.
        library.no_truncation()
        library.no_padding()
        return library, _special_tokens(path, sidecar, library)


def json_sidecar(path: Path, sidecar: Sidecar, name: str) -> Mapping[str, Any]:
    """The JSON object in a file beside the weights; empty when there is no such file."""
    content = sidecar(name)
    return {} if content is None else parse_json_object(content, path, name)


def token_ids(value: object) -> tuple[int, ...]:
    """The ids in a field that holds one token id or a list of them; a Boolean is none."""
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _special_tokens(path: Path, sidecar: Sidecar, library: tokenizers.Tokenizer) -> SpecialTokens:
    config = json_sidecar(path, sidecar, "tokenizer_config.json")
    model_files = [json_sidecar(path, sidecar, name) for name in ("generation_config.json", "config.json")]

    def ids_of(role: str) -> list[int]:
        """The tokenizer's own choice first. Ids outside the vocabulary, often defaults, are left out."""
        text = config.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        named = library.token_to_id(text) if isinstance(text, str) else None
        listed = [index for file in model_files for index in token_ids(file.get(f"{role}_token_id"))]
        found = listed if named is None else [named, *listed]
        return [index for index in found if 0 <= index < 2**32 and library.id_to_token(index) is not None]

    def first(ids: list[int]) -> int | None:
        return ids[0] if ids else None

    added = ((index, token.content) for index, token in library.get_added_tokens_decoder().items())
    bos, ends = first(ids_of("bos")), ids_of("eos")
    prefix, suffix = _surroundings(library)
    return SpecialTokens(
        bos_id=bos,
        eos_id=first(ends),
        pad_id=first(ids_of("pad")),
        unk_id=first(ids_of("unk")),
        end_ids=well_known_ends(added).union(ends),
        prefix=_chosen(prefix, bos, config.get("add_bos_token")),
        suffix=_chosen(suffix, first(ends), config.get("add_eos_token")),
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
