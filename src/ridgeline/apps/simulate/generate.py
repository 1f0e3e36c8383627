"""Traces that are made up: arrivals, lengths, and what prompts have in common.

Lengths are lognormal. Unless told otherwise they are ShareGPT's: first turns as vLLM's benchmark asks them
have 230 tokens of prompt and 203 of answer in the mean (1,000 of them in vLLM's pull request 18566), and the
logarithms spread as the medians and 90th percentiles of whole conversations do in Agrawal et al., "Taming
Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (OSDI 2024), table 2: 1,730 and 5,696 tokens
of prompt, 415 and 834 of answer. Documents, and the answers to questions about them, have that table's
medians and spread of arXiv's: 7,059 and 12,985 tokens, 208 and 371. How long a question about a document is,
is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ridgeline.apps.load.arrivals import arrival_times
from ridgeline.apps.simulate.trace import MOST_REQUESTS, MOST_TOKENS, Part, TraceRequest
from ridgeline.types import SERVICE_CLASSES, ConfigError, ServiceClass

KINDS = ("poisson", "bursty", "shared-prompts", "chats", "documents")
BURSTINESS = 0.25
"""Of bursty arrivals: gaps with twice the deviation that a Poisson process has."""
_NINETIETH = 1.2815515594
"""The standard normal's 90th percentile."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lognormal numbers of tokens: the median, and the standard deviation of the logarithms. Those over
    `most` are drawn again."""

    median: float
    sigma: float
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.median <= self.most:
            raise ConfigError(f"a median length is {self.median:g} tokens; accepted: 1 to {self.most}")

    @classmethod
    def of_quantiles(cls, median: float, ninetieth: float, most: int) -> Lengths:
        return cls(median, math.log(ninetieth / median) / _NINETIETH, most)

    def with_mean(self, mean: float) -> Lengths:
        """The same spread around a mean, of all that are drawn."""
        return replace(self, median=mean / math.exp(self.sigma**2 / 2))

    def draw(self, chance: np.random.Generator) -> int:
        while True:
            tokens = max(1, round(self.median * math.exp(self.sigma * chance.standard_normal())))
            if tokens <= self.most:
                return tokens


CONVERSATIONS = Lengths.of_quantiles(1730, 5696, 8192), Lengths.of_quantiles(415, 834, 8192)
TURNS = CONVERSATIONS[0].with_mean(230), CONVERSATIONS[1].with_mean(203)
"""Prompt and answer of one turn."""
DOCUMENT, SUMMARY = Lengths.of_quantiles(7059, 12_985, 16_384), Lengths.of_quantiles(208, 371, 16_384)
QUESTION = Lengths(24, 0.5, 1024)


@dataclass(frozen=True, slots=True)
class Workload:
    """What to make up. `rate_per_s` is that of all requests, however many a chat has. `prompt_tokens` and
    `output_tokens` are medians, and `shared_tokens` is the length of a shared system prompt or the median of
    documents; None takes what stands above. There are `system_prompts` shared ones, of which the n-th is
    asked for 1/n as often as the first. Chats have `turns` turns in the mean, and documents as many
    questions, each `think_s` seconds in the mean after the answer before. `classes` are shares.

    Raises ConfigError for what cannot be.
    """

    kind: str
    rate_per_s: float = 1.0
    count: int = 1000
    seed: int = 0
    burstiness: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    shared_tokens: int | None = None
    system_prompts: int = 8
    turns: float = 4.0
    think_s: float = 20.0
    classes: Mapping[ServiceClass, float] = field(default_factory=lambda: {"interactive": 1.0})

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"generate is {self.kind!r}; accepted: {', '.join(KINDS)}")
        for name, low, high in (
            ("count", 1, MOST_REQUESTS),
            ("system_prompts", 1, MOST_REQUESTS),
            ("turns", 1, 1000),
            ("think", 0, 1e6),
            ("seed", 0, 2**63),
        ):
            value = self.think_s if name == "think" else getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value:g}; accepted: {low:g} to {high:g}")
        for name in ("prompt_tokens", "output_tokens", "shared_tokens"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_TOKENS // 8:
                raise ConfigError(f"{name} is {value}; accepted: 1 to {MOST_TOKENS // 8}")
        shares = self.classes.values()
        known = set(self.classes) <= set(SERVICE_CLASSES)
        if not known or not all(0 <= share < math.inf for share in shares) or not sum(shares) > 0:
            raise ConfigError(
                f"classes are {dict(self.classes)}; accepted: shares of {', '.join(SERVICE_CLASSES)}"
            )


def generate(workload: Workload) -> list[TraceRequest]:
    """The requests of a workload; the same for the same seed. Raises ConfigError for arrivals that cannot
    be."""
    makers = {"shared-prompts": _SharedPrompts, "chats": _Chats, "documents": _Documents}
    return makers.get(workload.kind, _Maker)(workload).requests()


class _Maker:
    """Requests that have nothing in common: those of one kind of workload."""

    prompt, output = TURNS

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.chance = np.random.default_rng((workload.seed, 1))
        self.prompt = _around(self.prompt, workload.prompt_tokens)
        self.output = _around(self.output, workload.output_tokens)
        total = sum(workload.classes.values())
        self._classes = list(workload.classes)
        self._shares = [share / total for share in workload.classes.values()]

    def requests(self) -> list[TraceRequest]:
        due = zip(self.arrivals(1.0), self.levels(), strict=True)
        return [
            TraceRequest(f"r{n}", self.parts(n), self.output.draw(self.chance), at, service_class=level)
            for n, (at, level) in enumerate(due)
        ]

    def parts(self, index: int) -> tuple[Part, ...]:
        return ((f"r{index}/prompt", self.prompt.draw(self.chance)),)

    def arrivals(self, requests_each: float) -> list[float]:
        """Of as many as there are requests, each of which brings so many."""
        work = self.workload
        shape = work.burstiness
        if shape is None:
            shape = BURSTINESS if work.kind == "bursty" else 1.0
        return arrival_times(work.count, work.rate_per_s / requests_each, shape, work.seed)

    def levels(self) -> Iterator[ServiceClass]:
        drawn = self.chance.choice(len(self._classes), self.workload.count, p=self._shares)
        return (self._classes[place] for place in drawn.tolist())


class _SharedPrompts(_Maker):
    """Behind one of a few system prompts each."""

    def parts(self, index: int) -> tuple[Part, ...]:
        shared = self.workload.system_prompts
        weights = 1 / np.arange(1, shared + 1)
        which = int(self.chance.choice(shared, p=weights / weights.sum()))
        return ((f"system-{which}", self.workload.shared_tokens or 512), *super().parts(index))


class _Chats(_Maker):
    """Every turn's prompt is all that was said before, and a new message. Where that grows beyond what a
    prompt may be, the chat ends."""

    def requests(self) -> list[TraceRequest]:
        count, found = self.workload.count, list[TraceRequest]()
        levels = list(self.levels())
        for number, at in enumerate(self.arrivals(self.workload.turns)):
            turns = int(self.chance.geometric(1 / self.workload.turns))
            found += self._one(f"{self.name}{number}", at, min(turns, count - len(found)), levels[number])
            if len(found) == count:
                break
        return found

    name = "chat-"

    def _one(self, name: str, at: float, turns: int, level: ServiceClass) -> Iterator[TraceRequest]:
        before = self.opening(name)
        previous = None
        for turn in range(turns):
            prompt = (*before, (f"{name}/{turn}/asked", self.prompt.draw(self.chance)))
            if previous is not None and sum(tokens for _, tokens in prompt) > self.prompt.most:
                return
            made = TraceRequest(
                f"{name}/{turn}",
                prompt,
                self.output.draw(self.chance),
                at if previous is None else None,
                previous,
                0.0 if previous is None else float(self.chance.exponential(self.workload.think_s)),
                f"{name}/{turn}/told",
                level,
            )
            yield made
            previous, before = made.id, self.said(made, before)

    def opening(self, name: str) -> tuple[Part, ...]:
        """What a chat begins with."""
        shared = self.workload.shared_tokens
        return () if shared is None else (("system", shared),)

    def said(self, turn: TraceRequest, before: tuple[Part, ...]) -> tuple[Part, ...]:
        """What stands before the next message."""
        return (*turn.prompt, (turn.answer, turn.output_tokens))


class _Documents(_Chats):
    """Questions about a document, each of which comes without those before it."""

    prompt, output = QUESTION, SUMMARY
    name = "document-"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.document = _around(DOCUMENT, workload.shared_tokens)
        self.prompt = replace(self.prompt, most=self.prompt.most + self.document.most)

    def opening(self, name: str) -> tuple[Part, ...]:
        return ((name, self.document.draw(self.chance)),)

    def said(self, turn: TraceRequest, before: tuple[Part, ...]) -> tuple[Part, ...]:
        return before


def _around(lengths: Lengths, median: int | None) -> Lengths:
    """The same spread around another median."""
    if median is None:
        return lengths
    return replace(lengths, median=median, most=max(lengths.most, 8 * median))
