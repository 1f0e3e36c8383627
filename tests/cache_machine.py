"""Requests that come, go on and are aborted in any order on one engine, as a hypothesis state machine.

What it holds: each request that ends has the tokens, log-probabilities and text that it has alone on a fresh
engine without a prefix cache; nothing is found that nobody of the same salt has sent or been answered; and
queues, tables, tree and pools agree after every operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ridgeline.engine import Engine
from ridgeline.types import (
    SERVICE_CLASSES,
    PoolingParams,
    Request,
    RequestOutput,
    SamplingParams,
    ServiceClass,
)

Alone = Callable[[Request], list[Any]]
"""What a request comes to on an engine of its own."""

SALTS = ("", "a", "b")
PARAMS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 1},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.0, "seed": 3, "n": 3},
    {"temperature": 0.8, "seed": 5, "n": 2, "prompt_logprobs": 1},
    {"temperature": 0.0, "max_tokens": 0, "prompt_logprobs": 0},
    {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.3},
)


def contents(output: RequestOutput) -> list[Any]:
    each: list[Any] = [(o.token_ids, o.text, o.finish_reason, o.logprobs) for o in output.outputs]
    return [*each, output.prompt_logprobs, output.embedding]


def finish(engine: Engine, request: Request) -> RequestOutput:
    """Run one request to its end."""
    engine.add(request, stream=False)
    while True:
        for output in engine.step():
            if output.request_id == request.id:
                return output


def common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many numbers both begin with."""
    differ = (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return next(differ, min(len(one), len(two)))


class CacheMachine(RuleBasedStateMachine):
    """Prompts are made of a few texts, so that they share beginnings of any length. `vocabulary` bounds their
    tokens, `longest` prompt and answer together. `done` counts over all runs."""

    engine: Engine
    alone: Alone
    done: Counter[str]
    vocabulary = 97
    longest = 100
    pooled = True
    contents = staticmethod(contents)

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, Request] = {}
        self.open: dict[str, Request] = {}
        self.told: dict[str, RequestOutput] = {}
        self.spoken: list[tuple[str, tuple[int, ...]]] = []

    @rule(
        text=st.integers(0, 2),
        shared=st.integers(0, 80),
        own=st.integers(1, 20),
        params=st.sampled_from(PARAMS),
        tokens=st.integers(1, 70),
        salt=st.sampled_from(SALTS),
        service_class=st.sampled_from(SERVICE_CLASSES),
    )
    def ask(
        self,
        text: int,
        shared: int,
        own: int,
        params: dict[str, Any],
        tokens: int,
        salt: str,
        service_class: ServiceClass,
    ) -> None:
        prompt = [*self._text(text)[:shared], *self._text(own + 3)[:own]]
        asked = SamplingParams(**{"max_tokens": tokens, "ignore_eos": True, **params})
        self._add(tuple(prompt), asked, salt, service_class)

    @precondition(lambda self: self.spoken)
    @rule(which=st.integers(0, 1000), more=st.integers(1, 18), tokens=st.integers(1, 20))
    def go_on(self, which: int, more: int, tokens: int) -> None:
        """The next turn of a chat."""
        salt, said = self.spoken[which % len(self.spoken)]
        prompt = (*said[: self.longest - 40], *self._text(more)[:more])
        self._add(prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), salt)

    @precondition(lambda self: self.pooled)
    @rule(text=st.integers(0, 2), length=st.integers(1, 60), last=st.booleans())
    def pool(self, text: int, length: int, last: bool) -> None:
        self._add(tuple(self._text(text)[:length]), PoolingParams("last" if last else "mean"), "")

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 1000))
    def abort(self, which: int) -> None:
        name = list(self.open)[which % len(self.open)]
        del self.open[name]
        self.engine.abort(name)
        self.done["aborts"] += 1

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._hear(self.engine.step())

    @rule()
    def plan_in_vain(self) -> None:
        """An interrupt between a plan and its launch."""
        self.engine.scheduler.schedule(0.0)

    @invariant()
    def agrees(self) -> None:
        self.engine.scheduler.check_integrity()
        self.done["operations"] += 1

    def teardown(self) -> None:
        while self.open:
            self._hear(self.engine.step())
        while self.engine.has_work or self.engine._in_flight:
            self.engine.step()
        scheduler = self.engine.scheduler
        scheduler.check_integrity()
        assert all(pool.free_pages == pool.pages for pool in scheduler.cache.pools)
        assert scheduler.cache.states is None or scheduler.cache.states.pool.used_pages == 0
        self.done["preemptions"] += scheduler.preemptions
        for name, output in self.told.items():
            assert self.contents(output) == self.alone(self.asked[name]), name
        self.done["finished"] += len(self.told)

    def _add(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams | PoolingParams,
        salt: str,
        service_class: ServiceClass = "interactive",
    ) -> None:
        if len(self.open) > 12:
            return
        # Who shares what is computed is one tenant; each class knows it apart.
        request = Request(str(len(self.asked)), prompt, params, salt, service_class, salt)
        self.asked[request.id] = self.open[request.id] = request
        self.engine.add(request)

    def _hear(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            request = self.asked[output.request_id]
            if not output.finished or request.id not in self.open:
                continue
            del self.open[request.id]
            self.told[request.id] = output
            prompt = request.prompt_token_ids
            self.done["cached tokens"] += output.cached_tokens
            assert output.cached_tokens < len(prompt)
            # Who came before in this run, and all that may have been answered to them.
            known = [each for each in self.asked.values() if each.cache_salt == request.cache_salt]
            sent = [each.prompt_token_ids for each in known if each is not request]
            heard = [said for salt, said in self.spoken if salt == request.cache_salt]
            most = max((common(prompt, other) for other in sent + heard), default=0)
            assert output.cached_tokens <= most
            said = [(*prompt, *choice.token_ids) for choice in output.outputs]
            self.spoken += [(request.cache_salt, each) for each in said]

    def _text(self, number: int) -> list[int]:
        return [(number * 31 + index * (7 + number)) % (self.vocabulary - 3) + 3 for index in range(100)]
