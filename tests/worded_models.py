"""A tiny random model whose tokens are pieces of words, as those of real models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
import vocabularies


def make_worded(folder: Path, **tokenizer_config: Any) -> Path:
    """Logits are nearly even, so that answers come to an end. The width of logits exceeds the vocabulary."""
    library = vocabularies.oracle()
    torch.manual_seed(6)
    model = tiny_models._llama(vocab_size=library.get_vocab_size() + 5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1 if weight.ndim == 1 else 0, 0.2 if weight.ndim == 1 else 0.1)
    model.save_pretrained(folder, safe_serialization=True)
    config = {"eos_token": "<|im_end|>", "chat_template": vocabularies.CHATML, **tokenizer_config}
    return vocabularies.write_folder(folder, library, tokenizer_config=config)
