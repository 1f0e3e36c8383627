"""Drive transformers: the model called step by step with its own KV cache, as its `generate` does.

The model is a folder of safetensors, in bfloat16, or a GGUF file, which it widens to that. `--option` sets
arguments of `from_pretrained` (`attn_implementation`, `dtype` …).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.peers.protocol import Answer, Options, main


class TransformersDriver:
    system = "transformers"

    def __init__(self, options: Options) -> None:
        import torch
        import transformers

        self.version = transformers.__version__
        self._torch, self._new_cache = torch, transformers.DynamicCache
        torch.set_num_threads(options.threads)
        settings: dict[str, Any] = {"dtype": "bfloat16", "local_files_only": True, **options.more}
        folder = Path(options.model)
        if folder.is_file():
            settings["gguf_file"], folder = folder.name, folder.parent
        self._model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **settings).eval()
        self.vocabulary = self._model.config.vocab_size

    def prefill(self, prompts: list[list[int]]) -> Answer:
        with self._torch.inference_mode():
            start = time.perf_counter()
            last = self._run(self._torch.tensor(prompts), self._new_cache())
            return Answer(time.perf_counter() - start, last.tolist())

    def decode(self, prompts: list[list[int]], tokens: int) -> Answer:
        cache = self._new_cache()
        with self._torch.inference_mode():
            last = self._run(self._torch.tensor(prompts), cache)
            made = []
            start = time.perf_counter()
            for _ in range(tokens):
                last = self._run(last, cache)
                made.append(last)
            outputs = self._torch.cat(made, dim=1).tolist()
            return Answer(time.perf_counter() - start, outputs)

    def _run(self, ids: Any, cache: Any) -> Any:
        """The likeliest token after each row of `ids`, which the cache then holds: (batch, 1)."""
        logits = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(dim=-1, keepdim=True)


if __name__ == "__main__":
    main(TransformersDriver)
