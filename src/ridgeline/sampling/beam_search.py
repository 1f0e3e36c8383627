"""Beam search: the continuations of highest log-probability, weighed by their length.

The algorithm alone, without an engine: whoever drives a search asks in each round for one token behind every
beam, with the log-probabilities of the best ones, and hands them to `extend`. Of the `2 × beam_width` best
tokens of each beam those that end it are kept aside, and of the others the `beam_width` best go on, as in
vLLM. A search is over at its limit, or as soon as nothing that goes on can still be among the best: the
log-probability of a beam never grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ridgeline.sampling.stop import StopMatcher
from ridgeline.types import FinishReason, RequestError, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from ridgeline.model.detokenizer import Detokenizer

MAX_BEAM_WIDTH = 50
"""Twice as many log-probabilities are asked for at each position."""
MAX_LENGTH_PENALTY = 10


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """What to search for. Names and meanings follow vLLM, and where it has none SamplingParams.

    Beams compete by their log-probability over their length in tokens to the power of `length_penalty`; an
    end token counts in both. `max_tokens` None searches to the end of the context. With `early_stopping` a
    search is over once `beam_width` beams have ended, though others could still become better. The `n` best
    are given, None for all. `logprobs` k gives those of each token, with the k most probable ones.

    Raises RequestError when a value is out of range.
    """

    beam_width: int
    max_tokens: int | None
    ignore_eos: bool = False
    length_penalty: float = 1.0
    early_stopping: bool = False
    n: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def __post_init__(self) -> None:
        width, penalty = self.beam_width, self.length_penalty
        if type(width) is not int or not 1 <= width <= MAX_BEAM_WIDTH:
            raise RequestError(f"beam_width is {width!r}; accepted: 1 to {MAX_BEAM_WIDTH}")
        if self.n is not None and (type(self.n) is not int or not 1 <= self.n <= width):
            raise RequestError(f"n is {self.n!r}; accepted: 1 to {width}, which is beam_width, or none")
        if not isinstance(penalty, int | float) or not abs(penalty) <= MAX_LENGTH_PENALTY:
            accepted = f"{-MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}"
            raise RequestError(f"length_penalty is {penalty!r}; accepted: {accepted}")
        if not isinstance(self.early_stopping, bool):
            raise RequestError(f"early_stopping is {self.early_stopping!r}; accepted: true or false")
        checked = SamplingParams(
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.logprobs,
        )
        object.__setattr__(self, "stop", checked.stop)
        object.__setattr__(self, "stop_token_ids", checked.stop_token_ids)

    @property
    def ask(self) -> SamplingParams:
        """How to ask for the next token of a beam. Guesses gain nothing where one token is wanted."""
        most = max(2 * self.beam_width, self.logprobs or 0)
        return SamplingParams(max_tokens=1, temperature=0, logprobs=most, ignore_eos=True, speculation=False)


@dataclass(frozen=True, slots=True)
class Beam:
    """A continuation of one prompt, without the prompt: its tokens, an end token included, their summed
    log-probability, and its text. `stop_reason` is as in CompletionOutput."""

    token_ids: tuple[int, ...]
    cumulative_logprob: float
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


class BeamSearch:
    """The state of one search: the beams that go on, and those that have ended.

    `limit` is the most tokens that a beam may have, at least 1; `ends` are the model's own end tokens;
    `detokenizer(skip_special_tokens)` makes the text side of a beam. Ask for one token behind each of
    `prompts`, until there are none.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        params: BeamSearchParams,
        ends: Collection[int],
        limit: int,
        detokenizer: Callable[[bool], Detokenizer],
    ) -> None:
        self._prompt = prompt
        self._params = params
        self._limit = limit
        self._detokenizer = detokenizer
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else set(ends))
        text = _Text(detokenizer(params.skip_special_tokens), params.stop) if params.stop else None
        scores: tuple[TokenLogprobs, ...] | None = None if params.logprobs is None else ()
        self._going = [_Going(Beam((), 0.0, logprobs=scores), text)]
        self._ended: list[Beam] = []
        self._quiet: dict[int, bool] = {}

    @property
    def params(self) -> BeamSearchParams:
        return self._params

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """What the next token is wanted for: the prompt and each beam that goes on. None when it is over."""
        beams = [each.beam.token_ids for each in self._going]  # all of one length
        return [self._prompt + beam for beam in beams] if beams and len(beams[0]) < self._limit else []

    def extend(self, scores: Sequence[TokenLogprobs]) -> None:
        """Take in what came for each of `prompts`: the most probable tokens, as `params.ask` has them."""
        width = self._params.beam_width
        going: list[_Candidate] = []
        floor = -math.inf  # of log-probability, below which nothing goes on
        for each, score in zip(self._going, scores, strict=True):
            for rank, (token, logprob) in enumerate(score.top[: 2 * width]):
                found = each.beam.cumulative_logprob + logprob, each, token, rank, score.top
                if token in self._ends:
                    named = token if token in self._params.stop_token_ids else None
                    self._ended.append(self._longer(_Candidate(*found), "stop", named))
                elif (matched := self._matched(each, token)) is not None:
                    self._ended.append(self._longer(_Candidate(*found), "stop", matched))
                elif found[0] >= floor:
                    going.append(_Candidate(*found))
            if len(going) > width:
                going = sorted(going, key=_order)[:width]
                floor = going[-1].total
        self._going = [self._grown(found) for found in sorted(going, key=_order)]
        # No more are ever told, and none that is worse than these can come to be.
        self._ended = self._ranked(self._ended)[:width]
        if self._is_over():
            self._going = []

    def best(self) -> list[Beam]:
        """The best beams with their texts, best first; those that were still going on are cut."""
        cut = [replace(each.beam, finish_reason="length") for each in self._going]
        best = self._ranked([*self._ended, *cut])[: self._told]
        return [replace(beam, text=self._shown(beam)) for beam in best]

    @property
    def _told(self) -> int:
        return self._params.n or self._params.beam_width

    def _matched(self, going: _Going, token: int) -> str | None:
        """The stop string that a beam comes to have with one more token, if any."""
        if going.text is None or self._is_quiet(token):
            return None
        return going.text.copy().push(token)

    def _is_quiet(self, token: int) -> bool:
        """Whether a token surely completes no stop string: it has none of the characters that they end in. Of
        blanks, and parts of characters, nobody can say what they become."""
        quiet = self._quiet.get(token)
        if quiet is None:
            alone = self._detokenizer(self._params.skip_special_tokens)
            alone.push(token)  # at the start of a text it may be another
            text = alone.push(token) + alone.finish()
            last = {stop[-1] for stop in self._params.stop}
            whole = bool(text.strip()) and "\ufffd" not in text and "\ufffd" not in last
            quiet = self._quiet[token] = whole and last.isdisjoint(text)
        return quiet

    def _grown(self, found: _Candidate) -> _Going:
        text = found.parent.text
        if text is not None:
            text = text.copy()
            text.push(found.token)
        return _Going(self._longer(found), text)

    def _longer(
        self, found: _Candidate, reason: FinishReason | None = None, stop_reason: str | int | None = None
    ) -> Beam:
        before, most = found.parent.beam, self._params.logprobs
        logprobs = before.logprobs
        if most is not None and logprobs is not None:
            top = found.top
            logprobs += (TokenLogprobs(found.token, top[found.rank][1], top[:most], found.rank + 1),)
        return Beam((*before.token_ids, found.token), found.total, "", reason, stop_reason, logprobs)

    def _is_over(self) -> bool:
        """Whether no beam that goes on is to be followed any further."""
        if self._params.early_stopping and len(self._ended) >= self._params.beam_width:
            return True
        if len(self._ended) < self._told or not self._going:
            return False
        worst = self._score(self._ended[self._told - 1])
        penalty = self._params.length_penalty
        # The log-probability at most stays what it is; the length at which that counts least is the best.
        best = self._going[0].beam
        length = self._limit if penalty >= 0 else min(len(best.token_ids) + 1, self._limit)
        return worst > best.cumulative_logprob / float(length**penalty)

    def _ranked(self, beams: Sequence[Beam]) -> list[Beam]:
        return sorted(beams, key=lambda beam: (-self._score(beam), beam.token_ids))

    def _score(self, beam: Beam) -> float:
        return beam.cumulative_logprob / float(len(beam.token_ids) ** self._params.length_penalty)

    def _shown(self, beam: Beam) -> str:
        """A beam's text, without what has ended it unless that is wanted."""
        params, tokens = self._params, beam.token_ids
        by_text = isinstance(beam.stop_reason, str)
        if beam.finish_reason == "stop" and not by_text:
            shown = beam.stop_reason is not None and params.include_stop_str_in_output
            tokens = tokens if shown else tokens[:-1]
        detokenizer = self._detokenizer(params.skip_special_tokens)
        text = "".join(map(detokenizer.push, tokens)) + detokenizer.finish()
        return (
            StopMatcher(tuple(params.stop), params.include_stop_str_in_output).push(text) if by_text else text
        )


class _Text:
    """The text of a beam, as far as stop strings need it."""

    __slots__ = ("_detokenizer", "_stops")

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] | StopMatcher) -> None:
        self._detokenizer = detokenizer
        self._stops = stops if isinstance(stops, StopMatcher) else StopMatcher(tuple(stops))

    def copy(self) -> _Text:
        return _Text(self._detokenizer.copy(), self._stops.copy())

    def push(self, token: int) -> str | None:
        """The stop string that this token completes, if any."""
        self._stops.push(self._detokenizer.push(token))
        return self._stops.matched


class _Going(NamedTuple):
    """A beam that goes on, and its text where there are stop strings."""

    beam: Beam
    text: _Text | None


class _Candidate(NamedTuple):
    """A beam and one more token, the one of that `rank` of what came for it."""

    total: float
    parent: _Going
    token: int
    rank: int
    top: tuple[tuple[int, float], ...]


def _order(found: _Candidate) -> tuple[float, tuple[int, ...], int]:
    """Best first; between equals, by tokens."""
    return -found.total, found.parent.beam.token_ids, found.token
