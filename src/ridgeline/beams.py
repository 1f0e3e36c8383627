"""Beam searches on an engine: each round of a search is a request of one token for each of its beams.

What beams have in common is in the prefix cache, as for any requests; the engine knows no more of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ridgeline.sampling.beam_search import Beam, BeamSearch, BeamSearchParams
from ridgeline.types import (
    Request,
    RequestOutput,
    RidgelineError,
    SamplingParams,
    ServiceClass,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from ridgeline.engine import Engine

_MARK = "/"
"""Stands between the id of a search and the number of a request that belongs to it."""


def new_search(engine: Engine, prompt: tuple[int, ...], params: BeamSearchParams) -> BeamSearch:
    """A search behind a prompt. Raises RequestError when the engine cannot serve it, up to its last token."""
    tokens, facts = engine.prompt_of(prompt), engine.model
    longest = SamplingParams(max_tokens=params.max_tokens, stop_token_ids=params.stop_token_ids)
    limit = engine.limit_of(tokens, longest) - len(tokens)
    return BeamSearch(tokens, params, facts.end_token_ids, limit, engine.detokenizer)


def scores_of(output: RequestOutput) -> TokenLogprobs:
    """What a search asked for. Raises RidgelineError when the model could not go on behind the beam."""
    (answer,) = output.outputs
    if not answer.logprobs:
        raise RidgelineError(f"beam could not go on: {answer.stop_reason or answer.finish_reason}")
    return answer.logprobs[0]


@dataclass(frozen=True, slots=True)
class Searched:
    """The end of a search: its best beams, or why there are none. Of the prompt, `cached_tokens` were found
    in the prefix cache."""

    id: str
    beams: Sequence[Beam] = ()
    cached_tokens: int = 0
    error: Exception | None = None


class BeamRequests:
    """The searches under way on one engine; belongs to the thread that steps it. It owns the requests that it
    adds, whose ids begin with the search's."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._searches: dict[str, _Search] = {}

    def begin(
        self,
        search_id: str,
        prompt: tuple[int, ...],
        params: BeamSearchParams,
        cache_salt: str = "",
        service_class: ServiceClass = "interactive",
        tenant: str = "",
    ) -> None:
        """Begin a search. Raises what `Engine.add` raises; nothing is kept of it then."""
        state = new_search(self._engine, prompt, params)
        sender = cache_salt, service_class, tenant
        # Its later rounds come before what came after the first: a search is in the line once.
        place = self._engine.reserve(params.beam_width)
        search = _Search(search_id, state, params.ask, sender, place)
        self._searches[search_id] = search
        try:
            self._ask(search)
        except BaseException:
            self.abort(search_id)
            raise

    def take(self, outputs: list[RequestOutput]) -> tuple[list[RequestOutput], list[Searched]]:
        """Take in what a step gave: the outputs that belong to no search, and the searches that are over. The
        others have their next round in the next step."""
        if not self._searches:
            return outputs, []
        others, full = [], []
        for output in outputs:
            search = self._searches.get(owner_of(output.request_id))
            if search is None:
                others.append(output)
            else:
                search.outputs[output.request_id] = output
                if len(search.outputs) == len(search.asked):
                    full.append(search)
        return others, [ended for search in full if (ended := self._go_on(search)) is not None]

    def abort(self, search_id: str) -> bool:
        """End a search and all of its requests; whether there was one."""
        search = self._searches.pop(search_id, None)
        if search is None:
            return False
        for request_id in search.asked:
            self._engine.abort(request_id)
        return True

    def has_begun(self, search_id: str) -> bool | None:
        """Whether any row of a search has been planned; None where there is no such search."""
        search = self._searches.get(search_id)
        if search is None:
            return None
        return search.rounds > 1 or any(self._engine.has_begun(each) for each in search.asked)

    def _go_on(self, search: _Search) -> Searched | None:
        """The next round of a search that has had all answers of the last one; or its end."""
        answers = [search.outputs[request_id] for request_id in search.asked]
        if search.rounds == 1:
            search.cached_tokens = answers[0].cached_tokens
        try:
            search.state.extend([scores_of(answer) for answer in answers])
            if search.state.prompts:
                self._ask(search)
                return None
            ended = Searched(search.id, search.state.best(), search.cached_tokens)
        except Exception as error:  # what is wrong with one search must not end the others
            ended = Searched(search.id, error=error)
        self.abort(search.id)
        return ended

    def _ask(self, search: _Search) -> None:
        prompts = search.state.prompts
        search.outputs, search.asked = {}, []
        search.rounds += 1
        for beam, prompt in enumerate(prompts):
            request = Request(f"{search.id}{_MARK}{beam}", prompt, search.ask, *search.sender)
            self._engine.add(request, stream=False, place=search.place + beam)
            search.asked.append(request.id)


@dataclass(slots=True)
class _Search:
    """`asked` are the requests of this round, and `outputs` what has come of them."""

    id: str
    state: BeamSearch
    ask: SamplingParams
    sender: tuple[str, ServiceClass, str]
    place: int
    asked: list[str] = field(default_factory=list)
    outputs: dict[str, RequestOutput] = field(default_factory=dict)
    rounds: int = 0
    cached_tokens: int = 0


def owner_of(request_id: str) -> str:
    """The search to which a request of the engine belongs; itself, where it belongs to none."""
    return request_id.partition(_MARK)[0]
