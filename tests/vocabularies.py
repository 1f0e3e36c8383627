"""Small vocabularies for tests: trained here with `tokenizers`, and the same ones inside GGUF files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEFINED = ("<tool>", "im_")
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SENTENCES = (
    "The sky is blue because air scatters short waves of light more than long ones.",
    "user assistant system content <|im_start|> it's we'll they're I'd 1234567890 2026 3.14",
    "Grüße aus Köln, naïve café, señor, Ærøskøbing, 東京の空は青い。 Привет, мир! 🌈🌍 été",
    "def f(x):\n    return x ** 2 + 1\n\n\tfor i in range(10):\r\n        print(i)\n",
)
# The rules of each kind as Hugging Face's own tokenizer files state them.
ORACLE_WORDS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


@cache
def trained(pre: str = "smollm") -> tokenizers.Tokenizer:
    """A byte-level BPE of some 500 tokens with control tokens first; nothing is registered as added."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    library.pre_tokenizer = pre_tokenizers.Sequence(ORACLE_WORDS[pre])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(CONTROLS + DEFINED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_SENTENCES * 4, trainer)
    described = json.loads(library.to_str())
    described["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def oracle(pre: str = "smollm", special: bool = True) -> tokenizers.Tokenizer:
    """`trained` with its defined tokens registered, and its control tokens too if `special`."""
    library = tokenizers.Tokenizer.from_str(trained(pre).to_str())
    library.add_tokens([AddedToken(text, special=False, normalized=False) for text in DEFINED])
    if special:
        library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROLS])
    return library


def vocabulary_keys(pre: str = "smollm") -> dict[str, Any]:
    """The GGUF keys of `trained`."""
    model = json.loads(trained(pre).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = {**dict.fromkeys(CONTROLS, 3), **dict.fromkeys(DEFINED, 4)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }


def write_gguf(path: Path, keys: dict[str, Any], age_s: float = 60.0) -> Path:
    """A GGUF with these keys, no tensors, last changed `age_s` ago. Keys of None are left out."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    changed = path.stat().st_mtime - age_s
    os.utime(path, (changed, changed))
    return path


def write_folder(folder: Path, library: tokenizers.Tokenizer, **files: Any) -> Path:
    """A folder with tokenizer.json and other JSON files, named without their suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def ids_of(library: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: Sequence[int] = library.encode(text, add_special_tokens=False).ids
    return list(ids)
