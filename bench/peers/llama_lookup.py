"""Drive llama-cpp-python's high-level class with its speculation by prompt lookup.

`llama_cpp.Llama` runs one sequence, so a command has one prompt. Its settings are the class's defaults but
for the threads and a context of what is needed; the drafter is `LlamaPromptLookupDecoding` with the number
of guesses that its documentation names as the default, 10. `--option` sets parameters of either by their own
names: `num_pred_tokens` and `max_ngram_size` of the drafter, `flash_attn`, `n_ubatch` … of the class.

The class keeps the prompt that it has read: one that comes again is not read again, which no clock sees. What
it looks up is the prompt and the output of this command alone. `passes` are the timed runs of the model.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.peers.protocol import Answer, Options, main

PREDICTED_TOKENS = 10


class LookupDriver:
    system = "llama-cpp-python with prompt lookup"

    def __init__(self, options: Options) -> None:
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        drafting: dict[str, Any] = {"num_pred_tokens": PREDICTED_TOKENS}
        running: dict[str, Any] = {}
        known = parameters(LlamaPromptLookupDecoding), parameters(llama_cpp.Llama)
        for name, value in options.more.items():
            if name not in known[0] + known[1]:
                raise ValueError(f"option is {name!r}; accepted: {', '.join(known[0] + known[1])}")
            (drafting if name in known[0] else running)[name] = value
        self.version = llama_cpp.__version__
        self._longest = options.max_context
        self._drafter = Counted(LlamaPromptLookupDecoding(**drafting))
        settings = {
            "n_ctx": options.max_context,
            "n_threads": options.threads,
            "n_threads_batch": options.threads,
            "verbose": False,
            **running,
        }
        self._llama = llama_cpp.Llama(options.model, draft_model=self._drafter, **settings)
        self.vocabulary = self._llama.n_vocab()

    def prefill(self, prompts: list[list[int]]) -> Answer:
        stream = self._stream(prompts, 1)
        start = time.perf_counter()
        first = next(stream)
        return Answer(time.perf_counter() - start, [[first]])

    def decode(self, prompts: list[list[int]], tokens: int) -> Answer:
        stream = self._stream(prompts, 1 + tokens)
        next(stream)
        before = self._drafter.calls
        start = time.perf_counter()
        output = list(itertools.islice(stream, tokens))
        elapsed_s = time.perf_counter() - start
        return Answer(elapsed_s, [output], {"passes": self._drafter.calls - before})

    def _stream(self, prompts: list[list[int]], tokens: int) -> Iterator[int]:
        """The likeliest tokens after the one prompt, without end: `generate` knows no end token."""
        if len(prompts) != 1:
            raise ValueError(f"prompts are {len(prompts)}; accepted: 1, the high-level class runs no more")
        if len(prompts[0]) + tokens > self._longest:
            raise ValueError(f"{len(prompts[0])} + {tokens} tokens; accepted: {self._longest} together")
        return iter(self._llama.generate(prompts[0], temp=0.0))


class Counted:
    """A drafter that counts its calls: there is one before every run of the model but that of the prompt."""

    def __init__(self, drafter: Callable[..., Any]) -> None:
        self._drafter = drafter
        self.calls = 0

    def __call__(self, input_ids: Any, /, **more: Any) -> Any:
        self.calls += 1
        return self._drafter(input_ids, **more)


def parameters(kind: type) -> list[str]:
    """The named parameters of a class; `Llama` takes any other name, too, and forgets it."""
    return [
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


if __name__ == "__main__":
    main(LookupDriver)
