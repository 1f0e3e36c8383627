"""What has become of a request so far: its continuations, or its pooled prompt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ridgeline.sampling.pooling import Pooler
from ridgeline.sampling.sampler import Sampled
from ridgeline.sampling.stop import StopMatcher
from ridgeline.scheduling.sequence import Sequence
from ridgeline.types import (
    CompletionOutput,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    Transcript,
)

if TYPE_CHECKING:
    from ridgeline.model.detokenizer import Detokenizer


_SPELLED_AT_ONCE = 32
"""Tokens of an answer that nobody follows, whose text is made together, while what that takes is at hand: not
with every token of every sequence."""
_NOTHING = Transcript([], 0)


class Outcome:
    """What one sequence of a request came to. The engine hands it the outputs of the sequence's rows until
    there is a `finish_reason`."""

    __slots__ = ("embedding", "finish_reason", "index", "prompt_logprobs", "sequence", "stop_reason")

    def __init__(self, index: int, sequence: Sequence) -> None:
        self.index = index
        self.sequence = sequence
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.embedding: tuple[float, ...] | None = None

    def take(self, sample: Sampled, position: int) -> None:
        """Take in the output of the row before `position`."""
        raise NotImplementedError

    def abort(self) -> None:
        """End it where it stands."""
        self.finish_reason = "abort"

    @property
    def mean_logprob(self) -> float:
        """By which the best of a request's choices are found."""
        return -math.inf

    def output(self) -> CompletionOutput:
        return CompletionOutput(self.index, _NOTHING, 0, 0, self.finish_reason, self.stop_reason)

    def _fail(self, what: str, error: Exception) -> None:
        self.finish_reason, self.stop_reason = "error", f"{what} failed: {type(error).__name__}: {error}"


class Choice(Outcome):
    """One of a request's continuations: its sequence, its text so far, and when it ends. The text grows with
    every token where it is `followed`, or may end the choice."""

    __slots__ = (
        "_constraint", "_only_scored", "_scores", "_spell_at", "_spell_every", "_spelled", "detokenizer",
        "ends", "limit", "logprobs", "params", "stops", "transcript"
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        sequence: Sequence,
        params: SamplingParams,
        ends: frozenset[int],
        limit: int,
        detokenizer: Detokenizer,
        followed: bool,
    ) -> None:
        super().__init__(index, sequence)
        self.params = params
        self.ends = ends
        self.limit = limit
        self.detokenizer = detokenizer
        self.stops = (
            StopMatcher(tuple(params.stop), params.include_stop_str_in_output) if params.stop else None
        )
        self._constraint = sequence.chooser.constraint
        self._only_scored = params.max_tokens == 0
        self.logprobs: list[TokenLogprobs] = []
        told = self.logprobs if params.logprobs is not None else None
        self.transcript = Transcript(sequence.token_ids, sequence.prompt_length, told)
        self._spelled = sequence.prompt_length  # tokens that have text, or are to have none
        self._spell_every = 1 if followed or self.stops is not None else _SPELLED_AT_ONCE
        # Not all in one step, where many begin in one.
        self._spell_at = self._spelled + 1 + sequence.arrival % self._spell_every
        self._scores: list[TokenLogprobs | None] = [None]  # of the prompt's tokens so far
        self._note_scores()

    def take(self, sample: Sampled, position: int) -> None:
        """Append a sampled token and its text, and see whether that ends the choice; or take in the score of
        a prompt token.

        What has been taken already, before an interrupt or a preemption, is passed over. A token that could
        not be sampled or shown ends the choice with "error", and the cause as `stop_reason`.
        """
        sequence = self.sequence
        try:
            if position == len(sequence.token_ids):
                self._take(sample)
            elif position < sequence.prompt_length:
                self._score(sample, position)
        except Exception as error:  # what is wrong with one request must not end the others
            self._fail("text", error)

    def abort(self) -> None:
        """End the choice where it stands."""
        try:
            self._end("abort")
        except Exception as error:
            self._fail("text", error)

    def _score(self, sample: Sampled, position: int) -> None:
        if sample.error is not None:
            self._end("error", sample.error)
            return
        if position == len(self._scores):
            self._scores.append(sample.logprobs)
        self._note_scores()
        if self.prompt_logprobs is not None and self._only_scored:
            self._end("length")

    def _note_scores(self) -> None:
        if self.sequence.chooser.prompt_logprobs is None:
            return
        self.sequence.first_output = len(self._scores) - 1
        if len(self._scores) == self.sequence.prompt_length:
            self.prompt_logprobs = tuple(self._scores)

    def _take(self, sample: Sampled) -> None:
        sequence = self.sequence
        if sample.error is not None:
            self._end("error", sample.error)
            return
        if self._only_scored:  # a prompt of one token has nothing to score, but its row is run
            self._end("length")
            return
        token = sample.token_id
        sequence.append(token)
        if sample.logprobs is not None:
            self.logprobs.append(sample.logprobs)
        known = len(sequence.token_ids)
        if token in self.ends:
            named = token in self.params.stop_token_ids
            if named and self.params.include_stop_str_in_output:
                self._spell(known)
            self._end("stop", token if named else None, untold=1)
            return
        # By an end token that the request ignores otherwise.
        if self._constraint is not None and self._constraint.ended:
            self._end("stop", untold=1)
            return
        if known >= self._spell_at:
            self._spell(known)
        if known >= self.limit and self.finish_reason is None:
            self._end("length")

    def _end(self, reason: FinishReason, stop_reason: str | int | None = None, untold: int = 0) -> None:
        """Release the text that was held back and close the choice. Its last tokens may have no text."""
        self._spell(len(self.sequence.token_ids) - untold)
        self._show(self.detokenizer.finish())
        if self.stops is not None:
            self.transcript.write(self.stops.flush())
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason = reason, stop_reason

    def _spell(self, end: int) -> None:
        """Make the text of the tokens before `end`, as far as there is none yet."""
        known, spelled = self.sequence.token_ids, self._spelled
        self._spell_at = end + self._spell_every
        while spelled < end:
            token = known[spelled]
            self._spelled = spelled = spelled + 1  # a token that cannot be shown is not tried again
            self._show(self.detokenizer.push(token))

    def _show(self, piece: str) -> None:
        # Stop strings are not looked for in the first min_tokens tokens.
        if self.stops is not None and self.sequence.generated > self.params.min_tokens:
            piece = self.stops.push(piece)
            if self.stops.matched is not None and self.finish_reason is None:
                self.finish_reason, self.stop_reason = "stop", self.stops.matched
        self.transcript.write(piece)

    @property
    def mean_logprob(self) -> float:
        if self.finish_reason == "error" or not self.logprobs:
            return -math.inf
        return math.fsum(each.logprob for each in self.logprobs) / len(self.logprobs)

    def output(self) -> CompletionOutput:
        transcript = self.transcript
        tokens = len(transcript.token_ids) - transcript.prompt_length
        ended = self.finish_reason, self.stop_reason
        return CompletionOutput(self.index, transcript, tokens, transcript.characters, *ended)


