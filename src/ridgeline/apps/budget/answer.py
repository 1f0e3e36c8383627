"""From what is known of a training run to what is not, and what the scaling laws would rather do."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ridgeline.apps.budget.machines import Run, Workers
from ridgeline.apps.budget.scaling import SERVING_FLOPS, Law
from ridgeline.apps.budget.training import (
    Shape,
    affordable_parameters,
    affordable_tokens,
    training_flops,
)
from ridgeline.types import ConfigError


@dataclass(frozen=True, slots=True)
class Question:
    """What is known; None is what is not. `flops` is of the whole training, `served_tokens` of a lifetime."""

    parameters: float | None = None
    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    usd: float | None = None
    workers: Workers | None = None
    shape: Shape | None = None
    served_tokens: float | None = None
    laws: tuple[Law, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to train. `law` chose what was not given, None where nothing was left to choose.

    `losses` are those that each law predicts; `serving_flops` are of the lifetime's tokens, where asked for.
    """

    kind: str
    law: str | None
    parameters: float
    tokens: float
    training_flops: float
    serving_flops: float | None
    losses: dict[str, float]
    run: Run | None


GIVEN, OPTIMAL, FOR_SERVING = "as given", "optimal", "for serving"


def answer(question: Question) -> list[Plan]:
    """The plans that the question leads to (see `_plans`), all of whose figures are finite."""
    try:
        return _plans(question)
    except (OverflowError, ZeroDivisionError) as error:
        raise ConfigError(
            "these figures and constants lead beyond 1e308; accepted: what a model could have"
        ) from error


def _plans(question: Question) -> list[Plan]:
    """The run as given, where two of parameters, tokens and compute are known; then for each law the optimum:
    of the same compute, or around the one of the three that is known. With `served_tokens`, for each law the
    model of the same loss that takes the least compute over its life.

    Compute may be given as a time or as money, with machines. Raises ConfigError for too little, too much,
    and what cannot be.
    """
    flops, question = _compute(question)
    if question.parameters is None and question.tokens is None and flops is None:
        raise ConfigError(
            "nothing is known of the training; accepted: two of --parameters, --tokens and --compute, or one "
            "for its optimum; --machine with --days or --usd stands for compute"
        )
    given = _as_given(question, flops)
    if given is None and question.shape is not None:
        raise ConfigError(
            "the attention term is given, and one of parameters, tokens and compute; accepted: two of them"
        )
    optima = [_optimum(question, law, given.training_flops if given else flops) for law in question.laws]
    served = []
    if question.served_tokens is not None:
        served = [
            _for_serving(question, law, given or best)
            for law, best in zip(question.laws, optima, strict=True)
        ]
    return [*([given] if given else []), *optima, *served]


def _compute(question: Question) -> tuple[float | None, Question]:
    """The training's compute where it was given apart from parameters and tokens, and the question with as
    many workers as are known by now."""
    workers, seconds, usd = question.workers, question.seconds, question.usd
    if workers is None:
        if seconds is not None or usd is not None:
            name = "days" if seconds is not None else "usd"
            raise ConfigError(f"{name} is given without machines to spend it on; accepted: --machine too")
        return question.flops, question
    if usd is not None and seconds is not None:
        if workers.count is not None:
            raise ConfigError(
                f"days, usd and {workers.count} machines are given; accepted: two of the three, "
                f"--machine {workers.preset.name} leaves the number open"
            )
        workers = workers.affordable(usd, seconds)
    known = question.flops is not None or (question.parameters is not None and question.tokens is not None)
    open_count = workers.count is None and usd is None and known
    hired = None
    if usd is not None and seconds is None:
        hired = workers.flops_for(usd)
    elif seconds is not None and not open_count:
        hired = workers.flops_in(seconds, workers.count or 1)
    if hired is not None and known:
        raise ConfigError(
            "time or money of these machines says how much compute there is, and so does what else is given; "
            "accepted: one of them, or --days without a number of machines, which is then worked out"
        )
    if not open_count:
        workers = replace(workers, count=workers.count or 1)
    return (question.flops if hired is None else hired), replace(question, workers=workers)


def _as_given(question: Question, flops: float | None) -> Plan | None:
    parameters, tokens, shape = question.parameters, question.tokens, question.shape
    if parameters is not None and tokens is not None:
        if flops is not None:
            raise ConfigError("parameters, tokens and compute are all given; accepted: two of them")
        flops = training_flops(parameters, tokens, shape)
    elif flops is None:
        return None
    elif parameters is not None:
        tokens = affordable_tokens(flops, parameters, shape)
    elif tokens is not None:
        parameters = affordable_parameters(flops, tokens, shape)
    if parameters is None or tokens is None:
        return None
    return _plan(question, GIVEN, None, (parameters, tokens), flops)


def _optimum(question: Question, law: Law, flops: float | None) -> Plan:
    if flops is not None:
        return _plan(question, OPTIMAL, law, law.optimum(flops), flops)
    if question.parameters is not None:
        sizes = question.parameters, law.tokens_for(question.parameters)
    else:
        tokens = question.tokens or 0.0
        sizes = law.parameters_for(tokens), tokens
    return _plan(question, OPTIMAL, law, sizes, training_flops(*sizes))


def _for_serving(question: Question, law: Law, like: Plan) -> Plan:
    """The model of the loss of `like` that takes the least compute over its life."""
    sizes = law.served_optimum(like.losses[law.name], question.served_tokens or 0.0)
    return _plan(question, FOR_SERVING, law, sizes, training_flops(*sizes))


def _plan(question: Question, kind: str, law: Law | None, sizes: tuple[float, float], flops: float) -> Plan:
    parameters, tokens = sizes
    served = question.served_tokens
    if not all(0 < figure < math.inf for figure in (parameters, tokens, flops)):
        raise OverflowError
    return Plan(
        kind=kind,
        law=law.name if law else None,
        parameters=parameters,
        tokens=tokens,
        training_flops=flops,
        serving_flops=None if served is None else SERVING_FLOPS * parameters * served,
        losses={each.name: each.loss(parameters, tokens) for each in question.laws},
        run=question.workers.run(flops, question.seconds) if question.workers else None,
    )
