"""Fit what steps cost to steps that were timed: the same model that predicts, run backwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.resources.roofline import Limits
from ridgeline.resources.step_costs import FITTED, SHARES, StepCosts
from ridgeline.resources.step_time import StepTimeModel
from ridgeline.types import StepWork

_Vector = NDArray[np.float64]

_ROUNDS = 40
_SLOPE_STEP = 1e-4
_LEAST = 1e-7
"""Where a figure begins that is 0 at the start."""
_HOLD = 0.03
"""How strongly each figure is held to where it began, in the unit of a relative error: what the timed steps
say nothing about stays there."""
_TYPICAL_ERROR = 0.05
"""Relative errors above this count less than their square: some timings are of a disturbed machine."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Steps that took `seconds` together, on a machine that had these limits then."""

    works: tuple[StepWork, ...]
    seconds: float
    limits: Limits


def fit(timed: Sequence[Timed], start: StepCosts, source: str) -> StepCosts:
    """The costs with which the model comes nearest to the times, by their logarithms.

    Levenberg and Marquardt's method on the logarithms of the figures; large errors are weighted down (Huber).
    """
    point = np.log([max(getattr(start, name), _LEAST) for name in FITTED])
    most = np.array([-2 * _SLOPE_STEP if name in SHARES else math.inf for name in FITTED])
    point = np.minimum(point, most)  # slopes are taken upwards, and no share exceeds 1
    origin, damping = point.copy(), 1e-2
    errors = _errors(timed, start, point)
    for _ in range(_ROUNDS):
        shifted = [_errors(timed, start, point + _SLOPE_STEP * unit) for unit in np.eye(len(point))]
        slopes = (np.stack(shifted, axis=1) - errors[:, None]) / _SLOPE_STEP
        weights = 1 / np.maximum(1, np.abs(errors) / _TYPICAL_ERROR)
        held = _HOLD**2 * len(timed) * np.eye(len(point))
        normal = slopes.T @ (weights[:, None] * slopes) + held
        downhill = slopes.T @ (weights * errors) + held @ (point - origin)
        damped = normal + damping * np.diag(np.diag(normal))
        moved = np.minimum(point - np.clip(np.linalg.solve(damped, downhill), -1, 1), most)
        tried = _errors(timed, start, moved)
        if _loss(tried, moved - origin) < _loss(errors, point - origin):
            point, errors, damping = moved, tried, max(damping / 4, 1e-6)
        else:
            damping *= 8
    return _with(replace(start, source=source), point)


def _with(costs: StepCosts, point: _Vector) -> StepCosts:
    """The costs with the figures whose logarithms these are."""
    named: dict[str, Any] = dict(zip(FITTED, np.exp(point).tolist(), strict=True))
    return replace(costs, **named)


def _errors(timed: Sequence[Timed], start: StepCosts, point: _Vector) -> _Vector:
    """The logarithms of predicted / measured."""
    costs = _with(start, point)
    found = []
    for one in timed:
        model = StepTimeModel.of(one.limits, costs)
        found.append(math.log(sum(model.predict(work).seconds for work in one.works) / one.seconds))
    return np.array(found)


def _loss(errors: _Vector, moved: _Vector) -> float:
    small = np.minimum(np.abs(errors), _TYPICAL_ERROR)
    huber = small * (2 * np.abs(errors) - small)
    return float(huber.sum() + _HOLD**2 * len(errors) * (moved**2).sum())
