"""Prompts of the user's, which an engine answers beside what is measured of it: made-up prompts say nothing
of how often guessed tokens are right."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ridgeline.apps.benchmark import Workload
from ridgeline.apps.load.dataset import Sample, read_samples
from ridgeline.config import EngineConfig
from ridgeline.loading import LoadedModel, device_ceilings
from ridgeline.records import StepRecord
from ridgeline.sampling.drafting.replay import KnownText
from ridgeline.types import Request, SamplingParams

LEAST_TEXTS = 8
"""So many texts of a file are answered, or as many as there are at once."""

_ON, _ON_ASKED = "auto", "suffix"
"""What switches guesses on; and where "auto" is off because steps are launched ahead."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Texts that a model wrote `batch` at a time, and the steps that it took. `setting` is what would switch
    guesses on, None where they are on or cannot be."""

    texts: Sequence[KnownText]
    batch: int
    steps: Sequence[StepRecord]
    on: bool
    setting: str | None

    @property
    def prefill_s(self) -> float:
        """Of all steps that read prompts, until their results were there."""
        return sum(step.wall_s for step in self.steps if step.kind != "decode")

    @property
    def decode_s(self) -> float:
        return sum(step.wall_s for step in self.steps if step.kind == "decode")

    @property
    def tokens(self) -> int:
        return sum(len(text.answer) for text in self.texts)


@dataclass(slots=True)
class Texts:
    """The samples that are answered, `workload.batch` at a time and with as many tokens as it has at most;
    and what came of it. Without samples nothing is answered."""

    samples: Sequence[Sample]
    workload: Workload
    answered: Answered | None = None

    @classmethod
    def of_file(cls, path: Path | None, workload: Workload) -> Texts:
        """The first ones of a file, if there is one. Raises what `read_samples` raises."""
        samples = [] if path is None else read_samples(path, max(LEAST_TEXTS, workload.batch))
        return cls(samples, workload)

    def configured(self, config: EngineConfig, speculation: str | None) -> EngineConfig:
        """The settings that answer texts: what is guessed is as an engine does that nobody has told. It needs
        to know its machine, which is measured here if that was never done."""
        found = replace(
            config, speculation=EngineConfig().speculation if speculation is None else speculation
        )
        if self.samples:
            device_ceilings(found, measure=True)
        return found

    def answer(self, loaded: LoadedModel) -> None:
        """Raises what `answer_texts` raises."""
        if self.samples:
            work = self.workload
            self.answered = answer_texts(loaded, self.samples, work.batch, work.output_tokens)


def prompt_of(loaded: LoadedModel, sample: Sample) -> tuple[int, ...]:
    """The tokens of what a line of a dataset asks: of a prompt as a user's message, where the model knows
    chats, as a server is asked. Raises RequestError where the template refuses it."""
    if sample.messages is None and loaded.chat_template is None:
        return tuple(loaded.tokenizer.encode(sample.prompt or ""))
    return loaded.chat_tokens(sample.body("chat")["messages"])


def answer_texts(
    loaded: LoadedModel, samples: Sequence[Sample], batch: int, output_tokens: int, salt: str = "explain"
) -> Answered:
    """Have an idle engine answer greedily, with guesses as it is set, each with `output_tokens` at most; it
    is idle again afterwards. Texts of one `salt` are looked up in one another.

    Raises RequestError for a prompt that the engine refuses.
    """
    engine = loaded.engine
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens)
    waiting = deque(
        Request(f"{salt} {number}", prompt_of(loaded, sample), params, salt)
        for number, sample in enumerate(samples)
    )
    under_way: set[str] = set()
    texts, steps = list[KnownText](), list[StepRecord]()
    place = engine.steps.recent.count
    try:
        while waiting or under_way:
            while waiting and len(under_way) < batch:
                request = waiting.popleft()
                engine.add(request, stream=False)
                under_way.add(request.id)
            for output in engine.step():
                under_way.discard(output.request_id)
                texts.append(KnownText(output.prompt_token_ids, output.outputs[0].token_ids))
            steps += engine.steps.recent.since(place)
            place = engine.steps.recent.count
    finally:
        for name in under_way:
            engine.abort(name)
    drafting = engine.scheduler.drafting
    on = drafting is not None and drafting.wanted(None) is not None
    setting = _ON_ASKED if engine.executor.asynchronous else _ON
    return Answered(texts, batch, steps, on, None if on or drafting is None else setting)
