"""A whole model in one GGUF: the weights of a tiny model, a byte-level vocabulary and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from tiny_models import VOCABULARY, TinyModel
from tokenizers import pre_tokenizers

CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary_keys() -> dict[str, Any]:
    """Keys of GGUF for a token to each byte, control tokens first, without merges but one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [*CONTROLS, *alphabet, "th"]
    tokens = known + [f"<unused{number}>" for number in range(VOCABULARY - len(known))]
    kinds = [3] * len(CONTROLS) + [1] * (len(alphabet) + 1)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds + [5] * (VOCABULARY - len(kinds)),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }


def write_whole_gguf(model: TinyModel, path: Path, **changes: Any) -> Path:
    """The model's GGUF with a vocabulary. `changes` name keys after `tokenizer.`, with `__` for a dot; None
    leaves one out."""
    source = gguf.GGUFReader(model.gguf)
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    for key, field in source.fields.items():
        if not key.startswith("GGUF."):
            writer.add_key_value(key, field.contents(), field.types[0])
    changed = {f"tokenizer.{name.replace('__', '.')}": value for name, value in changes.items()}
    for key, value in {**vocabulary_keys(), **changed}.items():
        add_key(writer, key, value)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif value is not None:
        writer.add_string(key, value)
