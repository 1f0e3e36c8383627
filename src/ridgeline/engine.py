"""The engine: requests in, steps of the model, tokens and text out.

`Engine.step` is the whole loop. The rest of this file is the life of a request: checked, queued, given
tokens, ended. Nothing here knows HTTP, templates or what a model is made of. An engine belongs to one
thread at a time.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ridgeline.cache.radix import Scope
from ridgeline.execution.noise import derived_seed
from ridgeline.outcome import Choice, Outcome, PooledPrompt, RequestState
from ridgeline.sampling.constraints import Constraints
from ridgeline.sampling.drafting.tree import Descent
from ridgeline.sampling.pooling import Pooler
from ridgeline.sampling.sampler import Chooser, Sampled, Sampler
from ridgeline.scheduling.plan import Plan
from ridgeline.scheduling.scheduler import Scheduler
from ridgeline.scheduling.sequence import Sequence
from ridgeline.steps import StepLog
from ridgeline.types import (
    PoolingParams,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    StepFuture,
    StepResult,
    Work,
)

if TYPE_CHECKING:
    from ridgeline.execution.base import Executor
    from ridgeline.model.detokenizer import Detokenizer


_FETCH_WAIT_S = 0.005
"""Where every sequence waits for a lower tier, a step may take so long to do nothing."""
_CLOSE_S = 5.0
"""Closing an engine may take so long for what its lower tiers are to keep."""

MAX_PROMPT_SCORES = 2**20
"""Log-probabilities of a prompt's tokens that are kept for one request, the most probable ones included."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the engine has to know about the model. `max_model_len` bounds prompt and output together;
    `begin_token_id` stands for an empty prompt, if the model has one. `hidden_scale` is multiplied onto
    pooled hidden states."""

    vocabulary_size: int
    max_model_len: int
    end_token_ids: frozenset[int] = frozenset()
    begin_token_id: int | None = None
    hidden_scale: float = 1.0


@dataclass(slots=True)
class StepTotals:
    """Sums over steps: rows run, time inside the executor, and work."""

    steps: int = 0
    rows: int = 0
    elapsed_s: float = 0.0
    work: Work = field(default_factory=Work)

    def add(self, rows: int, result: StepResult) -> None:
        self.steps += 1
        self.rows += rows
        self.elapsed_s += result.elapsed_s
        self.work = self.work + result.work.total


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was made. `decode` counts the decoder's steps with one row per sequence,
    `prefill` all others; steps that mix the two are among the latter."""

    prefill: StepTotals = field(default_factory=StepTotals)
    decode: StepTotals = field(default_factory=StepTotals)


