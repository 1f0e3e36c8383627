"""Drive Ridgeline's engine. `--option` sets fields of `EngineConfig` (`weights`, `kv_format` …).

Beside times and tokens an answer has `work`, the arithmetic and the bytes of the timed steps as the program
and its lowering count them.
"""

from __future__ import annotations

import time

from msgspec.structs import asdict

from bench.peers.protocol import Answer, Options, main


class RidgelineDriver:
    system = "ridgeline"

    def __init__(self, options: Options) -> None:
        from importlib.metadata import PackageNotFoundError, version

        from ridgeline.config import EngineConfig
        from ridgeline.loading import load_engine

        try:
            self.version = version("ridgeline")
        except PackageNotFoundError:  # run from a checkout
            self.version = "checkout"
        default = EngineConfig()
        sequences = max(options.max_batch, 1)
        settings = {
            "model": options.model,
            "threads": options.threads,
            "max_model_len": options.max_context,
            "max_num_seqs": sequences,
            "max_num_batched_tokens": max(2 * sequences, default.max_num_batched_tokens),
            "enable_prefix_caching": False,  # the same prompts come again
            "speculation": "off",  # a step is to be of the batch's tokens
            "measured_budget": False,  # no prompt waits for those who decode already
            **options.more,
        }
        loaded = load_engine(EngineConfig.from_options(settings))
        self._engine = loaded.engine
        assert loaded.config.max_num_batched_tokens is not None
        self._budget_tokens = loaded.config.max_num_batched_tokens
        self.vocabulary = self._engine.model.vocabulary_size

    def prefill(self, prompts: list[list[int]]) -> Answer:
        before = self._work()
        ids = self._add(prompts, 1)
        ended = []
        start = time.perf_counter()
        while self._engine.has_work:
            ended += self._engine.step()
        elapsed_s = time.perf_counter() - start
        tokens = {output.request_id: list(output.outputs[0].token_ids) for output in ended}
        return Answer(elapsed_s, [tokens[name] for name in ids], {"work": asdict(self._work() - before)})

    def decode(self, prompts: list[list[int]], tokens: int) -> Answer:
        """Only steps in which every sequence has exactly one row are timed: while the batch fills, its first
        sequences decode beside the prompts of the last."""
        from ridgeline.types import CapacityError, Work

        engine = self._engine
        filling = len(prompts) * len(prompts[0]) // max(self._budget_tokens - len(prompts), 1) + 2
        ids = self._add(prompts, tokens + filling)
        elapsed_s, work, steps = 0.0, Work(), 0
        try:
            while steps < tokens:
                if not engine.has_work:
                    raise CapacityError(f"a batch of {len(prompts)} does not fit the KV cache at once")
                rows, before = engine.stats.decode.rows, self._work()
                start = time.perf_counter()
                engine.step()
                step_s = time.perf_counter() - start
                if engine.stats.decode.rows - rows == len(prompts):
                    elapsed_s, work, steps = elapsed_s + step_s, work + (self._work() - before), steps + 1
        finally:
            ended = [engine.abort(name) for name in ids]
        outputs = [list(one.outputs[0].token_ids[-steps:]) if one is not None else [] for one in ended]
        return Answer(elapsed_s, outputs, {"work": asdict(work)})

    def _add(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        from ridgeline.types import Request, SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        ids = [f"bench-{index}" for index in range(len(prompts))]
        for name, prompt in zip(ids, prompts, strict=True):
            self._engine.add(Request(name, tuple(prompt), params), stream=False)
        return ids

    def _work(self):  # type: ignore[no-untyped-def] - Work, which is imported when a model is loaded
        return self._engine.stats.prefill.work + self._engine.stats.decode.work


if __name__ == "__main__":
    main(RidgelineDriver)
