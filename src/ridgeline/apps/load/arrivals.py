"""When requests of an open loop arrive."""

from __future__ import annotations

import math

import numpy as np

from ridgeline.types import ConfigError


def arrival_times(count: int, rate_per_s: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds after the start at which each of `count` requests is due, the first at 0.

    Gaps are drawn from a gamma distribution of mean 1/rate and shape `burstiness`: 1 is a Poisson process,
    less comes in bursts, more is more even. An infinite rate is all at once. Raises ConfigError.
    """
    if not rate_per_s > 0:
        raise ConfigError(f"request_rate is {rate_per_s:g}; accepted: above 0, or inf for all at once")
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise ConfigError(f"burstiness is {burstiness:g}; accepted: above 0, 1 for a Poisson process")
    if math.isinf(rate_per_s):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate_per_s * burstiness), max(count - 1, 0))
    return [0.0, *np.cumsum(gaps).tolist()][:count]
