"""Beam search on the engine's public face: what `use_beam_search` is on the server.

Every round asks the engine for one token of each beam, with the log-probabilities of the best ones, in one
batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from ridgeline.beams import new_search, scores_of
from ridgeline.llm import LLM
from ridgeline.loading import Prompt
from ridgeline.sampling.beam_search import Beam, BeamSearchParams

__all__ = ["Beam", "BeamSearchParams", "beam_search"]


def beam_search(llm: LLM, prompts: Sequence[Prompt], params: BeamSearchParams) -> list[list[Beam]]:
    """The best continuations of each prompt, best first. Raises RequestError as `LLM.generate`, before
    anything is run, and RidgelineError when the model cannot go on."""
    loaded, ask = llm.loaded, params.ask
    searches = [new_search(loaded.engine, loaded.tokens_of(prompt), params) for prompt in prompts]
    while any(rounds := [search.prompts for search in searches]):
        outputs = iter(llm.generate([prompt for asked in rounds for prompt in asked], ask))
        for search, asked in zip(searches, rounds, strict=True):
            if asked:
                search.extend([scores_of(next(outputs)) for _ in asked])
    return [search.best() for search in searches]
