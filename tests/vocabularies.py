"""Small vocabularies for tests: trained here with `tokenizers`, and the same ones inside GGUF files."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
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
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ],
    "deepseek-coder": [
        pre_tokenizers.Split(Regex("[\r\n]"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?\p{P}+"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "bloom": [
        pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "gpt-4o": [
        pre_tokenizers.Split(
            Regex(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "tekken": [
        pre_tokenizers.Split(
            Regex(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


@cache
def trained(pre: str = "smollm") -> tokenizers.Tokenizer:
    """A byte-level BPE of some 500 tokens with control tokens first; nothing is registered as added."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
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


def pair_vocabulary(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Byte-level tokens and merges that join any two bytes that stand side by side in `texts`, and no more:
    how long the tokens of a text are then shows where it was cut into words."""
    spelled = "".join(
        pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(t)[0][0] for t in texts
    )
    pairs = list(dict.fromkeys(left + right for left, right in pairwise(spelled)))
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *pairs]
    return tokens, [f"{pair[0]} {pair[1]}" for pair in pairs]


_SCRIPTS = ("नमस्ते दुनिया, สวัสดี 안녕하세요 مرحبا", "==== ---- ____ ....", "    x\n        y\n\n\n\t\tz")


@cache
def sentencepiece_model(
    defined: tuple[str, ...] = (),
    **options: Any,
) -> bytes:
    """A SentencePiece model of some 600 byte-pair pieces, trained on a few sentences."""
    import sentencepiece

    lines = [line for text in (*_SENTENCES, *_SCRIPTS) for line in text.split("\n")] * 8
    written = io.BytesIO()
    chosen = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "character_coverage": 0.995,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        user_defined_symbols=list(defined),
        **chosen | options,
    )
    return written.getvalue()


def sentencepiece_keys(model: bytes, defined: tuple[str, ...] = ()) -> dict[str, Any]:
    """The GGUF keys that a converter writes for such a model; user-defined pieces with plain spaces."""
    import sentencepiece

    read = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces, kinds = [], []
    for index in range(read.vocab_size()):
        piece = read.id_to_piece(index)
        own = piece in defined
        pieces.append(piece.replace("▁", " ") if own else piece)
        tests = ((2, read.is_unknown), (3, read.is_control), (5, read.is_unused), (6, read.is_byte))
        kinds.append(4 if own else next((kind for kind, test in tests if test(index)), 1))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [read.get_score(index) for index in range(read.vocab_size())],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
