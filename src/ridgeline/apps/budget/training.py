"""The arithmetic of training: 6ND and the attention term, and the third of parameters, tokens and compute."""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.apps.budget.scaling import TRAINING_FLOPS
from ridgeline.types import ConfigError

_ATTENTION_FLOPS = 12
"""Per layer, unit of width and position of the context, for a token: scores and their sum of values are two
products, forward and backward three passes, a multiply-add two operations."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What attention's arithmetic depends on. `hidden` is the width of all heads together."""

    layers: int
    hidden: int
    context_tokens: int

    @property
    def attention_flops_per_token(self) -> int:
        """12·layers·hidden·context, as in appendix B of A. Chowdhery et al., "PaLM", arXiv:2204.02311.

        Counts the whole square of scores; a kernel that skips the masked half does half of it.
        """
        return _ATTENTION_FLOPS * self.layers * self.hidden * self.context_tokens


def flops_per_token(parameters: float, shape: Shape | None) -> float:
    """Training compute of one token: six for each parameter, and attention's where the shape is known."""
    return TRAINING_FLOPS * parameters + (shape.attention_flops_per_token if shape else 0)


def training_flops(parameters: float, tokens: float, shape: Shape | None = None) -> float:
    """Compute of a training run over `tokens`, repeated ones counted as often as they are seen."""
    return flops_per_token(parameters, shape) * tokens


def affordable_tokens(flops: float, parameters: float, shape: Shape | None = None) -> float:
    """Tokens on which that much compute trains a model of that size."""
    return flops / flops_per_token(parameters, shape)


def affordable_parameters(flops: float, tokens: float, shape: Shape | None = None) -> float:
    """Parameters that can be trained on those tokens. Raises ConfigError where attention takes it all."""
    attention = shape.attention_flops_per_token if shape else 0
    parameters = (flops / tokens - attention) / TRAINING_FLOPS
    if parameters <= 0:
        raise ConfigError(
            f"compute is {flops:.3g} flop; accepted for {tokens:.3g} tokens of this shape: more than "
            f"{attention * tokens:.3g}, which attention alone takes"
        )
    return parameters
