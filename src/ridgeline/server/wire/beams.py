"""Beam search in a body: vLLM's fields, and what cannot be asked for beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ridgeline.sampling.beam_search import MAX_BEAM_WIDTH, BeamSearchParams
from ridgeline.server.errors import bad_request
from ridgeline.server.wire.base import Accepts, only
from ridgeline.types import SamplingParams

if TYPE_CHECKING:
    from ridgeline.server.wire.requests import Sampled

BESIDE: Mapping[str, Accepts] = {
    "stream": only(False),
    "temperature": only(0, 1),
    "top_p": only(1),
    "top_k": only(0, -1),
    "min_p": only(0),
    "repetition_penalty": only(1),
    "presence_penalty": only(0),
    "frequency_penalty": only(0),
    "logit_bias": only({}),
    "bad_words": only([]),
    "min_tokens": only(0),
    "prompt_logprobs": only(),
    "typical_p": only(1),
    "top_n_sigma": only(0, -1),
    "xtc_probability": only(0),
    "mirostat": only(0),
    "dry_multiplier": only(0),
}
"""Beams are ranked by the log-probabilities of the model itself, and told at the end. So these fields can say
nothing else; a seed and guesses change nothing anyway."""

ONLY_BEAMS = ("length_penalty", "early_stopping")


def check_beams(body: Sampled) -> None:
    """Refuse what does not go together. Raises HttpError."""
    if not body.use_beam_search:
        given = (getattr(body, name) for name in ONLY_BEAMS)
        for name, value in zip(ONLY_BEAMS, given, strict=True):
            if value not in (None, 1 if name == "length_penalty" else False):
                raise bad_request(f"{name} is only for use_beam_search: true", name)
        return
    for name, accepts in BESIDE.items():
        value = getattr(body, name)
        if value is not None and not accepts(value):
            accepted = " or ".join(map(repr, accepts.values or ())) or "none"
            raise bad_request(f"{name} is {value!r} with use_beam_search; accepted: {accepted}", name)


def beam_params(body: Sampled, params: SamplingParams) -> BeamSearchParams:
    """What a body searches for whose `params` these are. Raises RequestError and HttpError."""
    if params.structured_outputs is not None:
        field = body.form_field
        raise bad_request(f"{field} cannot be used with use_beam_search", field)
    width = params.best_of or params.n
    if width > MAX_BEAM_WIDTH:
        name = "n" if params.best_of is None else "best_of"
        raise bad_request(f"{name} is {width} with use_beam_search; accepted: 1 to {MAX_BEAM_WIDTH}", name)
    return BeamSearchParams(
        beam_width=width,
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        early_stopping=bool(body.early_stopping),
        n=params.n,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        logprobs=params.logprobs,
    )
