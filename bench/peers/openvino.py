"""Drive OpenVINO GenAI through its `LLMPipeline`.

The model is a GGUF file that its reader knows, or a folder with a model in OpenVINO's format. One call reads
the prompts and decodes; its own metrics say when the first token was there, and the rest is the decoding.
`--option` sets properties of the device (`KV_CACHE_PRECISION`, `ATTENTION_BACKEND` …).
"""

from __future__ import annotations

from typing import Any

from bench.peers.protocol import Answer, Options, main


class OpenvinoDriver:
    system = "openvino-genai"

    def __init__(self, options: Options) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        self.version = openvino_genai.__version__
        self._library, self._tensor, self._numpy = openvino_genai, openvino.Tensor, np
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = max(options.max_batch, 1)
        properties = {
            "INFERENCE_NUM_THREADS": options.threads,
            "scheduler_config": scheduler,
            **options.more,
        }
        if properties.get("ATTENTION_BACKEND") == "SDPA":
            del properties["scheduler_config"]  # belongs to paged attention
        self._pipeline = openvino_genai.LLMPipeline(options.model, "CPU", **properties)
        self.vocabulary = len(self._pipeline.get_tokenizer().get_vocab())

    def prefill(self, prompts: list[list[int]]) -> Answer:
        result = self._generate(prompts, 1)
        return Answer(result.perf_metrics.get_generate_duration().mean / 1e3, _tokens(result))

    def decode(self, prompts: list[list[int]], tokens: int) -> Answer:
        result = self._generate(prompts, tokens + 1)
        metrics = result.perf_metrics
        seconds = (metrics.get_generate_duration().mean - metrics.get_ttft().mean) / 1e3
        return Answer(seconds, [made[1:] for made in _tokens(result)])

    def _generate(self, prompts: list[list[int]], tokens: int) -> Any:
        config = self._library.GenerationConfig()
        config.max_new_tokens = tokens
        config.min_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        ids = self._numpy.array(prompts, dtype=self._numpy.int64)
        inputs = self._library.TokenizedInputs(self._tensor(ids), self._tensor(self._numpy.ones_like(ids)))
        return self._pipeline.generate(inputs, config)


def _tokens(result: Any) -> list[list[int]]:
    return [[int(token) for token in made] for made in result.tokens]


if __name__ == "__main__":
    main(OpenvinoDriver)
