"""Drive llama.cpp through llama-cpp-python's bindings of its own functions.

The high-level class of llama-cpp-python runs one sequence; `llama_decode` with a `llama_batch` runs many.
A context is made for each shape of command, as llama.cpp's own tools do, with its defaults: the KV cache of
the size that is needed, flash attention where it chooses it, micro-batches of 512. `--option` sets fields of
`llama_context_params` (`n_ubatch`, `kv_unified`, `flash_attn_type`, `type_k` …) and, with `model.` before the
name, of `llama_model_params` (`model.use_mmap`).
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

from bench.peers.protocol import Answer, Options, main


class LlamaDriver:
    system = "llama.cpp"

    def __init__(self, options: Options) -> None:
        import llama_cpp
        import numpy as np

        self._library, self._numpy, self._options = llama_cpp, np, options
        self.version = llama_cpp.__version__
        llama_cpp.llama_backend_init()
        wanted = llama_cpp.llama_model_default_params()
        for name, value in options.more.items():
            if name.startswith("model."):
                set_field(wanted, name.removeprefix("model."), value)
        self._model = llama_cpp.llama_model_load_from_file(options.model.encode(), wanted)
        if not self._model:
            raise SystemExit(f"error: llama.cpp does not load {options.model}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._shape: tuple[int, int] | None = None
        self._context: Any = None
        self._batch: Any = None

    def prefill(self, prompts: list[list[int]]) -> Answer:
        self._prepare(len(prompts), len(prompts[0]) + 1)
        start = time.perf_counter()
        first = self._read(prompts)
        return Answer(time.perf_counter() - start, [[token] for token in first])

    def decode(self, prompts: list[list[int]], tokens: int) -> Answer:
        length = len(prompts[0])
        self._prepare(len(prompts), length + tokens + 1)
        last = self._read(prompts)
        outputs: list[list[int]] = [[] for _ in prompts]
        start = time.perf_counter()
        for position in range(length, length + tokens):
            self._run([(token, position, index, True) for index, token in enumerate(last)])
            last = [self._likeliest(index) for index in range(len(prompts))]
            for output, token in zip(outputs, last):  # noqa: B905 - Pythons before 3.10 have no `strict`
                output.append(token)
        return Answer(time.perf_counter() - start, outputs)

    def _prepare(self, sequences: int, context_tokens: int) -> None:
        """An empty context for `sequences` of up to `context_tokens` each."""
        library = self._library
        shape = (sequences, -(-context_tokens // 256) * 256)
        if shape != self._shape:
            if self._context is not None:
                library.llama_batch_free(self._batch)
                library.llama_free(self._context)
                self._context = None
            wanted = library.llama_context_default_params()
            wanted.n_ctx = sequences * shape[1]
            wanted.n_seq_max = sequences
            wanted.n_threads = wanted.n_threads_batch = self._options.threads
            for name, value in self._options.more.items():
                if not name.startswith("model."):
                    set_field(wanted, name, value)
            self._context = library.llama_init_from_model(self._model, wanted)
            if not self._context:
                raise RuntimeError(f"llama.cpp makes no context of {sequences} × {shape[1]} tokens")
            self._rows = library.llama_n_batch(self._context)
            self._batch = library.llama_batch_init(self._rows, 0, 1)
            self._shape = shape
        library.llama_memory_clear(library.llama_get_memory(self._context), True)

    def _read(self, prompts: list[list[int]]) -> list[int]:
        """Run all prompts; the likeliest token after each."""
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        found = []
        for begin in range(0, len(rows), self._rows):
            part = rows[begin : begin + self._rows]
            self._run(part)
            found += [self._likeliest(row) for row, (_, _, _, wanted) in enumerate(part) if wanted]
        return found

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One `llama_decode` of rows (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {len(rows)} rows")

    def _likeliest(self, row: int) -> int:
        logits = self._library.llama_get_logits_ith(self._context, row)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(self._numpy.ctypeslib.as_array(pointer, (self.vocabulary,)).argmax())


def set_field(structure: Any, name: str, value: Any) -> None:
    """Set a field of a C structure; one that it does not have is refused, ctypes would make an attribute."""
    names = [known for known, *_ in structure._fields_]
    if name not in names:
        raise SystemExit(f"error: {type(structure).__name__} has no {name!r}; accepted: {', '.join(names)}")
    setattr(structure, name, value)


if __name__ == "__main__":
    main(LlamaDriver)