class Engine:
    """Runs requests on one executor. It owns the requests; the scheduler owns queues and pages, and `steps`
    what is remembered of the steps.

    `encoder` compiles the program that gives hidden states, when the first request to pool a prompt comes.

    `detokenizer(skip_special_tokens)` makes the text side of one sequence. With `seed`, requests without
    a seed of their own are repeatable: theirs is derived from it by their order of arrival. `constraints`
    compiles the forms that answers are to have. `clock` tells the time, in seconds.
    """

    def __init__(
        self,
        executor: Executor,
        handle: Any,
        scheduler: Scheduler,
        model: ModelFacts,
        detokenizer: Callable[[bool], Detokenizer],
        seed: int | None = None,
        encoder: Callable[[], Any] | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self.model = model
        self.scheduler = scheduler
        self.stats = EngineStats()
        self.steps = StepLog(scheduler)
        self.executor = executor
        self.handle = handle
        self._compile_encoder = encoder
        self._encoder: Any = None
        self._constraints = constraints
        self.detokenizer = detokenizer
        self._seed = seed
        self._sampler = Sampler(executor.drawer)
        self._requests: dict[str, RequestState] = {}
        self._in_flight: deque[tuple[Plan, StepFuture]] = deque()
        self._launching: Plan | None = None
        self._requests_seen = 0
        self._sequences_seen = 0

    # ------------------------------------------------------------------------------------- the loop

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the state of each request that advanced and wants to be told.

        Where the executor is asynchronous, that of the step before: this one runs meanwhile, on tokens that
        were drawn on the device. Rows that turn out to have run past an end are ignored.
        """
        launched = self._launch()
        if not self._in_flight:  # nothing to run; at most, an interrupt kept an end from being told
            self.scheduler.cache.wait(_FETCH_WAIT_S)
            return self._tell([state for state in self._requests.values() if state.has_ended])
        if launched and len(self._in_flight) <= self.executor.asynchronous:
            return []
        plan, future = self._in_flight[0]
        sampled = self._sampler.finish(future, plan)
        outputs = self._commit(plan, future.result(), sampled)
        self._in_flight.popleft()
        return outputs

    def _launch(self) -> bool:
        """Plan and launch the next step, if there is one."""
        if self._launching is not None:
            # An interrupt struck between a launch and its record. All that is under way is brought in first:
            # what was launched without a record must not be planned again beside it.
            self.scheduler.relaunch(self._launching)
            if self._in_flight:
                return False
            self._launching = None
        if len(self._in_flight) > self.executor.asynchronous:
            # Another struck while results were taken in: they come first, before the device draws other
            # tokens or uses results' memory again.
            return False
        plan = self.scheduler.schedule(self.clock())
        if not plan.sequences:
            self._move()
            return False
        if self._constraints is not None:
            self._constraints.flush()
        self._launching = plan
        if plan.moves:
            self.executor.transfer(plan.moves)
        future = self.executor.run(self._handle_of(plan), plan.step)
        self._in_flight.append((plan, future))
        self.scheduler.advance(plan)
        self._launching = None
        return True

    def _handle_of(self, plan: Plan) -> Any:
        return self._encoder if plan.pooled else self.handle

    def expected_step_s(self) -> float | None:
        """What the steps under way are to take, None where that is not known. Safe to call from any thread,
        which may find the engine between two steps."""
        under_way = {id(plan): plan for plan, _ in list(self._in_flight)}
        if (launching := self._launching) is not None:
            under_way[id(launching)] = launching
        expected_s = [self.steps.expected_s(plan, self._handle_of(plan)) for plan in under_way.values()]
        return None if None in expected_s else sum(filter(None, expected_s))

    def _move(self) -> None:
        """Make the moves that are planned, without a step."""
        cache = self.scheduler.cache
        if cache.moves:
            self.executor.transfer(cache.moves)
            cache.moved()

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def idle(self) -> bool:
        """Use a moment without work to save some of what the prefix cache holds to its lower tiers; whether
        there is more to be saved, in another moment."""
        more = self.scheduler.cache.save()
        self._move()
        return more

    def close(self) -> None:
        """Drop all requests, save to lower tiers what a few seconds allow, and close the executor."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self._save_all()
        self.steps.close()
        # A compiled program keeps its weights alive.
        self.handle = self._encoder = self._compile_encoder = None
        if self._constraints is not None:
            self._constraints.close()
        self.executor.close()

    def _save_all(self) -> None:
        cache = self.scheduler.cache
        if cache.tiers is None:
            return
        until_s = time.perf_counter() + _CLOSE_S
        try:
            while self.idle() and time.perf_counter() < until_s:
                cache.tiers.ladder.drain(until_s - time.perf_counter())
        finally:  # an engine may be closed because its executor fails
            cache.close(max(until_s - time.perf_counter(), 0.1))

    # ------------------------------------------------------------------------- requests come and go

    def reserve(self, sequences: int) -> int:
        """Places in the line of those that wait, for requests that are to come; the first one's number."""
        place = self._sequences_seen
        self._sequences_seen += sequences
        return place

    def add(
        self, request: Request, prompt: str | None = None, stream: bool = True, place: int | None = None
    ) -> None:
        """Queue a request. `prompt` is its text, for its outputs; without `stream` it only reports its end.
        It is the last in the line, or has the reserved `place` of another one that has ended.

        Raises RequestError when the request cannot be served; nothing is kept of it then.
        """
        if request.id in self._requests:
            raise RequestError(f"request id {request.id!r} is in use; accepted: an id of its own")
        tokens, params = self.prompt_of(request.prompt_token_ids), request.params
        limit = self.limit_of(tokens, params)
        scope = Scope(salt=request.cache_salt)
        state = RequestState(request.id, prompt, tokens, stream, self.clock())
        if isinstance(params, SamplingParams) and params.is_best_of:
            state.stream, state.best = False, params.n
        if isinstance(params, PoolingParams):
            self._need_encoder()
            state.choices.append(self._pooled(tokens, params, limit, scope))
        else:
            first = self._sequences_seen if place is None else place
            state.choices += self._continued(first, state, params, limit, scope)
        self._requests[request.id] = state
        self.steps.arrived(state)
        self._requests_seen += 1
        self._sequences_seen += len(state.choices) if place is None else 0
        whose = request.service_class, request.tenant, state.metrics.arrived_s
        for choice in state.choices:
            choice.sequence.owner = (state, choice)
            self.scheduler.add(choice.sequence, *whose)

    def prepare(self, params: SamplingParams | PoolingParams) -> None:
        """Compile the form that an answer is to have, which may take a second, so that `add` need not. Safe
        to call from any thread. Raises RequestError when that cannot be done."""
        form = params.structured_outputs if isinstance(params, SamplingParams) else None
        if form is not None:
            self._constraining.prepare(form)

    def is_prepared(self, params: SamplingParams | PoolingParams) -> bool:
        """Whether `prepare` has nothing to do."""
        form = params.structured_outputs if isinstance(params, SamplingParams) else None
        return form is None or self._constraints is None or self._constraints.has(form)

    @property
    def _constraining(self) -> Constraints:
        if self._constraints is None:
            raise RequestError("structured_outputs cannot be used: this engine knows no tokenizer")
        return self._constraints

    def _continued(
        self, first: int, state: RequestState, params: SamplingParams, limit: int, scope: Scope
    ) -> list[Choice]:
        tokens, seed = state.tokens, self._seed_of(params)
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:  # mostly all there are: one set for everybody stays at hand
            ends = ends | self.model.end_token_ids if ends else self.model.end_token_ids
        form = params.structured_outputs
        words = None if self._constraints is None else self._constraints.words
        count = params.best_of or params.n
        constraints = [None] * count if form is None else self._constraining.start(form, count)
        choices: list[Choice] = []
        for index, constraint in enumerate(constraints):
            chooser = Chooser(params, seed, index, tokens, tuple(ends), constraint, words)
            pages = self.scheduler.cache.new_sequence(scope)
            leader = choices[0].sequence if choices else None
            sequence = Sequence(first + index, tokens, chooser, pages, limit, leader=leader)
            detokenizer = self.detokenizer(params.skip_special_tokens)
            choices.append(Choice(index, sequence, params, ends, limit, detokenizer, state.stream))
        return choices

    def _pooled(
        self, tokens: tuple[int, ...], params: PoolingParams, limit: int, scope: Scope
    ) -> PooledPrompt:
        sequence = Sequence(
            self._sequences_seen,
            tokens,
            Chooser(SamplingParams(), 0, 0, (), ()),  # never asked
            self.scheduler.cache.new_sequence(scope),
            limit,
            pooled=True,
        )
        sequence.first_output = 0 if params.pooling == "mean" else len(tokens) - 1
        return PooledPrompt(sequence, Pooler(self.model.hidden_scale, params.normalise))

    def _need_encoder(self) -> None:
        """Raises CapacityError when there is no memory for a second program's buffers."""
        if self._encoder is None:
            if self._compile_encoder is None:
                raise RequestError("this engine gives no embeddings; accepted: prompts to continue")
            self._encoder = self._compile_encoder()

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free what it holds; its last state, or None when there is none (any more)."""
        state = self._requests.get(request_id)
        if state is None:
            return None
        for choice in state.choices:
            if choice.finish_reason is None:
                choice.abort()
            if choice.sequence.owner is not None:
                self._retire(choice)
        return self._finish(state)

    @property
    def running(self) -> tuple[str, ...]:
        """The requests that have a sequence in the steps, the one that came last at the end."""
        owners = [sequence.owner for sequence in list(self.scheduler.running)]
        return tuple(dict.fromkeys(owner[0].id for owner in owners if owner is not None))

    def has_begun(self, request_id: str) -> bool:
        """Whether any row of a request that is under way has been planned."""
        return any(choice.sequence.computed for choice in self._requests[request_id].choices)

    def prompt_of(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens that are run for a prompt."""
        begin = self.model.begin_token_id
        return tokens if tokens or begin is None else (begin,)

    def limit_of(self, tokens: tuple[int, ...], params: SamplingParams | PoolingParams) -> int:
        """Refuse what cannot be served; returns the most tokens that a sequence of the request may have, one
        more than are ever run."""
        context = self.model.max_model_len
        if not tokens:
            raise RequestError("prompt has 0 tokens; accepted: at least 1")
        none_generated = isinstance(params, PoolingParams) or params.max_tokens == 0
        longest = context if none_generated else context - 1
        if len(tokens) > longest:
            seen = f"prompt has {len(tokens)} tokens"
            raise RequestError(f"{seen}; this model's context of {context} takes at most {longest}")
        self._check_ids("prompt token", tokens)
        if isinstance(params, PoolingParams):
            limit = len(tokens) + 1
        else:
            limit = self._check_sampling(len(tokens), params)
        capacity = self.scheduler.cache.max_sequence_tokens
        # The last token is never run, so it needs no slot.
        if capacity is not None and limit - 1 > capacity:
            raise RequestError(
                f"prompt and output may reach {limit} tokens; the KV cache holds at most {capacity + 1}"
            )
        return limit

    def _check_sampling(self, length: int, params: SamplingParams) -> int:
        context = self.model.max_model_len
        self._check_ids("stop_token_ids token", params.stop_token_ids)
        self._check_ids("logit_bias token", params.logit_bias or ())
        if params.prompt_logprobs is not None:
            scores, most = length * (1 + params.prompt_logprobs), MAX_PROMPT_SCORES
            if scores > most:
                seen = f"prompt_logprobs is {params.prompt_logprobs} for {length} tokens, {scores} in all"
                raise RequestError(f"{seen}; accepted: up to {most} log-probabilities")
        if params.max_tokens is None:
            return context
        # The row of a prompt's only token is run even where nothing is generated.
        return max(min(context, length + params.max_tokens), 2)

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        size = self.model.vocabulary_size
        for token in ids:
            if type(token) is not int or not 0 <= token < size:
                raise RequestError(f"{name} is {token!r}; accepted: 0 to {size - 1}")

    def _seed_of(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        if self._seed is not None:
            return derived_seed(self._seed, self._requests_seen)
        return int.from_bytes(os.urandom(8), "little")

    # ------------------------------------------------------------------------------------ committing

    def _commit(self, plan: Plan, result: StepResult, sampled: list[Sampled]) -> list[RequestOutput]:
        """Append the tokens, end what has ended, and tell the requests that advanced.

        A sequence that has ended meanwhile, or took its token on before an interrupt, is passed over.
        """
        now_s = self.clock()
        decode = len(plan.sequences) == plan.rows - plan.guesses and not plan.pooled
        (self.stats.decode if decode else self.stats.prefill).add(plan.rows, result)
        advanced: dict[str, RequestState] = {}
        outputs: list[RequestOutput] = []
        accepted = 0
        if plan.drafted:
            accepted = self._follow(plan, result, sampled)
            if self.scheduler.drafting is not None:
                self.scheduler.drafting.handled(plan.guesses, self.clock() - now_s, result.elapsed_s)
        self.steps.add(plan, result, now_s, accepted, self.handle)
        sequences, positions = plan.sampled, plan.positions
        for output in plan.certain:
            sequence, position = sequences[output], positions[output]
            owner = sequence.owner
            if owner is None:
                continue
            state, choice = owner
            if choice.finish_reason is None:
                choice.take(sampled[output], position)
            if choice.finish_reason is not None:
                self._retire(choice)
            elif position < sequence.prompt_length:
                continue  # the prompt's own token: nothing to tell yet
            if state.metrics.first_token_s is None and sequence.generated:
                state.note_first_token(now_s)
            if choice.finish_reason is not None or len(state.choices) > 1:
                advanced[state.id] = state
            elif state.stream:  # told while it is at hand: with many sequences, looking again is dear
                outputs.append(state.output())
        return outputs + self._tell(advanced.values())

    def _follow(self, plan: Plan, result: StepResult, sampled: list[Sampled]) -> int:
        """Let sequences take on what they drafted, for as long as the target says the same, and the token
        after it; returns how many guesses were right. All go a token at a time: what it changes (penalties, a
        constraint) is known to the next."""
        accepted = 0
        going = [(each, Descent(each.tree), each.output) for each in plan.drafted]
        while going:
            further = []
            for drafted, descent, output in going:
                owner = drafted.sequence.owner
                if owner is None:
                    continue  # it was aborted
                _, choice = owner
                position, known = plan.positions[output], drafted.sequence.token_ids
                choice.take(sampled[output], position)
                ended = choice.finish_reason is not None or len(known) == position
                node = None if ended else descent.go(known[position])
                if node is None:
                    self.scheduler.settle(drafted, descent.nodes)
                    accepted += len(descent.nodes)
                else:
                    further.append((drafted, descent, drafted.output + 1 + node))
            if further and self._constraints is not None:
                self._constraints.flush()
            self._sampler.choose(result, plan, [output for *_, output in further], sampled)
            going = further
        return accepted

    def _tell(self, states: Iterable[RequestState]) -> list[RequestOutput]:
        """The state of requests that have ended, which are then forgotten, or that stream."""
        outputs = []
        for state in states:
            if state.has_ended:
                outputs.append(self._finish(state))
            elif state.stream:
                outputs.append(state.output())
        return outputs

    def _retire(self, choice: Outcome) -> None:
        # In this order, so that who was removed in part, as memory ran out, is removed again.
        self.scheduler.remove(choice.sequence)
        choice.sequence.owner = None

    def _finish(self, state: RequestState) -> RequestOutput:
        del self._requests[state.id]
        state.note_end(self.clock())
        self.steps.ended(state)
        return state.output()
