"""Beam search: the continuations of highest mean log-probability, on the engine's public face.

Every step asks the engine for one token of each beam, with the log-probabilities of the best ones, in one
batch. The engine does the rest; what beams share of their tokens it knows no more than of other requests'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ridgeline.llm import LLM
from ridgeline.loading import Prompt
from ridgeline.types import RequestError, SamplingParams


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """Names and meanings follow vLLM. A beam that ends competes by its log-probability over its length to the
    power of `length_penalty`; the end token counts in both.

    Raises RequestError when a value is out of range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= 50:  # twice as many log-probabilities are asked for
            raise RequestError(f"beam_width is {self.beam_width}; accepted: 1 to 50")
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; accepted: 1 or more")


@dataclass(frozen=True, slots=True)
class Beam:
    """A continuation of one prompt, without the prompt: its tokens, an end token included, their summed
    log-probability, and its text."""

    token_ids: tuple[int, ...]
    cumulative_logprob: float
    text: str = ""
    finish_reason: str | None = None


def beam_search(llm: LLM, prompts: Sequence[Prompt], params: BeamSearchParams) -> list[list[Beam]]:
    """The `beam_width` best continuations of each prompt, best first. Raises RequestError as
    `LLM.generate`."""
    tokenizer, starts = llm.tokenizer, [llm.loaded.tokens_of(prompt) for prompt in prompts]
    searches = [_Search(start, params, frozenset(tokenizer.eos_ids)) for start in starts]
    ask = SamplingParams(max_tokens=1, temperature=0, logprobs=2 * params.beam_width, ignore_eos=True)
    for _ in range(params.max_tokens):
        asked = [(search, beam) for search in searches for beam in search.beams]
        if not asked:
            break
        outputs = llm.generate([[*search.prompt, *beam.token_ids] for search, beam in asked], ask)
        for search in searches:
            search.candidates = []
        for (search, beam), output in zip(asked, outputs, strict=True):
            (answer,) = output.outputs
            if not answer.logprobs:
                raise RequestError(f"beam could not go on: {answer.stop_reason or answer.finish_reason}")
            search.extend(beam, answer.logprobs[0].top)
        for search in searches:
            search.choose()
    return [
        [replace(beam, text=tokenizer.decode(beam.token_ids)) for beam in search.best()]
        for search in searches
    ]


class _Search:
    """The beams of one prompt."""

    def __init__(self, prompt: tuple[int, ...], params: BeamSearchParams, ends: frozenset[int]) -> None:
        self.prompt = prompt
        self.beams = [Beam((), 0.0)]
        self.candidates: list[Beam] = []
        self._params = params
        self._ends = frozenset[int]() if params.ignore_eos else ends
        self._ended: list[Beam] = []

    def extend(self, beam: Beam, top: Sequence[tuple[int, float]]) -> None:
        for token, logprob in top:
            longer = (*beam.token_ids, token)
            ended = "stop" if token in self._ends else None
            self.candidates.append(Beam(longer, beam.cumulative_logprob + logprob, "", ended))

    def choose(self) -> None:
        """Keep the best of those that go on, and whatever has ended."""
        self._ended += [beam for beam in self.candidates if beam.finish_reason is not None]
        growing = [beam for beam in self.candidates if beam.finish_reason is None]
        growing.sort(key=lambda beam: (-beam.cumulative_logprob, beam.token_ids))
        self.beams = growing[: self._params.beam_width]
        self.candidates = []

    def best(self) -> list[Beam]:
        cut = [Beam(beam.token_ids, beam.cumulative_logprob, "", "length") for beam in self.beams]
        ranked = sorted([*self._ended, *cut], key=lambda beam: (-self._score(beam), beam.token_ids))
        return ranked[: self._params.beam_width]

    def _score(self, beam: Beam) -> float:
        return beam.cumulative_logprob / float(len(beam.token_ids) ** self._params.length_penalty)
