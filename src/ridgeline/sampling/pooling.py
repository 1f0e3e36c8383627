"""From the hidden states of a prompt to one vector: the embedding of a text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ridgeline.types import Float32Array


class Pooler:
    """The mean of the rows that it is given, which for one row is that row.

    Rows are added one by one, in their order and in float64, so that the result does not depend on how the
    prompt was cut into steps. `scale` is multiplied onto the mean; `normalise` divides by its length.
    """

    __slots__ = ("_normalise", "_scale", "_sum")

    def __init__(self, scale: float, normalise: bool) -> None:
        self._scale = scale
        self._normalise = normalise
        # Replaced by a single store, so that an interrupt cannot part the two.
        self._sum: tuple[int, NDArray[np.float64]] = (0, np.zeros(1))

    @property
    def rows(self) -> int:
        """How many rows have been added."""
        return self._sum[0]

    def add(self, hidden: Float32Array) -> None:
        """Add the next row, (width,)."""
        self._sum = (self._sum[0] + 1, self._sum[1] + hidden)

    def vector(self) -> tuple[float, ...]:
        """The pooled vector, in float32. Raises ValueError when it is not finite."""
        rows, total = self._sum
        mean = total / rows * self._scale
        length = float(np.sqrt((mean * mean).sum()))
        if self._normalise and length > 0:
            mean = mean / length
        vector = mean.astype(np.float32)
        if not np.isfinite(vector).all():
            raise ValueError("the hidden states are not finite numbers")
        return tuple(vector.tolist())
