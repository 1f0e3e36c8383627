"""Filters that only the host has: typical-p, XTC, and mirostat, which remembers.

They narrow what the filters of `execution.draw` leave, in this order, and look at probabilities over that.
Sums and logarithms are in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ridgeline.execution.draw import Candidates, Filter
from ridgeline.execution.noise import BITS, XTC, Address, NoiseSource
from ridgeline.types import SamplingParams

Floats = NDArray[np.float64]


def compose_filters(
    params: SamplingParams, seed: int, choice: int
) -> tuple[tuple[Callable[[int], Filter], ...], Mirostat | None]:
    """What `params` switches on: makers of filters, by the position of the token, of which the last is
    mirostat's where that is on, whose state is the sequence's own."""
    makers: list[Callable[[int], Filter]] = []
    if params.typical_p < 1:
        typical = typical_p(params.typical_p)
        makers.append(lambda position: typical)
    if params.xtc_probability > 0:
        makers.append(xtc(params.xtc_probability, params.xtc_threshold, seed, choice))
    if params.mirostat == 0:
        return tuple(makers), None
    mirostat = Mirostat(params.mirostat_tau, params.mirostat_eta)
    makers.append(lambda position: mirostat)
    return tuple(makers), mirostat


def _log_probabilities(candidates: Candidates) -> Floats:
    logits = candidates.logits.astype(np.float64)
    shifted = logits - logits.max()
    normalised: Floats = shifted - np.log(np.exp(shifted).sum())
    return normalised


def _kept(candidates: Candidates, keep: NDArray[np.bool_]) -> Candidates:
    return Candidates(candidates.ids[keep], candidates.logits[keep])


def typical_p(mass: float) -> Filter:
    """Keep the tokens whose information is nearest to the expected, down to the least typical one of a set
    that holds `mass` (Meister et al., "Locally Typical Sampling", 2023), and those that are as typical as
    that one."""

    def narrow(candidates: Candidates) -> Candidates:
        logs = _log_probabilities(candidates)
        chances = np.exp(logs)
        with np.errstate(invalid="ignore"):
            entropy = -np.nansum(chances * logs)
            distance = np.where(np.isfinite(logs), np.abs(-logs - entropy), np.inf)
        order = np.argsort(distance, kind="stable")
        reached = int(np.searchsorted(np.cumsum(chances[order]), mass))
        return _kept(candidates, distance <= distance[order[min(reached, order.size - 1)]])

    return narrow


def xtc(probability: float, threshold: float, seed: int, choice: int) -> Callable[[int], Filter]:
    """ "Exclude top choices" (p-e-w, text-generation-webui's pull request 6335, 2024): of the tokens with a
    probability of at least `threshold`, keep only the least probable, at `probability` of the positions.
    Which they are depends on seed, choice and position alone."""
    source = NoiseSource()

    def at(position: int) -> Filter:
        bits = source.bits(Address(seed, choice, position, XTC), np.zeros(1, np.int64))
        excludes = (int(bits[0]) + 0.5) * 2.0**-BITS < probability

        def narrow(candidates: Candidates) -> Candidates:
            if not excludes:
                return candidates
            chances = np.exp(_log_probabilities(candidates))
            top = np.flatnonzero(chances >= threshold)
            if top.size < 2:
                return candidates
            keep = np.ones(chances.size, bool)
            keep[top] = False
            # Among equals the last id, as everywhere the first one counts as the more probable.
            keep[top[::-1][np.argmin(chances[top[::-1]])]] = True
            return _kept(candidates, keep)

        return narrow

    return at


class Mirostat:
    """Mirostat 2.0 (Basu et al., "Mirostat: A Neural Text Decoding Algorithm that Directly Controls
    Perplexity", 2021): keep the tokens whose surprise is at most μ bits, and move μ after each token by `eta`
    times what its surprise, among those that were kept, is off `tau`. μ begins at 2 `tau`."""

    def __init__(self, tau: float, eta: float) -> None:
        self.mu = 2.0 * tau
        self._tau = tau
        self._eta = eta
        self._last: Candidates | None = None

    def __call__(self, candidates: Candidates) -> Candidates:
        surprise = -_log_probabilities(candidates) / np.log(2)
        keep = surprise <= self.mu
        keep[candidates.logits.argmax()] = True
        self._last = _kept(candidates, keep)
        return self._last

    def append(self, token: int) -> None:
        """Take in the token that was drawn from what was kept last."""
        if self._last is None:
            return
        at = np.flatnonzero(self._last.ids == token)
        if at.size:
            surprise = -_log_probabilities(self._last)[at[0]] / np.log(2)
            self.mu -= self._eta * (float(surprise) - self._tau)
        self._last = None