class PooledPrompt(Outcome):
    """A prompt whose hidden states are pooled: the rows from the sequence's `first_output` on."""

    __slots__ = ("_first_row", "_pooler")

    def __init__(self, sequence: Sequence, pooler: Pooler) -> None:
        super().__init__(0, sequence)
        self._first_row = sequence.first_output
        self._pooler = pooler

    def take(self, sample: Sampled, position: int) -> None:
        try:
            self._take(sample, position)
        except Exception as error:  # what is wrong with one request must not end the others
            self._fail("pooling", error)

    def _take(self, sample: Sampled, position: int) -> None:
        assert sample.hidden is not None
        if position - 1 == self._first_row + self._pooler.rows:
            self._pooler.add(sample.hidden)
        self.sequence.first_output = self._first_row + self._pooler.rows
        if self.sequence.first_output == self.sequence.prompt_length:
            self.embedding = self._pooler.vector()
            self.finish_reason = "stop"


class RequestState:
    """A request under way. With `best`, so many of its choices are told, once all have ended."""

    __slots__ = "best", "choices", "id", "metrics", "prompt", "stream", "tokens"

    def __init__(
        self, request_id: str, prompt: str | None, tokens: tuple[int, ...], stream: bool, arrived_s: float
    ) -> None:
        self.id = request_id
        self.prompt = prompt
        self.tokens = tokens
        self.stream = stream
        self.metrics = RequestMetrics(arrived_s)
        self.choices: list[Outcome] = []
        self.best: int | None = None

    def note_first_token(self, now_s: float) -> None:
        self.metrics = replace(self.metrics, first_token_s=now_s)

    def note_end(self, now_s: float) -> None:
        self.metrics = replace(self.metrics, finished_s=now_s)

    @property
    def has_ended(self) -> bool:
        """Whether every choice has."""
        for choice in self.choices:  # noqa: SIM110 - every step asks every request: no generator
            if choice.finish_reason is None:
                return False
        return True

    def _told(self) -> tuple[CompletionOutput, ...]:
        if self.best is None:
            if len(self.choices) == 1:
                return (self.choices[0].output(),)
            return tuple([choice.output() for choice in self.choices])
        # A choice's own number decides between equals.
        ranked = sorted(self.choices, key=lambda choice: -choice.mean_logprob)[: self.best]
        return tuple([replace(choice.output(), index=index) for index, choice in enumerate(ranked)])

    def output(self) -> RequestOutput:
        first = self.choices[0]
        return RequestOutput(
            self.id,
            self.prompt,
            self.tokens,
            self._told(),
            self.metrics.finished_s is not None,
            self.metrics,
            first.prompt_logprobs,
            first.embedding,
            first.sequence.cached_tokens,
        )
